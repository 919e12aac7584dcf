"""Lowering models to hardware: what a backend returns, how it is kept on disk, and what it must be able to say.

A backend turns a model's graph into a :class:`Program`: every op *placed*, its numbers fixed, nothing dropped. Programs
run on their backend's own simulator with numpy alone; this module and theirs import no torch, so a saved program runs
on a machine that has none. A program is a folder: ``program.json``, ``weights.safetensors``, ``SHA256SUMS``, and
``COMPLETE`` written last.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from spiking_lm import registry
from spiking_lm.config import parse_config
from spiking_lm.errors import CheckpointError, DataError, SpikingLMError
from spiking_lm.files import atomic_folder
from spiking_lm.sealed import seal_folder, verify_folder

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spiking_lm.interfaces import SpikingLanguageModel

PROGRAM_FORMAT = 1

RunsOn = Literal["neuromorphic", "embedded-core", "host"]
"""neuromorphic: neurons and event-driven synapses; embedded-core: a processor of the chip; host: the machine beside."""

Grade = Literal["measured", "simulated", "derived", "assumed"]
"""How far a number can be trusted: on the chip; by a simulator; computed from measured ones; a guess that says so."""


class LoweringError(SpikingLMError):
    """A model, or one op of it, cannot be placed on the hardware asked for; the message names the op and the reason."""


@dataclass(frozen=True)
class Constant:
    """One number that a report rests on, with where it is from."""

    name: str
    value: float
    unit: str
    source: str
    grade: Grade


@dataclass(frozen=True)
class PlacedOp:
    """Where one op of the model runs, and in what form."""

    name: str
    kind: str
    runs_on: RunsOn
    where: str
    """In the words of the hardware, e.g. ``"PE 0-49"``."""
    format: str
    """Of its weights, e.g. ``"fp32 CSR"``; empty without weights."""
    weights: int = 0
    """Stored weights."""
    bytes: int = 0
    """Memory of weights and state."""


@dataclass(frozen=True)
class Figure:
    """One result of a program: a value with its unit and its grade."""

    name: str
    value: float
    unit: str
    grade: Grade
    note: str = ""


@dataclass(frozen=True)
class ProgramReport:
    """What a program occupies and costs, each figure with its grade, each constant with its source."""

    backend: str
    model: str
    placement: tuple[PlacedOp, ...]
    figures: tuple[Figure, ...]
    constants: tuple[Constant, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        return asdict(self)

    def render(self) -> RenderableType:
        """Return rich tables: figures, placement, constants, warnings."""
        from spiking_lm.report.tables import program_tables

        tables: RenderableType = program_tables(self.to_dict())
        return tables


@dataclass
class ProgramResult:
    """What a run gave: ``logits (S, V)`` float32, the state after the last token, and what was counted."""

    logits: NDArray[np.float32]
    state: Any
    counters: dict[str, Any] = field(default_factory=dict)


class Program(ABC):
    """A model as a backend runs it. Subclasses live in modules that do not import torch."""

    backend: ClassVar[str]
    vocab_size: int

    @abstractmethod
    def run(self, tokens: NDArray[Any], state: Any = None) -> ProgramResult:
        """Feed one stream of ``tokens (S,)``, going on from ``state``. Raises DataError for ids beyond the vocabulary."""

    @abstractmethod
    def report(self, result: ProgramResult | None = None) -> ProgramReport:
        """Say what it occupies and, given what a run counted, how long that takes and what it costs."""

    @abstractmethod
    def to_folder(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return what ``program.json`` and ``weights.safetensors`` hold; :meth:`from_folder` takes them back."""

    @classmethod
    @abstractmethod
    def from_folder(cls, record: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Program:
        """Rebuild a program. Raises DataError naming what is missing or wrong."""

    def save(self, path: str | os.PathLike[str], *, files: Mapping[str, str | bytes] | None = None) -> None:
        """Write the program's folder atomically, with further ``files`` (name -> content) beside it."""
        from safetensors.numpy import save_file

        record, tensors = self.to_folder()
        record = {"format": PROGRAM_FORMAT, "backend": self.backend, **record}
        with atomic_folder(path, replace=True) as folder:
            (folder / "program.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "weights.safetensors")
            for name, content in (files or {}).items():
                (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
            seal_folder(folder)

    def check_tokens(self, tokens: NDArray[Any]) -> NDArray[np.int64]:
        """Return ``tokens`` as int64. Raises DataError unless they are one stream of known ids."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"a program takes one stream of whole numbers (S,), not {ids.dtype} {ids.shape}")
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise DataError(
                f"token ids run from {int(ids.min())} to {int(ids.max())}, the program knows 0 to {self.vocab_size - 1}",
                hint="encode the text with the tokenizer that the model was trained with",
            )
        return ids.astype(np.int64)


def lower(model: SpikingLanguageModel, backend: str, **options: Any) -> Program:
    """Lower ``model`` to the hardware backend registered as ``backend``; ``options`` are those of its configuration.

    Raises: LoweringError naming the op that cannot be placed and why; UnknownNameError, ConfigError, MissingExtraError.
    """
    entry = registry.get("backends", backend)
    config = parse_config(entry.load("config"), options, where=f"backend {backend!r}")
    program: Program = entry.load("lower")(model, config)
    return program


def load_program(path: str | os.PathLike[str], *, verify: bool = True) -> Program:
    """Load what :meth:`Program.save` wrote, without torch.

    Raises: CheckpointError naming the file that is missing, cut short or altered, or a format from a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such program folder", hint="'spiking-lm lower' writes one")
    if verify:
        verify_folder(folder)
    try:
        record = json.loads((folder / "program.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "weights.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a program: {error}", hint="lower the model again") from None
    if not isinstance(record, dict) or not isinstance(record.get("backend"), str):
        raise CheckpointError(f"{folder / 'program.json'}: the field 'backend' is missing")
    if record.get("format") != PROGRAM_FORMAT:
        raise CheckpointError(
            f"{folder / 'program.json'}: format {record.get('format')!r}, this version reads {PROGRAM_FORMAT}",
            hint="update spiking-lm, or lower the model again",
        )
    program: Program = registry.get("backends", record["backend"]).load("program").from_folder(record, tensors)
    return program
