"""The parameters of ``adlif`` (torch-free, so that recipes are checked without importing it)."""

from __future__ import annotations

from pydantic import Field

from spiking_lm.config import NeuronConfig, SurrogateConfig


class AdLIFConfig(NeuronConfig):
    """An adaptive-threshold LIF neuron in discrete time."""

    beta: float = Field(default=0.5, ge=0, le=1)
    """Membrane decay per step."""
    gain: float = 0.5
    """Input gain."""
    threshold: float = Field(default=1.0, gt=0)
    """What it takes to fire after a long silence."""
    rho: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the adaptation per step; it forgets over about 1 / (1 - rho) steps."""
    strength: float = Field(default=0.5, gt=0)
    """Initial rise of the threshold of a neuron that fires at every step."""
    surrogate: SurrogateConfig = SurrogateConfig()
