"""The directory of one run: what lies in it, and how it is written so that a stop at any moment loses nothing.

``<out>/<recipe name>/<UTC time>-<id>/`` holds ``recipe.yaml`` (resolved), ``manifest.json``, ``metrics.jsonl``,
``log.txt``, ``checkpoints/`` and what each stage wrote.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from spiking_lm import __version__
from spiking_lm.errors import DataError, UsageError
from spiking_lm.files import atomic_write
from spiking_lm.manifest import describe_environment, plain
from spiking_lm.recipe import Recipe, load_recipe

_RUN_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")

Status = Literal["running", "complete", "interrupted", "failed"]


class RunDir:
    """One run's directory. Use :meth:`create` or :meth:`open`.

    ``path`` is the folder; the object is accepted wherever a path is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, recipe: Recipe, out: Path) -> RunDir:
        """Make the directory of a new run of ``recipe`` below ``out``, and point ``<out>/<name>/latest`` at it."""
        family = out / recipe.name
        while True:
            path = family / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        run = cls.begin(path, recipe)
        atomic_write(family / "latest", path.name + "\n")
        return run

    @classmethod
    def begin(cls, path: Path, recipe: Recipe) -> RunDir:
        """Make ``path`` the directory of a new run of ``recipe``."""
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        atomic_write(path / "recipe.yaml", recipe.to_yaml())
        run.update_manifest(
            format=1,
            spiking_lm=__version__,
            recipe=recipe.name,
            run=path.name,
            status="running",
            started=now(),
            ended=None,
            seed=recipe.seed,
            stages={},
            **describe_environment(),
        )
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open the directory of a run, or of a recipe's runs, which means the latest of them.

        Raises: DataError when there is no run, or its recipe or manifest cannot be read.
        """
        folder = Path(path)
        pointer = folder / "latest"
        if not (folder / "manifest.json").is_file() and pointer.is_file():
            name = pointer.read_text(encoding="utf-8", errors="replace").strip()
            if not _RUN_NAME.fullmatch(name):
                raise DataError(f"{pointer} does not name a run: {name!r}", hint="name the run's folder itself")
            folder = folder / name
        for name in ("recipe.yaml", "manifest.json"):
            if not (folder / name).is_file():
                raise DataError(f"{folder} is not a run: it has no {name}", hint="a run is RUNS/<recipe>/<time>-<id>")
        run = cls(folder)
        run.manifest  # noqa: B018 - says now if it cannot be read
        return run

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(self.path / "recipe.yaml")

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk."""
        return read_json(self.path / "manifest.json")

    @property
    def status(self) -> Status:
        """``running`` is also what a killed run says."""
        status: Status = self.manifest["status"]
        return status

    @property
    def resume_command(self) -> str:
        """The command line that goes on with this run."""
        return f"spiking-lm run --resume {shlex.quote(str(self.path))}"

    def update_manifest(self, **changes: Any) -> None:
        """Change entries of the manifest, atomically."""
        path = self.path / "manifest.json"
        manifest = self.manifest if path.is_file() else {}
        self.write_json("manifest.json", {**manifest, **changes})

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, atomically."""
        atomic_write(self.path / name, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; a line that a killed process left half-written is cut off first."""
        path = self.path / "metrics.jsonl"
        line = json.dumps(plain(entry)) + "\n"
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    content = path.read_bytes()
                    file.truncate(content.rfind(b"\n") + 1)
            file.write(line.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``; see :func:`read_metrics`."""
        return read_metrics(self.path / "metrics.jsonl")

    def log(self, message: str) -> None:
        """Append a line, with the time, to ``log.txt``."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{now()} {message}\n")

    def rewind_metrics(self, step: int) -> None:
        """Forget what was logged after ``step``: training goes on from there and will log it again."""
        kept = [entry for entry in self.metrics() if entry.get("step", 0) <= step]
        atomic_write(self.path / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of this run while the block lasts; the system lets go when a process dies.

        Raises: UsageError when another process holds it. On Windows, where files are locked otherwise, nothing is held.
        """
        try:
            import fcntl
        except ImportError:
            yield
            return
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"{self.path} is being run by another process", hint="wait for it, or stop it"
                ) from None
            yield


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``: one entry per line, without a last line that was cut short.

    Raises: DataError naming the line when any other line is not JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entries += [json.loads(line)] if line.strip() else []
        except ValueError:  # noqa: PERF203
            if number < len(lines):
                raise DataError(f"{path}, line {number}: not JSON", hint="remove the line") from None
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"cannot read {path}: expected an object, found a {type(value).__name__}")
    return value


def now() -> str:
    """Return the time in UTC, as manifests and logs write it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
