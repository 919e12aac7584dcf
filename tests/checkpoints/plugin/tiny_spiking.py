"""A third-party plugin with the smallest model that has what can go wrong on disk: ties, buffers, several dtypes."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import ModelSpec, NeuronSpec


@hookimpl
def spiking_lm_models(register: Register) -> None:
    register(
        ModelSpec(name="tiny", config="tiny_model:TinyConfig", factory="tiny_model:Tiny", importer="tiny_model:read")
    )


@hookimpl
def spiking_lm_neurons(register: Register) -> None:
    register(NeuronSpec(name="tiny", config="spiking_lm.config:LIFConfig", factory="spiking_lm.neurons:LIF"))
