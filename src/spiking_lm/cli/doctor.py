"""``spiking-lm doctor``: is everything here that should be, and what mends it if not."""

from __future__ import annotations

import typer

from spiking_lm.cli._output import console, print_json

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def command(
    checks: list[str] = typer.Argument(None, metavar="[CHECK]...", help="Only these.", show_default=False),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check the installation, and say how to mend what is wrong.

    Exits with 1 when something fails. A missing extra is a warning: everything else works without it.
    """
    from rich.text import Text

    from spiking_lm.doctor import diagnose

    findings = diagnose(checks or ())
    counts = {status: sum(finding.status == status for finding in findings) for status in _STYLES}
    if as_json:
        print_json({"ok": not counts["fail"], "findings": findings})
    else:
        width = max((len(finding.check) for finding in findings), default=0)
        for finding in findings:
            line = Text.assemble((f"{finding.status:<5}", _STYLES[finding.status]), f"{finding.check:<{width}}  ")
            console.print(line + Text(finding.message))
            if finding.hint and finding.status != "ok":
                console.print(Text(f"{'':{width + 7}}{finding.hint}"), soft_wrap=True)  # stays one line to paste
        console.print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    if counts["fail"]:
        raise typer.Exit(1)
