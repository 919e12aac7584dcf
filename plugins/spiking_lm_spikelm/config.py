"""The configuration of SpikeLM (torch-free)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from spiking_lm.config import ModelConfig

Precision = Literal["full", "ternary", "binary"]


class SpikeLMSizes(ModelConfig):
    """What every form of SpikeLM is made of: sizes, neurons and precision of its blocks and its embedding."""

    vocab_size: int = Field(gt=0)
    n_layer: int = Field(default=4, gt=0)
    n_embd: int = Field(default=256, gt=0)
    n_head: int = Field(default=4, gt=0)
    n_hidden: int | None = Field(default=None, gt=0)
    """Width of the feed-forward layer; None: four times ``n_embd``."""
    ctx_len: int = Field(default=128, gt=0)
    """The longest text: positions are learned."""
    norm_eps: float = Field(default=1e-12, gt=0)

    steps: int = Field(default=4, gt=0)
    """Spike steps per token (T); every block runs in all of them."""
    neuron: dict[str, Any] | None = {"type": "elastic"}
    """``type`` is a registered neuron, the rest are its parameters. ``{type: lif, threshold: 0.5}`` makes the LIF twin;
    None the dense twin, with real numbers everywhere, and one step."""
    weights: Precision = "full"
    """Of the matrices of a block: real, or trained as ternary or binary ones."""
    embedding: Precision = "full"
    """Of the word embedding, scaled by row; the released code defines it and does not use it."""
    mlm_activation: Literal["relu", "gelu"] = "relu"
    """Of the head that predicts words."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """On the embedding, the attention weights, and what each sub-block adds."""
    word_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the words whose embedding is zero, in training."""
    init: Literal["fan_in", "bert"] = "fan_in"
    """fan_in: normal with deviation 1/sqrt(inputs). bert: 0.02, which leaves neurons with a fixed threshold silent."""

    @model_validator(mode="after")
    def _blocks_fit(self) -> SpikeLMSizes:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.neuron is not None and not isinstance(self.neuron.get("type"), str):
            raise ValueError("neuron has no type; write {type: elastic}, or null for the dense twin")
        return self

    @property
    def inner(self) -> int:
        """Width of the feed-forward layer."""
        return self.n_hidden or 4 * self.n_embd

    @property
    def time_steps(self) -> int:
        """Spike steps that really run: one in the dense twin."""
        return 1 if self.neuron is None else self.steps


class SpikeLMConfig(SpikeLMSizes):
    """SpikeLM as an encoder or a causal model, its twins without elastic neurons, and its heads."""

    model_type: ClassVar[str] = "spikelm"

    type_vocab_size: int = Field(default=2, gt=0)
    """Kinds of segments; texts of one segment are of kind 0."""
    causal: bool = False
    """A language model that reads from left to right, in place of an encoder."""
    mlm: bool = False
    """Adds the head that predicts masked words; a causal model has it anyway, for the next word."""
    nsp: bool = False
    """Adds the head that says whether the second segment follows the first."""
    num_classes: int | None = Field(default=None, ge=1)
    """Adds a classification head; 1 is regression."""
    pooling: Literal["mean", "cls"] = "mean"
    """What classification and ``nsp`` read: the mean over the true tokens, or the first token behind a tanh layer."""

    @model_validator(mode="after")
    def _heads_fit(self) -> SpikeLMConfig:
        if self.causal and (self.nsp or self.pooling == "cls"):
            field = "nsp" if self.nsp else "pooling: cls"
            raise ValueError(f"{field} reads the first token, which in a causal model has seen no other")
        return self


class SpikeLMSeq2SeqConfig(SpikeLMSizes):
    """SpikeLM as an encoder of sources and a decoder of targets: ``n_layer`` are the blocks of the encoder."""

    model_type: ClassVar[str] = "spikelm-seq2seq"

    n_decoder: int | None = Field(default=None, gt=0)
    """Blocks of the decoder; None: as many as the encoder has."""

    @property
    def decoder_layers(self) -> int:
        """Blocks that the decoder has."""
        return self.n_decoder or self.n_layer
