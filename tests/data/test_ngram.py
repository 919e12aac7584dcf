"""The n-gram floor: a proper distribution, equal to the obvious slow form, and the known figures."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_lm import data
from spiking_lm.data.ngram import (
    byte_ngram_bits,
    kneser_ney_probabilities,
    ngram_bits,
    ngram_perplexities,
    ngram_probabilities,
)
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


def slow_kneser_ney(train: list[int], context: list[int], token: int, order: int, vocab_size: int) -> float:
    """Interpolated modified Kneser-Ney, written as its formulas."""

    def grams(length: int) -> list[tuple[int, ...]]:
        return [tuple(train[i : i + length]) for i in range(len(train) - length + 1)]

    def counts(length: int) -> Counter[tuple[int, ...]]:
        if length == order + 1:
            return Counter(grams(length))
        return Counter(gram[1:] for gram in set(grams(length + 1)))

    p = 1.0 / vocab_size
    for k in range(order + 1):
        if k > len(context):
            break
        count = counts(k + 1)
        of = Counter(count.values())
        taken = [0.0, 0.5, 0.5, 0.5]
        if of[1] and of[2] and of[3] and of[4]:
            y = of[1] / (of[1] + 2 * of[2])
            for i in (1, 2, 3):
                taken[i] = min(max(i - (i + 1) * y * of[i + 1] / of[i], 0.1), i)
        history = tuple(context[len(context) - k :])
        followers = {gram: c for gram, c in count.items() if gram[:-1] == history}
        total = sum(followers.values())
        if total:
            gram = (*history, token)
            own = count[gram]
            given_away = sum(taken[min(c, 3)] for c in followers.values())
            p = (own - taken[min(own, 3)] + given_away * p) / total
    return p


longer_texts = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@settings(max_examples=100)
@given(train=longer_texts, test=small_texts, order=st.integers(1, 4))
def test_kneser_ney_equals_the_obvious_form(train: list[int], test: list[int], order: int) -> None:
    fast = kneser_ney_probabilities(np.array(train), np.array(test), order, vocab_size=5)
    expected = [slow_kneser_ney(train, test[:i], token, order, 5) for i, token in enumerate(test)]
    np.testing.assert_allclose(fast, expected, rtol=1e-12)


@given(train=longer_texts, context=st.lists(st.integers(0, 5), max_size=6), order=st.integers(1, 4))
def test_kneser_ney_sums_to_one_over_the_vocabulary(train: list[int], context: list[int], order: int) -> None:
    last = [
        kneser_ney_probabilities(np.array(train), np.array([*context, token]), order, vocab_size=6)[-1]
        for token in range(6)
    ]
    assert math.isclose(sum(last), 1.0, rel_tol=1e-12)
    assert min(last) > 0


def test_kneser_ney_discounts_are_estimated_where_they_can_be() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.zipf(1.5, 4000) % 200, rng.zipf(1.5, 400) % 200
    context, token = test[:3].tolist(), int(test[3])
    assert kneser_ney_probabilities(train, test, 2, vocab_size=200)[3] == pytest.approx(
        slow_kneser_ney(train.tolist(), context, token, 2, 200), rel=1e-12
    )


def test_kneser_ney_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="1 token at least"):
        kneser_ney_probabilities(np.array([1]), np.array([1]), 0)
    with pytest.raises(DataError, match="empty text"):
        kneser_ney_probabilities(np.array([], np.uint8), np.array([1]), 1)
    with pytest.raises(DataError, match="no text to score"):
        ngram_perplexities(np.array([1]), np.array([], np.uint8), 1, vocab_size=2)


def test_kneser_ney_figures_on_the_embedded_corpus() -> None:
    """Better than Witten-Bell, which gains nothing from the third word, and better with more context."""
    tokenizer = {"type": "word", "lowercase": True, "split": "punctuation", "min_count": 3, "eos": False}
    austen = data.load({"type": "austen3", "tokenizer": tokenizer})
    assert isinstance(austen, data.TextData)
    train, valid = austen.train.tokens, austen.valid.tokens
    bigram, trigram = ngram_perplexities(train, valid, 2, vocab_size=austen.tokenizer.vocab_size)
    assert [bigram, trigram] == pytest.approx([114.52, 97.16], abs=0.01)
    bits = ngram_bits(train, valid, 2)
    assert [2**value for value in bits[1:]] == pytest.approx([120.88, 120.41], abs=0.01)
