"""Kernels for GPUs, written in Triton: chosen where tensors are on a GPU, refused with a reason where they are not."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import BenchmarkSpec, KernelSpec

SPIKING_LM_API = 1

PRIORITY = 30


@hookimpl
def spiking_lm_kernels(register: Register) -> None:
    for op, target, supports, summary in (
        ("lif_scan", "lif", "supports", "leaky integrate-and-fire in one pass, membranes computed anew backward"),
        ("wkv", "wkv", "supports", "the RWKV-4 recurrence in one pass, sums computed anew backward"),
        ("egru_scan", "egru", "supports", "event-based gated recurrent units: one product and one kernel per step"),
        ("gif_linear", "gif", "supports", "integrate-and-fire counts: quantised in one kernel, and so is the gradient"),
        ("spike_linear", "linear", "supports", "products by the weight rows of active sources"),
        ("int8_linear", "linear", "supports", "products of few rows with int8 weights"),
        ("ternary_linear", "linear", "supports", "products of few rows with ternary weights in two bits"),
        ("packed_linear", "linear", "supports_packed_linear", "ternary weights times packed spikes by counting bits"),
        ("pack_spikes", "linear", "supports_pack_spikes", "spikes as bits"),
    ):
        register(
            KernelSpec(
                name=f"{op}/triton",
                summary=f"on GPUs: {summary}",
                implementation=f"spiking_lm_triton.{target}:{op}",
                available="spiking_lm_triton.machine:available",
                supports=f"spiking_lm_triton.{target}:{supports}",
                priority=PRIORITY,
                extra="triton",
                requires=("triton",),
            )
        )


@hookimpl
def spiking_lm_benchmarks(register: Register) -> None:
    for op in (
        "lif_scan", "wkv", "egru_scan", "spike_linear", "packed_linear", "ternary_linear", "int8_linear",
        "gif_linear", "gif_int8_linear",
    ):  # fmt: skip
        register(
            BenchmarkSpec(
                name=f"triton/{op}",
                summary=f"{op} by Triton against torch on the same GPU",
                function=f"spiking_lm_triton.bench:{op}",
                device="cuda",
                extra="triton",
                requires=("triton",),
            )
        )
