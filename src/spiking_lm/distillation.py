"""Distillation: a student learns what a teacher, an encoder of ours, makes of the same tokens.

The losses are those of SpikingBERT (Bal & Sengupta, arXiv 2308.10873), with a cosine for pooled texts beside them.
Where depths, widths or heads differ, :func:`layer_pairs`, a learned projection and :func:`attention_loss` say how the
two are laid on each other. docs/distillation.md is the page for users.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from spiking_lm.checkpoints import load_model, resolve_model
from spiking_lm.data import LabelledData, TextData, Tokenizer
from spiking_lm.data.masking import Frame
from spiking_lm.data.reduced import ReducedTokenizer, tokenizer_of_model
from spiking_lm.data.sets import joint_hash
from spiking_lm.data.tokenfile import default_cache_dir
from spiking_lm.errors import ConfigError, DataError, UsageError
from spiking_lm.files import atomic_write
from spiking_lm.generation import evaluating
from spiking_lm.interfaces import Encoding, SpikingLanguageModel
from spiking_lm.objectives import Labels, Objective, Output, random_windows
from spiking_lm.preparation import identity
from spiking_lm.stages import DistillConfig, PhaseConfig, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from spiking_lm.data import Example
    from spiking_lm.rundir import RunDir

MASKED = -100.0
"""An attention score at most this stands for a place that is masked."""

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Token ids ``(B, S)``, padded on the right, and true lengths ``(B,)``."""

_POOLED_AT_ONCE, _SAMPLED = 128, 32

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""What a probe may pay for the square of its weights; the validation part chooses."""


# -- losses ------------------------------------------------------------------------------------------------------------


def layer_pairs(student: int, teacher: int) -> tuple[list[int], list[int]]:
    """Return which of a teacher's layers each of a student's learns from, for depths in layers.

    Of hidden states (``student + 1``, the embedding first) and of attention scores (``student``). With g = teacher /
    student, state i learns from state i g, and the scores of layer j from those of layer j g + g - 1. Where g is no
    whole number, i g is rounded, halves up, so that the first and the last always meet.
    """
    states = [math.floor(i * teacher / student + 0.5) for i in range(student + 1)]
    return states, [max(0, state - 1) for state in states[1:]]


def representation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the sum over pairs of hidden states ``(B, S, H)`` of their mean squared difference, padding included."""
    return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]).sum()


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the sum over pairs of attention scores ``(B, heads, S, S)`` of their mean squared difference.

    A place that either masks counts as 0 in both. Where the numbers of heads differ, neighbours are averaged down to
    the largest number that divides both.
    """
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        n = math.gcd(ours.shape[1], theirs.shape[1])
        masked = (ours <= MASKED).any(1, keepdim=True) | (theirs <= MASKED).any(1, keepdim=True)
        a, b = (torch.unflatten(scores.masked_fill(masked, 0.0), 1, (n, -1)).mean(2) for scores in (ours, theirs))
        losses.append(F.mse_loss(a, b))
    return torch.stack(losses).sum()


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean over batch *and* classes of -softmax(t / tau) log_softmax(s / tau), for logits ``(B, classes)``.

    So it is smaller than a cross-entropy by the number of classes, and has no factor tau^2.
    """
    return -(F.softmax(teacher / temperature, -1) * F.log_softmax(student / temperature, -1)).mean()


def pooled_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between rows ``(B, H)``."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


# -- the teacher -------------------------------------------------------------------------------------------------------


class Teacher:
    """A model folder with the capability ``encode``, frozen, that reads the tokens of ``tokenizer``.

    Raises: CheckpointError where there is none; UsageError for one that encodes nothing; DataError when it reads other
    tokens than the student.
    """

    def __init__(self, path: str, tokenizer: Tokenizer) -> None:
        self.folder = resolve_model(Path(path).expanduser())
        own = tokenizer_of_model(self.folder)
        self.model = load_model(self.folder).requires_grad_(False)
        if "encode" not in self.model.capabilities:
            raise UsageError(
                f"{self.folder}: a {type(self.model).__name__} cannot teach: it encodes no texts "
                f"(capabilities: {sorted(self.model.capabilities)})"
            )
        self._ids = _ids_for(own, tokenizer, self.folder)
        self.identity = identity(str(self.folder))

    def to(self, device: torch.device) -> Teacher:
        """Move it to where the student is."""
        self.model.to(device)
        self._ids = None if self._ids is None else self._ids.to(device)
        return self

    @torch.no_grad()
    def encode(self, tokens: Tensor, lengths: Tensor) -> Encoding:
        """Encode the student's ``tokens (B, S)``."""
        return self.model.encode(tokens if self._ids is None else self._ids[tokens], lengths)

    def pool(self, data: LabelledData, split: str, limit: int) -> Tensor:
        """Return what it pools of the examples of a split, ``(N, H)``, each cut at ``limit`` tokens.

        Kept in the cache, since many students ask the same.
        """
        examples: Sequence[Example] = getattr(data, split)
        key = joint_hash(self.identity["sha256"], data.sha256, split, str(limit))
        file = default_cache_dir() / "teachers" / f"{key[:32]}.safetensors"
        device = next(self.model.parameters()).device
        with contextlib.suppress(OSError, SafetensorError, KeyError):  # not there or damaged
            known = load_file(file)["pooled"]
            if len(known) == len(examples):
                return known.to(device)
        order = sorted(range(len(examples)), key=lambda i: data.length(examples[i]))
        parts = []
        for first in range(0, len(order), _POOLED_AT_ONCE):
            batch = data.batch([examples[i] for i in order[first : first + _POOLED_AT_ONCE]], limit)
            inputs, lengths = (torch.from_numpy(part).to(device) for part in batch)
            parts.append(self.encode(inputs, lengths).pooled)
        pooled = torch.cat(parts)[torch.tensor(order).argsort()]
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            atomic_write(file, save({"pooled": pooled.cpu().contiguous()}))
        return pooled

    def vectors(self) -> Tensor:
        """Return its embeddings of the student's tokens, ``(V, H)``."""
        table = embedding_table(self.model)
        return (table if self._ids is None else table[self._ids]).detach()


def _ids_for(own: Tokenizer, student: Tokenizer, folder: Path) -> Tensor | None:
    """Return the teacher's id of each of the student's tokens; None where they are the same."""
    if student.sha256 == own.sha256:
        return None
    if isinstance(student, ReducedTokenizer) and student.base.sha256 == own.sha256:
        return torch.from_numpy(student.kept)
    raise DataError(
        f"the student reads {student.vocab_size:,} tokens of its {student.type} tokenizer, the teacher {folder} "
        f"{own.vocab_size:,} of another: what one makes of a token says nothing about the other's",
        hint="data.tokenizer: {type: model} takes the teacher's, with keep: seen as far as the training text needs it",
    )


def embedding_table(model: SpikingLanguageModel) -> Tensor:
    """Return the table ``(V, H)`` in which a model looks up its tokens. Raises: UsageError if its graph names none."""
    modules = dict(model.named_modules())
    for op in model.graph():
        weight = getattr(modules.get(op.module or ""), "weight", None)
        if (
            op.kind == "embedding"
            and isinstance(weight, Tensor)
            and len(weight) == getattr(model.config, "vocab_size", None)
        ):
            return weight
    raise UsageError(f"the graph of {type(model).__name__} names no table of its tokens' embeddings")


@torch.no_grad()
def embed_as_teacher(model: SpikingLanguageModel, vectors: Tensor) -> None:
    """Begin a student's embedding table at the principal components of a teacher's ``vectors (V, H)``.

    The directions of most variance, as many as the student has dimensions, scaled as a whole to the spread that the
    table was drawn with, so that it keeps its balance with what is added to it.

    Raises: ConfigError when the teacher has fewer dimensions.
    """
    table = embedding_table(model)
    size = table.shape[1]
    if size > vectors.shape[1]:
        raise ConfigError(
            f"train.distill.embedding: pca: the student has {size} dimensions, its teacher only {vectors.shape[1]}",
            hint="embedding: own",
        )
    centred = vectors.double() - vectors.double().mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # by rising variance
    directions = directions[:, -size:].flip(1)
    largest = directions.abs().argmax(0)
    directions = directions * directions.gather(0, largest[None]).sign()  # an eigenvector has no sign of its own
    components = centred @ directions
    table.copy_((components * (table.double().std() / components.std())).to(table.dtype))


class Probe:
    """A logistic regression on pooled texts ``(N, H)``: what a teacher without a head for the labels says of them.

    Full-batch L-BFGS in float64 from zero, features standardised, so that the same texts give the same probe.
    """

    def __init__(self, pooled: Tensor, labels: Tensor, num_classes: int, penalty: float) -> None:
        x = pooled.double()
        self.mean, self.scale = x.mean(0), x.std(0).clamp(min=1e-8)
        x = self._features(x)
        weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
        bias = torch.zeros(num_classes, dtype=torch.float64, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight.T + bias, labels) + penalty * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        self.weight, self.bias = weight.detach(), bias.detach()

    def _features(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    def __call__(self, pooled: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)``."""
        return self._features(pooled.double()) @ self.weight.T + self.bias


# -- objectives --------------------------------------------------------------------------------------------------------


class Distiller:
    """What a distillation of labelled examples and one of running text share: teacher, phases, projections, losses.

    The student's states, ``(..., H)``, are laid on the teacher's by one linear layer for all hidden states and one for
    what is pooled; both are trained, and thrown away at the end. Their offsets begin at the teacher's means over a
    ``sample`` of inputs and lengths: a student that had to make those large constants would make nothing else first.
    """

    def __init__(
        self, model: SpikingLanguageModel, tokenizer: Tokenizer, config: TrainConfig, sample: Batch, seed: int
    ) -> None:
        assert config.distill is not None
        self.config, self.accumulate = config.distill, config.accumulate
        device = next(model.parameters()).device
        self.teacher = Teacher(teacher_path(config.distill), tokenizer).to(device)
        self.ends = _phase_ends(self.config.phases, config.steps)
        inputs, lengths = (torch.from_numpy(part).to(device) for part in sample)
        theirs = self.teacher.encode(inputs, lengths)
        true = torch.arange(inputs.shape[1], device=device) < lengths[:, None]
        means = torch.stack(theirs.hidden)[:, true].mean((0, 1)), theirs.pooled.mean(0)
        width = embedding_table(model).shape[1]
        self.projections = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for mean in means:
                layer = nn.Linear(width, len(mean))
                nn.init.orthogonal_(layer.weight)
                layer.bias.copy_(mean)
                self.projections.append(layer.to(device))

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.projections for parameter in layer.parameters()]

    def phase(self, index: int) -> PhaseConfig:
        """Return the phase of micro-batch ``index``."""
        number = bisect_right(self.ends, index // self.accumulate)
        return self.config.phases[min(number, len(self.ends) - 1)]

    def join(self, run: RunDir) -> None:
        """Note in the manifest whose student it is. Raises: DataError when a resumed run finds another teacher."""
        found, before = self.teacher.identity, run.manifest.get("teacher")
        if before is not None and before["sha256"] != found["sha256"]:
            raise DataError(
                f"{run.path}: the teacher {found['path']} is not the one that the run began with "
                f"(SHA-256 {found['sha256'][:12]}..., was {before['sha256'][:12]}...)",
                hint="restore it, or start a new run",
            )
        run.update_manifest(teacher={**(before or {}), **found})

    def losses(
        self, ours: Encoding, inputs: Tensor, lengths: Tensor, phase: PhaseConfig, pooled: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the losses that need no labels; ``pooled`` is the teacher's where it is known already."""
        found: dict[str, Tensor] = {}
        needed = phase.representation or phase.attention or (phase.pooled and pooled is None)
        theirs = self.teacher.encode(inputs, lengths) if needed else None
        depths = len(ours.hidden) - 1, len(theirs.hidden) - 1 if theirs is not None else 0
        layers = layer_pairs(*depths) if theirs is not None else ([], [])
        if phase.representation and theirs is not None:
            states = [self.projections[0](state) for state in ours.hidden]
            found["representation"] = representation_loss(states, [theirs.hidden[i] for i in layers[0]])
        if phase.attention and theirs is not None:
            if not (ours.scores and theirs.scores):
                raise UsageError(
                    f"{'the student' if not ours.scores else 'the teacher'} has no attention, and a phase of "
                    "train.distill compares its scores",
                    hint="leave out attention in train.distill.phases",
                )
            found["attention"] = attention_loss(ours.scores, [theirs.scores[i] for i in layers[1]])
        if phase.pooled:
            target = pooled if theirs is None else theirs.pooled
            assert target is not None
            found["pooled"] = pooled_loss(self.projections[1](ours.pooled), target.to(ours.pooled.dtype))
        return found


def teacher_path(config: DistillConfig) -> str:
    """Return the path of the teacher. Raises: ConfigError when none is named."""
    if config.teacher is None:
        raise ConfigError("train.distill.teacher is not set", hint="add --set train.distill.teacher=MODEL_DIR")
    return config.teacher


def _phase_ends(phases: Sequence[PhaseConfig], steps: int) -> list[int]:
    """Return the step before which each phase ends."""
    whole = sum(phase.share for phase in phases)
    return [round(steps * share / whole) for share in accumulate(phase.share for phase in phases)]


class _Distilled(Objective):
    """An objective with a teacher: what is trained beside the student, kept over a stop, and logged."""

    distiller: Distiller
    parts: dict[str, float]
    """Each loss of the last micro-batch."""

    def parameters(self) -> list[nn.Parameter]:
        return self.distiller.parameters()

    def join(self, run: RunDir) -> None:
        self.distiller.join(run)

    def carried(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.parameters()]

    @torch.no_grad()
    def take_up(self, model: SpikingLanguageModel, carried: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), carried, strict=True):
            parameter.copy_(value)

    def describe(self, loss: float) -> dict[str, float]:
        means = self.world.sums(*(part / self.world.size for part in self.parts.values()))
        return dict(zip(self.parts, means, strict=True))

    def weigh(self, losses: dict[str, Tensor], phase: PhaseConfig) -> Tensor:
        """Return the sum of ``losses``, each by its weight in ``phase``, and keep them for the log."""
        self.parts = {f"{name}_loss": float(loss.detach()) for name, loss in losses.items()}
        weights = phase.weights()
        return torch.stack([weights[name] * loss.float() for name, loss in losses.items()]).sum()

    def held_out(self, model: SpikingLanguageModel, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the last phase's loss and its parts that need no labels, over batches of inputs and lengths."""
        phase, device = self.distiller.config.phases[-1], next(model.parameters()).device
        found: list[tuple[int, dict[str, float]]] = []
        with evaluating(model):
            for batch in batches:
                inputs, lengths = (torch.from_numpy(part).to(device) for part in batch)
                losses = self.distiller.losses(model.encode(inputs, lengths), inputs, lengths, phase)
                found.append((len(inputs), {"loss": float(self.weigh(losses, phase)), **self.parts}))
        n = sum(size for size, _ in found)
        return {name: sum(size * part[name] for size, part in found) / n for name in found[0][1]}


class DistilledText(_Distilled):
    """General distillation: the inner life of the teacher, on windows of a text without labels."""

    def __init__(self, model: SpikingLanguageModel, data: TextData, config: TrainConfig, seed: int) -> None:
        self.data, self.config, self.seed = data, config, seed
        self.frame = Frame(data.tokenizer, config.seq_len)
        assert config.distill is not None
        _only(config.distill.phases, ("representation", "attention", "pooled"), data.name)
        sample = self.frame.put(random_windows(data, self.frame.room, _SAMPLED, seed, 0))
        self.distiller = Distiller(model, data.tokenizer, config, sample, seed)

    def loss(self, model: SpikingLanguageModel, index: int, *, record: bool) -> tuple[Tensor, Output | None, int]:
        rows = random_windows(self.data, self.frame.room, self.config.batch_size, self.seed, index)
        phase, device = self.distiller.phase(index), next(model.parameters()).device
        rows = rows[self.world.rows(len(rows))]
        inputs, lengths = (torch.from_numpy(part).to(device) for part in self.frame.put(rows))
        ours = model.encode(inputs, lengths, return_spikes=record)
        losses = self.distiller.losses(ours, inputs, lengths, phase)
        return self.weigh(losses, phase), ours, inputs.numel()

    def validate(self, model: SpikingLanguageModel) -> dict[str, float]:
        room, size = self.frame.room, self.config.batch_size
        tokens = np.asarray(self.data.valid.tokens[: self.config.eval_tokens]).astype(np.int64)
        rows = tokens[: len(tokens) // room * room].reshape(-1, room)
        if not len(rows):
            raise DataError(f"the validation text has {len(tokens)} tokens, a window holds {room}")
        return self.held_out(model, (self.frame.put(rows[at : at + size]) for at in range(0, len(rows), size)))


class DistilledLabels(_Distilled, Labels):
    """Distillation on labelled examples: the teacher's inner life, its opinion of the classes, and the true labels."""

    def __init__(self, model: SpikingLanguageModel, data: LabelledData, config: TrainConfig, seed: int) -> None:
        super().__init__(data, config, seed)
        self.texts = data
        assert config.distill is not None
        self.phases = config.distill.phases
        if data.regression:
            _only(self.phases, ("representation", "attention", "pooled", "labels"), data.name, "numbers for labels")
        sample = data.batch(data.train[:_SAMPLED], config.seq_len)
        self.distiller = Distiller(model, data.tokenizer, config, sample, seed)
        if any(phase.prediction or phase.labels for phase in self.phases) and "classify" not in model.capabilities:
            raise UsageError(
                f"{type(model).__name__} has no classes to predict; phases can ask for its inner life alone"
            )
        self.pooled: Tensor | None = None
        """The teacher's, ``(N, H)``, of the training examples."""
        self.opinion: Tensor | None = None
        """Its logits, ``(N, num_classes)``."""

    def begin(self, run: RunDir, console: Console) -> None:
        """Ask the teacher about every training example once, where a phase needs no more of it than one row each."""
        opinion = any(phase.prediction for phase in self.phases)
        if not opinion and not any(phase.pooled for phase in self.phases):
            return
        n = len(self.texts.train) + len(self.texts.valid)
        console.print(
            f"the teacher reads {n:,} examples (unless the cache knows what it makes of them)", highlight=False
        )
        teacher, limit = self.distiller.teacher, self.config.seq_len
        self.pooled, valid = (teacher.pool(self.texts, split, limit) for split in ("train", "valid"))
        if not opinion:
            return
        found = self._opinion(self.pooled, valid)
        run.update_manifest(teacher={**run.manifest["teacher"], **found})
        console.print(
            f"the teacher ({found['head']}) is right about {found['train_accuracy']:.1%} of the training examples and "
            f"{found['valid_accuracy']:.1%} of the validation examples",
            highlight=False,
        )

    def _opinion(self, pooled: Tensor, valid: Tensor) -> dict[str, Any]:
        """Form the teacher's opinion, by its own head where it has one for these classes, else by a probe."""
        model, classes = self.distiller.teacher.model, len(self.texts.labels)
        labels, held_out = _labels(self.texts.train, pooled.device), _labels(self.texts.valid, pooled.device)
        facts: dict[str, Any]
        if "classify" in model.capabilities and getattr(model.config, "num_classes", None) == classes:
            with torch.no_grad():
                self.opinion, on_valid = model.classify_pooled(pooled), model.classify_pooled(valid)
            facts = {"head": "its own head"}
        else:
            probes = {penalty: Probe(pooled, labels, classes, penalty) for penalty in PENALTIES}
            best = max(PENALTIES, key=lambda penalty: _accuracy(probes[penalty](valid), held_out))
            self.opinion, on_valid = probes[best](pooled).to(pooled.dtype), probes[best](valid)
            facts = {"head": "a logistic probe", "penalty": best}
        return {
            **facts,
            "train_accuracy": _accuracy(self.opinion, labels),
            "valid_accuracy": _accuracy(on_valid, held_out),
        }

    def loss(self, model: SpikingLanguageModel, index: int, *, record: bool) -> tuple[Tensor, Output | None, int]:
        batch, phase = self.batch(index, next(model.parameters()).device), self.distiller.phase(index)
        ours = model.encode(batch.inputs, batch.lengths, return_spikes=record)
        pooled = None if self.pooled is None else self.pooled[batch.chosen]
        losses = self.distiller.losses(ours, batch.inputs, batch.lengths, phase, pooled)
        if phase.prediction or phase.labels:
            logits = model.classify_pooled(ours.pooled)
            if phase.prediction:
                assert self.opinion is not None
                losses["prediction"] = soft_cross_entropy(logits, self.opinion[batch.chosen], phase.temperature)
            if phase.labels:
                losses["labels"] = self.to_labels(logits, batch.labels)
        return self.weigh(losses, phase), ours, int(batch.lengths.sum())

    def validate(self, model: SpikingLanguageModel) -> dict[str, float]:
        """Return loss and accuracy by the true labels; where no phase has taught any, the distance to the teacher."""
        if any(phase.prediction or phase.labels for phase in self.phases):
            return super().validate(model)
        examples, size, limit = self.texts.valid, 4 * self.config.batch_size, self.config.seq_len
        parts = (examples[at : at + size] for at in range(0, len(examples), size))
        return self.held_out(model, (self.texts.batch(part, limit) for part in parts))


def _only(phases: Iterable[PhaseConfig], allowed: Sequence[str], name: str, has: str = "no labels") -> None:
    for number, phase in enumerate(phases):
        asked = [loss for loss, weight in phase.weights().items() if weight and loss not in allowed]
        if asked:
            raise ConfigError(
                f"train.distill.phases.{number}: {asked[0]}: {name!r} has {has}, and a teacher no opinion of them",
                hint=f"there are {', '.join(allowed)}",
            )


def _labels(examples: Sequence[Example], device: torch.device) -> Tensor:
    return torch.tensor([example.label for example in examples], device=device)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())
