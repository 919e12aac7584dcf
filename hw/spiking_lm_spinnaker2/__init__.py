"""SpiNNaker 2: an embedded simulator that is accurate per processing element, and the road to py-spinnaker2."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import BackendSpec, BenchmarkSpec, DoctorSpec

SPIKING_LM_API = 1


@hookimpl
def spiking_lm_backends(register: Register) -> None:
    register(
        BackendSpec(
            name="spinnaker2",
            summary="SpiNNaker 2, by an embedded simulator of its processing elements",
            config="spiking_lm_spinnaker2.config:SpiNNaker2Config",
            lower="spiking_lm_spinnaker2.lower:lower",
            program="spiking_lm_spinnaker2.program:SpiNNaker2Program",
            check="spiking_lm_spinnaker2.lower:check",
        )
    )


@hookimpl
def spiking_lm_benchmarks(register: Register) -> None:
    register(
        BenchmarkSpec(
            name="spinnaker2-paper",
            summary="the published chip point of the event-based GRU (arXiv 2312.09084)",
            function="spiking_lm_spinnaker2.bench:bench_paper",
        )
    )
    register(
        BenchmarkSpec(
            name="spinnaker2-simulator",
            summary="speed of the embedded simulator",
            function="spiking_lm_spinnaker2.bench:bench_simulator",
        )
    )


@hookimpl
def spiking_lm_doctor(register: Register) -> None:
    register(
        DoctorSpec(
            name="py-spinnaker2",
            summary="can LIF networks run on a SpiNNaker 2 chip from here?",
            function="spiking_lm_spinnaker2.native:check_py_spinnaker2",
        )
    )
