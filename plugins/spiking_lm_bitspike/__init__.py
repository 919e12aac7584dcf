"""The 1 and 1.58-bit spiking language model on SpikingBERT's populations (arXiv 2308.10873 and 2405.02543)."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import BenchmarkSpec, ConverterSpec, ModelSpec

SPIKING_LM_API = 1


@hookimpl
def spiking_lm_models(register: Register) -> None:
    register(
        ModelSpec(
            name="bitspike",
            summary="integrate-and-fire populations trained at their equilibrium, with 1, 1.58 or 32-bit weights",
            config="spiking_lm_bitspike.config:BitspikeConfig",
            factory="spiking_lm_bitspike.model:Bitspike",
            importer="spiking_lm_bitspike.reference:import_reference",
            paper="https://arxiv.org/abs/2405.02543",
            capabilities=frozenset({"lm", "encode", "mlm", "classify"}),
        )
    )


@hookimpl
def spiking_lm_converters(register: Register) -> None:
    register(
        ConverterSpec(
            name="bitspike",
            summary="checkpoints of the released SpikingBERT",
            sniff="spiking_lm_bitspike.reference:is_reference",
            convert="spiking_lm_bitspike.reference:import_reference",
        )
    )


@hookimpl
def spiking_lm_benchmarks(register: Register) -> None:
    register(
        BenchmarkSpec(
            name="bitspike/gap",
            summary="how far spikes are from the equilibrium that is trained, in each mode",
            function="spiking_lm_bitspike.bench:gap",
        )
    )
