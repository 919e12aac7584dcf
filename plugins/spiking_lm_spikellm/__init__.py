"""SpikeLLM (Xing et al., arXiv 2407.04752): Llama-family models converted to Generalized Integrate-and-Fire spikes."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import ModelSpec

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
