"""``lif_scan`` on GPUs: one pass over the input forward, and two backward that keep no membranes.

Forward, a membrane is put down every ``CHUNK`` steps; backward, the ones between are computed anew, chunk by chunk.
Per element and step that is 4 / CHUNK bytes instead of 4. Multiplications and additions are not fused, so that
membranes and spikes are those of the reference to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spiking_lm.config import SurrogateConfig
from spiking_lm_triton.device import lif as device
from spiking_lm_triton.machine import operator, stages, takes
from spiking_lm_triton.sizes import CHUNK, cut

BLOCK, WARPS = 64, 1
"""Neurons of a program, and its warps: so a thread has two, and copies both at once."""
KINDS = {"atan": 0, "fast_sigmoid": 1, "sigmoid": 2, "triangle": 3}


def supports(x: Tensor, v0: Tensor | None = None, **_: Any) -> bool | str:
    """Say whether :func:`lif_scan` takes these inputs, or why not."""
    return takes(x, v0)


def lif_scan(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    beta: float,
    gain: float,
    threshold: float,
    v_reset: float | None = 0.0,
    compare: str = ">=",
    surrogate: SurrogateConfig,
    detach_reset: bool = False,
    final_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run leaky integrate-and-fire neurons over time; see :func:`spiking_lm.kernels.lif_scan`."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or (v0 is not None and v0.requires_grad))
    spikes, v, _ = _forward(
        x, v0, beta, gain, threshold, v_reset, compare == ">", final_only, False, recorded,
        KINDS[surrogate.name], surrogate.alpha, detach_reset,
    )  # fmt: skip
    return spikes, v


def lif_scan_packed(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    beta: float,
    gain: float,
    threshold: float,
    v_reset: float | None = 0.0,
    compare: str = ">=",
) -> tuple[Tensor, Tensor]:
    """Run the neurons of ``x (T, ..., N)`` and return ``(words (T, ..., ceil(N / 32)) int32, v (..., N))``.

    Bit j of word i is the spike of neuron 32 i + j, as the packed products read them; ``v`` is the last membrane. No
    gradient is recorded. A membrane that is not finite shows in ``v``, not in the words.
    """
    with torch.no_grad():
        words, v, _ = _forward(x, v0, beta, gain, threshold, v_reset, compare == ">", True, True, False, 0, 1.0, True)
    return words, v


def _three(x: Tensor) -> tuple[Tensor, int, int]:
    """Return ``x`` as (T, outer, inner) without a copy where its strides allow, and the two sizes."""
    if x.dim() == 1:
        x = x[:, None, None]
    elif x.dim() == 2:
        x = x.unsqueeze(1)
    elif x.dim() > 3:
        x = x.flatten(1, -2)
    return x, x.shape[1], x.shape[2]


@operator("lif_forward")
def _forward(
    x: Tensor,
    v0: Tensor | None,
    beta: float,
    gain: float,
    threshold: float,
    v_reset: float | None,
    strict: bool,
    final_only: bool,
    packed: bool,
    marked: bool,
    kind: int,
    alpha: float,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    spikes, v, marks = _results(x, final_only, packed, marked)
    source, outer, inner = _three(x)
    if x.numel() == 0:
        if final_only:
            v.zero_() if v0 is None else v.copy_(v0)
        return spikes, v, marks
    drift = 0.0 if v_reset is None else (1 - beta) * v_reset
    start = None if v0 is None else v0.contiguous()
    device.lif_forward[(cut(inner, BLOCK) * outer,)](
        source, x if start is None else start, spikes, v, marks,
        x.shape[0], outer, inner, cut(inner, 32), *source.stride(), beta, gain, drift, threshold, v_reset or 0.0,
        STARTED=start is not None, PACKED=packed, EVERY_V=not final_only, MARK=marked, STRICT=strict,
        SOFT=v_reset is None, CHUNK=CHUNK, BLOCK=BLOCK, STAGES=stages(), num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return spikes, v, marks


def _results(x: Tensor, final_only: bool, packed: bool, marked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for spikes, membranes and marks."""
    spikes = x.new_empty((*x.shape[:-1], cut(x.shape[-1], 32)), dtype=torch.int32) if packed else x.new_empty(x.shape)
    v = x.new_empty(x.shape[1:] if final_only else x.shape, dtype=torch.float32)
    marks = x.new_empty((cut(x.shape[0], CHUNK) if marked else 0, *x.shape[1:]), dtype=torch.float32)
    return spikes, v, marks


@_forward.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, _, _, _, final_only, packed, marked, *_ = args
    return _results(x, final_only, packed, marked)


@operator("lif_backward")
def _backward(
    x: Tensor,
    marks: Tensor,
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    beta: float,
    gain: float,
    threshold: float,
    v_reset: float | None,
    strict: bool,
    final_only: bool,
    kind: int,
    alpha: float,
    detach: bool,
) -> tuple[Tensor, Tensor]:
    g_x, g_v0 = x.new_empty(x.shape), x.new_zeros(x.shape[1:], dtype=torch.float32)
    source, outer, inner = _three(x)
    if x.numel() == 0:
        if final_only and g_v is not None:
            g_v0.copy_(g_v)
        return g_x, g_v0
    scratch = x.new_empty((min(CHUNK, x.shape[0]), outer, inner), dtype=torch.float32)
    drift = 0.0 if v_reset is None else (1 - beta) * v_reset
    from_spikes, from_v = (g_x if g is None else g.contiguous() for g in (g_spikes, g_v))
    device.lif_backward[(cut(inner, BLOCK) * outer,)](
        source, marks, scratch, from_spikes, from_v, g_x, g_v0,
        x.shape[0], outer, inner, *source.stride(), beta, gain, drift, threshold, v_reset or 0.0, alpha,
        FROM_SPIKES=g_spikes is not None, FROM_V=g_v is not None, EVERY_V=not final_only, STRICT=strict,
        SOFT=v_reset is None, DETACH=detach, KIND=kind, CHUNK=CHUNK, BLOCK=BLOCK, STAGES=stages(), num_warps=WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return g_x, g_v0


@_backward.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1:], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, v0, *numbers = inputs
    ctx.save_for_backward(x, output[2])
    ctx.start = None if v0 is None else v0.dtype
    beta, gain, threshold, v_reset, strict, final_only, _, _, *surrogate = numbers
    ctx.options = beta, gain, threshold, v_reset, strict, final_only, *surrogate
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, g_spikes: Tensor | None, g_v: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, marks = ctx.saved_tensors
    g_x, g_v0 = _backward(x, marks, g_spikes, g_v, *ctx.options)
    return g_x, None if ctx.start is None else g_v0.to(ctx.start), *[None] * 11


_forward.register_autograd(_gradients, setup_context=_keep)
