"""The configuration of SpikeGPT (torch-free)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from spiking_lm.config import ModelConfig


class SpikeGPTConfig(ModelConfig):
    """Sizes and switches of SpikeGPT; the defaults are the architecture of the released training code."""

    model_type: ClassVar[str] = "spikegpt"

    vocab_size: int = Field(gt=0)
    n_layer: int = Field(default=12, gt=0)
    n_embd: int = Field(default=512, gt=0)
    ctx_len: int = Field(default=1024, gt=0)
    """The context it is trained with. The model is recurrent: longer texts run too, in constant memory."""
    neuron: dict[str, Any] = {"type": "snntorch.leaky"}
    """``type`` is a registered neuron; the rest are its parameters."""
    spiking: bool = True
    """False gives the continuous twin: no neuron and no binarised embedding, everything else equal."""
    placement: Literal["canonical", "spike_input"] = "canonical"
    """canonical: neurons after each sub-block, as published. spike_input: a neuron before each of the seven block
    matrices, so that all of them read binary spikes; residual stream and embedding are then real."""
    input_gain: float = Field(default=3.0, gt=0)
    """spike_input only: initial value of the learned gain in front of each neuron."""
    silence_penalty: float = Field(default=0.0, ge=0)
    """Weight of an auxiliary loss on channels that fire at fewer than 2 % of the tokens; the paper has none."""
    binary_embedding: bool = True
    """Threshold the embedding at 0; False is what the released generation script does for most vocabularies."""
    ffn_pre: bool = False
    """The released ``RWKV-ffnPre`` variant: block 0 has a second FFN in place of its time mix."""
    rescale: bool = False
    """The released generation script's fp16 rescaling every 6 layers, which changes the spikes. For parity only."""
    init: Literal["scaled", "rwkv", "torch", "released"] = "scaled"
    """scaled: orthogonal, so large that neurons fire from the start. rwkv: RWKV-4's as intended (most matrices zero).
    torch: PyTorch's defaults, what the released training script ends up with. released: what the released initialiser
    does when it is triggered (every block matrix orthogonal with gain 1)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the residual stream after every block; the released code uses 0.03."""
    head_tying: bool = False
    """Share the embedding matrix with the output head."""
    l2wrap: bool = False
    """Add the released training's penalty on the largest logit of each position (as a proper auxiliary loss)."""
    num_classes: int | None = Field(default=None, ge=1)
    """Adds a classification head; 1 is regression."""
    pool: Literal["mean", "last"] = "mean"
    """What the classification head reads: the mean over the true tokens, or the last of them."""
