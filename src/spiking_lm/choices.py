"""Multiple choice by log-likelihood: the choice that a model finds likeliest after the question is its answer.

``acc`` compares the log-likelihoods as they are, ``acc_norm`` divides each by the characters of its choice. A tie goes
to the choice that stands first. Prompts, the border between prompt and choice in tokens and both figures are those of
lm-eval (0.4), so that they can be compared; :mod:`spiking_lm.harness` runs that program itself.

What the rows of a question have in common is read once: its state is carried into each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

from spiking_lm.data.questions import QuestionFile, read_questions
from spiking_lm.errors import UsageError
from spiking_lm.evaluation import LOGITS_AT_ONCE
from spiking_lm.generation import evaluating
from spiking_lm.interfaces import SpikingLanguageModel, State, select_rows

if TYPE_CHECKING:
    from spiking_lm.data import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (rows scored, rows in all)."""


class Row(NamedTuple):
    """Tokens to score and the tokens before them: two arrays of ids, neither empty."""

    context: NDArray[np.int64]
    continuation: NDArray[np.int64]


class RowScore(NamedTuple):
    """The log-likelihood (nats) of a row's continuation, and whether each of its tokens is the likeliest one."""

    log_likelihood: float
    greedy: bool


def encode_row(tokenizer: Tokenizer, context: str, continuation: str) -> Row:
    """Encode a text and its continuation, neither empty, as lm-eval does.

    Spaces at the end of the context belong to the continuation, whose tokens are those that the whole text has after
    as many as the context has by itself. Where that leaves none, it is encoded by itself.
    """
    head = context.rstrip() or context
    tail = context[len(head) :] + continuation
    before = tokenizer.encode(head).astype(np.int64)
    after = tokenizer.encode(head + tail).astype(np.int64)[len(before) :]
    return Row(before, after if len(after) else tokenizer.encode(tail).astype(np.int64))


def score_rows(
    model: SpikingLanguageModel,
    groups: Sequence[Sequence[Row]],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[list[RowScore]]:
    """Score the continuations of rows; each group, of at least one, is best made of rows that begin alike.

    About ``batch_size`` rows go at once, never less than a group. The result is that of every row by itself, but for
    the rounding of sums.

    Raises: UsageError for a model that does not predict the next token.
    """
    if "lm" not in model.capabilities:
        raise UsageError(
            f"a {model.config.model_type} model does not predict the next token "
            f"(capabilities: {', '.join(sorted(model.capabilities))}), so it has no log-likelihoods to choose by"
        )
    shared = [_shared(rows) for rows in groups]
    results: list[list[RowScore]] = [[] for _ in groups]
    done, total = 0, sum(map(len, groups))
    with evaluating(model):
        for batch in _batches(groups, shared, batch_size):
            start = min(shared[i] for i in batch)
            firsts = np.stack([np.concatenate(groups[i][0])[:start] for i in batch])
            state = _read(model, firsts) if start else None
            rows = [row for i in batch for row in groups[i]]
            source = [place for place, i in enumerate(batch) for _ in groups[i]]
            scores = iter(_score(model, rows, start, state, source))
            for i in batch:
                results[i] = [next(scores) for _ in groups[i]]
            done += len(rows)
            if progress is not None:
                progress(done, total)
    return results


def _shared(rows: Sequence[Row]) -> int:
    """Return how many tokens the rows have in common, before the last token of the shortest context."""
    limit = min(len(row.context) for row in rows) - 1  # that token's logits are the first that count
    first = rows[0].context[:limit]
    differing = [np.flatnonzero(row.context[:limit] != first) for row in rows[1:]]
    return min([limit, *(int(places[0]) for places in differing if len(places))])


def _batches(groups: Sequence[Sequence[Row]], shared: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield indices of groups whose shared parts are of similar length, so that little is read more than once."""
    batch: list[int] = []
    size = 0
    for i in sorted(range(len(groups)), key=lambda i: shared[i]):
        if batch and size + len(groups[i]) > batch_size:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += len(groups[i])
    if batch:
        yield batch


def _read(model: SpikingLanguageModel, tokens: NDArray[np.int64]) -> State:
    """Return the state after ``tokens (B, S)``, read in pieces whose logits fit into memory."""
    batch = _tensor(model, tokens)
    piece = max(1, LOGITS_AT_ONCE // (len(tokens) * _vocab_size(model)))
    state = None
    for part in torch.split(batch, piece, 1):
        state = model(part, state).state
    return state


def _score(
    model: SpikingLanguageModel, rows: list[Row], start: int, state: State | None, source: list[int]
) -> Iterator[RowScore]:
    """Yield the scores of rows whose first ``start`` tokens were read into row ``source`` of ``state``."""
    texts = [np.concatenate(row)[start:] for row in rows]
    longest = max(map(len, texts)) - 1
    at_once = max(1, LOGITS_AT_ONCE // (longest * _vocab_size(model)))
    for first in range(0, len(rows), at_once):
        part = slice(first, first + at_once)
        tokens = np.zeros((len(texts[part]), longest), np.int64)  # what fills up the end changes nothing before it
        for row, text in enumerate(texts[part]):
            tokens[row, : len(text) - 1] = text[:-1]
        batch = _tensor(model, tokens)
        before = None if state is None else select_rows(state, torch.tensor(source[part], device=batch.device))
        logits = model(batch, before).logits
        for row, text, (_, continuation) in zip(logits, texts[part], rows[part], strict=True):
            end = len(text) - 1
            log_p = torch.log_softmax(row[end - len(continuation) : end].float(), -1)
            target = _tensor(model, continuation)
            chosen = log_p.gather(1, target[:, None])[:, 0]
            yield RowScore(float(chosen.double().sum()), bool((log_p.argmax(-1) == target).all()))


def _tensor(model: SpikingLanguageModel, tokens: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(tokens).to(next(model.parameters()).device)


def _vocab_size(model: SpikingLanguageModel) -> int:
    return int(getattr(model.config, "vocab_size", 1))


def evaluate_choices(
    model: SpikingLanguageModel,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer the questions of jsonl files, of each only the first ``limit``; return a JSON-able dict.

    ``tasks`` has for each file ``task``, ``file``, ``sha256``, ``prompt``, ``n``, ``chance`` (what guessing would
    reach), ``acc`` and ``acc_norm`` with their standard errors ``acc_stderr`` and ``acc_norm_stderr``. acc_norm is None
    where the choices do not differ in length or are not what is scored (BoolQ, Winogrande), and a standard error is
    None for a single question. ``protocol`` says in words how they were put.

    Raises: DataError naming the file, line and field; UsageError for a model that does not predict the next token.
    """
    files = [read_questions(path, limit) for path in paths]
    groups = [
        [
            encode_row(tokenizer, context, f" {continuation}")
            for context, continuation in zip(question.contexts, question.continuations, strict=True)
        ]
        for file in files
        for question in file.questions
    ]
    scores = iter(score_rows(model, groups, batch_size=batch_size, progress=progress))
    tasks = [
        _result(file, [[score.log_likelihood for score in next(scores)] for _ in file.questions]) for file in files
    ]
    protocol = (
        "0-shot, the choice with the highest log-likelihood after the prompt and a space (acc), the same per character "
        "of the choice (acc_norm); ties go to the first; prompts as in lm-eval 0.4"
    )
    return {"task": "choices", "tasks": tasks, "limit": limit, "protocol": protocol}


def _result(file: QuestionFile, log_likelihoods: list[list[float]]) -> dict[str, Any]:
    hits, normed = [], []
    for question, values in zip(file.questions, log_likelihoods, strict=True):
        lengths = [max(1, len(choice)) for choice in question.continuations]
        hits.append(int(np.argmax(values)) == question.answer)
        normed.append(int(np.argmax(np.array(values) / lengths)) == question.answer)
    result: dict[str, Any] = {
        "task": file.task,
        "file": str(file.path),
        "sha256": file.sha256,
        "prompt": file.prompt,
        "n": len(hits),
        "chance": float(np.mean([1 / len(question.continuations) for question in file.questions])),
    }
    for name, right in (("acc", hits), ("acc_norm", normed if file.normalised else None)):
        result[name] = float(np.mean(right)) if right is not None else None
        result[f"{name}_stderr"] = _standard_error(result[name], len(hits))
    return result


def _standard_error(mean: float | None, n: int) -> float | None:
    """Return the standard error of a mean of ``n`` zeros and ones, from their sample standard deviation."""
    return None if mean is None or n < 2 else math.sqrt(mean * (1 - mean) / (n - 1))


def render(result: dict[str, Any]) -> RenderableType:
    """Return a table of what :func:`evaluate_choices` returned, its protocol as the caption."""
    table = Table(title="multiple choice", caption=result["protocol"], title_justify="left")
    for name in ("task", "file"):
        table.add_column(name)
    for name in ("n", "acc", "acc_norm", "chance"):
        table.add_column(name, justify="right")
    for task in result["tasks"]:
        figures = [_with_error(task[name], task[f"{name}_stderr"]) for name in ("acc", "acc_norm")]
        table.add_row(task["task"], Path(task["file"]).name, f"{task['n']:,}", *figures, f"{task['chance']:.4f}")
    return table


def _with_error(mean: float | None, error: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"
