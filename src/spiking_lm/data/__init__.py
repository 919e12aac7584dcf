"""Texts, labelled sets, pairs, clips, tokenizers, token files. Importing it imports no torch and no ``tokenizers``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from spiking_lm.config import parse_config
from spiking_lm.data.clips import Clip, ClipData
from spiking_lm.data.pairs import EncodedPair, PairData, encode_pairs
from spiking_lm.data.sampling import epoch_order, gather, pad_batch, sample_offsets
from spiking_lm.data.sets import (
    SPLITS,
    Example,
    LabelledCorpus,
    LabelledData,
    Pair,
    PairCorpus,
    TextCorpus,
    TextData,
    TokenCorpus,
    TokenSplit,
    joint_hash,
    splits_to_learn_from,
)
from spiking_lm.data.sources import Progress, TextSource
from spiking_lm.data.tokenfile import open_tokens, tokenize, write_tokens
from spiking_lm.data.tokenizers import (
    StreamDecoder,
    Tokenizer,
    Tokens,
    create_tokenizer,
    load_tokenizer,
    stream_decoder,
)
from spiking_lm.errors import ConfigError, DataError, PluginError

__all__ = [
    "Clip",
    "ClipData",
    "Data",
    "EncodedPair",
    "Example",
    "LabelledCorpus",
    "LabelledData",
    "Pair",
    "PairCorpus",
    "PairData",
    "StreamDecoder",
    "TextCorpus",
    "TextData",
    "TextSource",
    "TokenCorpus",
    "TokenSplit",
    "Tokenizer",
    "create_tokenizer",
    "epoch_order",
    "gather",
    "load",
    "load_tokenizer",
    "open_tokens",
    "pad_batch",
    "sample_offsets",
    "stream_decoder",
    "write_tokens",
]


Data = TextData | LabelledData | PairData | ClipData
"""What a recipe's ``data`` can be."""


def load(config: dict[str, Any], *, cache_dir: Path | None = None, progress: Progress | None = None) -> Data:
    """Load a dataset as a recipe's ``data`` mapping describes it: ``type``, its options, and for text ``tokenizer``.

    Parameters: ``progress`` is called with (bytes done, bytes in all) while a large text is tokenized.

    Raises: UnknownNameError, ConfigError (names the field), DataError (names the file), MissingExtraError.
    """
    from spiking_lm import registry

    values = dict(config)
    name = values.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError("data: a dataset has a type", hint=f"one of: {', '.join(registry.all('datasets'))}")
    choice = values.pop("tokenizer", {"type": "byte"})
    if not isinstance(choice, dict):
        raise ConfigError(f"data.tokenizer is {choice!r}", hint="write it as tokenizer: {type: byte}")
    entry = registry.get("datasets", name)
    parsed = parse_config(entry.load("config"), values, where=f"dataset {name!r}")
    if entry.spec.task == "clips" and "tokenizer" in config:
        raise ConfigError(f"dataset {name!r} holds clips of events, which have no tokenizer", hint="leave it out")
    corpus = entry.load("factory")(parsed)
    if isinstance(corpus, ClipData):
        return dataclasses.replace(corpus, name=name)
    if isinstance(corpus, LabelledCorpus):
        return _load_labelled(name, corpus, choice)
    if isinstance(corpus, PairCorpus):
        return encode_pairs(name, corpus, choice)
    if isinstance(corpus, TokenCorpus):
        return _load_tokens(name, corpus, choice, given="tokenizer" in config)
    if not isinstance(corpus, TextCorpus):
        raise PluginError(
            f"dataset {name!r} returned a {type(corpus).__name__}",
            hint="a TextCorpus, TokenCorpus, LabelledCorpus, PairCorpus or ClipData of spiking_lm.data is needed",
        )
    for split in SPLITS:
        source: TextSource = getattr(corpus, split)
        if source.n_bytes == 0:
            raise DataError(f"dataset {name!r}: the {split} text ({source.name}) is empty")
    tokenizer, (train, valid, test) = tokenize(name, corpus, choice, cache_dir=cache_dir, progress=progress)
    digest = joint_hash(train.sha256, valid.sha256, test.sha256, tokenizer.sha256)
    return TextData(name, tokenizer, train, valid, test, digest)


def _load_labelled(name: str, corpus: LabelledCorpus, choice: dict[str, Any]) -> LabelledData:
    texts = (f"{example.text}\n" for split in splits_to_learn_from(choice) for example in getattr(corpus, split))
    tokenizer = create_tokenizer(choice, texts, where=f"dataset {name!r}, tokenizer")
    splits = [corpus.train, corpus.valid, corpus.test]
    content = [[[example.label, example.text] for example in split] for split in splits]
    digest = joint_hash(json.dumps([corpus.labels, content]), tokenizer.sha256)
    return LabelledData(name, tokenizer, corpus.labels, corpus.train, corpus.valid, corpus.test, digest)


def _load_tokens(name: str, corpus: TokenCorpus, choice: dict[str, Any], *, given: bool) -> TextData:
    if not given:
        raise ConfigError(
            f"dataset {name!r} holds tokens, and which tokenizer made them is not written in it",
            hint="name it, e.g. tokenizer: {type: file, path: 20B_tokenizer.json}",
        )
    tokenizer = create_tokenizer(choice, where=f"dataset {name!r}, tokenizer")
    train, valid, test = (_measure(getattr(corpus, split), tokenizer, f"dataset {name!r}, {split}") for split in SPLITS)
    return TextData(name, tokenizer, train, valid, test, joint_hash(corpus.sha256, tokenizer.sha256))


def _measure(tokens: Tokens, tokenizer: Tokenizer, where: str) -> TokenSplit:
    """Find how much text tokens stand for, a million tokens at a time, and check that the tokenizer knows them all."""
    n_bytes = n_chars = 0
    sizes: np.ndarray[Any, np.dtype[np.int64]] | None = None
    if tokenizer.bytes_add_up:
        texts = [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)]
        sizes = np.array([(len(text), sum(byte & 0xC0 != 0x80 for byte in text)) for text in texts], np.int64)
    for start in range(0, len(tokens), 1 << 20):
        part = tokens[start : start + (1 << 20)]
        if int(part.min()) < 0 or int(part.max()) >= tokenizer.vocab_size:
            raise DataError(
                f"{where}: token {int(part.max())} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}",
                hint="name the tokenizer that made these tokens",
            )
        if sizes is not None:
            part_bytes, part_chars = sizes[part].sum(0)
            n_bytes, n_chars = n_bytes + int(part_bytes), n_chars + int(part_chars)
        else:
            text = tokenizer.decode(part)
            n_bytes, n_chars = n_bytes + len(text.encode("utf-8")), n_chars + len(text)
    return TokenSplit(tokens, n_bytes, n_chars)
