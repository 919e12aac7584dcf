"""What counting alone achieves: interpolated n-gram models, the floor that a language model must beat."""

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


def kneser_ney_probabilities(
    train: NDArray[Any], test: NDArray[Any], order: int, *, vocab_size: int | None = None
) -> Floats:
    """Return the probability of each test token after the ``order`` tokens before it, with Kneser-Ney smoothing.

    Interpolated, with three discounts per order (Kneser and Ney 1995; Chen and Goodman 1999): after a context h seen
    c(h) times p(w | h) = (c(h w) - D) / c(h) + b(h) p(w | the context without its first token), where b(h) gives away
    what the discounts D took. Shorter contexts count the different tokens before a word instead of how often it came;
    below them lies the uniform distribution over ``vocab_size`` (None: the largest token + 1). The first test tokens
    have shorter contexts. Needs about 100 bytes of memory per token of both texts.
    """
    if order < 1:
        raise ValueError(f"a Kneser-Ney model looks at 1 token at least, not {order}")
    if len(train) == 0:
        raise DataError("an n-gram model cannot be counted on an empty text")
    n = len(train)
    tokens = np.concatenate([train, test]).astype(np.int64)
    vocab_size = vocab_size or (int(tokens.max()) + 1)
    histories, grams = [np.zeros(len(tokens), np.int64)], []
    for _ in range(order + 1):  # number the grams of each length, and what comes before their last token
        _, gram = np.unique(histories[-1] * vocab_size + tokens, return_inverse=True)
        grams.append(gram)
        histories.append(np.concatenate([[0], gram[:-1]]))
    p: Floats = np.full(len(test), 1.0 / vocab_size)
    for k, (history, gram) in enumerate(zip(histories, grams, strict=False)):
        ends = np.arange(k, n)  # where a gram of this length ends in the training text
        if k < order:  # one place for each different token before it
            longer = np.arange(k + 1, n)
            ends = longer[np.unique(grams[k + 1][longer], return_index=True)[1]]
        count = np.bincount(gram[ends], minlength=int(gram.max()) + 1)
        contexts = int(history.max()) + 1
        total = np.bincount(history[ends], minlength=contexts)
        kinds, first = np.unique(gram[ends], return_index=True)
        discounts = _discounts(count)[np.minimum(count, 3)]
        taken = np.bincount(history[ends[first]], weights=discounts[kinds], minlength=contexts)
        here = history[n:]
        known = (np.arange(len(test)) >= k) & (total[here] > 0)
        own = (count[gram[n:]] - discounts[gram[n:]] + taken[here] * p) / np.maximum(total[here], 1)
        p = np.where(known, own, p)
    return p


def _discounts(count: NDArray[np.int64]) -> Floats:
    """Return what is taken from grams seen 0, 1, 2 and more times (Chen and Goodman 1999); half where it is undefined.

    The estimate needs grams seen 1, 2, 3 and 4 times, which a short text may lack.
    """
    once, twice, thrice, four = (int((count == times).sum()) for times in (1, 2, 3, 4))
    if min(once, twice, thrice, four) == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = once / (once + 2 * twice)
    estimate = [1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice]
    return np.array([0.0, *np.clip(estimate, [0.1, 0.1, 0.1], [1, 2, 3])])


def ngram_perplexities(
    train_tokens: NDArray[Any], test_tokens: NDArray[Any], max_order: int, *, vocab_size: int
) -> list[float]:
    """Return the perplexity of the Kneser-Ney models that look at 1, 2, ... ``max_order`` tokens."""
    if len(test_tokens) == 0:
        raise DataError("there is no text to score")
    models = [
        kneser_ney_probabilities(train_tokens, test_tokens, order, vocab_size=vocab_size)
        for order in range(1, max_order + 1)
    ]
    return [float(np.exp(-np.log(p).mean())) for p in models]
