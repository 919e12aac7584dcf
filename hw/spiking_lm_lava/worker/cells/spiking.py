"""Spiking neurons that hold their membrane while there is no token."""

from __future__ import annotations

from typing import Any

import numpy as np

ALIGN = 6
"""A current and a threshold count in multiples of 2^6 of the membrane, as in Lava."""
DECAY = 12
"""Fraction bits of a decay."""
MEMBRANE = (1 << 23) - 1
"""Where a membrane stops, on either side."""


def _toward_zero(x: Any, bits: int) -> Any:
    return (x + ((x >> 63) & ((1 << bits) - 1))) >> bits


def lif(p: Any, state: dict[str, Any], a: Any) -> tuple[Any, ...]:
    """Return spikes of Lava's LIF with du = 4095: the current is what arrives, the membrane decays by ``dv`` / 4096.

    It fires strictly above ``vth``; ``bias`` 1, the least there is, makes that "at or above" for currents of Q6.
    """
    v = _toward_zero(state["v"] * ((1 << DECAY) - p.dv), DECAY) + (a << ALIGN) + p.bias
    v = np.clip(v, -MEMBRANE, MEMBRANE)
    fires = v > (p.vth << ALIGN)
    state["v"] = np.where(fires, 0, v)
    return (fires.astype(np.int64),)


def gif(p: Any, state: dict[str, Any], a: Any) -> tuple[Any, ...]:
    """Return how often the threshold fits into the membrane, at most ``levels`` times, and take that off.

    A ladder of comparisons stands for the division; with ``signed`` there is another one for negative counts.
    """
    v = np.clip(_toward_zero(state["v"] * ((1 << DECAY) - p.dv), DECAY) + a, -MEMBRANE, MEMBRANE)
    rungs = np.arange(1, p.levels + 1)[:, None] * p.vth
    count = (v >= rungs).sum(0)
    if p.signed:
        count = count - (v <= -rungs).sum(0)
    state["v"] = v - count * p.vth
    return (count,)
