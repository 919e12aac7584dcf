"""The records that plugins hand to the host: frozen, and free of heavy imports.

A record names what it offers and where it lives (``"package.module:attribute"``), so that listing everything that is
installed imports neither torch nor any SNN framework. The target is imported when it is first used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from spiking_lm.errors import PluginError

SpikeKind = Literal["binary", "ternary", "integer", "graded"]
"""What a spike site emits: {0,1}; {-1,0,1}; small integers; or real-valued events."""

_TARGET = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")
_NAME = re.compile(r"^[a-z0-9][a-z0-9_.\-/]*$")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records: a registry name, a one-line summary, and the extra that its targets need."""

    kind: ClassVar[str]
    targets: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that hold ``"module:attribute"`` targets."""

    name: str
    summary: str = ""
    extra: str | None = None
    """The optional-dependency group to install, e.g. ``"spikegpt"``; None when the core suffices."""
    requires: tuple[str, ...] = ()
    """What the targets need: import names (looked for, not imported) and Python versions such as ``"python<3.11"``."""

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise PluginError(
                f"{type(self).__name__}: bad name {self.name!r}",
                hint="use lower-case letters, digits and . _ - / and begin with a letter or digit",
            )
        for field in self.targets:
            value = getattr(self, field)
            if value is not None and not _TARGET.match(value):
                raise PluginError(
                    f"{type(self).__name__} {self.name!r}: field {field!r} is {value!r}",
                    hint="write it as 'package.module:attribute'",
                )


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Record):
    """A language model: its configuration class (torch-free module) and the model class built from it."""

    kind = "models"
    targets = ("config", "factory", "importer")
    config: str
    """A :class:`spiking_lm.config.ModelConfig` subclass."""
    factory: str
    """A :class:`spiking_lm.interfaces.SpikingLanguageModel` subclass, called with the config."""
    importer: str | None = None
    """``f(state_dict, **config) -> model`` for the paper's own state-dict keys."""
    paper: str = ""
    capabilities: frozenset[str] = frozenset({"lm"})
    """What it can do in some configuration: any of ``lm`` (causal), ``encode``, ``mlm``, ``classify``, ``seq2seq``; or
    ``clips``, for frames of events instead of text."""


@dataclass(frozen=True, kw_only=True)
class NeuronSpec(Record):
    """A neuron model: its configuration class (torch-free module) and the module class built from it."""

    kind = "neurons"
    targets = ("config", "factory")
    config: str
    """A :class:`spiking_lm.config.NeuronConfig` subclass."""
    factory: str
    """A :class:`spiking_lm.interfaces.Neuron` subclass, called as ``factory(config, size=...)``."""
    spike_kind: SpikeKind = "binary"


@dataclass(frozen=True, kw_only=True)
class KernelSpec(Record):
    """One implementation of a declared op; ``name`` is ``"<op>/<implementation>"``, e.g. ``"lif_scan/torch"``."""

    kind = "kernels"
    targets = ("implementation", "available", "supports")
    implementation: str
    """A callable with the op's signature."""
    available: str | None = None
    """``f() -> True | str``: can it run on this machine, or why not; None means always."""
    supports: str | None = None
    """``f(*args, **kwargs) -> True | str`` with the op's signature; None means every argument."""
    priority: int = 0
    """The highest available and supporting implementation runs."""


@dataclass(frozen=True, kw_only=True)
class BackendSpec(Record):
    """A hardware backend: its options, what lowers a model to it, and the program that runs there."""

    kind = "backends"
    targets = ("config", "lower", "program", "check")
    config: str
    """A :class:`spiking_lm.config.BackendConfig` subclass."""
    lower: str
    """``f(model, config) -> Program``."""
    program: str
    """A :class:`spiking_lm.hardware.Program` subclass in a module that does not import torch."""
    check: str | None = None
    """``f(graph, config) -> None``: raises LoweringError for what no weights could make fit; runs ask before they train
    or convert."""
    calibrates: bool = False
    """Whether ``lower`` takes a text too, as ``f(model, config, text)``: token ids (S,), ``config.calibration_tokens``
    of them, that it may look at while it chooses formats, or None. A run gives the beginning of what it trained on, the
    command the embedded corpus."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec(Record):
    """A dataset: ``config`` describes its options, ``factory(config)`` returns a corpus or a labelled set."""

    kind = "datasets"
    targets = ("config", "factory")
    config: str
    """A :class:`spiking_lm.config.DatasetConfig` subclass."""
    factory: str
    task: Literal["text", "classification", "pairs", "clips"] = "text"


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec(Record):
    """A tokenizer: ``factory(config, texts)`` where ``texts`` iterates over the training text."""

    kind = "tokenizers"
    targets = ("config", "factory")
    config: str
    """A :class:`spiking_lm.config.TokenizerConfig` subclass."""
    factory: str


@dataclass(frozen=True, kw_only=True)
class RecipeSpec(Record):
    """One shipped recipe file; ``name`` is ``"<plugin>/<recipe>"``."""

    kind = "recipes"
    path: Path


@dataclass(frozen=True, kw_only=True)
class MetricSpec(Record):
    """An evaluation metric: ``f(scores) -> dict[str, float]``, see :mod:`spiking_lm.evaluation`."""

    kind = "metrics"
    targets = ("function",)
    function: str


@dataclass(frozen=True, kw_only=True)
class ConverterSpec(Record):
    """A converter: ``convert(source, **options) -> SpikingLanguageModel``, where ``sniff(source) -> bool`` said True.

    ``source`` is first the path, a file or a folder; when no converter takes that, it is the state dict in the file,
    ``{name: tensor}``, read without running code.
    """

    kind = "converters"
    targets = ("sniff", "convert", "tokenizer", "config", "calibrate", "outline")
    sniff: str
    convert: str
    tokenizer: str | None = None
    """``f(path) -> spiking_lm.data.Tokenizer``: the one that lies beside the weights; None where there never is one."""
    config: str | None = None
    """A :class:`spiking_lm.config.ConverterConfig` subclass, for a converter that can be the stage of a recipe; its
    name is then that of the model which it makes."""
    calibrate: str | None = None
    """With ``config``: ``f(config, data, work, *, seed, console) -> (model, report)``. The training part of ``data`` is
    what may be looked at, ``work`` a folder for what an interrupted conversion goes on from, ``report`` JSON-able."""
    outline: str | None = None
    """``f(config) -> spiking_lm.graph.LMGraph``: that of the model which ``calibrate`` would return. A recipe that
    deploys it is told before the conversion that it has no place."""


@dataclass(frozen=True, kw_only=True)
class CommandSpec(Record):
    """A command-line verb: ``function`` is a typer command function."""

    kind = "commands"
    targets = ("function",)
    function: str


@dataclass(frozen=True, kw_only=True)
class BenchmarkSpec(Record):
    """One figure of ``spiking-lm bench``: ``function(repeats) -> spiking_lm.bench.Row``, or a list of rows."""

    kind = "benchmarks"
    targets = ("function",)
    function: str
    on_request: bool = False
    """Runs only when it is named: it takes long, or much room."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it measures; ``spiking-lm bench --device`` chooses. ``cuda`` is torch's name for AMD's GPUs too."""


@dataclass(frozen=True, kw_only=True)
class DoctorSpec(Record):
    """A health check: ``function() -> list[spiking_lm.records.Finding]``."""

    kind = "doctor"
    targets = ("function", "setup")
    function: str
    setup: str | None = None
    """``f(say) -> None``: prepares what the check looks for, which no extra can bring; ``say`` takes lines of text. A
    backend's is registered under the backend's name: ``lower --backend NAME --setup`` runs it."""


@dataclass(frozen=True)
class Finding:
    """One line of ``spiking-lm doctor``: what was looked at, how it stands, and the command that mends it."""

    check: str
    status: Literal["ok", "warn", "fail"]
    message: str
    hint: str | None = None
