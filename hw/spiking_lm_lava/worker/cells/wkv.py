"""The time mix of RWKV-4: a weighted mean of all values so far, with a running maximum and without a division."""

from __future__ import annotations

from typing import Any

import numpy as np

from .fixed import UNIT, rescale, rounded_shift
from .powers import exp2, reciprocal

NEVER = -(1 << 22)
"""The running maximum before the first token: below every key."""


def step(p: Any, state: dict[str, Any], k: Any, v: Any) -> tuple[Any, ...]:
    """Return the mean after one more key and value, sums of their matrices, (C,) each.

    Keys are taken to base 2 with ``fraction`` bits (``k_mantissa``, ``k_shift``), so are ``first``, added to the key of
    this token, and ``decay``, by which older ones fall at each token. Values, and the mean, have the format that
    ``v_mantissa`` and ``v_shift`` give them, and stay within ``most``; the mean
    goes out with ``finer`` further bits. Weights have ``weight_bits`` fraction bits. With
    the greatest exponent so far taken out, ``top``, the state is ``num``, the weighted sum of values, and ``den``, that
    of weights.
    """
    k = rescale(k, p.k_mantissa, p.k_shift)
    v = np.clip(rescale(v, p.v_mantissa, p.v_shift), -p.most, p.most)
    num, den, top = state["num"], state["den"], state["top"]
    now = k + p.first
    num_now, den_now, _ = _joined(num, den, top, v, now, p)
    mantissa, shift = reciprocal(np.maximum(den_now, 1))
    mean = rounded_shift(num_now * mantissa, np.maximum(UNIT + shift - p.weight_bits - p.finer, 0))
    state["num"], state["den"], state["top"] = _joined(num, den, top - p.decay, v, k, p)
    return (np.clip(mean, -p.most << p.finer, p.most << p.finer),)


def _joined(num: Any, den: Any, top: Any, v: Any, k: Any, p: Any) -> tuple[Any, Any, Any]:
    """Return sums with one more value ``v`` of weight 2^k, and the greater of ``top`` and ``k``, which is taken out."""
    greatest = np.maximum(top, k)
    old, old_shift = exp2(top - greatest, p.fraction)
    new, new_shift = exp2(k - greatest, p.fraction)
    num = rounded_shift(num * old, UNIT + old_shift) + rounded_shift(v * new, UNIT + new_shift)
    weight = rounded_shift((1 << p.weight_bits) * new, UNIT + new_shift)
    den = rounded_shift(den * old, UNIT + old_shift) + weight
    return num, den, greatest
