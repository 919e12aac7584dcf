"""Options of the omni pipeline (torch-free, so that a recipe can be checked without torch)."""

from __future__ import annotations

from pydantic import Field, model_validator

from spiking_lm.config import StrictModel


class OmniOptions(StrictModel):
    """What is learnt per block, and how; the defaults are the released code's."""

    clipping: bool = True
    """Learn how far the range of each row or group of weights is drawn in (LWC)."""
    transformation: bool = True
    """Learn scales that move the difficulty of activations into weights without changing the float model (LET)."""
    tie_rotary: bool = True
    """One scale for the two channels of a rotary pair. False, as published, changes the float model."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """How much of the activations' range the scales take over at the start; 0.75 for 4-bit activations."""
    epochs: int = Field(default=10, ge=1)
    let_lr: float = Field(default=5e-3, gt=0)
    lwc_lr: float = Field(default=1e-2, gt=0)
    aug_loss: bool = False
    """Add the distance from what the float block makes of the quantised blocks' output."""

    @model_validator(mode="after")
    def _learns_something(self) -> OmniOptions:
        if not (self.clipping or self.transformation):
            raise ValueError("clipping and transformation are both off: nothing is learnt, use method rtn")
        return self
