"""What counting alone achieves: an interpolated n-gram model, the floor that a language model must beat."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import DataError

Floats = NDArray[np.float64]


def ngram_probabilities(
    train: NDArray[Any], test: NDArray[Any], order: int, *, vocab_size: int | None = None
) -> list[Floats]:
    """Return the probability of each test token under the models of order 0, 1, ... ``order``.

    The model of order k looks at the k tokens before. Witten-Bell interpolation (Witten and Bell 1991): after a context
    seen c times with t different followers, p_k = (count + t p_{k-1}) / (c + t); a context never seen leaves p_{k-1};
    below order 0 lies the uniform distribution over ``vocab_size`` (None: the largest token + 1). The first tokens of
    the test text have shorter contexts. Needs about 100 bytes of memory per token of both texts.
    """
    if order < 0:
        raise ValueError(f"the order of an n-gram model is at least 0, not {order}")
    if len(train) == 0:
        raise DataError("an n-gram model cannot be counted on an empty text")
    n = len(train)
    tokens = np.concatenate([train, test]).astype(np.int64)
    vocab_size = vocab_size or (int(tokens.max()) + 1)
    history = np.zeros(len(tokens), np.int64)  # which context each position has, numbered without gaps
    seen_here = np.ones(len(tokens), bool)  # positions far enough into their text to have a context this long
    p: Floats = np.full(len(test), 1.0 / vocab_size)
    levels = []
    for k in range(order + 1):
        _, first, gram = np.unique(history * vocab_size + tokens, return_index=True, return_inverse=True)
        usable = seen_here[:n]
        count = np.bincount(gram[:n][usable], minlength=len(first))
        contexts = int(history.max()) + 1
        context_count = np.bincount(history[:n][usable], minlength=contexts)
        followers = np.bincount(history[first[count > 0]], minlength=contexts)
        c, t = context_count[history[n:]], followers[history[n:]]
        known = seen_here[n:] & (c > 0)
        p = np.where(known, (count[gram[n:]] + t * p) / np.maximum(c + t, 1), p)
        levels.append(p)
        # The context of order k + 1 at a position is the gram of order k that ends just before it.
        history = np.concatenate([[0], gram[:-1]])
        seen_here = seen_here.copy()
        seen_here[k : k + 1] = False
        seen_here[n + k : n + k + 1] = False
    return levels


def byte_ngram_bits(train_tokens: NDArray[Any], test_tokens: NDArray[Any], order: int) -> float:
    """Return the bits per token that an interpolated n-gram model with ``order`` tokens of context needs.

    Bytes, characters or any small vocabulary of at most 256 tokens (larger ids enlarge it).
    """
    return ngram_bits(train_tokens, test_tokens, order)[order]


def ngram_bits(train_tokens: NDArray[Any], test_tokens: NDArray[Any], max_order: int) -> list[float]:
    """Return the bits per test token for each order from 0 to ``max_order``, for the price of the last."""
    if len(test_tokens) == 0:
        raise DataError("there is no text to score")
    largest = int(max(np.max(train_tokens, initial=255), np.max(test_tokens)))
    levels = ngram_probabilities(train_tokens, test_tokens, max_order, vocab_size=largest + 1)
    return [float(-np.log2(p).mean()) for p in levels]
