"""Scoring a model on text (bits per byte, bits per character, perplexity) or on labelled examples (accuracy).

Text is scored with full context: a window of ``window`` tokens slides by ``stride``, and of each window after the first
only the last ``stride`` predictions count, so every counted token has seen at least ``window - stride`` tokens. Each
token of the text but the first is counted exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from spiking_lm.data import LabelledData, TextData
from spiking_lm.data.sampling import pad_batch
from spiking_lm.errors import DataError
from spiking_lm.generation import evaluating
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.stages import EvaluateConfig

if TYPE_CHECKING:
    from spiking_lm.data import Example, Tokenizer

BASELINE_ORDER = 6
BASELINE_MAX_TOKENS = 5_000_000  # an n-gram table of a larger corpus would take minutes and gigabytes


@dataclass(frozen=True)
class Scores:
    """What a metric sees: one entry per counted token or example."""

    task: str
    """``"text"`` or ``"classification"``."""
    nll: NDArray[np.float64]
    """Negative log-likelihood in nats of what was there."""
    target: NDArray[np.int64]
    predicted: NDArray[np.int64]
    """The most likely token or class."""
    n_bytes: int = 0
    """UTF-8 bytes that the counted tokens encode."""
    n_chars: int = 0


def bits_per_byte(scores: Scores) -> dict[str, float]:
    """Bits needed per UTF-8 byte of the text: the figure that does not depend on the tokenizer."""
    return {"bits_per_byte": float(scores.nll.sum() / math.log(2) / scores.n_bytes)} if scores.n_bytes else {}


def bits_per_character(scores: Scores) -> dict[str, float]:
    """Bits needed per Unicode character of the text."""
    return {"bits_per_character": float(scores.nll.sum() / math.log(2) / scores.n_chars)} if scores.n_chars else {}


def perplexity(scores: Scores) -> dict[str, float]:
    """exp of the mean negative log-likelihood per token."""
    return {"perplexity": float(np.exp(scores.nll.mean()))} if scores.task == "text" else {}


def accuracy(scores: Scores) -> dict[str, float]:
    """Share of tokens or examples whose most likely guess is right."""
    return {"accuracy": float((scores.predicted == scores.target).mean())}


def macro_f1(scores: Scores) -> dict[str, float]:
    """F1 averaged over the classes that occur, each weighing the same."""
    if scores.task != "classification":
        return {}
    values = []
    for label in np.unique(scores.target):
        hit = float(((scores.predicted == label) & (scores.target == label)).sum())
        values.append(2 * hit / float((scores.predicted == label).sum() + (scores.target == label).sum()))
    return {"macro_f1": float(np.mean(values))}


def evaluate(model: SpikingLanguageModel, data: TextData | LabelledData, config: EvaluateConfig) -> dict[str, Any]:
    """Score ``model`` on a split; return a JSON-able dict with ``metrics``, ``protocol`` and, for bytes, ``baselines``.

    Raises DataError for an empty split, UnknownNameError for an unknown metric.
    """
    if isinstance(data, TextData):
        scores, protocol = _score_text(model, data, config)
    else:
        scores, protocol = _score_labelled(model, data, config)
    names = config.metrics if config.metrics is not None else list(registry.all("metrics"))
    metrics: dict[str, float] = {}
    for name in names:
        metrics.update(registry.get("metrics", name).load("function")(scores))
    result: dict[str, Any] = {
        "task": scores.task,
        "split": config.split,
        "metrics": metrics,
        "protocol": protocol,
        "data": data.describe(),
    }
    if (
        isinstance(data, TextData)
        and data.tokenizer.type == "byte"
        and 0 < len(data.train.tokens) <= BASELINE_MAX_TOKENS
    ):
        from spiking_lm.data.ngram import ngram_bits

        held_out = getattr(data, config.split).tokens[: config.max_tokens]
        bits = ngram_bits(data.train.tokens, held_out, BASELINE_ORDER)
        result["baselines"] = {
            f"interpolated byte n-gram, order {order}": bits[order] for order in range(3, BASELINE_ORDER + 1)
        }
    return result


def _score_text(model: SpikingLanguageModel, data: TextData, config: EvaluateConfig) -> tuple[Scores, str]:
    tokens = np.asarray(getattr(data, config.split).tokens[: config.max_tokens]).astype(np.int64)
    if len(tokens) < 2:
        raise DataError(f"the {config.split} split has {len(tokens)} tokens; scoring needs at least 2")
    nll, predicted = score_tokens(model, tokens, config)
    counted = data.tokenizer.decode_bytes(tokens[1:])
    n_chars = sum((byte & 0xC0) != 0x80 for byte in counted)
    stride = min(config.stride, config.window)
    protocol = (
        f"{len(nll):,} tokens of the {config.split} split ({len(counted):,} bytes), each scored once; window "
        f"{config.window}, stride {stride}: at least {config.window - stride} tokens of context after the first "
        f"window; state zero at each window's start"
    )
    return Scores("text", nll, tokens[1:], predicted, len(counted), n_chars), protocol


def score_tokens(
    model: SpikingLanguageModel, tokens: NDArray[np.int64], config: EvaluateConfig
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the negative log-likelihood (nats) and the arg-max guess for each of ``tokens[1:]``."""
    nll = np.empty(len(tokens) - 1)
    predicted = np.empty(len(tokens) - 1, dtype=np.int64)
    with evaluating(model):
        for starts, length, counted in _windows(len(tokens) - 1, config):
            rows = np.stack([tokens[start : start + length + 1] for start in starts])
            batch = torch.from_numpy(rows).to(next(model.parameters()).device)
            logits = model(batch[:, :-1]).logits[:, -counted:].float()
            losses = F.cross_entropy(logits.transpose(1, 2), batch[:, -counted:], reduction="none")
            for row, start in enumerate(starts):
                where = slice(start + length - counted, start + length)
                nll[where] = losses[row].double().cpu().numpy()
                predicted[where] = logits[row].argmax(-1).cpu().numpy()
    return nll, predicted


def _windows(n: int, config: EvaluateConfig) -> Iterator[tuple[list[int], int, int]]:
    """Yield (starts, window length, predictions counted at the end of each), covering ``n`` predictions once."""
    window, stride = min(config.window, n), min(config.stride, config.window)
    yield [0], window, window
    later = list(range(stride, n - window + 1, stride))
    for first in range(0, len(later), config.batch_size):
        yield later[first : first + config.batch_size], window, stride
    rest = n - (later[-1] if later else 0) - window
    if rest > 0:  # the last window ends with the text and overlaps more
        yield [n - window], window, rest


def _score_labelled(model: SpikingLanguageModel, data: LabelledData, config: EvaluateConfig) -> tuple[Scores, str]:
    examples: list[Example] = getattr(data, config.split)
    if not examples:
        raise DataError(f"the {config.split} split is empty")
    logits = classify_examples(model, data.tokenizer, examples, config.window, config.batch_size)
    labels = torch.tensor([example.label for example in examples])
    nll = F.cross_entropy(logits, labels, reduction="none")
    protocol = f"{len(examples):,} examples of the {config.split} split, cut at {config.window} tokens"
    return Scores("classification", nll.double().numpy(), labels.numpy(), logits.argmax(-1).numpy()), protocol


def classify_examples(
    model: SpikingLanguageModel, tokenizer: Tokenizer, examples: list[Example], max_tokens: int, batch_size: int
) -> torch.Tensor:
    """Return class logits ``(len(examples), num_classes)``, batching examples of similar length."""
    encoded = [tokenizer.encode(example.text)[:max_tokens].astype(np.int64) for example in examples]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    device = next(model.parameters()).device
    rows: list[torch.Tensor | None] = [None] * len(encoded)
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            tokens, lengths = pad_batch([encoded[i] for i in chosen], tokenizer.pad_id or 0)
            logits = model.classify(torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device))
            for i, row in zip(chosen, logits.float().cpu(), strict=True):
                rows[i] = row
    return torch.stack([row for row in rows if row is not None])


def render(result: dict[str, Any]) -> RenderableType:
    """Return a table of an evaluation result, its protocol as the caption."""
    table = Table(
        title=f"{result['task']}, {result['split']} split", caption=Text(result["protocol"]), title_justify="left"
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result["metrics"].items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    for name, value in result.get("baselines", {}).items():
        table.add_row(f"[dim]baseline: {name}, bits per byte", f"[dim]{value:.4f}")
    return table
