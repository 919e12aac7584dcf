"""Layer norm in a chain of cells with matrices of ones between them, as no neuron sees what another one holds.

    sum -> mean -> centre -> sum of squares -> inverse root -> normalise

The size is divided by with its reciprocal, a constant. Gain and bias are left to what reads the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .fixed import rescale, rounded_shift
from .powers import inverse_sqrt

EXPONENT_BITS = 5
"""Of an inverse root's message: its lowest bits are the shift, those above the mantissa."""


def centre(p: Any, state: dict[str, Any], x: Any, mean: Any) -> tuple[Any, ...]:
    """Return ``x`` less the mean, and the square of that without its last ``before`` bits, less ``behind`` bits."""
    x = x - mean
    rounded = rounded_shift(x, p.before)
    return x, rounded_shift(rounded * rounded, p.behind)


def inverse_root(p: Any, state: dict[str, Any], total: Any) -> tuple[Any, ...]:
    """Return the inverse root of ``total * mantissa / 2^shift + eps``, of 1 at least, as mantissa and shift in one."""
    mantissa, shift = inverse_sqrt(np.maximum(rescale(total, p.mantissa, p.shift) + p.eps, 1))
    return ((mantissa << EXPONENT_BITS) + shift,)


def normalise(p: Any, state: dict[str, Any], x: Any, root: Any) -> tuple[Any, ...]:
    """Return ``x`` times the inverse root, divided by 2^shift, within ``most``: the root of the size is not passed."""
    mantissa, shift = root >> EXPONENT_BITS, root & ((1 << EXPONENT_BITS) - 1)
    return (np.clip(rounded_shift(x * mantissa, p.shift + shift), -p.most, p.most),)
