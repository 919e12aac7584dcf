"""The bag of words: it is the regression that it says it is, and the floor that the documentation states."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_lm import data
from spiking_lm.data.bagofwords import C, bag_of_words

WORDS = ["sea", "whale", "ship", "ball", "letter", "sister", "a", "nation", "congress", "the"]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join), min_size=2, max_size=12)


def accuracy(corpus: data.LabelledData, split: str) -> float:
    examples = getattr(corpus, split)
    texts, labels = [e.text for e in corpus.train], [e.label for e in corpus.train]
    logits = bag_of_words(texts, labels, [e.text for e in examples], len(corpus.labels))
    return float((logits.argmax(-1) == torch.tensor([e.label for e in examples])).double().mean())


def features(train: list[str]) -> np.ndarray:
    """The same features, spelled out densely."""
    bags = []
    for text in train:
        words = [word for word in text.lower().split() if len(word) > 1]
        bags.append(Counter(words + [f"{a} {b}" for a, b in itertools.pairwise(words)]))
    known = sorted(term for term in set().union(*bags) if sum(term in bag for bag in bags) > 1)
    x = np.zeros((len(train), len(known)))
    for row, bag in enumerate(bags):
        for column, term in enumerate(known):
            x[row, column] = bag[term] * (math.log((1 + len(train)) / (1 + sum(term in b for b in bags))) + 1)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@settings(max_examples=25, deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_it_is_the_minimum_of_what_it_minimises(train: list[str], rng: random.Random) -> None:
    labels = [rng.randrange(3) for _ in train]
    logits = bag_of_words(train, labels, train, 3).numpy()
    # At the minimum w = C X^T (Y - P) and the residuals of each class sum to 0, so the logits follow from themselves.
    p = np.exp(logits - logits.max(1, keepdims=True))
    residual = np.eye(3)[labels] - p / p.sum(1, keepdims=True)
    x = features(train)
    offsets = logits - C * x @ (x.T @ residual)
    np.testing.assert_allclose(residual.sum(0), 0, atol=1e-3)
    np.testing.assert_allclose(offsets - offsets.mean(0), 0, atol=2e-2)


def test_texts_of_unknown_words_get_the_classes_of_the_training_set() -> None:
    (logits,) = bag_of_words(3 * ["white whale"], [0, 0, 1], ["quite unheard"], 2)
    assert logits[0] > logits[1]
    assert torch.isfinite(bag_of_words(["a", "b"], [0, 1], [""], 2)).all(), "a set without a single term"


def test_who_wrote_it() -> None:
    corpus = data.load({"type": "authors4", "tokenizer": {"type": "byte"}})
    assert 0.87 < accuracy(corpus, "test") < 0.885
