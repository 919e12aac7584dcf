"""``spiking-lm sweep``: a recipe at every combination of some values."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

from spiking_lm.cli.run import OUT, SET


class Format(str, Enum):
    """How the table is printed."""

    table = "table"
    csv = "csv"
    json = "json"
    markdown = "markdown"


class Engine(str, Enum):
    """What runs the points."""

    local = "local"
    ray = "ray"


def command(
    recipe: str = typer.Argument(..., metavar="RECIPE", help="A recipe's name, or its .yaml file."),
    over: list[str] = typer.Option(
        [], "--over", metavar="FIELD=A,B,...", help="Go through these values. May be repeated: every combination runs."
    ),
    settings: list[str] = SET,
    out: Path = OUT,
    engine: Engine = typer.Option(Engine.local, "--engine", help="Processes of this machine, or a Ray cluster."),
    jobs: int = typer.Option(1, "--jobs", min=1, help="Points at once."),
    form: Format = typer.Option(Format.table, "--format", help="How the table is printed."),
) -> None:
    """Run a recipe at every combination of some values, and print one table.

    Each point is a run in a process of its own. What is complete is not run again, so that the same command goes on
    with a sweep that was stopped. A point that fails does not stop the others.
    """
    import sys

    from spiking_lm import sweep
    from spiking_lm.cli import _output
    from spiking_lm.cli.run import terminated_like_ctrl_c
    from spiking_lm.errors import SpikingLMError

    def tell(line: str) -> None:
        _output.errors.print(line, markup=False, soft_wrap=True)

    with terminated_like_ctrl_c():
        result = sweep.sweep(recipe, settings, over, out=out, engine=engine.value, jobs=jobs, tell=tell)
    if form is Format.json:
        _output.print_json(result)
    elif form is Format.table:
        _output.table(f"{result['recipe']}, {result['folder']}", *sweep.cells(result))
    else:
        sys.stdout.write(sweep.as_csv(result) if form is Format.csv else sweep.as_markdown(result))
    failed = [point["name"] for point in result["points"] if point["status"] != "complete"]
    if failed:
        raise SpikingLMError(
            f"{len(failed)} of {len(result['points'])} points failed: {', '.join(failed)}",
            hint=f"each has a log: {result['folder']}/POINT.log; the same command runs them again",
        )
