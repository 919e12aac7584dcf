"""SpikeGPT (Zhu et al., arXiv 2302.13939) and the snnTorch neurons."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import ConverterSpec, ModelSpec, NeuronSpec

SPIKING_LM_API = 1


@hookimpl
def spiking_lm_models(register: Register) -> None:
    register(
        ModelSpec(
            name="spikegpt",
            summary="RWKV-4 time mixing with binary spikes (SpikeGPT)",
            config="spiking_lm_spikegpt.config:SpikeGPTConfig",
            factory="spiking_lm_spikegpt.model:SpikeGPT",
            importer="spiking_lm_spikegpt.reference:import_reference",
            paper="https://arxiv.org/abs/2302.13939",
            capabilities=frozenset({"lm", "encode", "classify"}),
        )
    )


@hookimpl
def spiking_lm_neurons(register: Register) -> None:
    register(
        NeuronSpec(
            name="snntorch.leaky",
            summary="snnTorch's Leaky, firing at the threshold, gradient through the reset",
            config="spiking_lm.config:LIFConfig",
            factory="spiking_lm_spikegpt.neuron:SnnTorchLeaky",
            extra="spikegpt",
            requires=("snntorch",),
        )
    )


@hookimpl
def spiking_lm_converters(register: Register) -> None:
    register(
        ConverterSpec(
            name="spikegpt",
            summary="the released SpikeGPT checkpoints (.pth, .safetensors)",
            sniff="spiking_lm_spikegpt.reference:is_reference",
            convert="spiking_lm_spikegpt.reference:import_reference",
        )
    )
