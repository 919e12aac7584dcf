"""The adaptive-threshold LIF neuron."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm.interfaces import Neuron
from spiking_lm.kernels import spike
from spiking_lm_adlif.config import AdLIFConfig


class AdLIFState(NamedTuple):
    """What the neurons remember between steps, each ``(B, N)``."""

    v: Tensor
    """Membrane."""
    a: Tensor
    """Adaptation: a running mean of the neuron's own spikes, in [0, 1]."""


class AdLIF(Neuron):
    """A leaky integrate-and-fire neuron whose threshold rises with every spike and relaxes again.

    With ``theta_t = threshold + strength a_{t-1}``::

        h_t = beta v_{t-1} + gain x_t
        s_t = [h_t >= theta_t]
        v_t = h_t - s_t theta_t
        a_t = rho a_{t-1} + (1 - rho) s_t

    ``strength`` is learned, one per neuron where ``size`` is given. Source: Bellec et al. 2018, equations of the
    adaptive neurons of LSNNs, with the membrane's input scaled by ``gain``.
    """

    config: AdLIFConfig

    def __init__(self, config: AdLIFConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        # Learned through softplus: a strength below zero would make a neuron that, once it fires, never stops.
        strength = torch.full((size or 1,), config.strength)
        self.raw_strength = nn.Parameter(strength + torch.log(-torch.expm1(-strength)))  # softplus of it is strength

    def init_state(
        self, shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AdLIFState:
        """Return neurons at rest that have not fired for long."""
        zeros = torch.zeros(shape, device=device, dtype=dtype)
        return AdLIFState(zeros, zeros)

    def step(self, x: Tensor, state: AdLIFState) -> tuple[Tensor, AdLIFState]:
        """Advance one time step: ``x (B, N)`` -> spikes ``(B, N)`` in the dtype of ``x``, and the next state."""
        c, (v, a) = self.config, state
        theta = c.threshold + F.softplus(self.raw_strength.to(v.dtype)) * a
        h = c.beta * v + c.gain * x.to(v.dtype)
        s = spike(h - theta, 0.0, ">=", c.surrogate)
        return s.to(x.dtype), AdLIFState(h - s * theta, c.rho * a + (1 - c.rho) * s)
