"""Which tokens a training step sees: a function of seed and step alone, so that resuming needs no random state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.data.tokenizers import Tokens
from spiking_lm.errors import DataError

_SAMPLE, _ORDER = 1, 2  # keep the two kinds of draw apart when their seeds and counters coincide


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


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which epoch ``epoch`` visits ``n`` examples."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(n)


def pad_batch(sequences: Sequence[NDArray[Any]], pad_id: int | None = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sequences padded on the right, ``(B, longest)``, and their true lengths, ``(B,)``.

    A ``pad_id`` of None pads with 0: models mask by length, never by token.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    batch = np.full((len(sequences), int(lengths.max(initial=0))), pad_id or 0, np.int64)
    for row, sequence in zip(batch, sequences, strict=True):
        row[: len(sequence)] = sequence
    return batch, lengths
