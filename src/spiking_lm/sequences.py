"""From a source to a target: what is trained on pairs, and how what is written is scored.

Training and validation are teacher forcing: every token of a target is predicted from the source and the target's own
tokens before it. An evaluation also lets the model write, always taking the likeliest token, and compares texts:

- exact match: the share of the targets that are written as they are, white space aside;
- ROUGE-1, ROUGE-2, ROUGE-L (Lin 2004): F1 of words, of pairs of words, of the longest common subsequence of words, with
  one reference; means over the pairs. Words are runs of letters and digits in lower case; nothing is stemmed.

The source itself, handed in as the answer, is scored beside it: what a model must beat.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spiking_lm.data import EncodedPair, PairData
from spiking_lm.data.pairs import PairBatch
from spiking_lm.data.sampling import visited
from spiking_lm.errors import ConfigError, DataError, UsageError
from spiking_lm.evaluation import LOGITS_AT_ONCE, Activity, Scores, measure
from spiking_lm.generation import evaluating, write_targets
from spiking_lm.interfaces import LMOutput, SpikingLanguageModel, longest_text
from spiking_lm.objectives import Objective
from spiking_lm.stages import EvaluateConfig, TrainConfig

SAMPLES = 5
"""Pairs that an evaluation shows with what was written."""


def needs_pairs(model: SpikingLanguageModel, what: str) -> None:
    """Raise UsageError for a model that reads no sources; ``what`` needs one that does."""
    if "seq2seq" not in model.capabilities:
        raise UsageError(
            f"{what} needs a model with the capability 'seq2seq'; this {type(model).__name__} has "
            f"{sorted(model.capabilities)}",
            hint="spikelm-seq2seq is one",
        )


def check_lengths(model: SpikingLanguageModel, data: PairData, split: str) -> None:
    """Raise DataError naming the first pair of a split that is too long for ``model``."""
    most = longest_text(model)
    if most is None:
        return
    for number, pair in enumerate(getattr(data, split), 1):
        for side, length in (("source", len(pair.source)), ("target", len(pair.target) - 1)):
            if length > most:
                raise DataError(
                    f"dataset {data.name!r}, pair {number} of {split}: its {side} has {length} tokens, and the model "
                    f"knows {most} positions",
                    hint=f"set model.ctx_len to {length} or more, or leave such pairs out",
                )


class Pairs(Objective):
    """Targets, token by token, from their sources and their own tokens before; each pair once per epoch."""

    def __init__(self, model: SpikingLanguageModel, data: PairData, config: TrainConfig, seed: int) -> None:
        if config.sampling == "stream":
            raise ConfigError("train.sampling: stream is for texts; pairs have no order", hint="leave it out")
        needs_pairs(model, f"the pairs of {data.name!r}")
        for split in ("train", "valid"):
            check_lengths(model, data, split)
        self.data, self.config, self.seed = data, config, seed

    def loss(self, model: SpikingLanguageModel, index: int, *, record: bool) -> tuple[Tensor, LMOutput | None, int]:
        chosen = visited(len(self.data.train), self.config.batch_size, self.seed, index)
        whole = self.data.batch([self.data.train[place] for place in chosen])
        rows = self.world.rows(len(chosen))
        batch = PairBatch(*(part[rows] for part in whole))
        output, logits, targets = score_batch(model, batch, return_spikes=record)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        loss = loss * self.world.weight(len(targets), int((whole.target_lengths).sum()))
        return loss, output, int(batch.lengths.sum() + batch.target_lengths.sum())

    def validate(self, model: SpikingLanguageModel) -> dict[str, float]:
        sizes = np.cumsum([len(pair.target) - 1 for pair in self.data.valid])
        pairs = self.data.valid[: max(1, int(np.searchsorted(sizes, self.config.eval_tokens, side="right")))]
        scores = score_targets(model, self.data, pairs, 4 * self.config.batch_size)
        return {"loss": float(scores.nll.mean()), "accuracy": float((scores.predicted == scores.target).mean())}


def score_batch(
    model: SpikingLanguageModel, batch: PairBatch, *, return_spikes: bool = False
) -> tuple[LMOutput, Tensor, Tensor]:
    """Return the model's output, and of the true tokens of all targets logits ``(n, V)`` and ids ``(n,)``."""
    device = next(model.parameters()).device
    source, lengths, target, target_lengths = (torch.from_numpy(part).to(device) for part in batch)
    output = model.score_pairs(source, lengths, target[:, :-1], return_spikes=return_spikes)
    true = torch.arange(target.shape[1] - 1, device=device) < target_lengths[:, None]
    return output, output.logits[true].float(), target[:, 1:][true]


def score_targets(
    model: SpikingLanguageModel,
    data: PairData,
    pairs: Sequence[EncodedPair],
    batch_size: int,
    activity: Activity | None = None,
) -> Scores:
    """Score every token of the targets of ``pairs``, each from the true ones before it.

    ``activity`` is told the spikes at true tokens, of a source at its sites and of a target at the others.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    longest = max((len(pair.target) for pair in pairs), default=1)
    at_once = min(batch_size, max(1, LOGITS_AT_ONCE // (longest * data.tokenizer.vocab_size)))
    with evaluating(model):
        for first in range(0, len(pairs), at_once):
            batch = data.batch(pairs[first : first + at_once])
            output, logits, targets = score_batch(model, batch, return_spikes=activity is not None)
            parts.append((F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1), targets))
            if activity is not None:
                _note_spikes(activity, model, output.spikes or {}, batch)
    nll, predicted, target = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return Scores("pairs", nll.astype(np.float64), target, predicted)


def _note_spikes(activity: Activity, model: SpikingLanguageModel, spikes: dict[str, Tensor], batch: PairBatch) -> None:
    """Count spikes at true tokens: those of the target where a site fires while it is written, else the source's."""
    device = next(model.parameters()).device
    source, lengths, target, target_lengths = (torch.from_numpy(part).to(device) for part in batch)
    state = model.read(source[:1], lengths[:1])
    writing = model(target[:1, :1], state, return_spikes=True).spikes or {}
    for site, values in spikes.items():
        ends = target_lengths if site in writing else lengths
        counted = values[torch.arange(values.shape[1], device=device) < ends[:, None]]
        activity.add({site: counted[None]}, len(counted))


def evaluate_pairs(model: SpikingLanguageModel, data: PairData, config: EvaluateConfig) -> dict[str, Any]:
    """Score ``model`` on a split of pairs, as :func:`spiking_lm.evaluation.evaluate` describes.

    Also ``samples``, the first few pairs with what was written. Raises UsageError for a model of another capability,
    DataError for an empty split and for pairs that are too long.
    """
    needs_pairs(model, f"the pairs of {data.name!r}")
    pairs: list[EncodedPair] = getattr(data, config.split)
    if not pairs:
        raise DataError(f"the {config.split} split is empty")
    check_lengths(model, data, config.split)
    activity = Activity()
    scores = score_targets(model, data, pairs, config.batch_size, activity if model.spike_sites() else None)
    metrics = measure(scores, config.metrics)
    written = write_all(model, data, pairs, config.batch_size)
    targets, sources = [pair.pair.target for pair in pairs], [pair.pair.source for pair in pairs]
    copied = compare_texts(sources, targets)
    result: dict[str, Any] = {
        "task": "pairs",
        "split": config.split,
        "metrics": {**metrics, "perplexity": float(np.exp(scores.nll.mean())), **compare_texts(written, targets)},
        "protocol": (
            f"{len(pairs):,} pairs of the {config.split} split; accuracy and perplexity of {len(scores.nll):,} tokens, "
            "each from the true ones before it; the rest of what the model writes, always the likeliest token"
        ),
        "data": data.describe(),
        "baseline_unit": "F1, and share of exact matches",
        "baselines": {f"the source copied, {name.replace('_', ' ')}": value for name, value in copied.items()},
        "samples": [
            {"source": source, "target": target, "written": text}
            for source, target, text in list(zip(sources, targets, written, strict=True))[:SAMPLES]
        ],
    }
    if activity.places:
        result["activity"] = activity.to_dict()
    return result


def write_all(model: SpikingLanguageModel, data: PairData, pairs: Sequence[EncodedPair], batch_size: int) -> list[str]:
    """Return what ``model`` writes for the source of each pair, sources of similar length at once."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].source))
    most = longest_text(model) or 2 * max(len(pair.target) for pair in pairs)
    device = next(model.parameters()).device
    written: dict[int, str] = {}
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = data.batch([pairs[row] for row in rows])
        source, lengths = (torch.from_numpy(part).to(device) for part in (batch.source, batch.lengths))
        for row, ids in zip(rows, write_targets(model, source, lengths, data.end_id, most), strict=True):
            written[row] = data.tokenizer.decode(ids)
    return [written[row] for row in range(len(pairs))]


# -- texts against texts -----------------------------------------------------------------------------------------------


def compare_texts(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Return exact match and ROUGE F1 of texts against one reference each, means over the texts."""
    rows = [
        (text.split() == target.split(), rouge_n(text, target, 1), rouge_n(text, target, 2), rouge_l(text, target))
        for text, target in zip(written, targets, strict=True)
    ]
    means = np.mean(np.array(rows, np.float64), 0)
    return dict(zip(("exact_match", "rouge_1", "rouge_2", "rouge_l"), map(float, means), strict=True))


def rouge_words(text: str) -> list[str]:
    """Return the words that ROUGE compares: runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def rouge_n(written: str, target: str, n: int) -> float:
    """Return the F1 of the n-grams that two texts share, each as often as both have it; 0 where either has none."""
    ours, theirs = (
        Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in map(rouge_words, (written, target))
    )
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(written: str, target: str) -> float:
    """Return the F1 of the longest common subsequence of words of two texts."""
    ours, theirs = rouge_words(written), rouge_words(target)
    row = [0] * (len(theirs) + 1)
    for word in ours:
        last = row
        row = [0]
        for i, other in enumerate(theirs):
            row.append(last[i] + 1 if word == other else max(last[i + 1], row[i]))
    return _f1(row[-1], len(ours), len(theirs))


def _f1(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if shared else 0.0
