"""Kernels for GPUs, written in Triton: chosen where tensors are on a GPU, refused with a reason where they are not."""

from __future__ import annotations

from spiking_lm import hookimpl
from spiking_lm.hookspecs import Register
from spiking_lm.records import KernelSpec

SPIKING_LM_API = 1

PRIORITY = 30


@hookimpl
def spiking_lm_kernels(register: Register) -> None:
    for op, module, summary in (
        ("lif_scan", "lif", "leaky integrate-and-fire over time: one pass on a GPU, membranes computed anew backward"),
        ("wkv", "wkv", "the RWKV-4 recurrence over time: one pass on a GPU, sums computed anew backward"),
    ):
        register(
            KernelSpec(
                name=f"{op}/triton",
                summary=summary,
                implementation=f"spiking_lm_triton.{module}:{op}",
                available="spiking_lm_triton.machine:available",
                supports=f"spiking_lm_triton.{module}:supports",
                priority=PRIORITY,
                extra="triton",
                requires=("triton",),
            )
        )
