"""The configuration of every stage of a run, and the order in which the stages go (torch-free)."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from spiking_lm.config import StrictModel

SAFE_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
"""One part of a recipe's or a variant's name."""

STAGES = ("convert", "train", "prune", "evaluate", "generate", "explain", "deploy", "compare", "report")
"""The stages that a recipe may have or lack, in the order in which they run."""


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
    shape: Literal["linear", "cosine"] = "linear"
    """wsd only: the curve of the final decay."""


class ObjectiveConfig(StrictModel):
    """What is learned from a text."""

    type: Literal["next_token", "masked"] = "next_token"
    """next_token: every token from those before it. masked: some tokens from those on both sides, for encoders."""
    rate: float = Field(default=0.15, gt=0, lt=1)
    """masked only: share of the tokens that is predicted; 80 % of them are hidden, 10 % become another token, 10 % stay
    as they are (Devlin et al., arXiv 1810.04805)."""


DISTILLATION_LOSSES = ("representation", "attention", "pooled", "prediction", "labels")


class PhaseConfig(StrictModel):
    """A part of a distillation: how much each loss weighs. Sums and means are as in docs/distillation.md."""

    share: float = Field(default=1.0, gt=0)
    """Of the steps: what this phase takes, against the shares of the others."""
    representation: float = Field(default=0.0, ge=0)
    """Squared distance of the hidden states to those of the teacher's layers."""
    attention: float = Field(default=0.0, ge=0)
    """Squared distance of the attention scores."""
    pooled: float = Field(default=0.0, ge=0)
    """1 - cosine between what is pooled of a text."""
    prediction: float = Field(default=0.0, ge=0)
    """Cross-entropy to the teacher's probabilities of the classes."""
    labels: float = Field(default=0.0, ge=0)
    """Cross-entropy to the true labels."""
    temperature: float = Field(default=1.0, gt=0)
    """Of ``prediction``: both sides' logits are divided by it."""

    @model_validator(mode="after")
    def _learns_something(self) -> PhaseConfig:
        if not any(self.weights().values()):
            raise ValueError("a phase needs a loss that weighs more than 0")
        return self

    def weights(self) -> dict[str, float]:
        """Return the weight of every loss, by name."""
        return {name: getattr(self, name) for name in DISTILLATION_LOSSES}


class DistillConfig(StrictModel):
    """Distillation: what a teacher, an encoder of ours, makes of the same tokens is to be learned."""

    teacher: str | None = None
    """A model folder, or a run. A recipe that is made for any teacher leaves it out; a run needs it."""
    phases: list[PhaseConfig] = Field(min_length=1)
    """One after the other, over the steps of the stage."""
    embedding: Literal["own", "pca"] = "own"
    """Where the student's embedding table begins. own: at random. pca: at the principal components of the teacher's,
    which tells it what words mean: compare it with models that are told so too."""


class DistributedConfig(StrictModel):
    """How several processes train one model; how many there are is said to torchrun, and no part of the recipe."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: every process has the whole model. fsdp2: each has a part of every weight, and of the optimizer's state."""


class TrainConfig(StrictModel):
    """The training stage."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    """Sequences per micro-batch; where several processes train, of all of them together."""
    accumulate: int = Field(default=1, gt=0)
    """Micro-batches per optimizer step."""
    seq_len: int = Field(default=128, gt=0)
    sampling: Literal["random", "stream"] = "random"
    """random: sequences from anywhere, each from a fresh state. stream: the text in ``batch_size`` columns, read from
    top to bottom in windows of ``seq_len``, the state carried from window to window (truncated backpropagation)."""
    chunk_len: int | None = Field(default=None, gt=0)
    """Texts, ``random`` only: go through a sequence in chunks of so many tokens, the state carried from chunk to chunk
    and the gradient ending at their borders (truncated backpropagation), so that memory depends on the chunk alone."""
    jitter: bool = False
    """stream only: windows of random length around ``seq_len`` (Merity et al., arXiv 1708.02182)."""
    start: str | None = None
    """A model folder, or a run, whose weights are the first ones, wherever names and shapes agree: a head for another
    task begins at random. The tokens must be the same: ``data.tokenizer: {type: model}``."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is learned from a text. Labelled data have their labels."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Labelled data only: share of the probability that is spread over all classes."""
    distill: DistillConfig | None = None
    """Also, or instead, learn from a teacher."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs matrix products in bfloat16 under autocast; weights, states and norms stay fp32."""
    activation_checkpointing: bool = False
    """Compute the inside of every block a second time for its gradient, in place of keeping it: less memory, the same
    result, about a third more time."""
    distributed: DistributedConfig = DistributedConfig()
    """Where torchrun starts several processes: docs/distributed.md."""
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

    @property
    def chunks(self) -> int:
        """In how many pieces a sequence is gone through."""
        return self.seq_len // self.chunk_len if self.chunk_len is not None else 1

    @property
    def passes(self) -> int:
        """How often an optimizer step goes forward and backward: once for every chunk of every micro-batch."""
        return self.accumulate * self.chunks

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.jitter and self.sampling != "stream":
            raise ValueError("jitter is for sampling: stream")
        if self.sampling == "stream" and (self.objective.type == "masked" or self.distill is not None):
            raise ValueError("sampling: stream carries the state of a causal model; an encoder has none")
        if self.chunk_len is not None:
            if self.sampling == "stream":
                raise ValueError("a stream is read in windows of seq_len already: chunk_len is for sampling: random")
            if self.objective.type == "masked" or self.distill is not None:
                raise ValueError("chunk_len carries the state of a causal model; an encoder has none")
            if self.seq_len % self.chunk_len:
                raise ValueError(f"seq_len {self.seq_len} is not a multiple of chunk_len {self.chunk_len}")
        if self.objective.type == "masked" and self.distill is not None:
            raise ValueError("objective: masked and distill both say what is learned from a text: leave one out")
        if self.distill is not None and self.distributed.strategy == "fsdp2":
            raise ValueError("distill trains weights beside the model: distributed: {strategy: ddp}")
        if self.start is not None and self.distill is not None and self.distill.embedding == "pca":
            raise ValueError("start and distill.embedding: pca both say where the embedding begins: leave one out")
        return self


class PruneConfig(StrictModel):
    """The pruning stage: the smallest weights go to zero step by step, while the others are trained on."""

    sparsity: float = Field(gt=0, lt=1)
    """Share of the weights of the pruned matrices that is zero at the end."""
    scope: Literal["uniform", "global"] = "uniform"
    """uniform: the same share of every matrix. global: one magnitude for all of them."""
    steps: int = Field(gt=0)
    """Optimizer steps, going on after those of train with its batches and optimizer."""
    ramp: float = Field(default=0.7, gt=0, le=1)
    """Share of the steps over which the sparsity rises (cubically, Zhu & Gupta, arXiv 1710.01878)."""
    every: int = Field(default=20, gt=0)
    """Steps between two cuts while it rises."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; None takes that of train."""
    parameters: list[str] = Field(default=["*"])
    """Which matrices: shell patterns of operation names in the model's graph; embedding and output head never are."""


class EvaluateConfig(StrictModel):
    """The evaluation stage: which tokens of a text are scored, and what the model has read before each of them."""

    split: Literal["valid", "test"] = "test"
    protocol: Literal["sliding", "carried", "blocks"] = "sliding"
    """sliding: a window slides by ``stride``, and only tokens with enough context are scored, each token once. carried:
    the text in one pass, windows one after the other, the state carried; batch 1. blocks: whole windows one after the
    other, each from a fresh state; the first token of each is not scored, and a last one that is not full is left out.
    """
    window: int = Field(default=1024, gt=0)
    stride: int = Field(default=512, gt=0)
    """sliding only."""
    batch_size: int = Field(default=8, gt=0)
    """Windows scored at once, at most."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Score only the first so many tokens of the split."""
    mask_rate: float = Field(default=0.15, gt=0, lt=1)
    """Encoders on text only: share of the tokens that is hidden and predicted."""
    shuffled: bool = False
    """Also score the text with its words in another order, which a model that cannot look ahead must find harder."""
    metrics: list[str] | None = None
    """Registry names; None computes every metric that applies."""

    @model_validator(mode="before")
    @classmethod
    def _runs_made_before_there_were_protocols(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("carry_state"), bool) and "protocol" not in values:
            carried = values["carry_state"]
            rest = {key: value for key, value in values.items() if key != "carry_state"}
            return {"protocol": "carried" if carried else "sliding", **rest}
        return values

    @model_validator(mode="after")
    def _blocks_score_something(self) -> EvaluateConfig:
        if self.protocol == "blocks" and self.window < 2:
            raise ValueError("a block needs a window of at least 2 tokens: its first one is not scored")
        return self


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
    stop: list[str] = Field(default=[])


class ExplainConfig(StrictModel):
    """The explain stage: where the spikes are, measured on text of the evaluation split."""

    tokens: int = Field(default=2048, gt=0)


class CompareConfig(StrictModel):
    """The comparison stage: the same recipe with a few values changed, each variant a run of its own inside the run."""

    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> ``{path.to.field: value}``, as with ``--set``."""
    spikes: bool = False
    """Also give every variant this run's weights and say whether its spikes are the same, and how fast it is."""

    @field_validator("variants")
    @classmethod
    def _safe_names(cls, variants: dict[str, Any]) -> dict[str, Any]:
        for name in variants:
            if not SAFE_PART.fullmatch(name):
                raise ValueError(f"{name!r} becomes a folder: use letters, digits and . _ -")
        return variants


class ReportConfig(StrictModel):
    """The report stage: one self-contained HTML file."""

    raster_tokens: int = Field(default=200, gt=0)
    """Tokens shown in the spike raster."""
