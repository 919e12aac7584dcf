"""Sums of a matrix as messages to the next one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .fixed import rescale


def step(p: Any, state: dict[str, Any], a: Any) -> tuple[Any, ...]:
    """Return ``a * mantissa / 2^shift + bias`` of each neuron, held in ``-limit .. limit``."""
    return (np.clip(rescale(a, p.mantissa, p.shift) + p.bias, -p.limit, p.limit),)
