"""Pairs of a source and a target: users' own files, and what a model of pairs reads and writes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spiking_lm.data.configs import PairsConfig
from spiking_lm.data.sampling import pad_batch
from spiking_lm.data.sets import (
    SPLITS,
    Pair,
    PairCorpus,
    describe_tokenizer,
    joint_hash,
    splits_to_learn_from,
)
from spiking_lm.data.sources import fill_splits, find_splits, read_lines
from spiking_lm.data.tokenizers import Tokenizer, Tokens, create_tokenizer
from spiking_lm.errors import ConfigError, DataError

_COLUMNS = ("source", "target")
_LAYOUT = (
    "one file, or train.jsonl, valid.jsonl and test.jsonl (or .tsv with the header 'source<TAB>target') in a folder"
)


def pairs(config: PairsConfig) -> PairCorpus:
    """Read any pairs: JSON lines or a table with ``source`` and ``target``; one file, or train, valid, test files."""
    path = config.path.expanduser()
    train_file, *others = find_splits(path, "pairs", ("jsonl", "tsv"), _LAYOUT)
    valid, test = (None if file is None else _read(file) for file in others)
    train, valid, test = fill_splits(_read(train_file), valid, test, (config.valid, config.test), _hold_out)
    if not (train and valid and test):
        n = len(train) + len(valid) + len(test)
        raise DataError(
            f"the {n} pairs in {path} are too few to be divided", hint="give valid and test files beside it"
        )
    return PairCorpus(train, valid, test)


def _read(file: Path) -> list[Pair]:
    """Read a file of pairs. Raises DataError naming the line that holds none."""
    lines = [(number, line) for number, line in enumerate(read_lines(file), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file} is empty")
    rows = _objects(file, lines) if lines[0][1].lstrip().startswith("{") else _table(file, lines)
    found = []
    for number, values in rows:
        for name, value in zip(_COLUMNS, values, strict=True):
            if not value:
                raise DataError(f"{file}, line {number}: the {name} is empty", hint="leave such pairs out")
        found.append(Pair(*values))
    if not found:
        raise DataError(f"{file} holds no pairs")
    return found


def _objects(file: Path, lines: Sequence[tuple[int, str]]) -> list[tuple[int, list[str]]]:
    rows = []
    for number, line in lines:
        try:
            content = json.loads(line)
        except json.JSONDecodeError as err:
            raise DataError(f"{file}, line {number}: not JSON: {err}", hint="one JSON object a line") from None
        if not isinstance(content, dict):
            raise DataError(
                f"{file}, line {number}: not a JSON object", hint='write {"source": "...", "target": "..."}'
            )
        for name in _COLUMNS:
            if not isinstance(content.get(name), str):
                problem = f"no {name!r}" if name not in content else f"{name!r} is no text"
                fields = ", ".join(map(repr, content)) or "none"
                raise DataError(f"{file}, line {number}: {problem}; the fields are {fields}", hint="rename the field")
        rows.append((number, [content[name].strip() for name in _COLUMNS]))
    return rows


def _table(file: Path, lines: Sequence[tuple[int, str]]) -> list[tuple[int, list[str]]]:
    header = [name.strip().lower() for name in lines[0][1].split("\t")]
    for name in _COLUMNS:
        if name not in header:
            raise DataError(
                f"{file} has no column {name!r}; its columns are {', '.join(map(repr, header))}",
                hint="put 'source<TAB>target' above the pairs",
            )
    places = [header.index(name) for name in _COLUMNS]
    rows = []
    for number, line in lines[1:]:
        cells = line.split("\t")
        if len(cells) != len(header):
            raise DataError(f"{file}, line {number}: {len(cells)} columns, the header has {len(header)}")
        rows.append((number, [cells[place].strip() for place in places]))
    return rows


def _hold_out(found: list[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Return (what stays, what is held out): a function of the sources alone, the pairs of one staying together."""
    sources = sorted({pair.source for pair in found}, key=lambda source: hashlib.sha256(source.encode()).digest())
    held = set(sources[: max(1, round(share * len(sources)))])
    return [pair for pair in found if pair.source not in held], [pair for pair in found if pair.source in held]


# -- as tokens ---------------------------------------------------------------------------------------------------------


class EncodedPair(NamedTuple):
    """A pair, and its tokens."""

    pair: Pair
    source: Tokens
    """With what the tokenizer puts around a text."""
    target: Tokens
    """With the token that ends a target before and behind it."""


class PairBatch(NamedTuple):
    """Pairs as a model of them reads them, padded on the right."""

    source: NDArray[np.int64]
    """``(B, S)``"""
    lengths: NDArray[np.int64]
    """``(B,)``"""
    target: NDArray[np.int64]
    """``(B, N + 1)``: each token but the last is read, each but the first predicted."""
    target_lengths: NDArray[np.int64]
    """``(B,)``: of what is predicted, N at most."""


@dataclass(frozen=True)
class PairData:
    """A set of pairs and the tokenizer of both their sides."""

    name: str
    tokenizer: Tokenizer
    train: list[EncodedPair] = field(repr=False)
    valid: list[EncodedPair] = field(repr=False)
    test: list[EncodedPair] = field(repr=False)
    end_id: int
    """The token that a target begins with, and that ends it."""
    sha256: str
    """Identity of the pairs, their order and the tokenizer."""

    def batch(self, chosen: Sequence[EncodedPair]) -> PairBatch:
        """Return pairs as one padded batch."""
        source, lengths = pad_batch([pair.source for pair in chosen], self.tokenizer.pad_id)
        target, ends = pad_batch([pair.target for pair in chosen], self.tokenizer.pad_id)
        return PairBatch(source, lengths, target, ends - 1)

    def describe(self) -> dict[str, Any]:
        """Return the JSON-able summary that manifests and reports show."""
        return {
            "dataset": self.name,
            "task": "pairs",
            "sha256": self.sha256,
            "tokenizer": describe_tokenizer(self.tokenizer),
            "splits": {
                name: {
                    "pairs": len(split),
                    "source_tokens": sum(len(pair.source) for pair in split),
                    "target_tokens": sum(len(pair.target) - 1 for pair in split),
                }
                for name, split in ((name, getattr(self, name)) for name in SPLITS)
            },
        }


def end_token(tokenizer: Tokenizer) -> int:
    """Return the token that ends a target, and that its first token is predicted from.

    It is the tokenizer's own end of a text; else the last token that it puts behind one (``[SEP]``); else its line end.
    Raises: ConfigError for a tokenizer without any of them.
    """
    if tokenizer.eos_id is not None:
        return tokenizer.eos_id
    if tokenizer.around[1]:
        return tokenizer.around[1][-1]
    line_end = tokenizer.encode("\n").tolist()
    if len(line_end) == 1 and line_end[0] != tokenizer.unk_id:
        return int(line_end[0])
    raise ConfigError(
        f"the {tokenizer.type} tokenizer has no token that could end a target",
        hint="word has one with eos: true; byte and bpe take the line end",
    )


def encode_source(tokenizer: Tokenizer, text: str) -> Tokens:
    """Return the tokens of a source. Raises DataError for one without any."""
    before, after = tokenizer.around
    ids = tokenizer.encode(text)
    if len(ids) == 0:
        raise DataError("the source is empty", hint="give at least a word")
    return np.concatenate([np.array(before, ids.dtype), ids, np.array(after, ids.dtype)])


def encode_pairs(name: str, corpus: PairCorpus, choice: dict[str, Any]) -> PairData:
    """Make a tokenizer, of both sides' training text where it learns from one, and encode the pairs with it.

    Raises: what a tokenizer raises; DataError naming the pair that has no tokens or holds the end of a target.
    """
    texts = (
        f"{pair.source}\n{pair.target}\n" for split in splits_to_learn_from(choice) for pair in getattr(corpus, split)
    )
    tokenizer = create_tokenizer(choice, texts, where=f"dataset {name!r}, tokenizer")
    end = end_token(tokenizer)

    def encoded(split: str) -> list[EncodedPair]:
        rows = []
        for number, pair in enumerate(getattr(corpus, split), 1):
            where = f"dataset {name!r}, pair {number} of {split}"
            target = tokenizer.encode(pair.target)
            if len(target) == 0 or not pair.source.strip():
                raise DataError(f"{where}: the {'target' if pair.source.strip() else 'source'} is empty")
            if bool((target == end).any()):
                raise DataError(
                    f"{where}: the target holds {tokenizer.decode([end])!r}, with which a target ends",
                    hint="write a target in one line",
                )
            framed = np.concatenate([[end], target, [end]]).astype(target.dtype)
            rows.append(EncodedPair(pair, encode_source(tokenizer, pair.source), framed))
        return rows

    digest = joint_hash(json.dumps([getattr(corpus, split) for split in SPLITS]), tokenizer.sha256)
    return PairData(name, tokenizer, encoded("train"), encoded("valid"), encoded("test"), end, digest)
