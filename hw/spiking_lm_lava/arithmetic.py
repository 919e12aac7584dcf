"""Whole numbers as Loihi-style processes compute with them: 32-bit words, 24-bit states, shifts (numpy only).

All arrays are int64, so that what a register would lose is there to be seen; the functions below lose it on purpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]

STATE_BITS = 24
"""Of a neuron's states and of a graded message, sign included."""
STATE_LIMIT = 2 ** (STATE_BITS - 1)
"""A state that wraps stays in (-STATE_LIMIT, STATE_LIMIT]; one that saturates stops 1 before either."""
WORD_LIMIT = 2**31
"""Sums are 32-bit words."""
DECAY_SHIFT = 12
DECAY_UNITY = 1 << DECAY_SHIFT
"""A decay of so much forgets everything."""
ALIGN_SHIFT = 6
"""Thresholds and what arrives at a membrane's current count in multiples of 2^6."""

_NEWTON_START = 1.238982962
INV_SQRT_FRACTION = 12
INV_SQRT_STEPS = 5


def wrap_word(x: Int) -> Int:
    """Return ``x`` as a 32-bit register holds it, in two's complement."""
    return x.astype(np.int32).astype(np.int64)


def wrap_state(x: Int) -> Int:
    """Bring ``x`` back into (-2^23, 2^23] by 2^24, once as Lava does: what is beyond 3 * 2^23 stays out."""
    if x.size and (
        x.max() > STATE_LIMIT or x.min() <= -STATE_LIMIT
    ):  # rarely: two comparisons are cheaper than two masks
        x = x - 2 * STATE_LIMIT * ((x > STATE_LIMIT).astype(np.int64) - (x <= -STATE_LIMIT))
    return x


def saturate(x: Int) -> Int:
    """Clip ``x`` to -2^23 + 1 .. 2^23 - 1."""
    clipped: Int = np.minimum(np.maximum(x, 1 - STATE_LIMIT), STATE_LIMIT - 1)
    return clipped


def shift(x: Int, exponent: int) -> Int:
    """Return ``x * 2^exponent``, rounded down."""
    return x << exponent if exponent > 0 else x >> -exponent


def shift_toward_zero(x: Int, bits: int) -> Int:
    """Return ``x / 2^bits``, rounded toward zero."""
    return (x + ((x >> 63) & ((1 << bits) - 1))) >> bits


def decayed(x: Int, decay: int) -> Int:
    """Return what is left of a state after a decay of ``decay`` / 4096, rounded toward zero."""
    if decay == DECAY_UNITY:
        return np.zeros_like(x)
    return shift_toward_zero(x * (DECAY_UNITY - decay), DECAY_SHIFT)


def inv_sqrt_table(fraction: int = INV_SQRT_FRACTION) -> Int:
    """Return the first guesses of :func:`inv_sqrt`, by the number of leading zeros of a 24-bit word."""
    exponents = np.arange(STATE_BITS - 1, -1, -1)
    guesses = 2.0**fraction / (2.0 ** ((exponents - fraction) / 2) * _NEWTON_START)
    return 2 * guesses.astype(np.int64)


_TABLE = inv_sqrt_table()


def inv_sqrt(x: Int) -> Int:
    """Return ``2^12 / sqrt(x / 2^12)`` by five Newton steps without a division; 0 for 0. ``x`` is 0 .. 2^24 - 1."""
    leading_zeros = STATE_BITS - np.frexp(np.maximum(x, 1).astype(np.float64))[1]
    guess: Any = _TABLE[leading_zeros]
    b, y = x, guess >> 1
    for _ in range(INV_SQRT_STEPS):
        b = ((b * guess >> (INV_SQRT_FRACTION + 1)) * guess) >> (INV_SQRT_FRACTION + 1)
        guess = (3 << INV_SQRT_FRACTION) - b
        y = (y * guess) >> (INV_SQRT_FRACTION + 1)
    return np.where(x == 0, 0, y)
