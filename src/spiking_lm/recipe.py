"""Recipes: the schema of one run, as data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from spiking_lm.config import StrictModel


class OptimizerConfig(StrictModel):
    """The optimizer and its peak learning rate."""

    type: Literal["adamw", "adam"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class ScheduleConfig(StrictModel):
    """The learning rate over the run, as a share of the peak."""

    type: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak that is left at the last step (cosine, wsd)."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """wsd only: share of the run that the final decay takes."""


class TrainConfig(StrictModel):
    """The training stage."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Sequences per micro-batch."""
    accumulate: int = Field(default=1, gt=0)
    """Micro-batches per optimizer step."""
    seq_len: int = Field(default=128, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs matrix products in bfloat16 under autocast; weights, states and norms stay fp32."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    grad_clip: float | None = Field(default=1.0, gt=0)
    eval_every: int = Field(default=0, ge=0)
    """Steps between validation scores; 0 scores only at the end."""
    eval_tokens: int = Field(default=16384, gt=0)
    """Validation tokens scored each time; the evaluate stage scores the whole split."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    log_every: int = Field(default=10, gt=0)
    threads: int | None = Field(default=None, gt=0)
    """CPU threads for torch; None leaves torch's choice."""


class EvaluateConfig(StrictModel):
    """The evaluation stage: a window slides over the text, and only tokens with enough context are scored."""

    split: Literal["valid", "test"] = "test"
    window: int = Field(default=1024, gt=0)
    stride: int = Field(default=512, gt=0)
    batch_size: int = Field(default=8, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)
    """Score only the first so many tokens of the split."""
    metrics: list[str] | None = None
    """Registry names; None computes every metric that applies."""


class GenerateConfig(StrictModel):
    """The generation stage."""

    prompt: str = "\n"
    max_new_tokens: int = Field(default=300, gt=0)
    temperature: float = Field(default=0.8, ge=0)
    """0 is greedy."""
    top_k: int | None = Field(default=None, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    """1.0 means no cut."""
    seed: int = 0
    stop: list[str] = []


class ExplainConfig(StrictModel):
    """The explain stage: where the spikes are, measured on text of the evaluation split."""

    tokens: int = Field(default=2048, gt=0)


class ReportConfig(StrictModel):
    """The report stage: one self-contained HTML file."""

    raster_tokens: int = Field(default=200, gt=0)
    """Tokens shown in the spike raster."""


class Recipe(StrictModel):
    """One run: the stages that are present run in this order."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    description: str = ""
    requires: list[str] = []
    """Plugins that must be active."""
    seed: int = Field(default=0, ge=0)
    data: dict[str, Any]
    """``type`` names a dataset; the rest is its configuration, with ``tokenizer: {type: ...}`` beside it."""
    model: dict[str, Any]
    """``type`` names a model; the rest is its configuration. ``vocab_size`` comes from the tokenizer."""
    train: TrainConfig | None = None
    evaluate: EvaluateConfig | None = None
    generate: GenerateConfig | None = None
    explain: ExplainConfig | None = None
    report: ReportConfig | None = None
