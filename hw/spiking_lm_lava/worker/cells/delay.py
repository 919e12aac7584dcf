"""Delays: what arrives is sent some steps later."""

from __future__ import annotations

from typing import Any

import numpy as np


def step(p: Any, state: dict[str, Any], arrived: Any) -> tuple[Any, ...]:
    """Send the oldest row of ``held (steps, size)`` and keep what arrived."""
    held = state["held"]
    state["held"] = np.concatenate([held[1:], arrived[None]])
    return (held[0],)
