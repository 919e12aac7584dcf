"""The configuration of the neuron ``slayer.cuba`` (torch-free), under lava-dl's own names."""

from __future__ import annotations

from pydantic import Field

from spiking_lm.config import NeuronConfig

DECAY_UNITY = 1 << 12
"""A decay of so much forgets everything."""
WEIGHT_SCALE = 1 << 6
"""What 1 is in integer weights and thresholds."""


class SlayerCubaConfig(NeuronConfig):
    """A leaky integrate-and-fire neuron with a current, in the integers of Loihi (``slayer.cuba``).

    ``threshold`` and decays have no defaults in lava-dl, and the surrogate has 1 and 1 there, which leaves gradients of
    0.0005 / threshold at most; these are values to train with.
    """

    threshold: float = Field(default=1.0, ge=1 / WEIGHT_SCALE, lt=2**17 / WEIGHT_SCALE)
    """A membrane above it fires, one exactly at it does not; cut down to a multiple of 1/64."""
    current_decay: float = Field(default=0.25, ge=0, le=1)
    """The share of the current that is lost per step, rounded to a multiple of 1/4096."""
    voltage_decay: float = Field(default=0.1, ge=0, le=1)
    """The share of the membrane that is lost per step, likewise."""
    tau_grad: float = Field(default=0.01, gt=0)
    """How far from the threshold gradients reach: the surrogate falls by e over 100 tau_grad thresholds."""
    scale_grad: float = Field(default=10.0, gt=0)
    """The area of the surrogate, in tenths."""

    @property
    def threshold_mantissa(self) -> int:
        """The threshold as Loihi counts it."""
        return int(self.threshold * WEIGHT_SCALE)

    @property
    def current_decay_mantissa(self) -> int:
        """The decay of the current in units of 1/4096."""
        return round(self.current_decay * DECAY_UNITY)

    @property
    def voltage_decay_mantissa(self) -> int:
        """The decay of the membrane in units of 1/4096."""
        return round(self.voltage_decay * DECAY_UNITY)
