"""Scoring a model on text (bits per byte, bits per character, perplexity) or on labelled examples (accuracy).

There are three protocols for text, whose figures are not comparable:

- sliding: a window of ``window`` tokens slides by ``stride``, and of each window after the first only the last
  ``stride`` predictions count, so every counted token has seen at least ``window - stride`` tokens. Each token of the
  text but the first is counted exactly once.
- carried: the windows do not overlap, and each goes on from the state in which the one before it ended, so that every
  token has seen all of the text before it. Each token but the first is counted exactly once.
- blocks: floor(n / window) windows, each from a fresh state and with ``window - 1`` predictions, as the perplexities of
  quantised models are published (2048 tokens). The first token of a block has nothing before it and is not counted;
  what is left at the end of the text is not either.

An encoder, which sees both sides of a token, is scored on hidden tokens instead: that is another quantity, with names
of its own (``masked_perplexity``), and no protocol makes it comparable to the perplexity of a causal model.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from spiking_lm import registry
from spiking_lm.data import ClipData, Data, LabelledData, PairData, TextData
from spiking_lm.data.masking import HiddenTokens
from spiking_lm.errors import DataError, UsageError
from spiking_lm.generation import evaluating
from spiking_lm.interfaces import SpikingLanguageModel, mean_over_steps, observe
from spiking_lm.stages import EvaluateConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spiking_lm.data import Clip, Example

BASELINE_ORDER = 6
BASELINE_MAX_EXAMPLES = 50_000  # half a minute, at most
BASELINE_MAX_TOKENS = 5_000_000  # an n-gram table of a larger corpus would take minutes and gigabytes

_BAGS: dict[tuple[str, str], float] = {}
"""What a bag of words has reached on a data set and split, which the variants of one run share."""

LOGITS_AT_ONCE = 1 << 27
"""Logits that are computed at once (512 MiB of float32): fewer windows at a time where the vocabulary is large."""

SUSPICIOUS_RATIO = 1.05
"""A perplexity that shuffling the words raises by less than this is remarked upon."""


@dataclass(frozen=True)
class Scores:
    """What a metric sees: one entry per counted token or example."""

    task: str
    """``"text"``, ``"masked"`` (hidden tokens of a text), ``"pairs"`` (tokens of targets), ``"classification"``
    or ``"regression"``."""
    nll: NDArray[np.float64]
    """Negative log-likelihood in nats of what was there; the squared error of a regression."""
    target: NDArray[Any]
    predicted: NDArray[Any]
    """The most likely token or class; the number that a regression predicts."""
    n_bytes: int = 0
    """UTF-8 bytes that the counted tokens encode."""
    n_chars: int = 0

    @classmethod
    def of_numbers(cls, logits: torch.Tensor, labels: torch.Tensor) -> Scores:
        """Return the scores of a regression: ``logits (N, 1)`` for ``labels (N,)``."""
        predicted, target = logits[:, 0].double().numpy(), labels.double().numpy()
        return cls("regression", (predicted - target) ** 2, target, predicted)


def measure(scores: Scores, names: Iterable[str] | None) -> dict[str, float]:
    """Return what the metrics of these names make of ``scores``; None: all that apply. Raises: UnknownNameError."""
    metrics: dict[str, float] = {}
    for name in registry.all("metrics") if names is None else names:
        metrics.update(registry.get("metrics", name).load("function")(scores))
    return metrics


def bits_per_byte(scores: Scores) -> dict[str, float]:
    """Bits needed per UTF-8 byte of the text: the figure that does not depend on the tokenizer."""
    return {"bits_per_byte": float(scores.nll.sum() / math.log(2) / scores.n_bytes)} if scores.n_bytes else {}


def bits_per_character(scores: Scores) -> dict[str, float]:
    """Bits needed per Unicode character of the text."""
    return {"bits_per_character": float(scores.nll.sum() / math.log(2) / scores.n_chars)} if scores.n_chars else {}


def perplexity(scores: Scores) -> dict[str, float]:
    """exp of the mean negative log-likelihood per token."""
    return {"perplexity": float(np.exp(scores.nll.mean()))} if scores.task == "text" else {}


def masked_perplexity(scores: Scores) -> dict[str, float]:
    """exp of the mean negative log-likelihood per hidden token, given the text on both sides of it."""
    return {"masked_perplexity": float(np.exp(scores.nll.mean()))} if scores.task == "masked" else {}


def accuracy(scores: Scores) -> dict[str, float]:
    """Share of tokens or examples whose most likely guess is right; of hidden tokens it is ``masked_accuracy``."""
    if scores.task == "regression":
        return {}
    name = "masked_accuracy" if scores.task == "masked" else "accuracy"
    return {name: float((scores.predicted == scores.target).mean())}


def macro_f1(scores: Scores) -> dict[str, float]:
    """F1 averaged over the classes that occur, each weighing the same."""
    if scores.task != "classification":
        return {}
    values = []
    for label in np.unique(scores.target):
        hit = float(((scores.predicted == label) & (scores.target == label)).sum())
        values.append(2 * hit / float((scores.predicted == label).sum() + (scores.target == label).sum()))
    return {"macro_f1": float(np.mean(values))}


def mean_squared_error(scores: Scores) -> dict[str, float]:
    """The mean squared error of numbers."""
    return {"mean_squared_error": float(scores.nll.mean())} if scores.task == "regression" else {}


def correlation(scores: Scores) -> dict[str, float]:
    """Pearson's correlation of numbers, and Spearman's, of their ranks (ties share theirs); 0 where one is constant."""
    if scores.task != "regression":
        return {}
    numbers = scores.target, scores.predicted
    ranks = [np.searchsorted(np.sort(x), x) + np.searchsorted(np.sort(x), x, "right") for x in numbers]
    return {"pearson": _pearson(*numbers), "spearman": _pearson(*ranks)}


def _pearson(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / spread if spread > 0 else 0.0


class Activity:
    """Counts events (values that are not zero) of every spike site."""

    def __init__(self) -> None:
        self.events: dict[str, int] = {}
        self.places: dict[str, int] = {}

    def add(self, spikes: dict[str, torch.Tensor], counted: int) -> None:
        """Take in the last ``counted`` positions of ``spikes (B, S, N)``."""
        for site, values in spikes.items():
            last = values[:, -counted:]
            self.events[site] = self.events.get(site, 0) + int(torch.count_nonzero(last))
            self.places[site] = self.places.get(site, 0) + last.numel()

    def to_dict(self) -> dict[str, Any]:
        """Return the event rates: ``mean`` over all units, and of each of ``sites``."""
        return {
            "mean": sum(self.events.values()) / sum(self.places.values()),
            "sites": {site: self.events[site] / self.places[site] for site in self.events},
        }


def evaluate(model: SpikingLanguageModel, data: Data, config: EvaluateConfig) -> dict[str, Any]:
    """Score ``model`` on a split; return a JSON-able dict with ``metrics`` and ``protocol``.

    For text, clips and encoders also ``activity``, the event rates of a model that has spike sites, measured on what is
    counted; ``baselines``, in ``baseline_unit``: what n-gram models reach on bytes and words, and a bag of words on
    labelled texts. With ``config.shuffled`` also ``shuffled``: the perplexity of the same text with its words in
    another order, and how many times as high that is.

    Raises DataError for a split that is empty or too short, UsageError for shuffling what is no text, UnknownNameError
    for an unknown metric.
    """
    if isinstance(data, PairData):
        from spiking_lm.sequences import evaluate_pairs

        return evaluate_pairs(model, data, config)
    if model.capabilities == {"seq2seq"}:
        raise UsageError(f"{type(model).__name__} writes targets from sources, and {data.name!r} holds no pairs")
    activity = Activity()
    also: dict[str, float] = {}
    causal = isinstance(data, TextData) and "lm" in model.capabilities
    if config.shuffled and not causal:
        what = "is scored on hidden tokens" if isinstance(data, TextData) else "holds no running text"
        raise UsageError(f"{data.name!r} {what}: there are no words that could be shuffled")
    if isinstance(data, TextData):
        tokens = np.asarray(getattr(data, config.split).tokens[: config.max_tokens])
        score = _score_text if causal else _score_masked
        scores, protocol = score(model, data, tokens, config, activity)
    else:
        scores, protocol, also = _score_labelled(model, data, config, activity)
    metrics = {**measure(scores, config.metrics), **also}
    result: dict[str, Any] = {
        "task": scores.task,
        "split": config.split,
        "metrics": metrics,
        "protocol": protocol,
        "data": data.describe(),
    }
    if activity.places:
        result["activity"] = activity.to_dict()
    if isinstance(data, TextData) and causal:
        if config.shuffled:
            result["shuffled"] = _score_shuffled(model, data, tokens, config, scores)
        if 0 < len(data.train.tokens) <= BASELINE_MAX_TOKENS:
            result.update(_baselines(data, tokens))
    if isinstance(data, LabelledData) and 0 < len(data.train) <= BASELINE_MAX_EXAMPLES:
        result.update(_words_alone(data, config))
    return result


def _baselines(data: TextData, held_out: NDArray[Any]) -> dict[str, Any]:
    """Return what n-gram models reach, where they are a known floor: for bytes and for words."""
    from spiking_lm.data.ngram import ngram_bits, ngram_perplexities

    if data.tokenizer.type == "byte":
        bits = ngram_bits(data.train.tokens, held_out, BASELINE_ORDER)
        orders = range(3, BASELINE_ORDER + 1)
        values = {f"interpolated byte n-gram, order {order}": bits[order] for order in orders}
        return {"baseline_unit": "bits per byte", "baselines": values}
    if data.tokenizer.type == "word":
        bigram, trigram = ngram_perplexities(data.train.tokens, held_out, 2, vocab_size=data.tokenizer.vocab_size)
        values = {"Kneser-Ney bigram": bigram, "Kneser-Ney trigram": trigram}
        return {"baseline_unit": "perplexity", "baselines": values}
    return {}


def _words_alone(data: LabelledData, config: EvaluateConfig) -> dict[str, Any]:
    """Return what a bag of words reaches on a labelled set, or the mean where numbers are predicted."""
    from spiking_lm.data.bagofwords import bag_of_words

    held_out: list[Example] = getattr(data, config.split)
    if data.regression:
        mean = float(np.mean([example.label for example in data.train]))
        error = float(np.mean([(example.label - mean) ** 2 for example in held_out]))
        return {"baseline_unit": "mean squared error", "baselines": {"the mean of the training part": error}}
    known = (data.sha256, config.split)
    if known not in _BAGS:
        texts, labels = [example.text for example in data.train], [int(example.label) for example in data.train]
        found = bag_of_words(texts, labels, [example.text for example in held_out], len(data.labels)).argmax(-1)
        right = [int(guess) == example.label for guess, example in zip(found, held_out, strict=True)]
        _BAGS[known] = float(np.mean(right))
    baselines = {"tf-idf of words and pairs, logistic regression": _BAGS[known]}
    return {"baseline_unit": "accuracy", "baselines": baselines}


def _score_text(
    model: SpikingLanguageModel, data: TextData, tokens: NDArray[Any], config: EvaluateConfig, activity: Activity
) -> tuple[Scores, str]:
    least = config.window if config.protocol == "blocks" else 2
    if len(tokens) < least:
        raise DataError(
            f"the {config.split} split has {len(tokens)} tokens; scoring needs at least {least}",
            hint="a block is that long: choose a smaller window" if least > 2 else None,
        )
    nll, predicted = score_tokens(model, tokens, config, activity if model.spike_sites() else None)
    target = tokens[_scored(len(tokens), config)]
    n_bytes = n_chars = 0
    if data.tokenizer.lossless:
        counted = data.tokenizer.decode_bytes(target)
        n_bytes, n_chars = len(counted), sum((byte & 0xC0) != 0x80 for byte in counted)
        text = f"({n_bytes:,} bytes)"
    else:
        unknown = float((target == data.tokenizer.unk_id).mean())
        text = f"({unknown:.2%} of them <unk>; no bits per byte, because the tokens do not say all of the text)"
    protocol = f"{len(nll):,} tokens of the {config.split} split {text}, each scored once; {_context(tokens, config)}"
    return Scores("text", nll, target, predicted, n_bytes, n_chars), protocol


def _context(tokens: NDArray[Any], config: EvaluateConfig) -> str:
    """Say in words what the model has read before each token that counts."""
    if config.protocol == "carried":
        return f"in one pass; windows of {config.window} without overlap, batch 1, state carried from each to the next"
    if config.protocol == "blocks":
        blocks, rest = divmod(len(tokens), config.window)
        left_out = f"; the last {rest} tokens, less than a block, left out" if rest else ""
        return (
            f"{blocks:,} blocks of {config.window} without overlap, the first token of each not scored; state zero at "
            f"each block's start, no token put before it{left_out}"
        )
    stride = min(config.stride, config.window)
    return (
        f"window {config.window}, stride {stride}: at least {config.window - stride} tokens of context after the first "
        f"window; state zero at each window's start"
    )


def _score_masked(
    model: SpikingLanguageModel, data: TextData, tokens: NDArray[Any], config: EvaluateConfig, activity: Activity
) -> tuple[Scores, str]:
    hidden = HiddenTokens(data.tokenizer, config.window, config.mask_rate)
    nll, target, predicted = score_hidden(model, hidden, tokens.astype(np.int64), config.batch_size, activity)
    protocol = (
        f"{len(nll):,} tokens of the {config.split} split, {config.mask_rate:.0%} of each window of {config.window}, "
        "predicted from both sides: 80 % of them hidden, 10 % replaced by another, 10 % left as they are (seed 0)"
    )
    return Scores("masked", nll, target, predicted), protocol


def score_hidden(
    model: SpikingLanguageModel,
    hidden: HiddenTokens,
    tokens: NDArray[np.int64],
    batch_size: int,
    activity: Activity | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the negative log-likelihood (nats), the token and the guess at each place of a text that is hidden.

    The windows of the text do not overlap; which places are hidden depends on the text's length alone.
    Raises: UsageError for a model without the capability ``mlm``, DataError for a text without a whole window.
    """
    if "mlm" not in model.capabilities:
        raise UsageError(
            f"{type(model).__name__} predicts no tokens (capabilities: {sorted(model.capabilities)})",
            hint="an encoder is scored on labelled data, or on text when it has the capability 'mlm'",
        )
    if len(tokens) < hidden.room:
        raise DataError(f"the text has {len(tokens)} tokens, a window holds {hidden.room}", hint="take a smaller one")
    rows = tokens[: len(tokens) // hidden.room * hidden.room].reshape(-1, hidden.room)
    batch = hidden.hide(rows, seed=0, index=0)
    at_once = min(batch_size, max(1, LOGITS_AT_ONCE // (batch.inputs.shape[1] * hidden.vocab_size)))
    device = next(model.parameters()).device
    nlls, guesses = [], []
    with evaluating(model):
        for first in range(0, len(rows), at_once):
            some = slice(first, first + at_once)
            inputs, lengths, places, targets = (torch.from_numpy(part[some]).to(device) for part in batch)
            logits = model.predict_masked(inputs, lengths)[places].float()
            nlls.append(F.cross_entropy(logits, targets.flatten(), reduction="none").double().cpu().numpy())
            guesses.append(logits.argmax(-1).cpu().numpy())
            if activity is not None and model.spike_sites():
                activity.add(observe(model, inputs, lengths).spikes or {}, inputs.shape[1])
    return np.concatenate(nlls), batch.targets.flatten(), np.concatenate(guesses)


def shuffle_words(text: str, seed: int = 0) -> str:
    """Return ``text`` with its words in another order; the white space stays in its places, so no byte is lost."""
    parts = re.split(r"(\s+)", text)
    places = [place for place in range(0, len(parts), 2) if parts[place]]
    order = places.copy()
    random.Random(seed).shuffle(order)
    shuffled = parts.copy()
    for place, source in zip(places, order, strict=True):
        shuffled[place] = parts[source]
    return "".join(shuffled)


def _score_shuffled(
    model: SpikingLanguageModel, data: TextData, tokens: NDArray[Any], config: EvaluateConfig, plain: Scores
) -> dict[str, float]:
    """Score the text with its words in another order, which tells a model that predicts from one that has looked."""
    text = data.tokenizer.decode(tokens)
    shuffled = shuffle_words(text)
    if shuffled == text:
        raise DataError(f"the {config.split} split has no words that could change places")
    mixed = data.tokenizer.encode(shuffled).astype(np.int64)
    # Other tokens for the same words can be a few less, which must not cost the only block.
    nll, _ = score_tokens(model, mixed, config.model_copy(update={"window": min(config.window, len(mixed))}))
    return {"perplexity": float(np.exp(nll.mean())), "ratio": float(np.exp(nll.mean() - plain.nll.mean()))}


def scored_positions(n: int, config: EvaluateConfig) -> NDArray[np.int64]:
    """Return which of ``n`` tokens the protocol scores: all but the first, in blocks all but the first of each."""
    return np.arange(n)[_scored(n, config)]


def _scored(n: int, config: EvaluateConfig) -> slice | NDArray[np.int64]:
    """Return the same as what an array can be indexed with, without taking memory where it need not."""
    if config.protocol == "blocks":
        whole = np.arange(n // config.window * config.window)
        return whole[whole % config.window > 0]
    return slice(1, n)


def score_tokens(
    model: SpikingLanguageModel, tokens: NDArray[Any], config: EvaluateConfig, activity: Activity | None = None
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Return the negative log-likelihood (nats) and the arg-max guess for each token at :func:`scored_positions`.

    ``activity`` is told the spikes at each token that is counted. A text of any length takes the memory of a batch of
    windows, and 8 bytes and a token of ``tokens``' type for each.
    """
    nll = np.empty(len(tokens))
    vocab_size = getattr(model.config, "vocab_size", 1)
    shortest = np.min_scalar_type(vocab_size - 1) if vocab_size > 1 else np.dtype(np.int64)
    predicted = np.empty(len(tokens), np.promote_types(tokens.dtype, shortest))
    device = next(model.parameters()).device
    state = None
    with evaluating(model):
        for starts, length, counted in _windows(len(tokens) - 1, config):
            at_once = max(1, LOGITS_AT_ONCE // (length * vocab_size))
            for part in (starts[first : first + at_once] for first in range(0, len(starts), at_once)):
                rows = np.stack([tokens[start : start + length + 1] for start in part]).astype(np.int64)
                batch = torch.from_numpy(rows).to(device)
                output = model(batch[:, :-1], state, return_spikes=activity is not None)
                if config.protocol == "carried":
                    state = output.state
                if activity is not None:
                    activity.add(output.spikes or {}, counted)
                for start, logits, targets in zip(part, output.logits[:, -counted:], batch[:, -counted:], strict=True):
                    where = slice(start + length + 1 - counted, start + length + 1)
                    losses = F.cross_entropy(logits.float(), targets, reduction="none")
                    nll[where] = losses.double().cpu().numpy()
                    predicted[where] = logits.argmax(-1).cpu().numpy()
    scored = _scored(len(tokens), config)
    return nll[scored], predicted[scored]


def _windows(n: int, config: EvaluateConfig) -> Iterator[tuple[list[int], int, int]]:
    """Yield (starts, window length, predictions counted at the end of each), covering the ``n`` predictions of a text.

    Each is counted once, but for those of the first tokens of blocks and of the rest after the last block.
    """
    if config.protocol == "carried":
        for start in range(0, n, config.window):
            length = min(config.window, n - start)
            yield [start], length, length
        return
    if config.protocol == "blocks":
        length = config.window - 1
        starts = list(range(0, n - length + 1, config.window))
        for first in range(0, len(starts), config.batch_size):
            yield starts[first : first + config.batch_size], length, length
        return
    window, stride = min(config.window, n), min(config.stride, config.window)
    yield [0], window, window
    later = list(range(stride, n - window + 1, stride))
    for first in range(0, len(later), config.batch_size):
        yield later[first : first + config.batch_size], window, stride
    rest = n - (later[-1] if later else 0) - window
    if rest > 0:  # the last window ends with the text and overlaps more
        yield [n - window], window, rest


def _score_labelled(
    model: SpikingLanguageModel, data: LabelledData | ClipData, config: EvaluateConfig, activity: Activity
) -> tuple[Scores, str, dict[str, float]]:
    examples: Sequence[Example | Clip] = getattr(data, config.split)
    if not examples:
        raise DataError(f"the {config.split} split is empty")
    also: dict[str, torch.Tensor] = {}
    watched = activity if isinstance(data, ClipData) or "encode" in model.capabilities else None
    logits = classify_examples(model, data, examples, config.window, config.batch_size, watched, also)
    labels = torch.tensor([example.label for example in examples])
    regression = isinstance(data, LabelledData) and data.regression
    unit = "frames" if isinstance(data, ClipData) else "tokens"
    protocol = f"{len(examples):,} examples of the {config.split} split, cut at {config.window} {unit}"
    if regression:
        return Scores.of_numbers(logits, labels), protocol, {}
    nll = F.cross_entropy(logits, labels, reduction="none")
    scores = Scores("classification", nll.double().numpy(), labels.numpy(), logits.argmax(-1).numpy())
    others = {f"accuracy ({name})": float((other.argmax(-1) == labels).double().mean()) for name, other in also.items()}
    return scores, protocol, others


def classify_examples(
    model: SpikingLanguageModel,
    data: LabelledData | ClipData,
    examples: Sequence[Any],
    limit: int,
    batch_size: int,
    activity: Activity | None = None,
    also: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return class logits ``(len(examples), num_classes)``, batching examples of similar length.

    ``examples`` are some of ``data``, each cut at ``limit`` tokens or frames. ``activity``, for clips and encoders, is
    told the spikes at the true ones. ``also`` is filled with the logits of :meth:`SpikingLanguageModel.classify_also`.
    """
    order = sorted(range(len(examples)), key=lambda i: data.length(examples[i]))
    device = next(model.parameters()).device
    parts: dict[str, list[torch.Tensor]] = {}
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            batch = data.batch([examples[i] for i in order[first : first + batch_size]], limit)
            inputs, lengths = (torch.from_numpy(part).to(device) for part in batch)
            readings = {} if also is None else model.classify_also(inputs, lengths)
            if activity is None or not model.spike_sites():
                readings[""] = model.classify(inputs, lengths)
            else:
                readings[""], spikes = _classify_watched(model, inputs, lengths)
                true = torch.arange(inputs.shape[1], device=device) < lengths[:, None]
                activity.add({site: values[true][None] for site, values in spikes.items()}, int(true.sum()))
            for name, logits in readings.items():
                parts.setdefault(name, []).append(logits.float().cpu())
    back = torch.tensor(order).argsort()
    found = {name: torch.cat(rows)[back] for name, rows in parts.items()}
    if also is not None:
        also.update({name: rows for name, rows in found.items() if name})
    return found[""]


def _classify_watched(
    model: SpikingLanguageModel, inputs: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return class logits and the spikes that led to them, from one pass."""
    if "encode" in model.capabilities:
        encoding = model.encode(inputs, lengths, return_spikes=True)
        return model.classify_pooled(encoding.pooled), encoding.spikes or {}
    output = model(inputs, return_spikes=True)
    return mean_over_steps(output.logits, lengths), output.spikes or {}


def render(result: dict[str, Any]) -> RenderableType:
    """Return a table of an evaluation result, its protocol as the caption."""
    table = Table(
        title=f"{result['task']}, {result['split']} split", caption=Text(result["protocol"]), title_justify="left"
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result["metrics"].items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    if activity := result.get("activity"):
        table.add_row("activity (share of units with an event)", f"{activity['mean']:.4f}")
    if shuffled := result.get("shuffled"):
        table.add_row("perplexity with the words shuffled", f"{shuffled['perplexity']:.4f}")
        table.add_row(
            "  times as high" if shuffled["ratio"] >= SUSPICIOUS_RATIO else "  [yellow]hardly higher: times as high",
            f"{shuffled['ratio']:.4f}",
        )
    for name, value in result.get("baselines", {}).items():
        table.add_row(f"[dim]baseline: {name}, {result['baseline_unit']}", f"[dim]{value:.4f}")
    return table
