"""Integrate-and-fire neurons that lose nothing between spikes: ``if``, and generalized ``gif`` and ``gif.ternary``.

Their resets subtract what was emitted and nothing leaks, so that spikes times threshold, plus what is left on the
membrane, are the sum of the inputs. (Xing et al., arXiv 2407.04752, sections on the generalized neuron and its ternary
form.) The state of each is the membrane v, ``(B, N)``, in float32 at least.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from spiking_lm.config import GIFConfig, IFConfig, TernaryGIFConfig
from spiking_lm.interfaces import LIFDynamics, Neuron
from spiking_lm.kernels.reference import compute_dtype, spike
from spiking_lm.neurons import membrane_dtype


class _Integrator(Neuron):
    """What the neurons here have in common: h_t = v_{t-1} + x_t, and v_t = h_t - threshold s_t."""

    config: IFConfig | GIFConfig | TernaryGIFConfig

    def init_state(
        self, shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return membranes at rest, zero, of ``shape``."""
        return torch.zeros(shape, device=device, dtype=membrane_dtype(dtype))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Advance one time step: ``x (B, N)`` and membranes ``(B, N)`` -> spikes in the dtype of ``x``, membranes."""
        dtype = compute_dtype(x, state)
        h = state.to(dtype) + x.to(dtype)
        s = self.emit(h)
        emitted = s.detach() if self.config.detach_reset else s
        return s.to(x.dtype), h - self.config.threshold * emitted

    @abstractmethod
    def emit(self, h: Tensor) -> Tensor:
        """Return the spikes of the charged membranes ``h (B, N)``."""


class IF(_Integrator):
    """The integrate-and-fire neuron ``if``: a membrane that charges, fires, and is lowered by the threshold.

    With input x_t, membrane v_t after the reset, and ``compare`` either ``>=`` or ``>``::

        h_t = v_{t-1} + x_t
        s_t = [h_t compare threshold]
        v_t = h_t - s_t threshold

    It is ``lif`` with ``beta: 1, gain: 1, reset: subtract``, and declares these dynamics. From a charge c that is given
    once, T steps emit clip(floor((c + v_0) / threshold), 0, T) spikes: a quantiser of T + 1 levels.
    """

    config: IFConfig
    dynamics: LIFDynamics

    def __init__(self, config: IFConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        self.dynamics = LIFDynamics(
            beta=1.0,
            gain=1.0,
            threshold=config.threshold,
            v_reset=None,
            compare=config.compare,
            surrogate=config.surrogate,
            detach_reset=config.detach_reset,
        )

    def emit(self, h: Tensor) -> Tensor:
        """Return 1 where the membrane reaches the threshold."""
        return spike(h, self.config.threshold, self.config.compare, self.config.surrogate)


class GIF(_Integrator):
    """The Generalized Integrate-and-Fire neuron ``gif``: ``levels`` sub-steps of ``if`` at once, their spikes counted.

    With input x_t and membrane v_t after the reset::

        h_t = v_{t-1} + x_t
        s_t = clip(floor(h_t / threshold), 0, levels)
        v_t = h_t - s_t threshold

    The gradient is straight-through: ds/dh is 1/threshold while 0 <= h < (levels + 1) threshold, where the floor alone
    acts, and 0 elsewhere; it also goes through the reset, unless ``detach_reset``. So within that range nothing of what
    is left on the membrane reaches later steps, and beyond it everything does.
    """

    spike_kind = "integer"
    config: GIFConfig

    def emit(self, h: Tensor) -> Tensor:
        """Return how often the threshold fits into the membrane, at most ``levels`` times."""
        spikes: Tensor = _Count.apply(h, self.config.threshold, self.config.levels)
        return spikes


class _Count(torch.autograd.Function):
    """clip(floor(h / threshold), 0, levels), whose derivative is that of the same without the floor."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: float, levels: int) -> Tensor:
        fits = torch.floor(h / threshold)
        ctx.save_for_backward((fits >= 0) & (fits <= levels))
        ctx.threshold = threshold
        return fits.clamp_(0, levels) + 0 * h  # 0 * h: a membrane that is not finite must not pass for a saturated one

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (within,) = ctx.saved_tensors
        return grads[0] * within / ctx.threshold, None, None


class TernaryGIF(_Integrator):
    """The ternary neuron ``gif.ternary``: an ``if`` for either sign on one membrane.

    With input x_t and membrane v_t after the reset::

        h_t = v_{t-1} + x_t
        s_t = sign(h_t) [|h_t| >= threshold]
        v_t = h_t - s_t threshold

    Gradients take ds/dh from ``surrogate``, at the distance to either threshold, and also flow through the reset,
    unless ``detach_reset``.
    """

    spike_kind = "ternary"
    config: TernaryGIFConfig

    def emit(self, h: Tensor) -> Tensor:
        """Return 1 from the threshold upwards, -1 from its negative downwards."""
        c = self.config
        return spike(h, c.threshold, ">=", c.surrogate) - spike(-h, c.threshold, ">=", c.surrogate)
