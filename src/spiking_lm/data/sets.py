"""What a dataset is, before and after tokenization."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spiking_lm.data.sampling import pad_batch
from spiking_lm.data.sources import TextSource
from spiking_lm.data.tokenizers import Tokenizer, Tokens

SPLITS = ("train", "valid", "test")


def splits_to_learn_from(tokenizer_config: dict[str, Any]) -> tuple[str, ...]:
    """Return the splits whose text a tokenizer sees: train, or with the option ``vocab_from: all`` all of them."""
    return SPLITS if tokenizer_config.get("vocab_from") == "all" else SPLITS[:1]


@dataclass(frozen=True)
class TextCorpus:
    """What the factory of a text dataset returns: three texts."""

    train: TextSource
    valid: TextSource
    test: TextSource


@dataclass(frozen=True)
class TokenCorpus:
    """What the factory of an already tokenized dataset returns: three arrays of ids, memory-mapped or not."""

    train: Tokens
    valid: Tokens
    test: Tokens
    sha256: str


@dataclass(frozen=True)
class Example:
    """A labelled text; ``label`` indexes the set's ``labels``, or is a number that is to be predicted itself."""

    text: str
    label: float


@dataclass(frozen=True)
class LabelledCorpus:
    """What the factory of a classification dataset returns."""

    labels: list[str]
    """Names of the classes; a single one is the name of the number that is to be predicted (regression)."""
    train: list[Example]
    valid: list[Example]
    test: list[Example]
    """May be empty when the published test set has no labels."""


class Pair(NamedTuple):
    """A text, and what is to be written when it was read."""

    source: str
    target: str


@dataclass(frozen=True)
class PairCorpus:
    """What the factory of a dataset of pairs returns."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


@dataclass(frozen=True)
class TokenSplit:
    """One split of a tokenized text, and how much text its tokens stand for."""

    tokens: Tokens
    n_bytes: int
    """UTF-8 bytes of the text: what bits per byte divide by, whatever the tokenizer."""
    n_chars: int
    sha256: str = ""
    """Of the text."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TextData:
    """A tokenized corpus, ready for training and evaluation."""

    name: str
    tokenizer: Tokenizer
    train: TokenSplit
    valid: TokenSplit
    test: TokenSplit
    sha256: str
    """Identity of the three texts and of the tokenizer."""

    def describe(self) -> dict[str, Any]:
        """Return the JSON-able summary that manifests and reports show."""
        splits = {name: getattr(self, name) for name in SPLITS}
        return {
            "dataset": self.name,
            "task": "text",
            "sha256": self.sha256,
            "tokenizer": describe_tokenizer(self.tokenizer),
            "splits": {
                name: {"tokens": len(split), "bytes": split.n_bytes, "chars": split.n_chars, "sha256": split.sha256}
                for name, split in splits.items()
            },
        }


@dataclass(frozen=True)
class LabelledData:
    """A labelled set and the tokenizer to read it with."""

    name: str
    tokenizer: Tokenizer
    labels: list[str]
    train: list[Example] = field(repr=False)
    valid: list[Example] = field(repr=False)
    test: list[Example] = field(repr=False)
    sha256: str
    """Identity of the examples, their order and the tokenizer."""

    @property
    def regression(self) -> bool:
        """Whether labels are numbers to be predicted, not classes."""
        return len(self.labels) == 1

    def length(self, example: Example) -> int:
        """Return about how long an example is, for batches of examples of similar length."""
        return len(example.text)

    def batch(self, examples: Sequence[Example], limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return token ids padded on the right, ``(B, S)``, and true lengths ``(B,)``, at most ``limit``.

        A text that is too long is cut; what the tokenizer puts ``around`` it stays.
        """
        before, after = (np.array(ids, np.int64) for ids in self.tokenizer.around)
        room = max(0, limit - len(before) - len(after))
        encoded = [np.concatenate([before, self.tokenizer.encode(e.text)[:room], after])[:limit] for e in examples]
        return pad_batch(encoded, self.tokenizer.pad_id)

    def describe(self) -> dict[str, Any]:
        """Return the JSON-able summary that manifests and reports show."""
        return {
            "dataset": self.name,
            "task": "regression" if self.regression else "classification",
            "sha256": self.sha256,
            "tokenizer": describe_tokenizer(self.tokenizer),
            "labels": self.labels,
            "splits": {name: self._describe_split(getattr(self, name)) for name in SPLITS},
        }

    def _describe_split(self, examples: list[Example]) -> dict[str, Any]:
        given = [example.label for example in examples]
        if self.regression:
            return {"examples": len(given), "range": [min(given), max(given)] if given else None}
        return {"examples": len(given), "per_label": [given.count(i) for i in range(len(self.labels))]}


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what manifests say of a tokenizer."""
    return {"type": tokenizer.type, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}


def joint_hash(*parts: str) -> str:
    """Return one SHA-256 for several."""
    return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()
