"""SpikeLLM (Xing et al., arXiv 2407.04752): Llama-family models converted to Generalized Integrate-and-Fire spikes."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import BenchmarkSpec, ConverterSpec, ModelSpec

SPIKING_LM_API = 1


@hookimpl
def spiking_lm_models(register: Register) -> None:
    register(
        ModelSpec(
            name="spikellm",
            summary="a Llama-family transformer whose activations are spike counts (SpikeLLM)",
            config="spiking_lm_spikellm.config:SpikeLLMConfig",
            factory="spiking_lm_spikellm.model:SpikeLLM",
            paper="https://arxiv.org/abs/2407.04752",
        )
    )


@hookimpl
def spiking_lm_converters(register: Register) -> None:
    register(
        ConverterSpec(
            name="spikellm",
            summary="Llama, Mistral and Qwen2 models: Hugging Face folders and GGUF files",
            sniff="spiking_lm_spikellm.sources:sniff",
            convert="spiking_lm_spikellm.sources:convert",
            tokenizer="spiking_lm_spikellm.sources:tokenizer",
            config="spiking_lm_spikellm.conversion_config:SpikeLLMConversion",
            calibrate="spiking_lm_spikellm.pipeline:calibrate",
            outline="spiking_lm_spikellm.pipeline:outline",
        )
    )


@hookimpl
def spiking_lm_benchmarks(register: Register) -> None:
    register(
        BenchmarkSpec(
            name="spikellm/forward",
            summary="forward passes in spike counts of 4 bits, against the float model",
            function="spiking_lm_spikellm.bench:forward",
        )
    )
    register(
        BenchmarkSpec(
            name="spikellm-memory/synthetic",
            summary="peak memory of converting a synthetic Llama of 1.1 billion parameters (2.2 GB of disk, minutes)",
            function="spiking_lm_spikellm.bench_memory:memory",
            on_request=True,
        )
    )
