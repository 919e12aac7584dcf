"""Norse's leaky integrate-and-fire neurons, with explicit state. One step is one call of Norse, and is the definition.

Parameters are handed to Norse as plain numbers: exact for float64 inputs, promoting no other, and neither weights to
be saved nor tensors to be moved.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from spiking_lm.errors import UsageError
from spiking_lm.interfaces import LIFDynamics, Neuron
from spiking_lm.kernels.reference import compute_dtype
from spiking_lm.neurons import membrane_dtype
from spiking_lm_egru.neuron_config import NorseLIFBoxConfig, NorseLIFConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing Norse compiles functions with torch.jit, which is deprecated
    from norse.torch.functional.lif import LIFFeedForwardState, LIFParameters, lif_feed_forward_step
    from norse.torch.functional.lif_box import LIFBoxFeedForwardState, LIFBoxParameters, lif_box_feed_forward_step
    from norse.torch.functional.reset import reset_subtract, reset_value


class NorseLIFBox(Neuron):
    """The neuron ``norse.lif_box``: a membrane that the input charges directly (Norse's ``lif_box_feed_forward_step``).

    With k = dt tau_mem_inv::

        h_t = v_{t-1} + k (x_t + v_leak - v_{t-1})
        s_t = [h_t > v_th]
        v_t = (1 - s_t) h_t + s_t v_reset           reset_method: value
        v_t = h_t - s_t v_th                        reset_method: subtract

    Gradients flow through the reset. Where the rest is the reset (or zero, when subtracting) and the surrogate is one
    of the kernels' table, these are the dynamics of :func:`spiking_lm.kernels.lif_scan`, which :meth:`forward` then
    runs. The state is v, ``(B, N)``, in float32 at least.
    """

    config: NorseLIFBoxConfig

    def __init__(self, config: NorseLIFBoxConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        charge = config.dt * config.tau_mem_inv
        rests_where_kernel_does = config.v_leak == (config.v_reset if config.reset_method == "value" else 0)
        if config.surrogate is not None and rests_where_kernel_does:
            self.dynamics = LIFDynamics(
                beta=1 - charge,
                gain=charge,
                threshold=config.v_th,
                v_reset=config.v_reset if config.reset_method == "value" else None,
                compare=">",
                surrogate=config.surrogate,
                detach_reset=False,
            )

    @property
    def p(self) -> Any:
        """Norse's parameters, made anew: its tuples cannot be pickled."""
        c = self.config
        return LIFBoxParameters(
            tau_mem_inv=c.tau_mem_inv,
            v_leak=c.v_leak,
            v_th=c.v_th,
            v_reset=c.v_reset,
            method=c.method,
            alpha=c.alpha,
            reset_method=reset_value if c.reset_method == "value" else reset_subtract,
        )

    def init_state(
        self, shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return membranes at rest, ``v_leak``, of ``shape``."""
        return torch.full(shape, self.config.v_leak, device=device, dtype=membrane_dtype(dtype))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Advance one time step: ``x (B, N)`` and membranes ``(B, N)`` -> spikes in the dtype of ``x``, membranes."""
        _check_shape("norse.lif_box", x, state)
        dtype = compute_dtype(x, state)
        before = LIFBoxFeedForwardState(v=state.to(dtype))
        spikes, after = lif_box_feed_forward_step(x.to(dtype), before, self.p, self.config.dt)
        return spikes.to(x.dtype), after.v


class NorseLIF(Neuron):
    """The neuron ``norse.lif``: the input charges a current, and that the membrane (``lif_feed_forward_step``).

    With k = dt tau_mem_inv and c = dt tau_syn_inv::

        j_t = i_{t-1} + x_t                 i_t = (1 - c) j_t
        h_t = v_{t-1} + k (v_leak - v_{t-1} + j_t)
        s_t = [h_t > v_th]
        v_t = (1 - s_t) h_t + s_t v_reset

    Two coupled states fit no dynamics of the kernels, so it runs step by step through Norse; with c = 1 the current is
    gone after its step, and the neuron is ``norse.lif_box``. The state is Norse's own ``LIFFeedForwardState(v, i)``.
    """

    config: NorseLIFConfig

    @property
    def p(self) -> Any:
        """Norse's parameters, made anew: its tuples cannot be pickled."""
        c = self.config
        return LIFParameters(
            tau_syn_inv=c.tau_syn_inv,
            tau_mem_inv=c.tau_mem_inv,
            v_leak=c.v_leak,
            v_th=c.v_th,
            v_reset=c.v_reset,
            method=c.method,
            alpha=c.alpha,
        )

    def init_state(
        self, shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """Return membranes at rest, ``v_leak``, and no current: ``LIFFeedForwardState(v, i)``, each of ``shape``."""
        v = torch.full(shape, self.config.v_leak, device=device, dtype=membrane_dtype(dtype))
        return LIFFeedForwardState(v=v, i=torch.zeros_like(v))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Advance one time step: ``x (B, N)`` and ``LIFFeedForwardState(v, i)`` -> spikes as ``x``, next state."""
        _check_shape("norse.lif", x, state.v)
        dtype = compute_dtype(x, state.v)
        state = LIFFeedForwardState(v=state.v.to(dtype), i=state.i.to(dtype))
        spikes, state = lif_feed_forward_step(x.to(dtype), state, self.p, self.config.dt)
        return spikes.to(x.dtype), state


def _check_shape(name: str, x: Tensor, v: Tensor) -> None:
    if v.shape != x.shape:  # Norse would broadcast
        raise UsageError(f"{name}: a membrane of shape {tuple(v.shape)} for input of shape {tuple(x.shape)}")
