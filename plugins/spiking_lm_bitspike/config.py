"""The configuration of the 1 and 1.58-bit spiking language model (torch-free)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from spiking_lm.config import ModelConfig, StrictModel


class ReplaceConfig(StrictModel):
    """What the loss is given, in training, in place of the clamp network's own values; gradients stay that network's.

    ``by`` simulation: the firing rates of a simulation, at the populations that losses read, as published. populations:
    at every population, so that what comes behind it reads what it will read of spikes. rounding: at every population
    the nearest of the T + 1 rates that T steps can have, which is what ``mode: sequential`` comes to, without
    simulating anything. none: nothing.
    """

    by: Literal["simulation", "populations", "rounding", "none"] = "simulation"
    share: float = Field(default=1.0, gt=0, le=1)
    """How far towards the replacement a value is moved."""


class BitspikeConfig(ModelConfig):
    """Sizes, dynamics and precision; populations, norms and wiring are SpikingBERT's at any depth."""

    model_type: ClassVar[str] = "bitspike"

    vocab_size: int = Field(gt=0)
    n_layer: int = Field(default=4, gt=0)
    """Blocks of six populations each, behind one of the embedding."""
    n_embd: int = Field(default=768, gt=0)
    n_head: int = Field(default=12, gt=0)
    n_hidden: int = Field(default=3072, gt=0)
    """Width of the feed-forward population."""
    ctx_len: int = Field(default=512, gt=0)
    """The longest text: positions are learned."""
    token_types: int = Field(default=0, ge=0)
    """Learned vectors of the parts of a text, of which all tokens have the first unless told; 0: none."""

    steps: int = Field(default=16, gt=0)
    """Simulation steps T."""
    vth: float = Field(default=1.0, gt=0)
    """Firing threshold, the same everywhere."""
    leak: float = Field(default=1.0, gt=0, le=1)
    """What is left of a membrane after a step; 1 integrates without leak."""
    charge: float = Field(default=0.5001, ge=0, lt=1)
    """Membranes begin at this share of the threshold. At a half, rates round to the nearest multiple of 1/T instead of
    down; the rest keeps membranes off the threshold, which softmax can put them on exactly. The released code: 0."""
    mode: Literal["released", "rate-consistent", "sequential"] = "rate-consistent"
    """What norms, softmax and GELU act on. released: the spikes of each step, as published; rates then converge to
    something else than the equilibrium that is trained. rate-consistent: running rates, and rates converge to it.
    sequential: the rates of all T steps; a population begins its T steps when those before it have ended, so that
    a text takes T steps for each population that waits for another, and its rates are the equilibrium's but for
    rounding."""
    tolerance: float | None = Field(default=None, gt=0)
    """Stop simulating a text once the rates of its last population have changed by no more, on average, while the steps
    grew by half; None: always T steps."""
    feedback: bool = False
    """The last population charges the first one at the next step, through a matrix of its own."""

    weights: Literal["full", "ternary", "binary"] = "full"
    """Of the six matrices of every block; embeddings, norms, biases and heads are always full."""
    causal: bool = False
    """Tokens attend to themselves and earlier ones only, and the model scores the next token."""
    masked: bool = False
    """Adds a head for masked tokens, if not causal."""
    tie_weights: bool = False
    """The head of tokens shares the embedding's matrix."""
    num_classes: int | None = Field(default=None, ge=1)
    """Adds a classification head; 1 is for regression."""
    pooling: Literal["cls", "mean"] = "cls"
    """What that head reads: rates of the first token, or their mean over the text."""
    teacher_embd: int | None = Field(default=None, gt=0)
    """Adds a map from rates to a teacher's space of this width, for distillation; it is no part of inference."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On what charges populations, in training; one mask for all steps of a simulation."""
    replace: ReplaceConfig = ReplaceConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> BitspikeConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.causal and self.masked:
            raise ValueError("masked is for models that are not causal: a causal one has the same head for next tokens")
        if self.causal and self.tolerance is not None:
            raise ValueError("tolerance is for models that are not causal: those keep the spikes of every step")
        if self.mode == "sequential" and (self.feedback or self.tolerance is not None):
            raise ValueError("mode: sequential needs the rates of all T steps: no feedback and no tolerance")
        if self.replace.by == "rounding" and (self.feedback or self.leak < 1):
            raise ValueError("replace.by rounding says what leak: 1 and feedback: false come to; choose simulation")
        return self
