"""The options of a conversion, the ``convert`` stage of a recipe (torch-free)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spiking_lm.config import ConverterConfig, StrictModel
from spiking_lm.schemes import ActivationScheme, CacheScheme, WeightScheme
from spiking_lm_spikellm.omni_config import OmniOptions


class CalibrationConfig(StrictModel):
    """The text that a conversion looks at: windows from random places of the training part of the data."""

    samples: int = Field(default=32, gt=0)
    """Windows."""
    window: int = Field(default=512, ge=2)
    """Tokens of each."""


class GPTQOptions(StrictModel):
    """How errors of rounding are made up for (Frantar et al., arXiv 2210.17323)."""

    act_order: bool = True
    """Columns of great activity first. Groups of inputs are then formed in that order, which is stored."""
    mse: bool = True
    """Narrow the ranges of weights to what minimises the error of the weights."""
    static_groups: bool = False
    """Groups of consecutive inputs in spite of ``act_order``."""
    damp: float = Field(default=0.01, gt=0)
    """Added to the Hessian's diagonal, as a share of its mean."""
    follow: float = Field(default=0.0, ge=0, le=1)
    """How far a matrix makes up for what the text has lost on its way to it, towards what the float model reads there
    (Li et al., arXiv 2504.02692). 1 can fit the calibration text too closely; it needs the float model beside."""


class PBLLMOptions(StrictModel):
    """PB-LLM (Shang et al., arXiv 2310.00034), which weights in ternary spikes are compared with."""

    low_frac: float = Field(default=0.95, gt=0, lt=1)
    """Share of the weights that have one bit; the others have eight."""
    act_order: bool = True
    group_size: int = Field(default=64, gt=0)
    """Inputs that share scales, and among which the salient weights are chosen."""


class SpikeLLMConversion(ConverterConfig):
    """What becomes of a Llama, Mistral or Qwen2 model; stages that are left out do nothing.

    In this order: ``rotation``, the masks of salient channels, ``omni``, and ``rounding`` of the weights, block by
    block, each on what the blocks before it return in few bits.
    """

    weights: WeightScheme = WeightScheme()
    activations: ActivationScheme = ActivationScheme()
    cache: CacheScheme = CacheScheme()
    rotation: bool = False
    """Rotate residual stream, values and feed-forward layer first, so that no channel stands out (QuaRot, arXiv
    2404.00456). In float nothing changes."""
    omni: OmniOptions | None = None
    """Learn how far to clip ranges and which channels to scale (OmniQuant, arXiv 2308.13137)."""
    rounding: Literal["nearest", "gptq", "pb_llm"] = "gptq"
    """How weights come to their grid. pb_llm has a grid of its own, and needs ``weights`` left out."""
    gptq: GPTQOptions = GPTQOptions()
    pb_llm: PBLLMOptions = PBLLMOptions()
    calibration: CalibrationConfig = CalibrationConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> SpikeLLMConversion:
        if self.rounding == "pb_llm" and not self.weights.off:
            raise ValueError("rounding: pb_llm has bits of its own: leave weights out")
        if self.omni is not None and self.omni.clipping and self.rounding == "gptq" and not self.weights.off:
            raise ValueError("omni.clipping is learnt for rounding: nearest; set one of the two")
        return self
