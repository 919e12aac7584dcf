"""Lowering models to hardware: what a backend returns, how it is kept on disk, and what it must be able to say.

A backend turns a model's graph into a :class:`Program`: every op *placed*, its numbers fixed, nothing dropped. Programs
run on their backend's own simulator with numpy alone; this module and theirs import no torch, so a saved program runs
on a machine that has none. A program is a folder: ``program.json``, ``weights.safetensors``, ``SHA256SUMS``, and
``COMPLETE`` written last.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from spiking_lm import __version__, registry
from spiking_lm.config import parse_config
from spiking_lm.errors import CheckpointError, DataError, LoweringError, PluginError, UnknownNameError, UsageError
from spiking_lm.sealed import COMPLETE, SUMS, listed_files, new_folder, verify_folder

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spiking_lm.graph import LMGraph
    from spiking_lm.interfaces import SpikingLanguageModel

__all__ = [
    "PROGRAM_FORMAT",
    "Constant",
    "CoreUse",
    "Figure",
    "Grade",
    "LoweringError",
    "PlacedOp",
    "Program",
    "ProgramReport",
    "ProgramResult",
    "RunsOn",
    "load_program",
    "lower",
    "score",
]

PROGRAM_FORMAT = 1
"""Version of ``program.json``; a folder with a newer one is refused."""

PROGRAM, WEIGHTS = "program.json", "weights.safetensors"

_FURTHER_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")

RunsOn = Literal["neuromorphic", "embedded-core", "host"]
"""neuromorphic: neurons and event-driven synapses; embedded-core: a processor of the chip; host: the machine beside."""

Grade = Literal["measured", "simulated", "derived", "assumed"]
"""How far a number can be trusted: on the chip; by a simulator; computed from measured ones; a guess that says so."""


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
class CoreUse:
    """What a part of a program takes of one core; several may share it."""

    chip: int
    core: int
    """On its chip."""
    what: str
    """The part, in words of the model."""
    share: float
    """Of what bounds the core, 0 .. 1."""


@dataclass(frozen=True)
class ProgramReport:
    """What a program occupies and costs, each figure with its grade, each constant with its source."""

    backend: str
    model: str
    placement: tuple[PlacedOp, ...]
    figures: tuple[Figure, ...]
    constants: tuple[Constant, ...]
    warnings: tuple[str, ...] = ()
    cores: tuple[CoreUse, ...] = ()
    """Which cores are in use, for a picture; empty where a backend does not say."""
    cores_per_chip: int = 0

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
    """What a run gave: ``logits (S, V)`` float32, the state after the last token, and what was counted.

    ``counters["runner"]`` says in words what ran the program where that was no simulator of the backend's own.
    """

    logits: NDArray[np.float32]
    state: Any
    counters: dict[str, Any] = field(default_factory=dict)


class Program(ABC):
    """A model as a backend runs it. Subclasses live in modules that do not import torch."""

    backend: ClassVar[str]
    reals: ClassVar[Literal["float32", "float64"]] = "float32"
    """In what a run computes what is real: the model that it is compared with is computed in the same."""
    vocab_size: int

    @abstractmethod
    def run(self, tokens: NDArray[Any], state: Any = None) -> ProgramResult:
        """Feed one stream of ``tokens (S,)``, going on from ``state``.

        Raises: DataError for ids beyond the vocabulary (:meth:`check_tokens`).
        """

    @abstractmethod
    def report(self, result: ProgramResult | None = None) -> ProgramReport:
        """Say what it occupies and, given what a run counted, how long that takes and what it costs."""

    @abstractmethod
    def to_folder(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return what ``program.json`` and ``weights.safetensors`` hold; :meth:`from_folder` takes them back."""

    def reference_logits(self, tokens: NDArray[Any]) -> NDArray[np.float32] | None:
        """Return the logits ``(S, V)`` of the same numbers computed in torch by other code, where there is such code.

        A run compares the program with it, and both with the model: what quantisation costs, and that nothing else
        does.
        """
        return None

    @classmethod
    @abstractmethod
    def from_folder(cls, record: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Program:
        """Rebuild a program. Raises DataError naming what is missing or wrong."""

    def save(self, path: str | os.PathLike[str], *, files: Mapping[str, str | bytes] | None = None) -> None:
        """Write the program's folder atomically, with further ``files`` (name -> content) beside it.

        Raises: UsageError when ``path`` holds other things than a program, CheckpointError when the disk refuses.
        """
        from safetensors.numpy import save_file

        plugin = registry.get("backends", self.backend).plugin
        record, tensors = self.to_folder()
        about = {
            "format": PROGRAM_FORMAT,
            "spiking_lm": __version__,
            "backend": self.backend,
            "distribution": plugin.distribution,
        }
        folder = Path(path)
        with new_folder(folder, ours=_ours(folder), what="program") as temporary:
            for name, content in (files or {}).items():
                if not _FURTHER_FILE.fullmatch(name) or name in (PROGRAM, WEIGHTS, SUMS, COMPLETE):
                    raise UsageError(f"{name!r} cannot be the name of a file beside a program", hint="use another name")
                (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)
            text = json.dumps({**about, **record}, indent=2, allow_nan=False)
            (temporary / PROGRAM).write_text(text + "\n", encoding="utf-8")
            save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, temporary / WEIGHTS)

    def check_tokens(self, tokens: NDArray[Any]) -> NDArray[np.int64]:
        """Return ``tokens`` as int64. Raises DataError unless they are one stream of known ids."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"a program takes one stream of whole numbers (S,), not {ids.dtype} {ids.shape}")
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            first, last = int(ids.min()), int(ids.max())
            raise DataError(
                f"token ids run from {first} to {last}, the program knows 0 to {self.vocab_size - 1}",
                hint="encode the text with the tokenizer that the model was trained with",
            )
        return ids.astype(np.int64)


Text = Callable[[int], "NDArray[Any]"]
"""From a number of tokens to the ids of so many of a text, or of fewer."""


def lower(model: SpikingLanguageModel, backend: str, *, text: Text | None = None, **options: Any) -> Program:
    """Lower ``model`` to the hardware backend registered as ``backend``; ``options`` are those of its configuration.

    ``text`` is asked by a backend that calibrates (:attr:`~spiking_lm.records.BackendSpec.calibrates`), for as many
    tokens as its options say.

    Raises: LoweringError naming the op that cannot be placed and why; UnknownNameError, ConfigError, MissingExtraError.
    """
    entry = registry.get("backends", backend)
    config = parse_config(entry.load("config"), options, where=f"backend {backend!r}")
    given: tuple[Any, ...] = (model, config)
    if entry.spec.calibrates:
        wanted = config.calibration_tokens
        given = (*given, text(wanted) if text is not None and wanted else None)
    program: Program = entry.load("lower")(*given)
    return program


def check_graph(graph: LMGraph, backend: str, **options: Any) -> None:
    """Say of the graph of a model, trained or not, that the backend has no place for one of its ops.

    Raises: LoweringError naming the op. What depends on weights is left to :func:`lower`.
    """
    entry = registry.get("backends", backend)
    if entry.spec.check is not None:
        entry.load("check")(graph, parse_config(entry.load("config"), options, where=f"backend {backend!r}"))


def load_program(path: str | os.PathLike[str], *, verify: bool = True) -> Program:
    """Load what :meth:`Program.save` wrote, without torch; ``verify=False`` skips the hashes.

    Raises: CheckpointError naming the file that is missing, cut short or altered, or a format from a newer version;
    PluginError when the plugin that offers the backend is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder, where = Path(path), Path(path) / PROGRAM
    if not folder.is_dir():
        what = "a file, not a program folder" if folder.exists() else "no such program folder"
        raise CheckpointError(f"{folder}: {what}", hint="'spiking-lm lower' writes one")
    if not where.exists() and not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder}: not a program folder: no {PROGRAM}", hint="'spiking-lm lower' writes one")
    if verify:
        verify_folder(folder, what="program", hint=_AGAIN)
    try:
        record = json.loads(where.read_text(encoding="utf-8"))
        version, backend = record.get("format"), record.get("backend")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not readable as a JSON object ({error})", hint=_AGAIN) from None
    if isinstance(version, int) and version > PROGRAM_FORMAT:
        raise CheckpointError(
            f"{where}: written in format {version} by spiking-lm {record.get('spiking_lm', '?')}; "
            f"this is {__version__}, which reads up to format {PROGRAM_FORMAT}",
            hint="pip install --upgrade spiking-lm",
        )
    if version != PROGRAM_FORMAT or not isinstance(backend, str):
        raise CheckpointError(f"{where}: the fields 'format' and 'backend' are not what a program has", hint=_AGAIN)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS}: not a readable safetensors file of numpy arrays ({error})", hint=_AGAIN
        ) from None
    try:
        entry = registry.get("backends", backend)
    except UnknownNameError as error:
        wanted = record.get("distribution") or "spiking-lm"
        upgrade = "--upgrade " if wanted == "spiking-lm" else ""
        raise PluginError(f"{where}: {error.message}", hint=f"pip install {upgrade}{wanted}. {error.hint}") from None
    try:
        program: Program = entry.load("program").from_folder(record, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{folder}: not a program of the backend {backend!r} ({type(error).__name__}: {error})", hint=_AGAIN
        ) from error
    return program


def score(result: ProgramResult, tokens: NDArray[Any]) -> NDArray[np.float64]:
    """Return the negative log-likelihood (nats) of ``tokens[1:]`` by the logits of a run on ``tokens[:-1]``."""
    logits = result.logits.astype(np.float64)
    if len(logits) != len(tokens) - 1:
        raise DataError(f"{len(logits)} tokens were run, so {len(logits) + 1} are scored, not {len(tokens)}")
    top = logits.max(-1)
    partition = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    nll: NDArray[np.float64] = partition - logits[np.arange(len(logits)), np.asarray(tokens[1:], np.int64)]
    return nll


_AGAIN = "restore what is named from a copy, or lower the model again"


def _ours(folder: Path) -> set[str]:
    """Return what may lie in a folder that a program replaces: a program, and what was sealed with it."""
    sealed_with_it = listed_files(folder) if (folder / PROGRAM).is_file() else set()
    return {PROGRAM, WEIGHTS, SUMS, COMPLETE, "tokenizer.json"} | sealed_with_it
