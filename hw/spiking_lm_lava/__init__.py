"""Lava: language models as Loihi-style processes, by a bit-exact integer simulator, and by Lava itself in a worker."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import BackendSpec, BenchmarkSpec, DoctorSpec, NeuronSpec

SPIKING_LM_API = 1


@hookimpl
def spiking_lm_backends(register: Register) -> None:
    register(
        BackendSpec(
            name="lava",
            summary="networks of Loihi-style processes, one token a step, by a bit-exact simulator or Lava itself",
            config="spiking_lm_lava.config:LavaConfig",
            lower="spiking_lm_lava.lower:lower",
            program="spiking_lm_lava.program:LavaProgram",
            check="spiking_lm_lava.lower:check",
            calibrates=True,
        )
    )


@hookimpl
def spiking_lm_benchmarks(register: Register) -> None:
    register(
        BenchmarkSpec(
            name="lava-simulator",
            summary="the simulator of Loihi-style processes against Lava, and what starting Lava takes",
            function="spiking_lm_lava.bench:bench_lava",
        )
    )


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


@hookimpl
def spiking_lm_neurons(register: Register) -> None:
    register(
        NeuronSpec(
            name="slayer.cuba",
            summary="lava-dl SLAYER's CUBA neuron: what trains are the integers that run on Loihi",
            config="spiking_lm_lava.slayer_config:SlayerCubaConfig",
            factory="spiking_lm_lava.slayer:SlayerCuba",
        )
    )
