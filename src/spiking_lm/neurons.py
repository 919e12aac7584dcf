"""The core's own neurons. Other frameworks' neurons come from plugins."""

from __future__ import annotations

import torch
from torch import Tensor

from spiking_lm.config import LIFConfig
from spiking_lm.interfaces import LIFDynamics, Neuron
from spiking_lm.kernels.reference import compute_dtype, spike


class LIF(Neuron):
    """The leaky integrate-and-fire neuron ``lif``: a membrane that leaks, charges, fires and resets.

    With input x_t, membrane v_t after the reset, and ``compare`` either ``>=`` or ``>``::

        h_t = beta v_{t-1} + gain x_t
        s_t = [h_t compare threshold]
        v_t = (1 - s_t) h_t                 reset: zero
        v_t = h_t - s_t threshold           reset: subtract

    Gradients take ds/dh from ``surrogate`` and also flow through the reset, unless ``detach_reset``.
    The state is v, ``(B, N)``, in float32 at least: a membrane in bfloat16 would lose small inputs.
    """

    config: LIFConfig
    dynamics: LIFDynamics

    def __init__(self, config: LIFConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        self.dynamics = LIFDynamics(
            beta=config.beta,
            gain=config.gain,
            threshold=config.threshold,
            v_reset=0.0 if config.reset == "zero" else None,
            compare=config.compare,
            surrogate=config.surrogate,
            detach_reset=config.detach_reset,
        )

    def init_state(
        self, shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return membranes at rest, zero, of ``shape``."""
        return torch.zeros(shape, device=device, dtype=membrane_dtype(dtype))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Advance one time step: ``x (B, N)`` and membranes ``(B, N)`` -> spikes in the dtype of ``x``, membranes."""
        c = self.config
        v = state.to(compute_dtype(x, state))
        h = c.beta * v + c.gain * x.to(v.dtype)
        s = spike(h, c.threshold, c.compare, c.surrogate)
        fired = s.detach() if c.detach_reset else s
        v = (1 - fired) * h if c.reset == "zero" else h - c.threshold * fired
        return s.to(x.dtype), v


def membrane_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a membrane is kept in when its inputs have ``dtype``: never less than float32."""
    return torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32
