"""Text corpora: the embedded one, and users' own files in the layouts in which the usual ones are published."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spiking_lm.data.binidx import open_binidx
from spiking_lm.data.configs import EmbeddedConfig, PathConfig, SplitConfig, WikiTextConfig
from spiking_lm.data.sets import SPLITS, TextCorpus, TokenCorpus, joint_hash
from spiking_lm.data.sources import (
    TextSource,
    char_border,
    find_one,
    find_optional,
    line_border,
    size_of,
    split_names,
    text_start,
)
from spiking_lm.errors import DataError

EMBEDDED = Path(__file__).parent / "embedded"
HUTTER_SIZE, HUTTER_VALID, HUTTER_TEST = 100_000_000, 90_000_000, 95_000_000


def austen3(config: EmbeddedConfig) -> TextCorpus:
    """Three novels by Jane Austen, 1.6 MB for training; the splits are the first 90, next 5 and last 5 % of each."""
    return _from_files([EMBEDDED / f"austen3.{split}.txt.xz" for split in SPLITS])


def wikitext(config: WikiTextConfig) -> TextCorpus:
    """WikiText-2 or WikiText-103 as published: wiki.{train,valid,test}.tokens (with <unk>) or .raw."""
    layout = "wiki.{train,valid,test}.tokens or wiki.{train,valid,test}.raw in one folder"
    folder = config.path.expanduser()
    forms = [config.form] if config.form else ["tokens", "raw"]
    present = [form for form in forms if find_optional([folder / f"wiki.train.{form}"])]
    if len(present) > 1:
        raise DataError(
            f"{folder} holds WikiText both as tokens and raw, and their scores are not comparable",
            hint="choose with the option form: tokens or form: raw",
        )
    form = present[0] if present else forms[0]
    names = [[folder / f"wiki.{split}.{kind}" for kind in ([form] if present else forms)] for split in SPLITS]
    return _from_files([find_one(candidates, "WikiText", layout) for candidates in names])


def ptb(config: PathConfig) -> TextCorpus:
    """Penn Treebank in Mikolov's form: ptb.{train,valid,test}.txt."""
    layout = "ptb.train.txt, ptb.valid.txt and ptb.test.txt in one folder"
    folder = config.path.expanduser()
    return _from_files([find_one([folder / f"ptb.{split}.txt"], "Penn Treebank", layout) for split in SPLITS])


def enwik8(config: PathConfig) -> TextCorpus:
    """The first 100,000,000 bytes of a Wikipedia dump, cut at 90 and 95 million bytes as everyone does.

    A cut inside a character is moved to before it.
    """
    return _hutter(config.path, "enwik8")


def text8(config: PathConfig) -> TextCorpus:
    """The 100,000,000 letters and spaces made from enwik8, cut at 90 and 95 million."""
    return _hutter(config.path, "text8")


def _hutter(path: Path, name: str) -> TextCorpus:
    path = path.expanduser()
    layout = f"the file {name} of exactly {HUTTER_SIZE:,} bytes, plain or as .zip, .xz, .gz or .bz2, or its folder"
    if not path.is_file():
        path = find_one([path / name, path / f"{name}.zip", path], name, layout)
    size = size_of(path)
    if size != HUTTER_SIZE:
        raise DataError(
            f"{path} has {size:,} bytes, {name} has {HUTTER_SIZE:,}",
            hint="read a part of it, or another text, as dataset type 'text'; its scores are not enwik8's or text8's",
        )
    ends = [0, *(char_border(path, end) for end in (HUTTER_VALID, HUTTER_TEST, HUTTER_SIZE))]
    return _cut(path, ends)


def text(config: SplitConfig) -> TextCorpus:
    """Any text: one file, cut by shares; a folder with train, valid and test .txt; or ``path``.train.txt and so on."""
    path = config.path.expanduser()
    if not path.is_file():
        layout = "one text file, a folder with {train,valid,test}.txt, or the NAME of NAME.{train,valid,test}.txt"
        return _from_files([find_one(split_names(path, split, ("txt",)), "text corpus", layout) for split in SPLITS])
    start, size = text_start(path), size_of(path)
    whole = size - start
    ends = [start]
    for share in (1 - config.valid - config.test, 1 - config.test):
        ends.append(max(ends[-1], line_border(path, start + round(share * whole), size)))
    ends.append(size)
    if any(a == b for a, b in itertools.pairwise(ends)):
        raise DataError(
            f"{path} has {whole:,} bytes of text, too little to be cut into training, validation and test text",
            hint="use a longer text, larger shares (valid, test), or give the three texts as files of one folder",
        )
    return _cut(path, ends)


def binidx(config: SplitConfig) -> TokenCorpus:
    """Tokens in Megatron's indexed format, PREFIX.bin and PREFIX.idx, read as one stream and cut by shares."""
    data = open_binidx(config.path.expanduser())
    n = len(data.tokens)
    borders = [round((1 - config.valid - config.test) * n), round((1 - config.test) * n)]
    train, valid, test = np.split(data.tokens, borders)
    if not (len(train) and len(valid) and len(test)):
        raise DataError(f"{data.path} has {n} tokens, too few to be cut into training, validation and test tokens")
    return TokenCorpus(train, valid, test, joint_hash(data.sha256, *map(str, borders)))


def _from_files(paths: Sequence[Path]) -> TextCorpus:
    train, valid, test = (TextSource.of_file(path, text_start(path)) for path in paths)
    return TextCorpus(train, valid, test)


def _cut(path: Path, ends: Sequence[int]) -> TextCorpus:
    train, valid, test = (TextSource.of_file(path, a, b) for a, b in itertools.pairwise(ends))
    return TextCorpus(train, valid, test)
