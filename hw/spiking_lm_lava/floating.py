"""Lava's floating-point models, for conformance alone: hardware has none of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm_lava.process import Delaying, Process, State
from spiking_lm_lava.values import Bounds, Range


@dataclass(frozen=True, eq=False)
class FloatLIF(Process):
    """Lava's floating-point LIF, with ``refractory`` v rests for so many steps after a spike."""

    kind = "float_lif"
    states = ("u", "v")
    du: float = 0.0
    dv: float = 0.0
    vth: float = 1.0
    bias: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    refractory: int = 0

    def initial(self) -> State:
        """Return the state before the first step."""
        return {**{name: np.zeros(self.size) for name in ("u", "v")}, "rests_until": np.zeros(self.size, np.int64)}

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return spikes."""
        u = state["u"] * (1 - self.du) + arrived[0]
        awake = state["rests_until"] < t
        v = np.where(awake, state["v"] * (1 - self.dv) + u + self.bias, state["v"])
        spikes = v > self.vth
        state["u"], state["v"] = u, np.where(spikes, 0.0, v)
        state["rests_until"] = np.where(spikes, t + self.refractory, state["rests_until"])
        return (spikes.astype(np.int64),)

    def bounds(self, *arrived: Range) -> Bounds:
        """Refuse: hardware has no floating point."""
        raise self.error("computes in floating point, which the hardware does not", "use lif")


@dataclass(frozen=True, eq=False)
class FloatSynapse(Delaying):
    """A matrix of real weights that adds one step; only whether a spike is there counts."""

    kind = "float_synapse"

    def receive(self, state: State, arrived: Any) -> None:
        """Put what arrived on its way."""
        state["pending"] = self.weight[:, arrived != 0].sum(1)[None]

    def bounds(self, *arrived: Range) -> Bounds:
        """Refuse: hardware has no floating point."""
        raise self.error("computes in floating point, which the hardware does not", "use synapse")
