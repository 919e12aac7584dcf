"""Lava: language models as Loihi-style processes, by a bit-exact integer simulator, and by Lava itself in a worker."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import DoctorSpec

SPIKING_LM_API = 1


@hookimpl
def spiking_lm_doctor(register: Register) -> None:
    register(
        DoctorSpec(
            name="lava",
            summary="can networks run in Lava from here?",
            function="spiking_lm_lava.install:check",
            setup="spiking_lm_lava.install:setup",
        )
    )
