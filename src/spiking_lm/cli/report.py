"""``spiking-lm report``: write the HTML report of a run."""

from __future__ import annotations

from pathlib import Path

import typer


def command(
    run: Path = typer.Argument(
        ..., help="The folder of a run, or one that holds several: then the newest.", show_default=False
    ),
    open: bool = typer.Option(False, "--open", help="Show the report in the web browser."),
) -> None:
    """Write the HTML report of a run: one file that needs nothing else, and its pictures beside it."""
    from spiking_lm.cli._output import console
    from spiking_lm.report import write_report

    page = write_report(run)
    console.print(str(page), soft_wrap=True)
    if open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
