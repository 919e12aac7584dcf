"""``spiking-lm run``: every stage of a recipe."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

RECIPE = typer.Argument(None, metavar="RECIPE", help="A recipe's name ('spiking-lm recipes ls') or its .yaml file.")
SET = typer.Option([], "--set", metavar="FIELD=VALUE", help="Change a field, e.g. train.steps=100. May be repeated.")
OUT = typer.Option(Path("runs"), "--out", metavar="DIR", help="Where runs are kept.")
RESUME = typer.Option(
    None, "--resume", metavar="auto|RUN", help="Go on with a run; auto: the latest unfinished one of this recipe."
)
DRY_RUN = typer.Option(False, "--dry-run", help="Show the resolved recipe, model size and data size; run nothing.")
JSON = typer.Option(False, "--json", help="Print the result as JSON; progress goes to standard error.")


def command(
    recipe: str | None = RECIPE,
    settings: list[str] = SET,
    out: Path = OUT,
    resume: str | None = RESUME,
    dry_run: bool = DRY_RUN,
    json: bool = JSON,
) -> None:
    """Run a recipe: every stage from training to the report, in one run directory.

    Ctrl-C saves a checkpoint and shows the command that goes on. Without RECIPE, --resume RUN goes on with that run.
    """
    execute(recipe, settings, out, resume, dry_run=dry_run, as_json=json)


def execute(
    recipe: str | None, settings: list[str], out: Path, resume: str | None, *, dry_run: bool, as_json: bool
) -> None:
    """Do what ``run`` and ``train`` do: run, or say what would be run."""
    from spiking_lm.cli import _output
    from spiking_lm.errors import UsageError
    from spiking_lm.rundir import RunDir
    from spiking_lm.runs import run_recipe
    from spiking_lm.world import leads

    console = _output.errors if as_json else _output.console
    if recipe is None and resume in (None, "auto"):
        raise UsageError("no recipe was given", hint="'spiking-lm recipes ls' lists them")
    if dry_run:
        if recipe is None:
            chosen = RunDir.open(str(resume)).path / "recipe.yaml"
            return _show_plan(chosen, [], as_json)
        return _show_plan(recipe, settings, as_json)
    with terminated_like_ctrl_c():
        run = run_recipe(recipe, settings, out=out, resume=resume, console=console)
    if as_json and leads():
        _output.print_json(_summary(run))
    return None


def _show_plan(recipe: str | Path, settings: list[str], as_json: bool) -> None:
    from spiking_lm.cli import _output
    from spiking_lm.recipe import load_recipe
    from spiking_lm.runs import plan

    resolved = load_recipe(recipe, settings)
    facts = plan(resolved, _output.errors)
    if as_json:
        _output.print_json({**facts, "resolved": resolved.model_dump(mode="json", by_alias=True)})
        return
    typer.echo(resolved.to_yaml())
    rows = [(key, value) for key, value in _output.flat(facts) if not key.endswith("sha256")]
    _output.table(None, ["what", "how much"], rows)


def _summary(run: Any) -> dict[str, Any]:
    manifest = run.manifest
    summary = {key: manifest[key] for key in ("recipe", "status", "started", "ended", "model", "data", "stages")}
    results = {f"{name}.json": name for name in ("pruning", "evaluation", "explanation", "deployment", "compare")}
    for file, key in results.items():
        if (run.path / file).is_file():
            from spiking_lm.rundir import read_json

            summary[key] = read_json(run.path / file)
    return {"run": str(run.path), **summary}


@contextlib.contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, with which clusters announce an end, save a checkpoint as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach only the main thread
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
