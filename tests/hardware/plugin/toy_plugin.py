"""A third-party plugin with a small recurrent model and a hardware backend that runs it."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import BackendSpec, ModelSpec


@hookimpl
def spiking_lm_models(register: Register) -> None:
    register(ModelSpec(name="toy", config="toy_config:ToyConfig", factory="toy_model:Toy"))


@hookimpl
def spiking_lm_backends(register: Register) -> None:
    register(
        BackendSpec(
            name="toy", config="toy_config:ToyChipConfig", lower="toy_lower:lower", program="toy_program:ToyProgram"
        )
    )
