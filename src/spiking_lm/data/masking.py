"""Masked language modelling: which tokens of a window are hidden, and what stands in their place."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spiking_lm.data.tokenizers import Tokenizer
from spiking_lm.errors import ConfigError

_MASK = 4  # keeps the draws apart from those of spiking_lm.data.sampling when seeds and counters coincide

HIDDEN, REPLACED = 0.8, 0.1
"""Of the tokens to predict: the share that becomes the mask, and the share that becomes another token."""


class HiddenBatch(NamedTuple):
    """A batch of windows with hidden tokens."""

    inputs: NDArray[np.int64]
    """``(B, S)``: what the model reads, with what stands around a text."""
    lengths: NDArray[np.int64]
    """``(B,)``, all S."""
    places: NDArray[np.bool_]
    """``(B, S)``: where a token is to be predicted."""
    targets: NDArray[np.int64]
    """``(B, n)``: the tokens at ``places``, from left to right."""


class HiddenTokens:
    """Hides tokens of windows as BERT does (Devlin et al., arXiv 1810.04805): a function of seed and counter alone.

    Of each window the share ``rate`` of its tokens, rounded and at least one, is to be predicted: 80 % of them become
    the mask, 10 % any token of the vocabulary, 10 % stay.

    Raises: ConfigError for a tokenizer without a mask, or a window without room for a token.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, rate: float) -> None:
        if tokenizer.mask_id is None:
            raise ConfigError(
                f"the {tokenizer.type} tokenizer has no token for what is hidden",
                hint="tokenizers bpe and word have one with mask: true; a file has one when it knows [MASK] or <mask>",
            )
        self.mask_id, self.vocab_size, self.rate = tokenizer.mask_id, tokenizer.vocab_size, rate
        self.frame = Frame(tokenizer, length)

    @property
    def room(self) -> int:
        """Tokens of the text in a window."""
        return self.frame.room

    def hide(self, rows: NDArray[np.int64], *, seed: int, index: int) -> HiddenBatch:
        """Hide tokens of ``rows (B, room)``; ``index`` counts the batches of a seed."""
        rng = np.random.default_rng([seed, index, _MASK])
        n = max(1, round(self.rate * rows.shape[1]))
        chosen = np.argsort(rng.random(rows.shape), axis=1) < n
        fate = rng.random(rows.shape)
        read = np.where(chosen & (fate < HIDDEN), self.mask_id, rows)
        other = rng.integers(0, self.vocab_size, rows.shape)
        read = np.where(chosen & (fate >= HIDDEN) & (fate < HIDDEN + REPLACED), other, read)
        inputs, lengths = self.frame.put(read)
        places = np.zeros(inputs.shape, bool)
        places[:, self.frame.first : self.frame.first + self.room] = chosen
        return HiddenBatch(inputs, lengths, places, rows[chosen].reshape(len(rows), n))


class Frame:
    """Windows of a text as an encoder reads them: with what its tokenizer puts around a text, ``length`` in all.

    Raises: ConfigError for a window without room for a token.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self._before, self._after = (np.array(ids, np.int64) for ids in tokenizer.around)
        self.first = len(self._before)
        self.room = length - self.first - len(self._after)
        if self.room < 1:
            raise ConfigError(f"a window of {length} has no room for a token between those around it")

    def put(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ``rows (B, room)`` as token ids ``(B, length)`` and true lengths ``(B,)``."""
        before, after = (np.broadcast_to(ids, (len(rows), len(ids))) for ids in (self._before, self._after))
        inputs = np.concatenate([before, rows, after], 1)
        return inputs, np.full(len(rows), inputs.shape[1])
