"""``spiking-lm bench``: how fast the kernels and models are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from spiking_lm.bench import Row


def command(
    only: list[str] = typer.Option([], "--only", metavar="NAME", help="A row or a group, e.g. lif. May be repeated."),
    json: Path | None = typer.Option(None, "--json", metavar="FILE", help="Write everything as JSON; '-' prints it."),
    threads: int = typer.Option(1, "--threads", min=1, help="Threads that torch may use."),
    repeats: int = typer.Option(5, "--repeats", min=1, help="Turns of each candidate; the median counts."),
) -> None:
    """Time the kernels and models on this machine.

    Every figure is a ratio of medians, measured in turns in the same run: processor time with one thread, wall clock
    with more. A missed target is shown, not turned into an exit code.
    """
    from spiking_lm import bench
    from spiking_lm.cli._output import console, errors, print_json, table
    from spiking_lm.files import atomic_write
    from spiking_lm.manifest import plain

    rows = []
    names = bench.select(only)
    measuring = bench.run(names, n_threads=threads, repeats=repeats)
    for name in names:
        with errors.status(f"{name} ..."):
            rows.append(next(measuring))
    result = bench.report(rows, n_threads=threads, repeats=repeats)
    if json is not None and str(json) == "-":
        print_json(result)
        return
    machine = f"{result['hardware']['cpu']}, torch {result['versions'].get('torch')}"
    title = f"{machine}, {threads} thread{'s' if threads > 1 else ''}, medians of {repeats}"
    table(title, ["benchmark", "figure", "target", "", "how"], [_cells(row) for row in rows])
    if json is not None:
        from json import dumps

        atomic_write(json, dumps(plain(result), indent=2) + "\n")
        console.print(f"written to {json}", markup=False)


def _cells(row: Row) -> list[str]:
    figure = "-" if row.value is None else f"{row.value:.3g} {row.unit}"
    bound = "at most" if row.at_most else "at least"
    target = "" if row.target is None else f"{bound} {row.target:g} {row.unit}"
    verdict = {True: "pass", False: "MISSED", None: ""}[row.passed]
    return [row.what, figure, target, verdict, row.note]
