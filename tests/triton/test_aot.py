"""Kernels are compiled for GPUs that are not here: nothing spills, all fits, and the assembly says what is meant.

Run in a process of its own (``test_processes.py``). What is compiled is what the host code would launch for the tensors
of the test, by Triton's own rules of specialisation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from triton_aot import COMPILING, MOST_SHARED, TARGETS, Compiled

from spiking_lm.config import SurrogateConfig

if not COMPILING:
    pytest.skip("needs a process of its own: test_processes.py starts it", allow_module_level=True)

from spiking_lm_triton import lif, wkv

Compile = Callable[..., list[Compiled]]
DTYPES = (torch.float32, torch.bfloat16)
LIF = {"beta": 0.5, "gain": 0.5, "threshold": 1.0}


def _sound(kernels: list[Compiled], names: set[str], *, registers: int = 128, shared: int = 48 << 10) -> None:
    """Check that these kernels, and no others, were compiled for every target, spill nothing and fit."""
    assert {(k.kernel, k.target) for k in kernels} == {(name, target) for name in names for target in TARGETS}
    for k in kernels:
        assert k.spilled == 0, f"{k.name} spills {k.spilled}"
        assert 0 < k.registers <= registers, f"{k.name} takes {k.registers} registers"
        assert k.shared <= min(shared, MOST_SHARED[k.target]), f"{k.name} takes {k.shared} bytes of shared memory"


def _says(kernels: list[Compiled], kernel: str, *patterns: str, vendor: str = "sm_") -> None:
    """Check that the assembly of ``kernel`` has every pattern, on all targets of the vendor."""
    chosen = [k for k in kernels if k.kernel == kernel and k.target.startswith(vendor)]
    assert chosen
    for k in chosen:
        for pattern in patterns:
            assert re.search(pattern, k.assembly), f"{k.name} has no {pattern}"


def _backward(outputs: Any) -> None:
    torch.autograd.backward(
        [o for o in outputs if o.requires_grad], [torch.ones_like(o) for o in outputs if o.requires_grad]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["atan", "fast_sigmoid", "sigmoid", "triangle"])
def test_lif(compiled: Compile, name: Any, dtype: torch.dtype) -> None:
    soft = name in ("sigmoid", "triangle")

    def call() -> None:
        x = torch.empty(70, 2, 128, dtype=dtype, requires_grad=True)
        v0 = torch.empty(2, 128, requires_grad=True)
        _backward(
            lif.lif_scan(
                x,
                v0,
                **LIF,
                v_reset=None if soft else 0.0,
                surrogate=SurrogateConfig(name=name),
                detach_reset=name == "triangle",
                compare=">" if soft else ">=",
                final_only=not soft,
            )
        )

    found = compiled(call)
    _sound(found, {"lif_forward", "lif_backward"}, registers=64)
    # Inputs are on their way several steps ahead, two neurons of a thread in one access; nothing waits for memory.
    each = 2 * dtype.itemsize
    for kernel in ("lif_forward", "lif_backward"):
        _says(found, kernel, rf"cp\.async\.ca\.shared\.global .*, 0x{each:x}\b", r"st\.global\.(v2\.b32|b32)")
        _says(found, kernel, r"buffer_load_", r"buffer_store_", vendor="gfx")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wkv(compiled: Compile, dtype: torch.dtype) -> None:
    def call() -> None:
        inputs = [torch.empty(64, requires_grad=True) for _ in range(2)]
        inputs += [torch.empty(2, 70, 64, requires_grad=True, dtype=dtype) for _ in range(2)]
        y, (p, q, _) = wkv.wkv(*inputs, tuple(torch.empty(2, 64, requires_grad=True) for _ in range(3)))
        _backward((y, p, q))

    found = compiled(call)
    _sound(found, {"wkv_forward", "wkv_backward"}, registers=96)
    for kernel in ("wkv_forward", "wkv_backward"):
        _says(found, kernel, r"cp\.async\.ca\.shared\.global", r"ex2\.approx", r"st\.global")
        _says(found, kernel, r"v_exp_f32", vendor="gfx")
