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

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.errors import UsageError
from spiking_lm.kernels.ops import check_charges, check_emittable, gif_linear
from spiking_lm.schemes import OFF, ActivationScheme, CacheScheme, SalientChannels

__all__ = [
    "Counts",
    "TokenCounts",
    "calibrate_scale",
    "gif_encode",
    "gif_encode_tokens",
    "gif_linear",
    "gif_quantize",
    "gif_quantize_tokens",
    "gif_spikes",
    "gif_substeps",
    "levels",
]

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
    """Where a token's values lie: at n scale, with n a whole number, low <= n <= high. The code is n - low."""

    scale: Tensor
    low: Tensor
    high: Tensor


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
    check_charges("gif_quantize", x, scheme, salient, scale)
    if torch.is_grad_enabled() and x.requires_grad:
        quantized: Tensor = _Quantize.apply(x, scheme, salient, scale)
        return quantized
    return _quantized(_at_least_float32(x), scheme, salient, scale).to(x.dtype)


class Counts(NamedTuple):
    """What the neurons of :func:`gif_encode` are charged with: value = (codes - zero) scale."""

    codes: Tensor
    """int32 ``(..., C)``. Unsigned: 0 ... T L. Signed: relative to the code of the real 0, thus at most T L in size."""
    scale: Tensor
    """``(..., 1)``, or with salient channels ``(..., C)``; without these dimensions where the scale is static."""
    zero: Tensor
    """Shaped as ``scale``. Signed: 0 unless the range does not reach 0, then the distance."""

    def decode(self) -> Tensor:
        """Return the values, those of :func:`gif_quantize`, in float32 or float64."""
        return (self.codes.to(self.scale.dtype) - self.zero) * self.scale


def gif_encode(
    x: Tensor, scheme: ActivationScheme, salient: Tensor | None = None, scale: Tensor | None = None
) -> Counts:
    """Return the counts of ``x (..., C)``; the arguments are those of :func:`gif_quantize`. No gradient is recorded."""
    check_charges("gif_encode", x, scheme, salient, scale)
    if scheme.bits >= OFF:
        raise UsageError("gif_encode: 16 bits leave activations real, so that there is nothing to count")
    with torch.no_grad():
        values = _at_least_float32(x)
        static, between = scale is not None, limits(values, scale)
        grid, fine = grids(between, scheme, salient)
        codes, zero = encode(values, grid, scheme, static=static)
        if salient is None:
            return Counts(codes.to(torch.int32), grid.scale, zero)
        place = _place(salient)
        picked, fine_zero = encode(_pick(values, place), fine, scheme, static=static)
        return Counts(
            _put(codes, place, picked).to(torch.int32),
            torch.where(salient, fine.scale, grid.scale),
            torch.where(salient, fine_zero, zero),
        )


def gif_spikes(counts: Counts, scheme: ActivationScheme, salient: Tensor | None = None) -> Tensor:
    """Return the spikes that neurons charged with ``counts`` emit, int32 ``(T, ..., C)``: they sum to the codes.

    T is that of the salient channels, or 1 if ``salient`` is None. A spike is at most 2^bits - 1 in size; ordinary
    channels spike in the first step only. Raises UsageError on the reference grid, whose greatest salient code T steps
    cannot emit.
    """
    check_emittable("gif_spikes", scheme, salient)
    return torch.stack(split_steps(counts.codes, scheme) if salient is not None else [counts.codes])


def split_steps(codes: Tensor, scheme: ActivationScheme) -> list[Tensor]:
    """Return the spikes that the salient steps of the scheme emit, at most 2^bits - 1 in size each."""
    most, rest, steps = 2**scheme.bits - 1, codes, []
    for _ in range(scheme.salient.steps if scheme.salient else 1):
        steps.append(rest.clamp(-most, most))
        rest = rest - steps[-1]
    return steps


def gif_substeps(spikes: Tensor, limit: int) -> Tensor:
    """Return spikes ``(T, ...)`` of at most ``limit`` one by one: int8 ``(T limit, ...)`` of -1, 0 and 1.

    A spike of n is n sub-steps of 1 in a row and silence then; sub-steps of step t are rows t ``limit`` and after.
    """
    k = torch.arange(1, limit + 1, device=spikes.device).view(limit, *[1] * (spikes.dim() - 1))
    emitting = spikes.abs().unsqueeze(1) >= k
    return (emitting * spikes.sign().unsqueeze(1)).to(torch.int8).flatten(0, 1)


def calibrate_scale(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the limits of a static scale, float32 ``(2,)``: the least and the greatest value of ``x``, and 0.

    ``scale`` is what was returned for the texts before. The range always reaches 0, so that signed spikes have no zero
    point, and silence is 0.
    """
    seen = torch.stack([x.detach().amin(), x.detach().amax(), x.new_zeros(())]).float()
    if scale is not None:
        seen = torch.cat([seen, scale])
    return torch.stack([seen.amin(), seen.amax()])


# -- queries, keys and values ------------------------------------------------------------------------------------------

Of = Literal["query", "key", "value"]


def gif_quantize_tokens(x: Tensor, scheme: CacheScheme, salient: Tensor | None = None, *, of: Of) -> Tensor:
    """Return queries, keys or values ``(B, H, S, d)`` as spikes carry them, each token and head on its own grid.

    ``salient (H, d)``, bool, are the salient channels of keys or values. Keys with ``key_range: channel`` have a grid
    per channel over all S tokens instead, so that later tokens change earlier ones. Gradients are those of
    :func:`gif_quantize`.
    """
    activations, mask = _of_tokens(x, scheme, salient, of)
    if of == "key" and scheme.key_range == "channel":
        mask = None if mask is None else mask.transpose(-1, -2)
        return gif_quantize(x.transpose(-1, -2), activations, mask).transpose(-1, -2)
    return gif_quantize(x, activations, mask)


class TokenCounts(NamedTuple):
    """Keys or values as counts, for a cache: from the limits of a token follow both of its grids."""

    codes: Tensor
    """``(B, H, S, d)``, unsigned: uint8 if they fit, else int32."""
    limits: Tensor
    """``(B, H, S, 2)``, float32 or float64: the least and the greatest value of a token and head."""

    def decode(self, scheme: CacheScheme, salient: Tensor | None = None, *, of: Of) -> Tensor:
        """Return what :func:`gif_quantize_tokens` does, bit for bit, in the dtype of the limits."""
        activations, mask = _of_tokens(self.limits, scheme, salient, of)
        least, greatest = self.limits.chunk(2, -1)
        grid, fine = grids((least, greatest), activations, mask)
        codes = self.codes.to(least.dtype)
        values = (codes + grid.low).mul_(grid.scale)
        return values if mask is None else _put(values, mask, codes.add_(fine.low).mul_(fine.scale))


def gif_encode_tokens(x: Tensor, scheme: CacheScheme, salient: Tensor | None = None, *, of: Of) -> TokenCounts:
    """Return keys or values ``(B, H, S, d)`` as counts; see :func:`gif_quantize_tokens`. No gradient is recorded."""
    if of == "key" and scheme.key_range == "channel":
        raise UsageError(
            "keys whose channels share a range over all tokens cannot be kept: the next token may change it",
            hint="set cache.key_range to token",
        )
    activations, mask = _of_tokens(x, scheme, salient, of)
    check_charges("gif_encode_tokens", x, activations, mask, None)
    with torch.no_grad():
        values = _at_least_float32(x)
        between = limits(values, None)
        grid, fine = grids(between, activations, mask)
        codes, _ = encode(values, grid, activations, static=False)
        if mask is not None:
            codes = _put(codes, mask, encode(values, fine, activations, static=False)[0])
        small = levels(activations, salient=mask is not None) <= torch.iinfo(torch.uint8).max
        return TokenCounts(codes.to(torch.uint8 if small else torch.int32), torch.cat(between, -1))


def _of_tokens(
    x: Tensor, scheme: CacheScheme, salient: Tensor | None, of: Of
) -> tuple[ActivationScheme, Tensor | None]:
    """Return the scheme of ``x (B, H, S, ...)`` and the mask of its salient channels, ``(H, 1, d)``."""
    if of == "query":
        if salient is not None:
            raise UsageError("queries have no salient channels")
        return _activations(scheme.query_bits, None, scheme.grid), None
    if salient is not None and (salient.dim() != 2 or salient.shape[0] != x.shape[1]):
        raise UsageError(
            f"salient must be (heads, channels of a head) of {of}s with {x.shape[1]} heads, not {tuple(salient.shape)}"
        )
    return _activations(scheme.bits, scheme.salient, scheme.grid), None if salient is None else salient.unsqueeze(1)


@lru_cache(maxsize=64)  # validating a scheme takes as long as quantising a token
def _activations(bits: int, salient: SalientChannels | None, grid: Literal["exact", "reference"]) -> ActivationScheme:
    return ActivationScheme(bits=bits, salient=salient, grid=grid, spikes="unsigned")


# -- how it is computed ------------------------------------------------------------------------------------------------


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def limits(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value that share a grid, broadcasting with ``x``."""
    if scale is not None:
        least, greatest = scale.to(x).unbind()
        return least, greatest
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # aminmax is 20 times slower than both of them


def grids(between: tuple[Tensor, Tensor], scheme: ActivationScheme, salient: Tensor | None) -> tuple[Grid, Grid]:
    """Return the grids of ordinary and of salient channels, from a least to a greatest value.

    Both are found at once: for few tokens the calls take longer than the arithmetic. Without salient channels it is the
    same grid twice.
    """
    least, greatest = between
    span = greatest - least
    top: Tensor | int
    if salient is None:
        top = levels(scheme)
    else:
        top = _tops(levels(scheme), levels(scheme, salient=True), least.dtype, least.device)
    scale = (span / top).clamp_min_(SCALE_FLOOR)
    if (
        span.device.type != "cpu" or not span.all()
    ):  # where all is one value c, the scale is |c|, which c is exactly once
        scale = torch.where(span > 0, scale, least.abs().clamp_min_(torch.finfo(least.dtype).tiny))
    low = (least / scale).round_()
    high = low + top
    if salient is None:
        grid = Grid(scale, low, high)
        return grid, grid
    (scale, fine_scale), (low, fine_low), (high, fine_high) = (t.chunk(2, -1) for t in (scale, low, high))
    return Grid(scale, low, high), Grid(fine_scale, fine_low, fine_high)


@lru_cache(maxsize=64)
def _tops(ordinary: int, salient: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([ordinary, salient], dtype=dtype, device=device)


def whole(x: Tensor, grid: Grid, *, static: bool, overwrite: bool = False) -> Tensor:
    """Return the n of every value, as real numbers, in memory of its own or that of ``x``."""
    n = (x.div_(grid.scale) if overwrite else x / grid.scale).round_()
    torch.minimum(n, grid.high, out=n)  # a dynamic range is left at the top too, where both ends are rounded
    if static:
        torch.maximum(n, grid.low, out=n)
    return n


def encode(x: Tensor, grid: Grid, scheme: ActivationScheme, *, static: bool) -> tuple[Tensor, Tensor]:
    """Return codes as real numbers, and the zero that is to be subtracted from them."""
    zero = grid.low.clamp(min=0) + grid.high.clamp(max=0) if scheme.spikes == "signed" else grid.low
    return whole(x, grid, static=static).sub_(zero), -zero


def _quantized(x: Tensor, scheme: ActivationScheme, salient: Tensor | None, scale: Tensor | None) -> Tensor:
    static = scale is not None
    grid, fine = grids(limits(x, scale), scheme, salient)
    values = whole(x, grid, static=static).mul_(grid.scale)
    if salient is None:
        return values
    place = _place(salient)
    picked = whole(_pick(x, place), fine, static=static, overwrite=place.dtype != torch.bool)
    return _put(values, place, picked.mul_(fine.scale))


# Salient channels are few: on a CPU their columns are taken out, computed apart and put back, as whole tensors of two
# scales would cost more than all the rest. A mask of several dimensions, and one on a GPU, which would have to wait for
# the number of channels, is computed everywhere and chosen from.


def _place(salient: Tensor) -> Tensor:
    """Return where the salient channels are: their indices, or the mask itself."""
    return salient.nonzero()[:, 0] if salient.dim() == 1 and salient.device.type == "cpu" else salient


def _pick(x: Tensor, place: Tensor) -> Tensor:
    return x if place.dtype == torch.bool else x.index_select(-1, place)


def _put(target: Tensor, place: Tensor, picked: Tensor) -> Tensor:
    """Overwrite ``target`` in the salient places with ``picked``."""
    if place.dtype == torch.bool:
        chosen = place.to(
            target.dtype
        )  # torch.where takes five times as long, and values of a token are all finite or none
        return target.mul_(1 - chosen).addcmul_(picked, chosen)
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
        g, between, static = grads[0].to(values.dtype), limits(values, scale), scale is not None
        grid, fine = grids(between, ctx.scheme, salient)
        gx, per_span = _pull_back(values, g, grid, levels(ctx.scheme), static=static)
        if salient is not None:
            place, top = _place(salient), levels(ctx.scheme, salient=True)
            gx_picked, per_span_picked = _pull_back(_pick(values, place), _pick(g, place), fine, top, static=static)
            gx = _put(gx, place, gx_picked)
            per_span = _put(per_span, place, per_span_picked)
        if not static:
            g_span = per_span.sum(-1, keepdim=True)
            least, greatest = between
            flat = least == greatest
            for limit, sign in ((greatest, 1), (least, -1)):
                here = (values == limit).to(g.dtype)
                gx.addcmul_(here, g_span / here.sum(-1, keepdim=True), value=sign)
            gx = torch.where(flat, g, gx)
        return gx.to(x.dtype), None, None, None


def _pull_back(x: Tensor, g: Tensor, grid: Grid, top: int, *, static: bool) -> tuple[Tensor, Tensor]:
    """Return what a gradient ``g`` of the quantised values gives to ``x`` itself, and to the span of its limits.

    With ``inside`` where a code is not clamped: d xhat = inside (dx - x/scale dscale) + n dscale, and dscale = dspan /
    top where the scale is not its floor.
    """
    n = whole(x, grid, static=static)
    charge = x / grid.scale
    rounded = charge.round()
    inside = ((rounded > grid.low) & (rounded < grid.high)).to(g.dtype)
    factor = (grid.scale > SCALE_FLOOR).to(g.dtype).div_(top)
    return g * inside, n.addcmul_(charge, inside, value=-1).mul_(g).mul_(factor)
