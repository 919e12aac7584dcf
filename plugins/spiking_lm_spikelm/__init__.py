"""SpikeLM (Xing et al., arXiv 2406.03287): BERT and a causal language model on elastic bi-spiking neurons."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import BenchmarkSpec, ConverterSpec, ModelSpec, NeuronSpec

if TYPE_CHECKING:
    from spiking_lm_spikelm.neuron import Elastic, SnnTorchElastic

SPIKING_LM_API = 1

__all__ = ["Elastic", "SnnTorchElastic"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("spiking_lm_spikelm.neuron"), name)
    raise AttributeError(f"module 'spiking_lm_spikelm' has no attribute {name!r}")


@hookimpl
def spiking_lm_models(register: Register) -> None:
    register(
        ModelSpec(
            name="spikelm",
            summary="BERT, or a causal model, whose matrices read elastic ternary spikes (SpikeLM)",
            config="spiking_lm_spikelm.config:SpikeLMConfig",
            factory="spiking_lm_spikelm.model:SpikeLM",
            importer="spiking_lm_spikelm.reference:import_reference",
            paper="https://arxiv.org/abs/2406.03287",
            capabilities=frozenset({"lm", "encode", "mlm", "classify"}),
        )
    )
    register(
        ModelSpec(
            name="spikelm-seq2seq",
            summary="an encoder and a decoder of SpikeLM's blocks, from a source to a target",
            config="spiking_lm_spikelm.config:SpikeLMSeq2SeqConfig",
            factory="spiking_lm_spikelm.seq2seq:SpikeLMSeq2Seq",
            paper="https://arxiv.org/abs/2406.03287",
            capabilities=frozenset({"seq2seq"}),
        )
    )


@hookimpl
def spiking_lm_neurons(register: Register) -> None:
    register(
        NeuronSpec(
            name="elastic",
            summary="ternary spikes whose size and threshold follow the scale of the currents",
            config="spiking_lm_spikelm.neuron_config:ElasticConfig",
            factory="spiking_lm_spikelm.neuron:Elastic",
            spike_kind="graded",
        )
    )


@hookimpl
def spiking_lm_converters(register: Register) -> None:
    register(
        ConverterSpec(
            name="spikelm",
            summary="BERT (Hugging Face folders, state dicts) and released SpikeLM checkpoints",
            sniff="spiking_lm_spikelm.bert:sniff",
            convert="spiking_lm_spikelm.bert:convert",
            tokenizer="spiking_lm_spikelm.bert:tokenizer",
        )
    )


@hookimpl
def spiking_lm_benchmarks(register: Register) -> None:
    for name, summary in (
        ("neuron", "elastic neurons over four steps, forward and back, against snnTorch's Leaky"),
        ("train", "a training step with four spike steps, against snnTorch's Leaky stepped in Python"),
    ):
        register(BenchmarkSpec(name=f"spikelm/{name}", summary=summary, function=f"spiking_lm_spikelm.bench:{name}"))
