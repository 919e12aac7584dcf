"""Activations as counts of Generalized Integrate-and-Fire spikes (Xing et al., arXiv 2407.04752).

A token's channels are charged with whole numbers, on a grid of the token's own: with its least value m, its range r and
L = 2^bits - 1 spikes per step::

    scale = r / (T L)      zero = round(-m / scale)      code = clamp(round(x / scale) + zero, 0, T L)
    x ~ (code - zero) scale

Ordinary channels have T = 1 step, salient ones more, so that their grid is T times as fine. A neuron that holds a code
emits at most L of it per step, or one of it per sub-step; so three views compute the same:

* ``fake``: the value (code - zero) scale, as :func:`gif_quantize` gives it, in one product;
* ``spike``: :func:`gif_spikes`, T steps of whole numbers of at most L in size, whose products are scaled and added;
* ``binary``: :func:`gif_substeps`, T L sub-steps of nothing but 0 and 1 (and -1 with signed spikes).

What differs from the paper's released code, and only for tokens that it loses: a token whose channels all have one
value comes back exactly, and neither scale nor zero is clamped to 1e4. The floor of the scale, 1e-5, is the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.errors import UsageError
from spiking_lm.schemes import OFF, ActivationScheme

SCALE_FLOOR = 1e-5
"""The least scale of a token that is not constant, as in the released code."""


def levels(scheme: ActivationScheme, *, salient: bool = False) -> int:
    """Return the greatest code of an ordinary or of a salient channel."""
    step: int = 2**scheme.bits - 1
    if not salient or scheme.salient is None:
        return step
    steps = scheme.salient.steps
    return steps * step if scheme.grid == "exact" else steps * 2**scheme.bits - 1


class Grid(NamedTuple):
    """Where a token's counts lie: value = (code - zero) scale with 0 <= code <= top."""

    scale: Tensor
    zero: Tensor
    """A whole number; beyond the codes where a token's range does not reach 0."""
    top: int


def gif_quantize(
    x: Tensor, scheme: ActivationScheme, salient: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Return the values that spikes can carry, next to ``x (..., C)`` and of its shape and dtype: the view ``fake``.

    ``salient`` is bool, ``(C,)`` or whatever broadcasts with ``x``, True where a channel has the salient steps; None:
    nowhere. ``scale`` is None for a grid per token, else what :func:`calibrate_scale` saw: the grid of all tokens.
    Gradients are those of the released code: identity through the rounding, but none at the first and the last code,
    where it is clamped; through a dynamic scale to the token's least and greatest value; none through ``zero``, nor to
    a static scale.
    With 16 bits this is ``x`` itself.
    """
    if scheme.bits >= OFF:
        return x
    _check(x, scheme, salient, scale)
    if torch.is_grad_enabled() and x.requires_grad:
        quantized: Tensor = _Quantize.apply(x, scheme, salient, scale)
        return quantized
    return _quantized(_at_least_float32(x), scheme, salient, scale).to(x.dtype)


def _check(x: Tensor, scheme: ActivationScheme, salient: Tensor | None, scale: Tensor | None) -> None:
    if not x.dtype.is_floating_point or x.dim() == 0 or x.shape[-1] == 0:
        raise UsageError(f"activations must be a floating-point tensor (..., C), not {x.dtype} {tuple(x.shape)}")
    if salient is not None:
        if scheme.salient is None:
            raise UsageError("salient channels were given, but the scheme of the activations has none")
        if salient.dtype != torch.bool or (salient.dim() == 1 and salient.shape != x.shape[-1:]):
            raise UsageError(
                f"salient must be bool ({x.shape[-1]},), one per channel, not {salient.dtype} {tuple(salient.shape)}"
            )
    if (scale is None) != (scheme.scale == "dynamic"):
        raise UsageError(
            f"the activations' scheme has a {scheme.scale} scale, but {'no' if scale is None else 'a'} scale was given",
            hint="calibrate_scale finds the static scale of a layer on text",
        )
    if scale is not None and scale.shape != (2,):
        raise UsageError(f"a static scale is the least and the greatest value, (2,), not {tuple(scale.shape)}")


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _limits(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value that share a grid, broadcasting with ``x``."""
    if scale is not None:
        least, greatest = scale.to(x).unbind()
        return least, greatest
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # aminmax is 20 times slower than both of them


def _grid(limits: tuple[Tensor, Tensor], top: int) -> Grid:
    least, greatest = limits
    span = greatest - least
    # Where all is one value c, the scale is |c|, which c is exactly once.
    floor = torch.where(span > 0, SCALE_FLOOR, least.abs().clamp_min_(torch.finfo(least.dtype).tiny))
    scale = torch.maximum(span / top, floor)
    return Grid(scale, (least / scale).neg_().round_(), top)


def _whole(x: Tensor, grid: Grid, *, static: bool) -> Tensor:
    """Return code - zero as real numbers, in memory of its own."""
    y = (x / grid.scale).round_()
    torch.minimum(y, grid.top - grid.zero, out=y)  # a dynamic range is left at the top too, where both ends round up
    if static:
        torch.maximum(y, -grid.zero, out=y)
    return y


def _quantized(x: Tensor, scheme: ActivationScheme, salient: Tensor | None, scale: Tensor | None) -> Tensor:
    static, limits = scale is not None, _limits(x, scale)
    grid = _grid(limits, levels(scheme))
    values = _whole(x, grid, static=static).mul_(grid.scale)
    if salient is None:
        return values
    fine, place = _grid(limits, levels(scheme, salient=True)), _place(salient)
    return _put(values, place, _whole(_pick(x, place), fine, static=static).mul_(fine.scale))


# Salient channels are few: on a CPU their columns are taken out, computed apart and put back, as whole tensors of two
# scales would cost more than all the rest. A mask of several dimensions, and one on a GPU, which would have to wait for
# the number of channels, is computed everywhere and chosen from.


def _place(salient: Tensor) -> Tensor:
    """Return where the salient channels are: their indices, or the mask itself."""
    return salient.nonzero()[:, 0] if salient.dim() == 1 and salient.device.type == "cpu" else salient


def _pick(x: Tensor, place: Tensor) -> Tensor:
    return x if place.dtype == torch.bool else x.index_select(-1, place)


def _put(target: Tensor, place: Tensor, picked: Tensor) -> Tensor:
    """Return ``target``, which may be overwritten, with ``picked`` in the salient places."""
    if place.dtype == torch.bool:
        return torch.where(place, picked, target)
    return target.scatter_(-1, place.expand_as(picked), picked)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: ActivationScheme, salient: Tensor | None, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, salient, scale)
        ctx.scheme = scheme
        return _quantized(_at_least_float32(x), scheme, salient, scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, salient, scale = ctx.saved_tensors
        values = _at_least_float32(x)
        g, limits, static = grads[0].to(values.dtype), _limits(values, scale), scale is not None
        gx, per_span = _pull_back(values, g, _grid(limits, levels(ctx.scheme)), static=static)
        if salient is not None:
            place, fine = _place(salient), _grid(limits, levels(ctx.scheme, salient=True))
            gx_picked, per_span_picked = _pull_back(_pick(values, place), _pick(g, place), fine, static=static)
            gx = _put(gx, place, gx_picked)
            per_span = _put(per_span, place, per_span_picked)
        if not static:
            g_span = per_span.sum(-1, keepdim=True)
            least, greatest = limits
            flat = least == greatest
            for limit, sign in ((greatest, 1), (least, -1)):
                here = (values == limit).to(g.dtype)
                gx.addcmul_(here, g_span / here.sum(-1, keepdim=True), value=sign)
            gx = torch.where(flat, g, gx)
        return gx.to(x.dtype), None, None, None


def _pull_back(x: Tensor, g: Tensor, grid: Grid, *, static: bool) -> tuple[Tensor, Tensor]:
    """Return what a gradient ``g`` of the quantised values gives to ``x`` itself, and to the span of its limits.

    With ``inside`` where a code is not clamped: d xhat = inside (dx - x/scale dscale) + (code - zero) dscale, and
    dscale = dspan / top where the scale is not its floor.
    """
    y = _whole(x, grid, static=static)
    charge = x / grid.scale
    code = charge.round().add_(grid.zero)
    inside = ((code > 0) & (code < grid.top)).to(g.dtype)
    factor = (grid.scale > SCALE_FLOOR).to(g.dtype).div_(grid.top)
    return g * inside, y.addcmul_(charge, inside, value=-1).mul_(g).mul_(factor)
