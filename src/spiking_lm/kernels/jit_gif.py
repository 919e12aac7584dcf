# mypy: ignore-errors
"""The loops of the compiled grid of Generalized Integrate-and-Fire neurons; only :mod:`.compiled_gif` imports this.

A token's channels are read once from memory: what is asked of them a second and a third time is in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import intrinsic

from spiking_lm.kernels.jit_core import compiled, where


@intrinsic
def nearest(typing: Any, x: Any) -> Any:
    """The nearest whole number, half to even, as one instruction."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [args[0].type]), args)

    return x(x), emit


@compiled()
def _limits(x, at, size, least, greatest):
    """Return the least and the greatest of ``size`` values, in many places at once; the last two are for work."""
    lanes = len(least)
    whole = size - size % lanes
    first = x[at]
    for j in range(np.uintp(lanes)):
        least[j], greatest[j] = first, first
    for i in range(0, whole, lanes):
        start = np.uintp(at + i)
        for j in range(np.uintp(lanes)):
            value = x[start + j]
            least[j] = where(value < least[j], value, least[j])
            greatest[j] = where(value > greatest[j], value, greatest[j])
    low, high = least[0], greatest[0]
    for j in range(lanes):
        low, high = where(least[j] < low, least[j], low), where(greatest[j] > high, greatest[j], high)
    for i in range(whole, size):
        value = x[np.uintp(at + i)]
        low, high = where(value < low, value, low), where(value > high, value, high)
    return low, high


@compiled()
def _grid(least, greatest, top, floor, tiny):
    """Return scale, lowest and highest whole number of a grid, as :func:`spiking_lm.gif.grids` does."""
    span = greatest - least
    scale = span / top
    scale = where(scale < floor, floor, scale)
    if not span > 0 and span == span:
        scale = where(abs(least) < tiny, tiny, abs(least))
    low = nearest(least / scale)
    return scale, low, low + top


@compiled()
def quantize(start, stop, size, x, stride, salient, limits, tops, floor, tiny, out):
    """Write the values that spikes carry of tokens ``start ... stop``, ``size`` channels each, ``stride`` apart in x.

    ``salient (size)`` is 1 where a channel has the finer grid; ``limits (2)``: those of all tokens, or empty: each
    has its own; ``tops``: the greatest codes of ordinary and salient channels.
    """
    static = len(limits) > 0
    first, second = np.empty(64, x.dtype), np.empty(64, x.dtype)
    for token in range(start, stop):
        at, to = token * stride, np.uintp(token * size)
        if static:
            least, greatest = limits[0], limits[1]
        else:
            least, greatest = _limits(x, at, size, first, second)
        scale, low, high = _grid(least, greatest, tops[0], floor, tiny)
        fine_scale, fine_low, fine_high = _grid(least, greatest, tops[1], floor, tiny)
        begin = np.uintp(at)
        if len(salient):
            for j in range(np.uintp(size)):
                fine = salient[j] != 0
                unit, most = where(fine, fine_scale, scale), where(fine, fine_high, high)
                n = nearest(x[begin + j] / unit)
                n = where(n > most, most, n)
                if static:
                    bottom = where(fine, fine_low, low)
                    n = where(n < bottom, bottom, n)
                out[to + j] = n * unit
        else:
            for j in range(np.uintp(size)):
                n = nearest(x[begin + j] / scale)
                n = where(n > high, high, n)
                if static:
                    n = where(n < low, low, n)
                out[to + j] = n * scale


@compiled(fastmath={"reassoc", "contract"})
def _slopes(x, at, g, to, size, salient, static, grids, shares, gx):
    """Write what comes back to the channels of one token; return what its span gets, in all channels together."""
    scale, low, high, fine_scale, fine_low, fine_high = grids
    zero, one = x.dtype.type(0), x.dtype.type(1)
    total, none = zero, len(salient) == 0
    for j in range(np.uintp(size)):
        fine = False if none else salient[j] != 0
        unit, bottom, most = where(fine, fine_scale, scale), where(fine, fine_low, low), where(fine, fine_high, high)
        charge = x[at + j] / unit
        rounded = nearest(charge)
        n = where(rounded > most, most, rounded)
        if static:
            n = where(n < bottom, bottom, n)
        inside = where(rounded > bottom, where(rounded < most, one, zero), zero)
        gx[to + j] = g[to + j] * inside
        total += (n - charge * inside) * g[to + j] * where(fine, shares[1], shares[0])
    return total


@compiled()
def pull_back(start, stop, size, x, stride, salient, limits, tops, floor, tiny, g, gx):
    """Write the gradient of ``x`` for that of the values, ``g``; see :class:`spiking_lm.gif._Quantize`."""
    static, zero = len(limits) > 0, x.dtype.type(0)
    first, second = np.empty(64, x.dtype), np.empty(64, x.dtype)
    for token in range(start, stop):
        at, to = token * stride, np.uintp(token * size)
        if static:
            least, greatest = limits[0], limits[1]
        else:
            least, greatest = _limits(x, at, size, first, second)
        begin = np.uintp(at)
        if not static and least == greatest:
            for j in range(np.uintp(size)):
                gx[to + j] = g[to + j]
            continue
        scale, low, high = _grid(least, greatest, tops[0], floor, tiny)
        fine_scale, fine_low, fine_high = _grid(least, greatest, tops[1], floor, tiny)
        shares = (
            where(scale > floor, x.dtype.type(1) / tops[0], zero),
            where(fine_scale > floor, x.dtype.type(1) / tops[1], zero),
        )
        grids = scale, low, high, fine_scale, fine_low, fine_high
        span = _slopes(x, begin, g, to, size, salient, static, grids, shares, gx)
        if static:
            continue
        highest, lowest = 0, 0
        for j in range(np.uintp(size)):
            highest += x[begin + j] == greatest
            lowest += x[begin + j] == least
        up, down = span / x.dtype.type(highest), span / x.dtype.type(lowest)
        for j in range(np.uintp(size)):
            value = x[begin + j]
            gx[to + j] += where(value == greatest, up, zero) - where(value == least, down, zero)
