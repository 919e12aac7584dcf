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

from spiking_lm.schemes import ActivationScheme, SalientChannels
from spiking_lm_triton import egru, gif, lif, linear, wkv

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lif_packed(compiled: Compile, dtype: torch.dtype) -> None:
    found = compiled(lambda: lif.lif_scan_packed(torch.empty(70, 2, 128, dtype=dtype), **LIF))
    _sound(found, {"lif_forward"}, registers=64)
    assert all(k.constants["PACKED"] for k in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["free", "kept"])
def test_egru(compiled: Compile, keep: bool, dtype: torch.dtype) -> None:
    def call() -> None:
        shapes = (2, 3, 384), (128, 384), (384,), (128,), (3, 128), (3, 128)
        inputs = [torch.zeros(s, dtype=dtype if i == 0 else None, requires_grad=True) for i, s in enumerate(shapes)]
        outputs = egru.egru_scan(*inputs, gamma=0.7, epsilon=1.0, keep=torch.ones(2, 3, 128) if keep else None)
        _backward(outputs if keep else outputs[:1])

    found = compiled(call)
    _sound(found, {"egru_forward", "egru_backward"}, registers=64)
    _says(found, "egru_forward", r"ex2\.approx")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("salient", [False, True], ids=["ordinary", "salient"])
def test_gif(compiled: Compile, salient: bool, dtype: torch.dtype) -> None:
    scheme = ActivationScheme(bits=4, salient=SalientChannels(rate=0.1, steps=2) if salient else None)
    mask = torch.zeros(512, dtype=torch.bool) if salient else None

    def call() -> None:
        x = torch.empty(16, 512, dtype=dtype, requires_grad=True)
        _backward([gif.gif_linear(x, torch.empty(64, 512, dtype=dtype), None, scheme, mask)])

    found = compiled(call)
    _sound(found, {"gif_quantize", "gif_pull_back"}, registers=80)
    _says(found, "gif_quantize", r"div\.rn\.f32", rf"ld\.global\.v{2 if dtype == torch.bfloat16 else 4}\.b32")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("salient", [False, True], ids=["ordinary", "salient"])
@pytest.mark.parametrize("rows", [1, 512])
def test_gif_int8(compiled: Compile, rows: int, salient: bool, dtype: torch.dtype) -> None:
    """Whole numbers are multiplied by tensor cores, in the form that each target has for them."""
    scheme = ActivationScheme(bits=4, salient=SalientChannels(rate=0.1, steps=2) if salient else None)
    mask = torch.zeros(512, dtype=torch.bool) if salient else None
    x, codes = torch.empty(rows, 512, dtype=dtype), torch.empty(256, 512, dtype=torch.int8)
    found = compiled(lambda: gif.gif_int8_linear(x, codes, torch.empty(256), torch.empty(256), scheme, mask))
    _sound(found, {"gif_quantize", "gif_product"}, registers=192, shared=80 << 10)
    (ampere,) = (k for k in found if k.name == "gif_product@sm_80")
    assert re.search(r"mma\.sync\.aligned\.m16n8k32\.row\.col\.(satfinite\.)?s32\.s8\.s8\.s32", ampere.assembly)
    (hopper,) = (k for k in found if k.name == "gif_product@sm_90")
    pattern = r"wgmma\.mma_async.*s32\.s8\.s8" if rows > 64 else r"(wgmma\.mma_async|mma\.sync).*s32\.s8\.s8"
    assert re.search(pattern, hopper.assembly)
    _says(found, "gif_product", r"v_mfma_i32_\d+x\d+x\d+_i8", vendor="gfx")


LINEAR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=str)
@pytest.mark.parametrize("targets", [512, 65536], ids=["in shares", "in one"])
def test_spike_linear(compiled: Compile, targets: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.empty(1, 512, dtype=dtype), torch.empty(512, targets, dtype=dtype), torch.empty(targets)
    found = compiled(lambda: linear.spike_linear(x, weight, bias))
    names = {"compact", "gather"} | ({"combine"} if targets == 512 else set())
    _sound(found, names, registers=96)
    _says(
        found,
        "gather",
        r"ld\.global\.(L1::\S+\.)?v4\.b32" if dtype == torch.float32 else r"ld\.global\.v[24]\.b(32|16)",
    )


@pytest.mark.parametrize("dtype", LINEAR_DTYPES, ids=str)
def test_products_of_one_token(compiled: Compile, dtype: torch.dtype) -> None:
    x, scale, bias = (torch.empty(n, dtype=dtype) for n in ((1, 512), (256,), (256,)))
    planes = torch.empty(2, 256, 16, dtype=torch.int32)

    def call() -> None:
        linear.int8_linear(x, torch.empty(256, 512, dtype=torch.int8), scale, bias)
        linear.ternary_linear(x, planes, scale, bias)

    found = compiled(call)
    _sound(found, {"int8_product", "ternary_product"}, registers=128)
    _says(found, "int8_product", r"ld\.global\.v4\.b32")


@pytest.mark.parametrize("spikes", [1, 2])
def test_packed_products_count_bits(compiled: Compile, spikes: int) -> None:
    s, planes = torch.empty(1, 512, dtype=torch.bfloat16), torch.empty(2, 256, 16, dtype=torch.int32)

    def call() -> None:
        linear.packed_linear(linear.pack_spikes(s, spikes), planes, torch.empty(256), torch.empty(256))

    found = compiled(call)
    _sound(found, {"pack", "packed_product"}, registers=96)
    _says(found, "packed_product", r"popc\.b32", r"ld\.global\.v4\.b32")
    _says(found, "packed_product", r"v_bcnt_u32_b32", vendor="gfx")
