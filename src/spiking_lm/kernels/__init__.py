"""Recurrences over time, each declared once and run by the fastest implementation that fits."""

from __future__ import annotations

from torch import Tensor

from spiking_lm.config import SurrogateConfig
from spiking_lm.kernels import torch_fast
from spiking_lm.kernels.reference import WKVState, spike, surrogate_gradient

__all__ = ["WKVState", "lif_scan", "spike", "surrogate_gradient", "wkv"]

_ATAN = SurrogateConfig()


def lif_scan(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    beta: float,
    gain: float,
    threshold: float,
    v_reset: float | None = 0.0,
    compare: str = ">=",
    surrogate: SurrogateConfig = _ATAN,
    detach_reset: bool = False,
    final_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run leaky integrate-and-fire neurons over time."""
    return torch_fast.lif_scan(
        x, v0, beta=beta, gain=gain, threshold=threshold, v_reset=v_reset, compare=compare, surrogate=surrogate,
        detach_reset=detach_reset, final_only=final_only,
    )  # fmt: skip


def wkv(
    time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Run the RWKV-4 recurrence over time."""
    return torch_fast.wkv(time_decay, time_first, k, v, state)
