"""The configuration of SpikeLLM (torch-free)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from spiking_lm.config import ModelConfig, StrictModel
from spiking_lm.schemes import ActivationScheme, CacheScheme, WeightScheme


class RopeScaling(StrictModel):
    """How rotary frequencies are stretched for contexts longer than those of the first training."""

    type: Literal["linear", "llama3"]
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(default=1.0, gt=0)
    """llama3 only."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """llama3 only."""
    original_ctx_len: int = Field(default=8192, gt=0)
    """llama3 only: the context of the first training."""


class SpikeLLMConfig(ModelConfig):
    """Sizes of a Llama, Mistral or Qwen2 model, and how its values become spikes; by default nothing does.

    With every scheme off this is the float model itself.
    """

    model_type: ClassVar[str] = "spikellm"

    vocab_size: int = Field(gt=0)
    n_layer: int = Field(default=4, gt=0)
    n_embd: int = Field(default=256, gt=0)
    n_inner: int = Field(default=688, gt=0)
    """Width of the gated feed-forward layer."""
    n_head: int = Field(default=8, gt=0)
    n_kv_head: int | None = Field(default=None, gt=0)
    """Heads of keys and values, each shared by n_head / n_kv_head heads of queries; None: as many as ``n_head``."""
    head_dim: int | None = Field(default=None, gt=0, multiple_of=2)
    """None: n_embd / n_head."""
    ctx_len: int = Field(default=2048, gt=0)
    """The context that the model was trained with."""
    sliding_window: int | None = Field(default=None, gt=0)
    """A token attends to itself and the ``sliding_window - 1`` tokens before it; None: to all before it."""
    norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    """Qwen2's biases of the query, key and value projections."""
    tie_embeddings: bool = False

    weights: WeightScheme = WeightScheme()
    """Of the seven projections of every block; embedding and head stay real."""
    activations: ActivationScheme = ActivationScheme()
    """Of what the seven projections read."""
    cache: CacheScheme = CacheScheme()
    rotation: bool = False
    """The residual stream, values and feed-forward layer were rotated, so that no channel stands out: the weights hold
    the rotations, but for those that are applied to activations."""
    mode: Literal["fake", "spike", "binary"] = "fake"
    """How the products are computed, with equal results. fake: counts times scale, one product. spike: one product per
    spike step. binary: one per sub-step, of zeros and ones."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> SpikeLLMConfig:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}: set head_dim")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_dim {self.head_size} is odd: rotary positions need pairs")
        return self

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.n_embd // self.n_head
