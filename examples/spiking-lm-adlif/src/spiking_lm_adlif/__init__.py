"""Adaptive-threshold LIF neurons for spiking-lm."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import NeuronSpec

SPIKING_LM_API = 1


@hookimpl
def spiking_lm_neurons(register: Register) -> None:
    """Register the neuron; the targets are imported when somebody uses it."""
    register(
        NeuronSpec(
            name="adlif",
            summary="LIF with an adaptive threshold of learned strength (Bellec et al. 2018)",
            config="spiking_lm_adlif.config:AdLIFConfig",
            factory="spiking_lm_adlif.neuron:AdLIF",
        )
    )
