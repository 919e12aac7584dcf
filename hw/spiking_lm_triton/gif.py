"""``gif_linear`` on GPUs: a token is put on its grid in one kernel, and so is its gradient.

The product with real weights is torch's. Where weights are int8 codes too, :func:`gif_int8_linear` multiplies whole
numbers with whole numbers on tensor cores, exactly, and scales the sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spiking_lm.errors import UsageError
from spiking_lm.gif import levels
from spiking_lm.kernels.ops import check_charges
from spiking_lm.schemes import OFF, ActivationScheme
from spiking_lm_triton.device import gif as device
from spiking_lm_triton.machine import operator, stages, takes
from spiking_lm_triton.sizes import cut, power

MOST_BLOCK, WARPS = 1024, 4
"""Channels of a token that are looked at together at most, and warps of a program."""
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4}
LARGE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}
TWICE = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}
"""Tiles of the int8 product: for few tokens, for many, and for many with salient channels, whose sums are apart."""
FEW = 64
"""Tokens up to which it is the small tile."""
MOST_CODE = 127


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    salient: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    mode: str = "fake",
) -> bool | str:
    """Say whether :func:`gif_linear` takes these inputs, or why not."""
    if mode != "fake" and scheme.bits < OFF:
        return f"mode={mode!r} shows what other hardware does, step by step: torch does that"
    if salient is not None and salient.dim() != 1:
        return "salient channels must be the same for all tokens"
    real = takes(x, weight, bias)
    return takes(x, salient, scale, dtypes=None) if real is True else real


def gif_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    salient: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    mode: str = "fake",
) -> Tensor:
    """Multiply Generalized Integrate-and-Fire spikes with a matrix; see :func:`spiking_lm.kernels.gif_linear`."""
    if scheme.bits < OFF:
        tops = levels(scheme), levels(scheme, salient=salient is not None)
        x = _quantize(x, salient, scale, *tops)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def gif_int8_linear(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    salient: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Multiply spikes of ``x (..., C)`` with ``codes (O, C)`` int8 that have ``weight_scale (O,)``; return (..., O).

    It is ``gif_linear(x, codes * weight_scale[:, None], ...)`` with sums of whole numbers, hence exact but for the
    scaling at the end. No gradient is recorded. Raises: UsageError when a count does not fit in int8: signed spikes of
    at most 7 bits do, over all their steps.
    """
    check_charges("gif_int8_linear", x, scheme, salient, scale)
    if codes.dim() != 2 or codes.dtype != torch.int8 or codes.shape[1] != x.shape[-1]:
        raise UsageError(
            f"gif_int8_linear: x {tuple(x.shape)} needs int8 codes (O, C), not {codes.dtype} {tuple(codes.shape)}"
        )
    tops = levels(scheme), levels(scheme, salient=salient is not None)
    if max(tops) > MOST_CODE:
        raise UsageError(
            f"gif_int8_linear: counts reach {max(tops)}, and int8 ends at {MOST_CODE}",
            hint="fewer bits, or fewer steps of salient channels",
        )
    rows = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        y: Tensor = _int8(rows, codes, weight_scale, bias, salient, scale, *tops, scheme.spikes == "signed")
    return y.view(*x.shape[:-1], codes.shape[0])


def _launch(kernel: Any, x: Tensor, salient: Tensor | None, scale: Tensor | None, *args: Any, **options: Any) -> None:
    """Run a kernel with a program for each token."""
    fixed = x if scale is None else scale.detach().float().contiguous()
    mask = x if salient is None else salient.to(torch.int8)
    kernel[(x.shape[0],)](
        x, fixed, mask, *args, STATIC=scale is not None, SALIENT=salient is not None,
        BLOCK=min(power(x.shape[1]), MOST_BLOCK), num_warps=WARPS, **options,
    )  # fmt: skip


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


@operator("gif_quantize")
def _quantize(x: Tensor, salient: Tensor | None, scale: Tensor | None, top: int, fine_top: int) -> Tensor:
    out = x.new_empty(x.shape)
    if x.numel():
        rows = _tokens(x)
        _launch(
            device.gif_quantize, rows, salient, scale, out, rows, x.shape[-1], float(top), float(fine_top),
            CODES=False, SIGNED=True,
        )  # fmt: skip
    return out


@_quantize.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@operator("gif_quantize_backward")
def _pull_back(g: Tensor, x: Tensor, salient: Tensor | None, scale: Tensor | None, top: int, fine_top: int) -> Tensor:
    out = x.new_empty(x.shape)
    if x.numel():
        rows = _tokens(x)
        _launch(device.gif_pull_back, rows, salient, scale, _tokens(g), out, x.shape[-1], float(top), float(fine_top))
    return out


@_pull_back.register_fake
def _(g: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, salient, scale, *ctx.tops = inputs
    ctx.save_for_backward(x, salient, scale)


def _gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return _pull_back(g, *ctx.saved_tensors, *ctx.tops), None, None, None, None


_quantize.register_autograd(_gradients, setup_context=_keep)


@operator("gif_int8")
def _int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    salient: Tensor | None,
    scale: Tensor | None,
    top: int,
    fine_top: int,
    signed: bool,
) -> Tensor:
    (rows, channels), targets = x.shape, weight.shape[0]
    out = x.new_empty((rows, targets))
    if not out.numel():
        return out
    x = x.contiguous()
    codes, tokens = x.new_empty(x.shape, dtype=torch.int8), x.new_empty((rows, 4), dtype=torch.float32)
    _launch(
        device.gif_quantize, x, salient, scale, codes, tokens, channels, float(top), float(fine_top),
        CODES=True, SIGNED=signed,
    )  # fmt: skip
    tile = SMALL if rows <= FEW else LARGE if salient is None else TWICE
    device.gif_product[(cut(rows, tile["BLOCK_M"]), cut(targets, tile["BLOCK_N"]))](
        codes, tokens, weight.contiguous(), weight_scale.contiguous(),
        codes if salient is None else salient.to(torch.int8), weight_scale if bias is None else bias.contiguous(),
        out, rows, channels, targets, SALIENT=salient is not None, BIASED=bias is not None,
        num_stages=stages(3, 2), **tile,
    )  # fmt: skip
    return out


@_int8.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))
