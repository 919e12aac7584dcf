"""What is trained: the loss of one micro-batch, and the score on held-out data.

Which tokens a micro-batch has depends only on the seed and its number, so that nothing of it is kept for resuming.
Where several processes train, each takes its rows of every micro-batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from spiking_lm.data import ClipData, Data, LabelledData, PairData, TextData
from spiking_lm.data.masking import HiddenTokens
from spiking_lm.data.sampling import Stream, gather, sample_offsets, visited
from spiking_lm.errors import ConfigError, UsageError
from spiking_lm.evaluation import Scores, classify_examples, correlation, score_hidden, score_tokens
from spiking_lm.interfaces import (
    Encoding,
    LMOutput,
    SpikingLanguageModel,
    State,
    detach_state,
    longest_text,
    map_state,
    mean_over_steps,
    observe,
)
from spiking_lm.stages import EvaluateConfig, TrainConfig
from spiking_lm.world import World

if TYPE_CHECKING:
    from rich.console import Console

    from spiking_lm.rundir import RunDir

Output = LMOutput | Encoding
"""What the model gave, for those who watch its spikes."""


def objective_for(model: SpikingLanguageModel, data: Data, config: TrainConfig, seed: int) -> Objective:
    """Return what ``config`` trains ``model`` for on ``data``.

    Raises: UsageError for a model that cannot do it, ConfigError for data that it cannot be done with.
    """
    if config.chunk_len is not None and not isinstance(data, TextData):
        raise ConfigError(
            f"train.chunk_len cuts sequences of a text; the examples of {data.name!r} are read whole",
            hint="leave it out",
        )
    if isinstance(data, PairData):
        from spiking_lm.sequences import Pairs

        if config.distill is not None:
            raise ConfigError(f"train.distill: {data.name!r} holds pairs, which no teacher knows", hint="leave it out")
        return Pairs(model, data, config, seed)
    if config.distill is not None:
        from spiking_lm.distillation import DistilledLabels, DistilledText

        _needs(model, "encode", "train.distill")
        if isinstance(data, ClipData):
            raise ConfigError(
                f"train.distill: {data.name!r} holds clips, and teachers read tokens", hint="leave it out"
            )
        kind = DistilledText if isinstance(data, TextData) else DistilledLabels
        return kind(model, data, config, seed)  # type: ignore[arg-type]
    if isinstance(data, TextData):
        masked = config.objective.type == "masked"
        _needs(model, "mlm" if masked else "lm", f"train.objective: {{type: {config.objective.type}}}")
        if config.chunk_len is not None or config.sampling == "stream":
            _needs_constant_state(model, "chunk_len" if config.chunk_len is not None else "sampling: stream")
        return (MaskedTokens if masked else NextToken)(data, config, seed)
    if isinstance(data, ClipData):
        return Clips(data, config, seed)
    _needs(model, "classify", f"the labels of {data.name!r}")
    return Labels(data, config, seed)


def _needs(model: SpikingLanguageModel, capability: str, what: str) -> None:
    if capability in model.capabilities:
        return
    other = "mlm" in model.capabilities and capability == "lm"
    raise UsageError(
        f"{what} needs a model with the capability {capability!r}; this {type(model).__name__} has "
        f"{sorted(model.capabilities)}",
        hint="train.objective: {type: masked} trains an encoder on text" if other else None,
    )


def _needs_constant_state(model: SpikingLanguageModel, field: str) -> None:
    """Refuse a model that keeps keys and values of every token: its state begins empty, and grows."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    map_state(note, model.init_state(1))
    if not sizes or 0 in sizes:
        raise UsageError(
            f"train.{field} carries a state of constant size; that of {type(model).__name__} grows with every token",
            hint="train on separate sequences: sampling: random, without chunk_len; spikegpt and egru carry theirs",
        )


class Objective(ABC):
    """What is trained: the loss of one micro-batch, and the score on held-out data."""

    unit = "tok"
    """What is counted per second."""
    world = World()
    """The processes that train together."""

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained beside the model, and thrown away with the objective."""
        return []

    def join(self, run: RunDir) -> None:
        """Note in the manifest what else is learned from; DataError when a resumed run finds it changed."""
        return

    def begin(self, run: RunDir, console: Console) -> None:
        """Prepare what the losses need; called once, when everything is as the next step will find it."""
        return

    @abstractmethod
    def loss(self, model: SpikingLanguageModel, index: int, *, record: bool) -> tuple[Tensor, Output | None, int]:
        """Return the mean loss of micro-batch ``index``, the model's output if there is one, and its token count.

        Output and count are those of this process's rows; the loss is such that its mean over the processes is the
        mean over the whole micro-batch.
        """

    @abstractmethod
    def validate(self, model: SpikingLanguageModel) -> dict[str, float]:
        """Return ``loss`` (nats) and what else describes it."""

    def describe(self, loss: float) -> dict[str, float]:
        """Return a training loss in the units that people read."""
        return {}

    def lr_factor(self, step: int) -> float:
        """Return by what the learning rate of ``step`` is multiplied, besides the schedule."""
        return 1.0

    def carried(self) -> list[Tensor]:
        """Return what the next step takes over from the last one, for a checkpoint."""
        return []

    def take_up(self, model: SpikingLanguageModel, carried: list[Tensor]) -> None:
        """Go on with what :meth:`carried` returned."""
        assert not carried


class NextToken(Objective):
    """Causal language modelling: every token from those before it, at random places or along columns of the text."""

    def __init__(self, data: TextData, config: TrainConfig, seed: int) -> None:
        self.data, self.config, self.seed = data, config, seed
        self.bytes_per_token = data.train.n_bytes / len(data.train.tokens)
        self.stream: Stream | None = None
        self.state: State = None
        if config.sampling == "stream":
            n, size = len(data.train.tokens), config.batch_size
            self.stream = Stream(n, size, config.seq_len, seed=seed, jitter=config.jitter)

    def loss(self, model: SpikingLanguageModel, index: int, *, record: bool) -> tuple[Tensor, Output | None, int]:
        tokens, config = self.data.train.tokens, self.config
        if self.stream is None:
            number, chunk = divmod(index, config.chunks)
            offsets = sample_offsets(len(tokens), config.seq_len, config.batch_size, seed=self.seed, step=number)
            length = config.chunk_len or config.seq_len
            offsets, first, carries = offsets + chunk * length, chunk == 0, chunk + 1 < config.chunks
        else:
            window = self.stream.window(index)
            offsets, length, first, carries = window.offsets, window.length, window.first, True
        offsets = offsets[self.world.rows(len(offsets))]
        batch = torch.from_numpy(gather(tokens, offsets, length)).to(next(model.parameters()).device)
        output = model(batch[:, :-1], None if first else self.state, return_spikes=record)
        self.state = detach_state(output.state) if carries else None
        targets = batch[:, 1:]
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), targets.flatten())
        return loss, output, targets.numel()

    def validate(self, model: SpikingLanguageModel) -> dict[str, float]:
        split, length = self.data.valid, self.config.chunk_len or self.config.seq_len
        tokens = np.asarray(split.tokens[: self.config.eval_tokens + 1]).astype(np.int64)
        if self.stream is None and self.config.chunk_len is None:
            window = min(2 * length, longest_text(model) or 2 * length)
            protocol = EvaluateConfig(window=window, stride=max(1, window // 2))
        else:
            protocol = EvaluateConfig(window=length, protocol="carried")
        nll, _ = score_tokens(model, tokens, protocol)
        loss = float(nll.mean())
        return {"loss": loss, **self._in_words(loss, split.n_bytes / len(split.tokens))}

    def describe(self, loss: float) -> dict[str, float]:
        return self._in_words(loss, self.bytes_per_token)

    def _in_words(self, loss: float, bytes_per_token: float) -> dict[str, float]:
        if self.data.tokenizer.lossless:
            return {"bpb": loss / math.log(2) / bytes_per_token}
        return {"perplexity": math.exp(min(loss, 700.0))}

    def lr_factor(self, step: int) -> float:
        """A window shorter than ``seq_len`` moves the weights less, and a longer one more."""
        if self.stream is None:
            return 1.0
        steps = range(step * self.config.passes, (step + 1) * self.config.passes)
        return sum(self.stream.window(index).length for index in steps) / (len(steps) * self.config.seq_len)

    def carried(self) -> list[Tensor]:
        tensors: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            tensors.append(self.world.whole(tensor))
            return tensor

        map_state(note, self.state)
        return tensors

    def take_up(self, model: SpikingLanguageModel, carried: list[Tensor]) -> None:
        if carried:  # the tensors, in the order of the places that a state of this model has
            device, left, rows = next(model.parameters()).device, iter(carried), self.world.rows(self.config.batch_size)
            self.state = map_state(lambda _: next(left)[rows].to(device), model.init_state(self.config.batch_size))


class MaskedTokens(Objective):
    """Masked language modelling: hidden tokens of windows at random places, from those on both sides of them."""

    def __init__(self, data: TextData, config: TrainConfig, seed: int) -> None:
        self.data, self.config, self.seed = data, config, seed
        self.hidden = HiddenTokens(data.tokenizer, config.seq_len, config.objective.rate)

    def loss(self, model: SpikingLanguageModel, index: int, *, record: bool) -> tuple[Tensor, Output | None, int]:
        rows = random_windows(self.data, self.hidden.room, self.config.batch_size, self.seed, index)
        batch, device = self.hidden.hide(rows, seed=self.seed, index=index), next(model.parameters()).device
        mine = self.world.rows(len(rows))
        inputs, lengths, places, targets = (torch.from_numpy(part[mine]).to(device) for part in batch)
        logits = model.predict_masked(inputs, lengths)[places]
        output = None
        if record:
            with torch.no_grad():  # looked at, not trained on
                output = observe(model, inputs, lengths)
        return F.cross_entropy(logits.float(), targets.flatten()), output, inputs.numel()

    def validate(self, model: SpikingLanguageModel) -> dict[str, float]:
        tokens = np.asarray(self.data.valid.tokens[: self.config.eval_tokens]).astype(np.int64)
        nll, target, predicted = score_hidden(model, self.hidden, tokens, self.config.batch_size)
        return {"loss": float(nll.mean()), "masked_accuracy": float((predicted == target).mean())}


def random_windows(data: TextData, room: int, batch_size: int, seed: int, index: int) -> NDArray[np.int64]:
    """Return windows of the training text for an encoder, ``(batch_size, room)``: a function of seed and index."""
    tokens = data.train.tokens
    return gather(tokens, sample_offsets(len(tokens), room - 1, batch_size, seed=seed, step=index), room - 1)


class LabelledBatch(NamedTuple):
    """A micro-batch of labelled examples."""

    chosen: list[int]
    """Which examples of the training part they are."""
    inputs: Tensor
    lengths: Tensor
    labels: Tensor


class Labels(Objective):
    """Classification: the label of a text, each example once per epoch."""

    def __init__(self, data: LabelledData | ClipData, config: TrainConfig, seed: int) -> None:
        if config.sampling == "stream":
            raise ConfigError(
                "train.sampling: stream is for texts; labelled examples have no order", hint="leave it out"
            )
        self.data, self.config, self.seed = data, config, seed
        self.regression = isinstance(data, LabelledData) and data.regression
        if self.regression and config.label_smoothing:
            raise ConfigError(f"train.label_smoothing: {data.name!r} has numbers for labels", hint="leave it out")

    def batch(self, index: int, device: torch.device) -> LabelledBatch:
        """Return this process's rows of micro-batch ``index``; every example occurs once in an epoch."""
        chosen = visited(len(self.data.train), self.config.batch_size, self.seed, index)
        examples: list[Any] = [self.data.train[place] for place in chosen]
        rows = self.world.rows(len(chosen))  # of the whole, so that padding is the same in every process
        batch = self.data.batch(examples, self.config.seq_len)
        inputs, lengths = (torch.from_numpy(part[rows]).to(device) for part in batch)
        labels = torch.tensor([example.label for example in examples[rows]], device=device)
        return LabelledBatch(chosen[rows], inputs, lengths, labels)

    def loss(self, model: SpikingLanguageModel, index: int, *, record: bool) -> tuple[Tensor, Output | None, int]:
        batch = self.batch(index, next(model.parameters()).device)
        logits, output = self.score(model, batch.inputs, batch.lengths, record=record)
        return self.to_labels(logits, batch.labels), output, int(batch.lengths.sum())

    def to_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats to the true labels, smoothed as the stage says, or squared error."""
        if self.regression:
            return F.mse_loss(logits[:, 0].float(), labels)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    def score(
        self, model: SpikingLanguageModel, inputs: Tensor, lengths: Tensor, *, record: bool
    ) -> tuple[Tensor, Output | None]:
        """Return class logits ``(B, num_classes)``, and the model's output when it is to be recorded."""
        if record and "encode" in model.capabilities:
            encoding = model.encode(inputs, lengths, return_spikes=True)
            return model.classify_pooled(encoding.pooled), encoding
        logits, output = model.classify(inputs, lengths), None
        if record:
            with torch.no_grad():  # looked at, not trained on
                output = observe(model, inputs)
        return logits, output

    def validate(self, model: SpikingLanguageModel) -> dict[str, float]:
        examples = self.data.valid
        logits = classify_examples(model, self.data, examples, self.config.seq_len, 4 * self.config.batch_size)
        labels = torch.tensor([example.label for example in examples])
        if self.regression:
            scores = Scores.of_numbers(logits, labels)
            return {"loss": float(scores.nll.mean()), **correlation(scores)}
        hit = float((logits.argmax(-1) == labels).float().mean())
        return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": hit}


class Clips(Labels):
    """Classification of clips of events: one pass gives the scores, the spikes and the auxiliary losses."""

    unit = "frames"

    def score(
        self, model: SpikingLanguageModel, inputs: Tensor, lengths: Tensor, *, record: bool
    ) -> tuple[Tensor, Output | None]:
        output: LMOutput = model(inputs, lengths=lengths, return_spikes=record)
        return mean_over_steps(output.logits, lengths), output
