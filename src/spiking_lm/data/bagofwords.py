"""What counting words alone achieves in classification: the floor that a model of sentences must beat."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

C = 10.0
"""The inverse penalty of the regression, the best or nearly so on the validation part of the sets tried."""

_WORD = re.compile(r"\b\w\w+\b")


class _Bags(NamedTuple):
    """Texts as weighted sets of terms; text i has the terms from ``offsets[i]`` to ``offsets[i + 1]``."""

    terms: Tensor
    offsets: Tensor
    weights: Tensor

    def scores(self, weight: Tensor) -> Tensor:
        """Return the sums of the rows of ``weight (V, C)``, one per text, ``(N, C)``."""
        return F.embedding_bag(
            self.terms, weight, self.offsets, mode="sum", per_sample_weights=self.weights, include_last_offset=True
        )


def bag_of_words(train: Sequence[str], labels: Sequence[int], texts: Sequence[str], num_classes: int) -> Tensor:
    """Return class logits ``(len(texts), num_classes)``, float64, of a logistic regression on tf-idf.

    Terms are words of two letters or more and pairs of neighbours, in lower case, if more than one text has them. A
    text is its terms' counts times log((1 + n) / (1 + texts with the term)) + 1, of Euclidean length 1. The regression
    minimises C times the summed cross-entropy and half the square of its weights, by L-BFGS from zero, so that the same
    texts give the same answer.
    """
    counted = [_terms(text) for text in train]
    seen = Counter(term for terms in counted for term in terms)
    vocabulary = {term: i for i, term in enumerate(t for t, n in seen.items() if n > 1)}
    idf = np.array([np.log((1 + len(train)) / (1 + seen[term])) + 1 for term in vocabulary])
    known = _bags(counted, vocabulary, idf)
    weight = torch.zeros(max(1, len(vocabulary)), num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(labels)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(known.scores(weight) + bias, target) + weight.square().sum() / (2 * C * len(train))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return _bags([_terms(text) for text in texts], vocabulary, idf).scores(weight) + bias


def _terms(text: str) -> Counter[str]:
    words = _WORD.findall(text.lower())
    return Counter([*words, *map(" ".join, itertools.pairwise(words))])


def _bags(counted: Sequence[Counter[str]], vocabulary: dict[str, int], idf: NDArray[np.float64]) -> _Bags:
    terms, weights, offsets = [], [], [0]
    for counts in counted:
        known = np.array([vocabulary[term] for term in counts if term in vocabulary], np.int64)
        weight = np.array([n for term, n in counts.items() if term in vocabulary], np.float64) * idf[known]
        terms.append(known)
        weights.append(weight / max(float(np.linalg.norm(weight)), 1e-12))
        offsets.append(offsets[-1] + len(known))
    return _Bags(*(torch.from_numpy(np.concatenate(part)) for part in (terms, [offsets], weights)))
