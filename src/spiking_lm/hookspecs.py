"""Every hook of spiking-lm, on one screen.

A plugin is a module (or object) with functions marked ``@spiking_lm.hookimpl``, found through the entry-point group
``spiking_lm``. Each function receives ``register`` and calls it with frozen records from :mod:`spiking_lm.records`.
A hook may be called for a listing only: it registers and does nothing else. docs/hooks has a page with the targets of
each example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("spiking_lm")
hookimpl = pluggy.HookimplMarker("spiking_lm")

Register = Callable[[Any], None]


@hookspec
def spiking_lm_models(register: Register) -> None:
    """Offer language models, for ``create_model``, recipes and checkpoints.

    >>> from spiking_lm.records import ModelSpec
    >>> @hookimpl
    ... def spiking_lm_models(register):
    ...     register(ModelSpec(name="tiny", config="demo.config:TinyConfig", factory="demo.model:Tiny"))
    """


@hookspec
def spiking_lm_neurons(register: Register) -> None:
    """Offer neurons, for ``create_neuron`` and the ``neuron`` of any model.

    >>> from spiking_lm.records import NeuronSpec
    >>> @hookimpl
    ... def spiking_lm_neurons(register):
    ...     register(NeuronSpec(name="leaky", config="demo.config:LeakyConfig", factory="demo.neuron:Leaky"))
    """


@hookspec
def spiking_lm_kernels(register: Register) -> None:
    """Offer implementations of a declared op; the best that fits the machine and the arguments runs.

    >>> from spiking_lm.records import KernelSpec
    >>> @hookimpl
    ... def spiking_lm_kernels(register):
    ...     register(KernelSpec(name="lif_scan/demo", implementation="demo.kernel:lif_scan", priority=-1))
    """


@hookspec
def spiking_lm_backends(register: Register) -> None:
    """Offer hardware backends, for ``lower`` and the ``deploy`` stage of recipes.

    >>> from spiking_lm.records import BackendSpec
    >>> @hookimpl
    ... def spiking_lm_backends(register):
    ...     register(
    ...         BackendSpec(
    ...             name="table",
    ...             config="demo.config:TableConfig",
    ...             lower="demo.lower:lower",
    ...             program="demo.program:TableProgram",
    ...         )
    ...     )
    """


@hookspec
def spiking_lm_datasets(register: Register) -> None:
    """Offer datasets, for the ``data`` of a recipe.

    >>> from spiking_lm.records import DatasetSpec
    >>> @hookimpl
    ... def spiking_lm_datasets(register):
    ...     register(DatasetSpec(name="diary", config="demo.config:DiaryConfig", factory="demo.data:diary"))
    """


@hookspec
def spiking_lm_tokenizers(register: Register) -> None:
    """Offer tokenizers, for the ``data.tokenizer`` of a recipe.

    >>> from spiking_lm.records import TokenizerSpec
    >>> @hookimpl
    ... def spiking_lm_tokenizers(register):
    ...     register(TokenizerSpec(name="words", config="demo.config:WordsConfig", factory="demo.words:Words"))
    """


@hookspec
def spiking_lm_recipes(register: Register) -> None:
    """Offer recipe files, for ``spiking-lm run NAME``.

    >>> from pathlib import Path
    >>> from spiking_lm.records import RecipeSpec
    >>> @hookimpl
    ... def spiking_lm_recipes(register):
    ...     register(RecipeSpec(name="demo/small", path=Path("small.yaml")))
    """


@hookspec
def spiking_lm_metrics(register: Register) -> None:
    """Offer metrics, computed by every evaluation that they apply to.

    >>> from spiking_lm.records import MetricSpec
    >>> @hookimpl
    ... def spiking_lm_metrics(register):
    ...     register(MetricSpec(name="worst", function="demo.metric:worst"))
    """


@hookspec
def spiking_lm_converters(register: Register) -> None:
    """Offer readers of other tools' checkpoints, for ``spiking-lm convert``.

    >>> from spiking_lm.records import ConverterSpec
    >>> @hookimpl
    ... def spiking_lm_converters(register):
    ...     register(ConverterSpec(name="demo", sniff="demo.convert:sniff", convert="demo.convert:read"))
    """


@hookspec
def spiking_lm_commands(register: Register) -> None:
    """Offer command-line verbs.

    >>> from spiking_lm.records import CommandSpec
    >>> @hookimpl
    ... def spiking_lm_commands(register):
    ...     register(CommandSpec(name="hello", function="demo.cli:hello", summary="Say hello."))
    """


@hookspec
def spiking_lm_benchmarks(register: Register) -> None:
    """Offer benchmarks, for ``spiking-lm bench``.

    >>> from spiking_lm.records import BenchmarkSpec
    >>> @hookimpl
    ... def spiking_lm_benchmarks(register):
    ...     register(BenchmarkSpec(name="demo/sum", function="demo.bench:bench_sum"))
    """


@hookspec
def spiking_lm_doctor(register: Register) -> None:
    """Offer health checks, for ``spiking-lm doctor``.

    >>> from spiking_lm.records import DoctorSpec
    >>> @hookimpl
    ... def spiking_lm_doctor(register):
    ...     register(DoctorSpec(name="board", function="demo.checks:board"))
    """
