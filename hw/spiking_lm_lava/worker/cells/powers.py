"""Powers, reciprocals and inverse square roots by tables and Newton's steps: products and shifts, no division.

Of the numbers here a result is a mantissa in Q15 and a shift, so that small ones are as exact as great ones:
``value * mantissa / 2^(15 + shift)`` is the product with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fixed import MOST_SHIFT, ONE, UNIT, rounded_shift

Int = NDArray[np.int64]

TABLE_BITS = 6
"""Tables of powers and reciprocals have 64 entries."""
WORD = 24
"""Bits of what has a reciprocal or a root, sign included or not."""
_NORMAL = 16
"""Bits of a normalised number: it is 2^15 .. 2^16 - 1, or for a root 2^14 .. 2^16 - 1."""


def _powers() -> Int:
    return np.rint(ONE * 2.0 ** (-np.arange((1 << TABLE_BITS) + 1) / (1 << TABLE_BITS))).astype(np.int64)


def _reciprocals() -> Int:
    middles = 0.5 + (np.arange(1 << TABLE_BITS) + 0.5) / (2 << TABLE_BITS)
    return np.rint(ONE / middles).astype(np.int64)


def _roots() -> Int:
    middles = (np.arange(1 << TABLE_BITS) + 0.5) / (1 << TABLE_BITS)
    return np.rint(ONE / np.sqrt(middles)).astype(np.int64)


POWERS = _powers()
"""2^0, 2^(-1/64), .. 2^-1 in Q15."""
RECIPROCALS = _reciprocals()
"""Of the middles of 64 parts of [1/2, 1)."""
ROOTS = _roots()
"""Inverse square roots of the middles of 64 parts of [0, 1), of which the first 16 are never read."""


def exp2(x: Any, fraction: int) -> tuple[Any, Any]:
    """Return mantissas in Q15, 2^14 .. 2^15, and shifts of ``2^x``.

    ``x`` is 0 or less, with ``fraction`` bits, 6 or more. The mantissa is off by at most 6e-5 of itself; that of 0 is
    2^15 to the bit. Shifts end at 31, where nothing is left.
    """
    below = -x
    whole, part = below >> fraction, below & ((1 << fraction) - 1)
    rest = fraction - TABLE_BITS
    at, beyond = part >> rest, part & ((1 << rest) - 1)
    upper = POWERS[at]
    return upper - rounded_shift((upper - POWERS[at + 1]) * beyond, rest), np.minimum(whole, MOST_SHIFT - UNIT)


def reciprocal(d: Any) -> tuple[Any, Any]:
    """Return mantissas in Q15, 2^15 .. 2^16, and shifts of ``1 / d``; off by at most 8e-5.

    ``d`` is 1 to 2^24 - 1. A table's guess, off by 1/128 at most, and two Newton steps, each of which squares that.
    """
    bits = _bit_length(d)
    m = _normalised(d, bits)
    y = RECIPROCALS[(m >> (_NORMAL - 1 - TABLE_BITS)) - (1 << TABLE_BITS)]
    for _ in range(2):
        y = rounded_shift(y * (2 * ONE - rounded_shift(m * y, _NORMAL)), UNIT)
    return y, bits


def inverse_sqrt(v: Any) -> tuple[Any, Any]:
    """Return mantissas in Q15, 2^15 .. 2^16 - 1, and shifts of ``1 / sqrt(v)``; off by at most 1e-4.

    ``v`` is 1 to 2^24 - 1. A table's guess and two Newton steps ``y (3 - v y^2) / 2``.
    """
    bits = _bit_length(v)
    even = bits + (bits & 1)
    m = _normalised(v, even)
    y = ROOTS[m >> (_NORMAL - TABLE_BITS)]
    for _ in range(2):
        square = rounded_shift(y * y, _NORMAL)
        y = rounded_shift(y * (3 * ONE - rounded_shift(m * square, UNIT)), UNIT + 1)
    return np.minimum(y, 2 * ONE - 1), even >> 1


def _bit_length(x: Any) -> Any:
    return np.frexp(x.astype(np.float64))[1].astype(np.int64)


def _normalised(x: Any, bits: Any) -> Any:
    """Return ``x / 2^bits`` with 16 fraction bits, rounded down."""
    return np.where(bits > _NORMAL, x >> np.maximum(bits - _NORMAL, 0), x << np.maximum(_NORMAL - bits, 0))
