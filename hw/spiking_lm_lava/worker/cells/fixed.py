"""Arithmetic that cells have in common: multiply and shift, sigmoid and tanh by a table. Numpy alone.

Notation: Qn is a whole number in which 2^n stands for 1. A product is of at most 32 by 16 bits; every shift rounds to
nearest, and halves up, by an addition of half a unit before it. Nothing is divided.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]

MANTISSA_BITS = 15
"""Of a multiplier's magnitude; with its sign 16."""
MOST_SHIFT = 46
"""Of a multiplier: a 31-bit word times a mantissa is below 2^46, so that a greater shift leaves nothing."""

GATE = 12
"""Fraction bits of what sigmoid and tanh read."""
UNIT = 15
"""Fraction bits of what they give."""
ONE = 1 << UNIT

_REACH = 16
"""Sigmoid is held to its end at this magnitude, where it is 1e-7 from it."""
_STEP_BITS = 8
"""Of what is between two entries of the table: it has one in 1/16."""


def rounded_shift(x: Any, bits: Any) -> Any:
    """Return ``x / 2^bits``, to nearest, halves up; ``bits`` is 0 or more, one number or one per neuron."""
    return (x + ((1 << np.asarray(bits, np.int64)) >> 1)) >> bits


def rescale(x: Any, mantissa: Any, shift: Any) -> Any:
    """Return ``x * mantissa / 2^shift``, to nearest: a multiplication by a real constant, see :func:`multiplier`."""
    return rounded_shift(x * mantissa, shift)


def multiplier(factor: Any) -> tuple[Int, Int]:
    """Return mantissas of 16 bits and shifts of 0 to 46 with ``factor = mantissa / 2^shift``, to 15 bits.

    For the host, before anything runs. Raises: ValueError for factors of 2^15 or more.
    """
    factor = np.asarray(factor, np.float64)
    _, exponent = np.frexp(factor)  # |factor| is 2^(exponent - 1) or more, and less than 2^exponent
    shift = np.minimum(MANTISSA_BITS - exponent.astype(np.int64), MOST_SHIFT)
    if factor.size and (not np.isfinite(factor).all() or shift.min() < 0):
        raise ValueError(f"a factor of {np.abs(factor).max():g} is no mantissa of {MANTISSA_BITS} bits and a shift")
    mantissa = np.rint(np.ldexp(factor, shift.astype(np.int32))).astype(np.int64)
    # What rounds up to 2^15 would be a bit too long.
    long = (np.abs(mantissa) >> MANTISSA_BITS) & (shift > 0)
    return mantissa >> long, shift - long


def _sigmoid_table() -> Int:
    entries = _REACH << (GATE - _STEP_BITS)
    values = [round(ONE / (1 + math.exp(-i * 2.0 ** (_STEP_BITS - GATE)))) for i in range(entries + 1)]
    return np.array(values, np.int64)


SIGMOID = _sigmoid_table()
"""Of 0, 1/16, .. 16 in Q15: 257 words."""


def sigmoid(x: Any) -> Any:
    """Return the sigmoid in Q15, 0 .. 2^15, of ``x`` in Q12: straight lines between the entries of a table.

    Off by at most 7e-5, 2 of its units, over all ``x``.
    """
    magnitude = np.minimum(np.abs(x), (_REACH << GATE) - 1)
    at, beyond = magnitude >> _STEP_BITS, magnitude & ((1 << _STEP_BITS) - 1)
    low = SIGMOID[at]
    value = low + rounded_shift((SIGMOID[at + 1] - low) * beyond, _STEP_BITS)
    return np.where(x < 0, ONE - value, value)


def tanh(x: Any) -> Any:
    """Return tanh in Q15, -2^15 .. 2^15, of ``x`` in Q12: ``2 sigmoid(2 x) - 1``, off by at most 1.4e-4."""
    return 2 * sigmoid(2 * x) - ONE
