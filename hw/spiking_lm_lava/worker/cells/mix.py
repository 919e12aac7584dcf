"""Everything pointwise between the matrices of SpikeGPT: token shift, gate, squared ReLU, residual addition.

What they send is ``... * mantissa / 2^shift + bias``, held in ``least .. most``: the gain and the offset in front of a
neuron, and the format in which it reads, are in these constants. A current that is above all that a neuron needs to
fire at once may be held to that: its membrane is 0 either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .fixed import UNIT, rescale, rounded_shift, sigmoid


def token_shift(p: Any, state: dict[str, Any], x: Any) -> tuple[Any, ...]:
    """Return a mix of what arrives now and what arrived one token ago; ``held`` is that one's share of the mix."""
    sent = rescale(x, p.mantissa, p.shift) + p.bias + state["held"]
    state["held"] = rescale(x, p.held_mantissa, p.held_shift) + p.held_bias
    return (np.clip(sent, p.least, p.most),)


def gate(p: Any, state: dict[str, Any], x: Any, r: Any) -> tuple[Any, ...]:
    """Return ``x`` times the sigmoid of ``r``, a sum that ``r_mantissa`` and ``r_shift`` take to Q12."""
    product = rounded_shift(x * sigmoid(rescale(r, p.r_mantissa, p.r_shift)), UNIT)
    return (np.clip(rescale(product, p.mantissa, p.shift) + p.bias, p.least, p.most),)


def squared_relu(p: Any, state: dict[str, Any], x: Any) -> tuple[Any, ...]:
    """Return the square of ``x``, of 0 where that is negative; 15 bits of it are left by ``root_mantissa``."""
    root = rescale(np.maximum(x, 0), p.root_mantissa, p.root_shift)
    return (np.clip(rescale(root * root, p.mantissa, p.shift) + p.bias, p.least, p.most),)


def add(p: Any, state: dict[str, Any], x: Any, y: Any) -> tuple[Any, ...]:
    """Return ``x`` plus ``y`` in the format of ``x``."""
    return (x + rescale(y, p.mantissa, p.shift),)
