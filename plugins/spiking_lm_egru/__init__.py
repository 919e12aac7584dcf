"""The event-based gated recurrent unit (Subramoney et al., arXiv 2206.06178) and the Norse neurons."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import BenchmarkSpec, ConverterSpec, ModelSpec, NeuronSpec

if TYPE_CHECKING:
    from spiking_lm_egru.functional import EGRUParameters, EGRUState
    from spiking_lm_egru.module import EGRU, EGRUCell

SPIKING_LM_API = 1

_HOMES = {"EGRU": "module", "EGRUCell": "module", "EGRUParameters": "functional", "EGRUState": "functional"}

__all__ = ["EGRU", "EGRUCell", "EGRUParameters", "EGRUState"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"spiking_lm_egru.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'spiking_lm_egru' has no attribute {name!r}")


@hookimpl
def spiking_lm_models(register: Register) -> None:
    register(
        ModelSpec(
            name="egru",
            summary="event-based gated recurrent units, with GRU and LSTM twins",
            config="spiking_lm_egru.config:EGRUConfig",
            factory="spiking_lm_egru.model:EGRULanguageModel",
            importer="spiking_lm_egru.reference:import_reference",
            paper="https://arxiv.org/abs/2206.06178",
        )
    )
    register(
        ModelSpec(
            name="egru-gesture",
            summary="a convolutional network and event-based units that classify clips of events",
            config="spiking_lm_egru.gesture_config:EGRUGestureConfig",
            factory="spiking_lm_egru.gesture:EGRUGesture",
            paper="https://arxiv.org/abs/2206.06178",
            capabilities=frozenset({"clips"}),
        )
    )


@hookimpl
def spiking_lm_converters(register: Register) -> None:
    register(
        ConverterSpec(
            name="egru",
            summary="the released EGRU language models and their GRU and LSTM baselines",
            sniff="spiking_lm_egru.reference:is_reference",
            convert="spiking_lm_egru.reference:import_reference",
        )
    )


@hookimpl
def spiking_lm_neurons(register: Register) -> None:
    for name, cls, summary in (
        ("norse.lif_box", "NorseLIFBox", "Norse's LIFBoxCell: the input charges the membrane"),
        ("norse.lif", "NorseLIF", "Norse's LIFCell: the input charges a synaptic current, and that the membrane"),
    ):
        register(
            NeuronSpec(
                name=name,
                summary=summary,
                config=f"spiking_lm_egru.neuron_config:{cls}Config",
                factory=f"spiking_lm_egru.neurons:{cls}",
                extra="egru",
                requires=("norse",),
            )
        )


@hookimpl
def spiking_lm_benchmarks(register: Register) -> None:
    for name, function, summary in (
        ("egru/train-1x256", "train_1x256", "EGRU in training, one row, against a naive loop, GRU and LSTM"),
        ("egru/train-20x650", "train_20x650", "EGRU in training, 20 rows, against a naive loop, GRU and LSTM"),
        ("egru/decode-dense", "decode_dense", "steps of one stream with dense input, against GRUCell and LSTMCell"),
        ("egru/decode-sparse", "decode_sparse", "steps of one stream with sparse input, against GRUCell and LSTMCell"),
    ):
        register(BenchmarkSpec(name=name, summary=summary, function=f"spiking_lm_egru.bench:{function}"))
