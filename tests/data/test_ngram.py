"""The n-gram floor: a proper distribution, equal to the obvious slow form, and the known figures."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_lm import data
from spiking_lm.data.ngram import byte_ngram_bits, ngram_bits, ngram_probabilities
from spiking_lm.errors import DataError


def slow_probability(train: list[int], context: list[int], token: int, order: int, vocab_size: int) -> float:
    """Interpolated Witten-Bell, written as its formula."""
    p = 1.0 / vocab_size
    for k in range(order + 1):
        if k > len(context):
            break
        seen = tuple(context[len(context) - k :])
        followers: Counter[int] = Counter()
        for i in range(k, len(train)):
            if tuple(train[i - k : i]) == seen:
                followers[train[i]] += 1
        if followers:
            c, t = sum(followers.values()), len(followers)
            p = (followers[token] + t * p) / (c + t)
    return p


small_texts = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@settings(max_examples=150)
@given(train=small_texts, test=small_texts, order=st.integers(0, 5))
def test_equals_the_obvious_form(train: list[int], test: list[int], order: int) -> None:
    levels = ngram_probabilities(np.array(train), np.array(test), order, vocab_size=4)
    for k, level in enumerate(levels):
        expected = [slow_probability(train, test[:i], token, k, 4) for i, token in enumerate(test)]
        np.testing.assert_allclose(level, expected, rtol=1e-12)


@given(train=small_texts, context=st.lists(st.integers(0, 5), max_size=8), order=st.integers(0, 6))
def test_sums_to_one_over_the_vocabulary(train: list[int], context: list[int], order: int) -> None:
    last = [
        ngram_probabilities(np.array(train), np.array([*context, token]), order, vocab_size=6)[order][-1]
        for token in range(6)
    ]
    assert math.isclose(sum(last), 1.0, rel_tol=1e-12)
    assert min(last) > 0


def test_a_repeated_text_is_predicted() -> None:
    train, test = np.array([1, 2, 3, 4] * 500, np.uint8), np.array([1, 2, 3, 4] * 50, np.uint8)
    assert byte_ngram_bits(train, test, 0) > 1.9
    assert byte_ngram_bits(train, test, 1) < 0.1


def test_ids_beyond_a_byte_enlarge_the_vocabulary() -> None:
    train, test = np.array([70000, 1], np.uint32), np.array([5], np.uint32)
    assert byte_ngram_bits(train, test, 0) == pytest.approx(-math.log2(2 / 4 / 70001))


def test_empty_texts_are_refused() -> None:
    with pytest.raises(DataError, match="empty text"):
        byte_ngram_bits(np.array([], np.uint8), np.array([1], np.uint8), 2)
    with pytest.raises(DataError, match="no text to score"):
        byte_ngram_bits(np.array([1], np.uint8), np.array([], np.uint8), 2)


def test_figures_on_the_embedded_corpus() -> None:
    austen = data.load({"type": "austen3"})
    assert isinstance(austen, data.TextData)
    bits = ngram_bits(austen.train.tokens, austen.valid.tokens, 6)
    assert bits[3:] == pytest.approx([2.077, 1.795, 1.722, 1.755], abs=0.001)
    assert bits[:3] == pytest.approx([4.412, 3.445, 2.669], abs=0.001)


def test_probabilities_of_one_token_only() -> None:
    (level,) = ngram_probabilities(np.array([0, 0, 1]), np.array([0, 1, 2]), 0, vocab_size=4)
    assert level.tolist() == [(2 + 2 / 4) / 5, (1 + 2 / 4) / 5, (2 / 4) / 5]
