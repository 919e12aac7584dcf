"""Event-based gated units in whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from .fixed import ONE, UNIT, rescale, rounded_shift, sigmoid, tanh

MEMBRANE = 20
"""Fraction bits of membrane and thresholds: magnitudes up to 1, in 24 bits with room."""


def step(p: Any, state: dict[str, Any], x: Any, q: Any) -> tuple[Any, ...]:
    """Advance by one token; ``x`` and ``q`` are the sums of the input and of the recurrent matrix, (3 H,) each.

    The sums become gates' arguments in Q12 by a multiplier per row (``x_mantissa``, ``x_shift``) and a bias
    (``x_bias``). In Q20 are the membrane and ``threshold``, in Q15 ``keep``, which is 1 - zoneout. An event carries
    the membrane with ``event_bits`` fraction bits.
    """
    n = len(p.threshold)
    a = rescale(x, p.x_mantissa, p.x_shift) + p.x_bias
    b = rescale(q, p.q_mantissa, p.q_shift) + p.q_bias
    gates = sigmoid(a[: 2 * n] + b[: 2 * n])
    z, r = gates[:n], gates[n:]
    g = tanh(a[2 * n :] + rounded_shift(r * b[2 * n :], UNIT)) << (MEMBRANE - UNIT)
    before = state["c"]
    c = rounded_shift(z * before + (ONE - z) * g, UNIT)
    c = before + rounded_shift((c - before) * p.keep, UNIT)
    event = c > p.threshold
    state["c"] = np.where(event, c - p.threshold, c)
    return (np.where(event, rounded_shift(c, MEMBRANE - p.event_bits), 0),)
