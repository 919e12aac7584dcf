"""The configuration of the elastic neuron (torch-free)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from spiking_lm.config import NeuronConfig

STEPS = 4
"""Amplitudes of a neuron that says nothing of its steps, and that no model holds."""


class ElasticConfig(NeuronConfig):
    """The elastic bi-spiking neuron: ternary spikes, and one amplitude per step for all neurons of a layer."""

    steps: int | None = Field(default=None, ge=1)
    """Amplitudes, one per time step; steps beyond the last share it. None: as many as the model that holds the neuron
    takes, and 4 without one."""
    k: float = Field(default=2.0, gt=0)
    """Frequency control: an amplitude is set to k times the mean size of the membranes, so a greater k means fewer
    spikes. Of normal inputs 69 % fire with k = 1, 42 % with 2, 23 % with 3."""
    beta: float = Field(default=0.25, ge=0)
    """Decay of the membrane, which the amplitude multiplies too; 0 leaves no memory between the steps."""
    bits: Literal[1, 2] = 2
    """2: spikes of -A, 0 and A. 1: of -A and A, the sign of the membrane."""
    reset: Literal["asymmetric", "symmetric"] = "asymmetric"
    """asymmetric: a positive spike wipes the membrane, a negative one doubles what is left of it, as in the released
    code. symmetric: either wipes it."""
    learn_alpha: bool = False
    """Train the amplitudes on, with the gradient of a learned step size."""
