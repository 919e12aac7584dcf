"""The neuron ``slayer.cuba``: Loihi's own integers in training, with the surrogate gradient of lava-dl's SLAYER.

What trains is what runs: currents and membranes are multiples of 1/4096, decays of 1/4096, thresholds of 1/64, weights
of 1/32 between -4 and 3.97, all as a LIF process has them. :class:`CubaDense` is a layer of such weights and neurons,
and :func:`to_network` makes a network of layers, which computes the same spikes and can be written as a netx file.
Equality with ``lava.lib.dl.slayer`` 0.6.0, gradients included, is tested; lava-dl itself is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spiking_lm.errors import UsageError
from spiking_lm.interfaces import Neuron
from spiking_lm.kernels.reference import compute_dtype
from spiking_lm.neurons import membrane_dtype
from spiking_lm_lava.arithmetic import ALIGN_SHIFT, DECAY_SHIFT, STATE_LIMIT
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.slayer_config import DECAY_UNITY, WEIGHT_SCALE, SlayerCubaConfig

STATE_SCALE = WEIGHT_SCALE << ALIGN_SHIFT
"""What 1 is in currents and membranes."""
WEIGHT_STEP = 2 / WEIGHT_SCALE
"""Mixed weights keep 8 bits, the lowest of which is 0."""
LEAST_WEIGHT, MOST_WEIGHT = -256 / WEIGHT_SCALE, 254 / WEIGHT_SCALE

_AREA, _REACH = 0.1, 100
"""What SLAYER makes of scale_grad and tau_grad."""


class CubaState(NamedTuple):
    """The current, and the membrane after its reset, both in units in which the threshold is given."""

    u: Tensor
    v: Tensor


class SlayerCuba(Neuron):
    """The neuron ``slayer.cuba``, with X = 4096 x cut toward zero, and 4096 u, 4096 v whole numbers::

        U_t = tz(U_{t-1} (4096 - du) / 4096) + X_t          du = round(4096 current_decay)
        H_t = tz(V_{t-1} (4096 - dv) / 4096) + U_t          dv = round(4096 voltage_decay), up to 24 bits
        s_t = [H_t > 64 floor(64 threshold)]
        V_t = (1 - s_t) H_t

    Gradients are SLAYER's: ``ds/dh = scale exp(-|h - threshold| / reach) / (2 reach)`` with scale = 0.1 scale_grad and
    reach = 100 tau_grad threshold, decays as they are, cuts and the reset left out of them. Two coupled states fit no
    kernel, so it runs step by step. The state is :class:`CubaState`, in float32 at least, which holds it exactly.

    As on hardware a membrane at its threshold never fires; SLAYER fires it where the threshold is 64 or more, because
    its margin is lost in float32 there. Membranes end at 24 bits as they do in Lava, and not in SLAYER.
    """

    config: SlayerCubaConfig

    def init_state(
        self, shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> CubaState:
        """Return currents and membranes of zero, each of ``shape``."""
        zero = torch.zeros(shape, device=device, dtype=membrane_dtype(dtype))
        return CubaState(zero, zero.clone())

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Advance one time step: ``x (B, N)`` and :class:`CubaState` -> spikes in the dtype of ``x``, next state."""
        for part in state:
            if part.shape != x.shape:
                raise UsageError(
                    f"slayer.cuba: a state of shape {tuple(part.shape)} for input of shape {tuple(x.shape)}"
                )
        c, dtype = self.config, compute_dtype(x, *state)
        u = _leaked(state.u.to(dtype), x.to(dtype), DECAY_UNITY - c.current_decay_mantissa, 0)
        h = _leaked(state.v.to(dtype), u, DECAY_UNITY - c.voltage_decay_mantissa, STATE_LIMIT - 1)
        threshold = c.threshold_mantissa / WEIGHT_SCALE
        fired: tuple[Tensor, Tensor] = _Fire.apply(h, threshold, _AREA * c.scale_grad, _REACH * c.tau_grad * threshold)
        return fired[0].to(x.dtype), CubaState(u, fired[1])


class CubaDense(nn.Module):
    """Weights and ``slayer.cuba`` neurons: ``x (B, T, in)`` and their state -> spikes ``(B, T, out)``, next state.

    The parameter ``weight (out, in)`` is real; what multiplies is :meth:`quantized_weight`. As a process a layer
    answers one step later, which this leaves out.
    """

    def __init__(
        self, in_features: int, out_features: int, config: SlayerCubaConfig | None = None, *, gain: float = 1.0
    ) -> None:
        """Draw weights uniformly, by ``gain`` larger than torch's linear layers do."""
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach() * gain)
        self.neuron = SlayerCuba(config or SlayerCubaConfig(), size=out_features)

    def quantized_weight(self) -> Tensor:
        """Return the weights as multiples of 1/32 between -4 and 3.97; gradients pass where they are not cut off."""
        rounded: Tensor = _Round.apply(self.weight)
        return rounded.clamp(LEAST_WEIGHT, MOST_WEIGHT)

    def forward(self, x: Tensor, state: CubaState | None = None) -> tuple[Tensor, CubaState]:
        """Run ``x (B, T, in)`` from ``state`` (None: from rest)."""
        spikes, after = self.neuron(nn.functional.linear(x, self.quantized_weight().to(x.dtype)), state)
        return spikes, after


def to_network(layers: Sequence[CubaDense]) -> Network:
    """Return trained layers, one behind the other, as a checked network from ``input`` to ``output``.

    Its spikes are those of the layers, len(layers) steps later. Nodes are ``synapse0``, ``neurons0`` and so on.
    Raises: UsageError for layers that do not fit each other; LoweringError with the bound that a current may pass.
    """
    if not layers:
        raise UsageError("a network needs a layer")
    nodes: list[Process] = [Source("input", layers[0].weight.shape[1])]
    for k, layer in enumerate(layers):
        rows, columns = layer.weight.shape
        if columns != nodes[-1].size:
            raise UsageError(f"layer {k} reads {columns} values, and {nodes[-1].size} arrive")
        weight = (layer.quantized_weight().detach().cpu().double().numpy() * WEIGHT_SCALE).astype(np.int64)
        c = layer.neuron.config
        du, dv = c.current_decay_mantissa - 1, c.voltage_decay_mantissa
        nodes += [
            Synapse(f"synapse{k}", rows, weight=weight),
            LIF(f"neurons{k}", rows, du=du, dv=dv, vth=c.threshold_mantissa),
        ]
    nodes.append(Sink("output", nodes[-1].size))
    edges = [Edge(a.name, b.name) for a, b in pairwise(nodes)]
    return Network(tuple(nodes), tuple(edges))


def _leaked(state: Tensor, x: Tensor, kept: int, most: int) -> Tensor:
    leaked: Tensor = _Leak.apply(state, x, kept, most)
    return leaked


class _Leak(torch.autograd.Function):
    """What is left of a state, and an input, in whole numbers; its gradient is that of the real numbers."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, x: Tensor, kept: int, most: int) -> Tensor:
        ctx.kept = kept
        left = (state * STATE_SCALE).to(torch.int64) * kept
        left = (left + ((left >> 63) & (DECAY_UNITY - 1))) >> DECAY_SHIFT  # toward zero
        total = left + (x * STATE_SCALE).to(torch.int64)
        if most:
            total = total.clamp(-most, most)
        # 0 times both: what is not finite must not become a number.
        return total.to(state.dtype) / STATE_SCALE + 0 * state + 0 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * (ctx.kept / DECAY_UNITY), grads[0], None, None


class _Fire(torch.autograd.Function):
    """Spikes of a membrane, and the membrane after the reset, through which gradients pass as if it were not there."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: float, area: float, reach: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h)
        ctx.threshold, ctx.area, ctx.reach = threshold, area, reach
        spikes = (h > threshold).to(h.dtype) + 0 * h
        return spikes, h * (1 - spikes)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (h,) = ctx.saved_tensors
        slope = ctx.area / (2 * ctx.reach) * torch.exp(-(h - ctx.threshold).abs() / ctx.reach)
        return slope * grads[0] + grads[1], None, None, None


class _Round(torch.autograd.Function):
    """The nearest multiples of the weights' step, halves to the even one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return (weight / WEIGHT_STEP).round() * WEIGHT_STEP

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


__all__ = ["CubaDense", "CubaState", "SlayerCuba", "to_network"]
