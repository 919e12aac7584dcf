"""``spiking-lm bench``: how fast the kernels and models are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spiking_lm.errors import KernelUnavailableError, UsageError

if TYPE_CHECKING:
    from spiking_lm.bench import Row


def command(
    names: list[str] = typer.Argument(
        [], metavar="[NAME]...", help="A row or a group, e.g. lif; without any, all but large ones."
    ),
    only: list[str] = typer.Option([], "--only", metavar="NAME", help="The same, as an option that may be repeated."),
    as_json: bool = typer.Option(
        False, "--json", help="Print everything as JSON, or write it to a NAME ending in .json."
    ),
    threads: int = typer.Option(1, "--threads", min=1, help="Threads that torch may use."),
    repeats: int = typer.Option(5, "--repeats", min=1, help="Turns of each candidate; the median counts."),
    device: str = typer.Option(
        "cpu", "--device", help="cpu, or cuda for the GPU; its table is written to bench-cuda.json and bench-cuda.md."
    ),
) -> None:
    """Run benchmarks on this machine: the core's and those of plugins.

    Every timing is a ratio of medians, measured in turns in the same run: processor time with one thread, wall clock
    with more. A missed target is shown, not turned into an exit code.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"bench --device: {device!r} is neither cpu nor cuda")
    if device == "cuda":
        _need_gpu()
    from spiking_lm import bench
    from spiking_lm.cli._output import console, errors, print_json, table
    from spiking_lm.files import atomic_write
    from spiking_lm.manifest import plain

    # A file stands where a name does, so that the option needs none: "--json FILE", and "--json -" for the terminal.
    files = [name for name in names if as_json and (name == "-" or name.endswith(".json"))]
    rows: list[Row] = []
    chosen = bench.select([name for name in (*names, *only) if name not in files], device)
    measuring = bench.run(chosen, n_threads=threads, repeats=repeats)
    for name in chosen:
        with errors.status(f"{name} ..."):
            rows += next(measuring)
    result = bench.report(rows, n_threads=threads, repeats=repeats)
    if len(rows) == 1:  # alone, its own figures are at hand at the top too
        result = {**rows[0].details, **result}
    if as_json and (not files or "-" in files):
        print_json(result)
        return
    hardware = result["hardware"]
    machine = f"{hardware['cpu'] if device == 'cpu' else ', '.join(hardware['accelerators'])}"
    machine += f", torch {result['versions'].get('torch')}"
    title = f"{machine}, {threads} thread{'s' if threads > 1 else ''}, medians of {repeats}"
    cells = [_cells(row) for row in rows]
    table(title, _HEAD, cells)
    if device == "cuda":
        files = files or ["bench-cuda.json"]
        for page in [str(Path(file).with_suffix(".md")) for file in files]:
            atomic_write(Path(page), _markdown(title, cells))
            console.print(f"written to {page}", markup=False)
    for file in files:
        from json import dumps

        atomic_write(Path(file), dumps(plain(result), indent=2) + "\n")
        console.print(f"written to {file}", markup=False)


_HEAD = ["benchmark", "figure", "target", "", "how"]


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise KernelUnavailableError(
            f"bench --device cuda: torch {torch.__version__} sees no GPU on this machine, so nothing was measured",
            hint="docs/triton.md has what is predicted; 'spiking-lm doctor' says what torch was built for",
        )


def _markdown(title: str, cells: list[list[str]]) -> str:
    lines = [_HEAD, ["---"] * len(_HEAD), *cells]
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> list[str]:
    figure = "-" if row.value is None else f"{row.value:.3g} {row.unit}"
    bound = "at most" if row.at_most else "at least"
    target = "" if row.target is None else f"{bound} {row.target:g} {row.unit}"
    verdict = {True: "pass", False: "MISSED", None: ""}[row.passed]
    return [row.what, figure, target, verdict, row.note]
