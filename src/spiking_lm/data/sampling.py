"""Which tokens a training step sees: a function of seed and step alone, so that resuming needs no random state."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.data.tokenizers import Tokens
from spiking_lm.errors import DataError

_SAMPLE, _ORDER, _WINDOW = 1, 2, 3  # keep the kinds of draw apart when their seeds and counters coincide

SHORTEST, SPREAD, HALVED = 5, 5.0, 0.05
"""Of jittered windows: the least length, the standard deviation, and the share of the windows that are half as long."""


def sample_offsets(n_tokens: int, seq_len: int, batch_size: int, *, seed: int, step: int) -> NDArray[np.int64]:
    """Return where the sequences of one step begin, ``(batch_size,)``, uniform over every offset that has a target.

    Raises: DataError when the text is shorter than one sequence and its target, ``seq_len + 1`` tokens.
    """
    places = n_tokens - seq_len
    if places < 1:
        raise DataError(
            f"the training text has {n_tokens:,} tokens, {seq_len:,} and one target need {seq_len + 1:,}",
            hint=f"train.seq_len can be at most {n_tokens - 1}" if n_tokens > 1 else "use a longer text",
        )
    return np.random.default_rng([seed, step, _SAMPLE]).integers(0, places, batch_size)


def gather(tokens: Tokens, offsets: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Return the sequences at ``offsets`` with their targets, ``(B, seq_len + 1)``, from an array or a memory map."""
    batch = np.empty((len(offsets), seq_len + 1), np.int64)
    for row, offset in zip(batch, offsets, strict=True):
        row[:] = tokens[offset : offset + seq_len + 1]
    return batch


@dataclass(frozen=True)
class Window:
    """What one step of a stream reads: ``length`` inputs and their targets from each of ``offsets (B,)``."""

    offsets: NDArray[np.int64]
    length: int
    first: bool
    """Whether the columns begin here, so that nothing is to be carried over."""


class Stream:
    """A text as ``batch_size`` contiguous columns that are read side by side, window after window, again and again.

    Each column has the N // ``batch_size`` tokens from its place on; the few left over at the end are never read. With
    ``jitter`` a window is max(5, int(x)) long, x normally distributed around ``seq_len``, or one time in 20 around half
    of it, with standard deviation 5 (Merity et al., arXiv 1708.02182), so that other places fall on the borders in each
    pass; without, every window but the last of a pass has ``seq_len``.

    Raises: DataError when a column is shorter than one window and its target.
    """

    def __init__(self, n_tokens: int, batch_size: int, seq_len: int, *, seed: int, jitter: bool = False) -> None:
        self.column = n_tokens // batch_size
        if self.column < seq_len + 1:
            raise DataError(
                f"the training text has {n_tokens:,} tokens, {batch_size} columns have {self.column:,} each, and a "
                f"window of {seq_len:,} and one target need {seq_len + 1:,}",
                hint="use a smaller train.batch_size or train.seq_len, or a longer text",
            )
        self.offsets = np.arange(batch_size, dtype=np.int64) * self.column
        self.seq_len, self.seed, self.jitter = seq_len, seed, jitter
        self._ends: list[int] = []  # windows read when each pass ends, as far as anyone has asked
        self._borders = (-1, np.zeros(0, np.int64))  # the last pass that was asked for, and where its windows begin

    def window(self, index: int) -> Window:
        """Return window ``index``, counted from the beginning of the first pass: a function of seed and index alone."""
        while not self._ends or index >= self._ends[-1]:
            windows = len(self._pass(len(self._ends))) - 1
            self._ends.append((self._ends[-1] if self._ends else 0) + windows)
        number = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[number - 1] if number else 0)
        borders = self._pass(number)
        start, end = int(borders[place]), int(borders[place + 1])
        return Window(self.offsets + start, end - start, place == 0)

    def _pass(self, number: int) -> NDArray[np.int64]:
        """Return where the windows of a pass begin, and the end of the last."""
        if self._borders[0] != number:
            targets = self.column - 1
            if self.jitter:
                rng, most = np.random.default_rng([self.seed, number, _WINDOW]), targets // SHORTEST + 1
                around = np.where(rng.random(most) < HALVED, self.seq_len / 2, self.seq_len)
                ends = np.cumsum(np.maximum(SHORTEST, rng.normal(around, SPREAD).astype(np.int64)))
                inner = ends[ends < targets]
            else:
                inner = np.arange(self.seq_len, targets, self.seq_len)
            self._borders = (number, np.concatenate([[0], inner, [targets]]))
        return self._borders[1]


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which epoch ``epoch`` visits ``n`` examples."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(n)


def visited(n: int, batch_size: int, seed: int, index: int) -> list[int]:
    """Return which of ``n`` examples batch ``index`` has; in an epoch, each occurs once."""
    places = np.arange(index * batch_size, (index + 1) * batch_size)
    orders = {int(epoch): epoch_order(n, seed, int(epoch)) for epoch in np.unique(places // n)}
    return [int(orders[int(place // n)][place % n]) for place in places]


def pad_batch(sequences: Sequence[NDArray[Any]], pad_id: int | None = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sequences padded on the right, ``(B, longest)``, and their true lengths, ``(B,)``.

    A ``pad_id`` of None pads with 0: models mask by length, never by token.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    batch = np.full((len(sequences), int(lengths.max(initial=0))), pad_id or 0, np.int64)
    for row, sequence in zip(batch, sequences, strict=True):
        row[: len(sequence)] = sequence
    return batch, lengths
