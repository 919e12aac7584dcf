"""The configuration of the EGRU language model and its GRU and LSTM twins (torch-free)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from spiking_lm.config import ModelConfig

Quirk = Literal["batch_shared_dropout", "batch_axis_beta", "row_weight_drop", "last_word_as_padding", "decayed_biases"]


class EGRUConfig(ModelConfig):
    """Sizes and switches of the EGRU language model; the default sizes are the published ones.

    Fields marked (egru) do nothing for the twins, so that changing ``cell`` alone gives the twin of a model.
    """

    model_type: ClassVar[str] = "egru"

    vocab_size: int = Field(gt=0)
    n_layer: int = Field(default=3, gt=0)
    n_embd: int = Field(default=750, gt=0)
    n_hidden: int = Field(default=1350, gt=0)
    """Units of every layer but the last, which has ``n_embd`` unless ``projection`` is set."""
    cell: Literal["egru", "gru", "lstm"] = "egru"
    """gru and lstm are the twins without events: the same embedding, sizes, dropouts and decoder."""
    tie_weights: bool = True
    """Share the embedding matrix with the decoder."""
    projection: bool = False
    """The last layer has ``n_hidden`` units too, and a matrix leads from there to ``n_embd``."""

    dropout_words: float = Field(default=0.0, ge=0, lt=1)
    """Share of the vocabulary whose embedding is zero for a whole window."""
    dropout_emb: float = Field(default=0.0, ge=0, lt=1)
    """On what the first layer reads. This and the next two drop the same channels at every position of a sequence."""
    dropout_forward: float = Field(default=0.0, ge=0, lt=1)
    """Between the layers."""
    dropout_last: float = Field(default=0.0, ge=0, lt=1)
    """On what the decoder reads; 0.5 in the released code."""
    dropout_connect: float = Field(default=0.0, ge=0, lt=1)
    """On the recurrent weights, each weight on its own, for a whole window."""
    zoneout: float = Field(default=0.0, ge=0, lt=1)
    """(egru) Chance that a unit keeps its state at a step."""

    thr_mean: float = Field(default=0.01, gt=0, lt=1)
    """(egru) Mean of the Beta distribution from which the thresholds are drawn. With much higher ones, deep models are
    silent at first, and then nothing trains them."""
    dampening_factor: float = Field(default=1.0, gt=0)
    """(egru) Height of the surrogate derivative; published language models: 3.6."""
    pseudo_derivative_support: float = Field(default=1.0, gt=0)
    """(egru) 1 / its half-width; published language models: 3.6."""
    threshold_lr: float = Field(default=1.0, ge=0)
    """(egru) Learning rate of the thresholds, as a multiple of everything else's; 0 freezes them, as published."""
    state_carry: Literal["full", "y_only"] = "full"
    """(egru) What a new window takes over. y_only: the events of the last step but not the states, which begin at zero,
    as in the released code. Stepping token by token carries both in either case."""

    alpha: float = Field(default=0.0, ge=0)
    """Weight of the mean state; twins: of the last layer's mean squared output."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the mean squared change of a state after an event; twins: of the last layer's output at every step."""
    gamma: float = Field(default=0.0, ge=0)
    """(egru) Weight of the mean event rate."""
    activity_penalty: float = Field(default=0.0, ge=0)
    """(egru) Weight of the event rate above ``activity_target``. The four penalties are summed over the layers."""
    activity_target: float = Field(default=0.15, ge=0, le=1)
    """(egru) Event rate of a layer up to which ``activity_penalty`` asks nothing."""

    reference_quirks: list[Quirk] = []
    """Defects of the released code to copy. batch_shared_dropout: one dropout mask for all rows, another at every
    position. batch_axis_beta: ``beta`` compares neighbouring rows of the batch instead of steps. row_weight_drop:
    ``dropout_connect`` of the twins drops whole rows. last_word_as_padding: what reads the last word of the vocabulary
    does not train its embedding. decayed_biases: weight decay on the biases too."""
