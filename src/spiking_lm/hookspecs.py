"""Every hook of spiking-lm, on one screen.

A plugin is a module (or object) with functions marked ``@spiking_lm.hookimpl``, found through the entry-point group
``spiking_lm``. Each function receives ``register`` and calls it with frozen records from :mod:`spiking_lm.records`.
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
    """Offer language models: ``register(ModelSpec(name="mine", config="mine.config:C", factory="mine.model:M"))``."""


@hookspec
def spiking_lm_neurons(register: Register) -> None:
    """Offer neurons: ``register(NeuronSpec(name="adlif", config="adlif:AdLIFConfig", factory="adlif:AdLIF"))``."""


@hookspec
def spiking_lm_kernels(register: Register) -> None:
    """Offer kernels: ``register(KernelSpec(name="lif_scan/mine", implementation="mine:lif_scan", priority=5))``."""


@hookspec
def spiking_lm_datasets(register: Register) -> None:
    """Offer datasets: ``register(DatasetSpec(name="diary", config="mine:DiaryConfig", factory="mine:load_diary"))``."""


@hookspec
def spiking_lm_tokenizers(register: Register) -> None:
    """Offer tokenizers: ``register(TokenizerSpec(name="morse", config="mine:MorseConfig", factory="mine:Morse"))``."""


@hookspec
def spiking_lm_recipes(register: Register) -> None:
    """Offer recipes: ``register(RecipeSpec(name="mine/small", path=Path(__file__).with_name("small.yaml")))``."""


@hookspec
def spiking_lm_metrics(register: Register) -> None:
    """Offer metrics: ``register(MetricSpec(name="top1", function="mine:top1"))``."""


@hookspec
def spiking_lm_converters(register: Register) -> None:
    """Offer converters: ``register(ConverterSpec(name="mine", sniff="mine:is_ours", convert="mine:read"))``."""


@hookspec
def spiking_lm_commands(register: Register) -> None:
    """Offer command-line verbs: ``register(CommandSpec(name="plot", function="mine.cli:plot", summary="Draw it."))``."""


@hookspec
def spiking_lm_doctor(register: Register) -> None:
    """Offer health checks: ``register(DoctorSpec(name="board", function="mine:check_board"))``."""
