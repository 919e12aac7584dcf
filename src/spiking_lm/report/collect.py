"""Read what a run left behind, whatever state it is in: each piece is there, or absent, or named as unreadable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from spiking_lm import safeyaml
from spiking_lm.errors import DataError, SpikingLMError
from spiking_lm.raster import Raster, load_raster

T = TypeVar("T")

_PIECES = (
    *("manifest.json", "recipe.yaml", "metrics.jsonl", "evaluation.json", "explanation.json", "compare.json"),
    "samples.txt",
)


@dataclass
class Collected:
    """The pieces of a run directory; None or empty where a piece is missing."""

    path: Path
    recipe_text: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    explanation: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None
    conversion: dict[str, Any] | None = None
    pruning: dict[str, Any] | None = None
    deployment: dict[str, Any] | None = None
    sample: str | None = None
    raster: Raster | None = None
    problems: list[str] = field(default_factory=list)
    """What is there but cannot be used, in words for the reader of the report."""

    def curve(self, split: str, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a logged quantity, leaving out what is absent or not finite."""
        entries = self.train if split == "train" else self.valid
        points = [(entry["step"], entry[name]) for entry in entries if _finite(entry.get(name))]
        return [float(step) for step, _ in points], [float(value) for _, value in points]


def collect(path: str | os.PathLike[str]) -> Collected:
    """Read a run directory, or the latest run of a recipe's folder. Raises DataError where there is no run."""
    folder = Path(path)
    pointer = folder / "latest"
    if not any((folder / name).is_file() for name in _PIECES) and pointer.is_file():
        folder = folder / Path(pointer.read_text(encoding="utf-8", errors="replace").strip()).name
    if not any((folder / name).is_file() for name in _PIECES):
        what = "it is empty or holds other things" if folder.is_dir() else "there is no such folder"
        raise DataError(f"{folder} is not a run: {what}", hint="a run is RUNS/<recipe>/<time>-<id>")
    run = Collected(folder)
    run.manifest = _read(run, "manifest.json", _object) or {}
    run.recipe_text = _read(run, "recipe.yaml", _text)
    run.recipe = _read(run, "recipe.yaml", safeyaml.read) or {}
    run.evaluation = _read(run, "evaluation.json", _object)
    run.explanation = _read(run, "explanation.json", _object)
    run.comparison = _read(run, "compare.json", _object)
    run.conversion = _read(run, "conversion.json", _object)
    run.pruning = _read(run, "pruning.json", _object)
    run.deployment = _read(run, "deployment.json", _object)
    run.sample = _read(run, "samples.txt", _text)
    run.raster = _read(run, "raster.npz", load_raster)
    _read_metrics(run)
    return run


def _read(run: Collected, name: str, reader: Callable[[Path], T]) -> T | None:
    file = run.path / name
    if not file.is_file():
        return None
    try:
        return reader(file)
    except (OSError, ValueError, SpikingLMError) as error:
        text = error.message if isinstance(error, SpikingLMError) else str(error)
        run.problems.append(f"{name} cannot be read: {text.removeprefix(f'{file}: ')}")
        return None


def _object(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found a {type(value).__name__}")
    return value


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _read_metrics(run: Collected) -> None:
    """Take every line that can be read: a run may have been killed while it wrote one, or have met NaN."""
    file = run.path / "metrics.jsonl"
    if not file.is_file():
        return
    bad: list[int] = []
    odd = 0
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.strip() else None
        except ValueError:
            bad.append(number)
            continue
        if not isinstance(entry, dict) or not _finite(entry.get("step")):
            bad += [number] if line.strip() else []
            continue
        odd += not _finite(entry.get("loss", 0.0))
        (run.valid if entry.get("split") == "valid" else run.train).append(entry)
    if bad == [len(lines)]:
        run.problems.append("the last line of metrics.jsonl was cut short; it is left out")
    elif bad:
        run.problems.append(f"metrics.jsonl: {len(bad)} of {len(lines)} lines cannot be read; they are left out")
    if odd:
        run.problems.append(f"metrics.jsonl: {odd} entries have a loss that is not a finite number; they are left out")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
