"""The configurations of the plugin ``toy``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from spiking_lm.config import BackendConfig, ModelConfig


class ToyConfig(ModelConfig):
    model_type: ClassVar[str] = "toy"
    vocab_size: int
    width: int = 8
    tied: bool = True


class ToyChipConfig(BackendConfig):
    bits: int = Field(default=16, ge=2, le=24)
    """Of a weight."""
    cores: int = Field(default=4, gt=0)
