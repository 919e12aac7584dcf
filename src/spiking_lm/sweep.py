"""Sweeps: a recipe with some of its values going through lists, every point a run in a process of its own.

A point is what the compare stage calls a variant: it trains, evaluates and explains. The points of a recipe lie in
``<out>/sweeps/<recipe>/<id>/<point>/``, the id being that of the recipe with its settings, so that a sweep that was
stopped goes on when it is started again, and one with more values repeats nothing. torch-free until the table is made.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from spiking_lm import safeyaml
from spiking_lm.errors import DataError, InterruptedRunError, MissingExtraError, UsageError
from spiking_lm.files import atomic_write
from spiking_lm.manifest import plain
from spiking_lm.recipe import Recipe, load_recipe, variants
from spiking_lm.rundir import RunDir
from spiking_lm.stages import CompareConfig
from spiking_lm.world import LAUNCHER

Finished = Iterator[tuple[Path, int]]
"""Runs and their exit codes, as they end."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-]+")
_SEPARATOR = re.compile(r",(?![^\[{]*[\]}])")  # not the commas within a list or a mapping


def points(recipe: Recipe, over: Sequence[str]) -> dict[str, tuple[dict[str, Any], Recipe]]:
    """Return every point of a sweep, by name: what it changes, and the resolved recipe.

    ``over`` has one ``FIELD=VALUE,VALUE,...`` for every field; each combination is a point.
    Raises: UsageError, RecipeError for a field or a value that does not fit, before anything runs.
    """
    lists: dict[str, list[Any]] = {}
    for given in over:
        field, equals, values = given.partition("=")
        field = field.strip()
        if not (field and equals and values.strip()) or field in lists:
            raise UsageError(f"--over {given}: " + ("given twice" if field in lists else "write FIELD=VALUE,VALUE,..."))
        lists[field] = [safeyaml.parse(text, where=f"--over {field}") for text in _SEPARATOR.split(values)]
    if not lists:
        raise UsageError("nothing was given to sweep over", hint="--over seed=1,2,3")
    last = [field.rpartition(".")[2] for field in lists]
    short = last if len(set(last)) == len(last) else list(lists)
    changes: dict[str, dict[str, Any]] = {}
    for point in itertools.product(*lists.values()):
        name = "_".join(f"{field}-{_in_a_name(value)}" for field, value in zip(short, point, strict=True))
        if name in changes:
            raise UsageError(f"--over: two points are called {name}", hint="give every value once")
        changes[name] = dict(zip(lists, point, strict=True))
    resolved = variants(recipe.model_copy(update={"compare": CompareConfig(variants=changes)}))
    return {name: (change, resolved[name]) for name, change in changes.items()}


def _in_a_name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    safe = _UNSAFE.sub("-", text).strip("-")
    return safe if safe == text and len(safe) <= 40 else f"{safe[:32]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def sweep(
    recipe: str | Path,
    settings: Sequence[str],
    over: Sequence[str],
    *,
    out: Path,
    engine: str = "local",
    jobs: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run every point that is not complete, ``jobs`` at once, and return the JSON-able table.

    A point that fails does not stop the others; the table, which is also written beside the points as ``sweep.json``
    and ``sweep.csv``, says why. ``tell`` is called with a line for every point that ends.

    Raises: what :func:`points` raises; DataError when a folder holds a run of another recipe; MissingExtraError
    without Ray; InterruptedRunError on Ctrl-C, after every running point has saved.
    """
    base = load_recipe(recipe, settings)
    every = points(base, over)
    start = ENGINES.get(engine)
    if start is None:
        raise UsageError(f"no such engine: {engine}", hint=f"there are {', '.join(ENGINES)}")
    document = base.model_copy(update={"compare": None}).to_yaml()
    folder = out / "sweeps" / base.name / hashlib.sha256(document.encode()).hexdigest()[:12]
    runs = {name: _run_of(folder / name, one) for name, (_, one) in every.items()}
    left = [run.path for run in runs.values() if run.status != "complete"]
    tell(f"{folder}: {len(runs)} points, {len(runs) - len(left)} complete")
    codes: dict[Path, int] = {}
    try:
        for path, code in start(left, jobs):
            codes[path] = code
            tell(f"{path.name}: {'complete' if code == 0 else _reason(path, code)}  ({len(codes)} of {len(left)})")
    except KeyboardInterrupt:
        again = shlex.join(["spiking-lm", "sweep", str(recipe), *_options(settings, over, out, engine, jobs)])
        raise InterruptedRunError("interrupted; every point keeps what it has done", hint=f"go on: {again}") from None
    result = {
        "recipe": base.name,
        "folder": str(folder),
        "points": [_row(name, runs[name], change, codes) for name, (change, _) in every.items()],
    }
    atomic_write(folder / "sweep.json", json.dumps(plain(result), indent=2) + "\n")
    atomic_write(folder / "sweep.csv", as_csv(result))
    return result


def _options(settings: Sequence[str], over: Sequence[str], out: Path, engine: str, jobs: int) -> list[str]:
    given = [word for option, values in (("--set", settings), ("--over", over)) for v in values for word in (option, v)]
    return [*given, "--out", str(out), "--engine", engine, "--jobs", str(jobs)]


def _run_of(path: Path, recipe: Recipe) -> RunDir:
    if not (path / "manifest.json").is_file():
        return RunDir.begin(path, recipe)
    run = RunDir.open(path)
    if run.recipe != recipe:
        raise DataError(f"{path} is a run of another recipe", hint="remove the folder")
    return run


# -- engines -----------------------------------------------------------------------------------------------------------


def run_point(path: str, threads: int) -> int:
    """Go on with the run at ``path`` in a process of its own, which writes beside it; return the exit code.

    Ctrl-C is passed on once, and the process has the time that it needs to save.
    """
    command = [sys.executable, "-m", "spiking_lm", "run", "--resume", path]
    with open(f"{path}.log", "ab") as log:
        child = subprocess.Popen(
            command, env=_environment(threads), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        with _lock:
            _running.add(child)
        try:
            return child.wait()
        except KeyboardInterrupt:
            _interrupt(child)
            child.wait()
            raise
        finally:
            with _lock:
                _running.discard(child)


def _interrupt(child: subprocess.Popen[bytes]) -> None:
    if os.name != "nt":  # there the console has told it already
        child.send_signal(signal.SIGINT)


_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()


def _environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), **{k: v for k, v in os.environ.items() if k not in LAUNCHER}}


def _threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


def _locally(paths: Sequence[Path], jobs: int) -> Finished:
    """Run ``jobs`` points at once on this machine, its processors shared among them."""
    with ThreadPoolExecutor(jobs) as pool:
        work = {pool.submit(run_point, str(path), _threads(jobs)): path for path in paths}
        try:
            while work:
                done, _ = wait(work, return_when=FIRST_COMPLETED)
                yield from [(work.pop(one), one.result()) for one in done]
        except BaseException:
            for waiting in work:
                waiting.cancel()
            with _lock:
                for child in _running:
                    _interrupt(child)
            raise


def _on_ray(paths: Sequence[Path], jobs: int) -> Finished:
    """Run points as tasks of a Ray cluster (``RAY_ADDRESS``, else one on this machine), ``jobs`` at once.

    Every node must see the runs under the same path, and have spiking-lm installed. A task that is lost, with its
    node for instance, counts as failed; its point goes on where it was when the sweep is started again.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise MissingExtraError("sweep --engine ray", "ray") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    task = ray.remote(num_cpus=1, max_retries=0)(run_point)
    ahead = list(reversed(paths))
    pending: dict[Any, Path] = {}
    try:
        while ahead or pending:
            while ahead and len(pending) < jobs:
                path = ahead.pop()
                pending[task.remote(str(path.resolve()), 1)] = path
            ready, _ = ray.wait(list(pending), num_returns=1)
            for one in ready:
                path = pending.pop(one)
                try:
                    code = ray.get(one)
                except ray.exceptions.RayError:
                    code = 1
                yield path, code
    except BaseException:
        for one in pending:
            ray.cancel(one)
        raise
    finally:
        if ours:
            ray.shutdown()


ENGINES: dict[str, Callable[[Sequence[Path], int], Finished]] = {"local": _locally, "ray": _on_ray}

# -- the table ---------------------------------------------------------------------------------------------------------


def _reason(path: Path, code: int) -> str:
    """Return why a point failed: what it said last, else its exit code."""
    said = Path(f"{path}.log").read_text(encoding="utf-8", errors="replace") if Path(f"{path}.log").is_file() else ""
    errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    return errors[-1] if errors else f"ended with exit code {code}"


def _row(name: str, run: RunDir, changes: dict[str, Any], codes: dict[Path, int]) -> dict[str, Any]:
    """Return one line of the table: what a point left behind, or why it failed."""
    if run.status != "complete":
        reason = _reason(run.path, codes.get(run.path, 0))
        return {"name": name, "changes": changes, "status": "failed", "error": reason, "run": str(run.path)}
    from spiking_lm.compare import result_of

    row = result_of(name, run, changes)
    if not row["metrics"]:  # no evaluation: the last validation of training
        scores = [entry for entry in run.metrics() if entry.get("split") == "valid"]
        kept = {k: v for k, v in (scores[-1] if scores else {}).items() if k not in ("split", "step", "elapsed_s")}
        row = {**row, "metrics": kept, "split": "valid" if kept else None}
    return {**row, "status": "complete", "error": None, "run": str(run.path)}


def cells(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return head and rows of the table: the fields, the metrics, and what training took; None where there is none."""
    rows = result["points"]
    fields = list(rows[0]["changes"])
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics", ())))
    more = ["parameters", "activity", "tokens_per_s", "seconds"]
    head = [*fields, *metrics, *more, "status"]
    return head, [
        [
            *row["changes"].values(),
            *(row.get("metrics", {}).get(name) for name in metrics),
            *(row.get(name) for name in more),
            row["error"] or row["status"],
        ]
        for row in rows
    ]


def as_csv(result: dict[str, Any]) -> str:
    """Return the table as CSV."""
    head, rows = cells(result)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def as_markdown(result: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    head, rows = cells(result)

    def line(row: Sequence[Any]) -> str:
        written = (f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in row)
        return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in written)} |\n"

    return line(head) + f"|{'---|' * len(head)}\n" + "".join(map(line, rows))
