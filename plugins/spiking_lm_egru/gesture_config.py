"""The configuration of the gesture classifier (torch-free)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from spiking_lm.config import ModelConfig


class EGRUGestureConfig(ModelConfig):
    """A convolutional network for each frame, EGRU over the frames, and a readout of its trace."""

    model_type: ClassVar[str] = "egru-gesture"

    frame_shape: tuple[int, int, int]
    """Channels, rows and columns of a frame; a recipe takes it from the data."""
    num_classes: int = Field(ge=2)
    cnn: Literal["small", "alexnet"] = "small"
    """small: three layers, for frames of 16 pixels and more on a CPU. alexnet: the published five, from 32 pixels."""
    n_features: int = Field(default=128, gt=0)
    """What the convolutional network hands on for a frame; published: 512."""
    n_hidden: int = Field(default=128, gt=0)
    """Event-based units; published: 795."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On what EGRU reads and on what the readout reads."""
    dropout_connect: float = Field(default=0.0, ge=0, lt=1)
    """On the recurrent weights, each weight on its own, for a whole clip."""
    zoneout: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a unit keeps its state at a step."""
    thr_mean: float = Field(default=0.3, gt=0, lt=1)
    """Mean of the Beta distribution from which the thresholds are drawn."""
    dampening_factor: float = Field(default=0.7, gt=0)
    """Height of the surrogate derivative."""
    pseudo_derivative_support: float = Field(default=1.0, gt=0)
    """1 / its half-width."""

    activity_loss: float = Field(default=0.0, ge=0)
    """Weight of (event rate - ``activity_target``)^2."""
    activity_target: float = Field(default=0.05, ge=0, le=1)
    voltage_loss: float = Field(default=0.0, ge=0)
    """Weight of the mean of c - (threshold - ``voltage_target``), which draws the states below their thresholds."""
    voltage_target: float = Field(default=0.05, ge=0, le=1)
