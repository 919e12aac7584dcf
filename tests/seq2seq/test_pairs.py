"""Pairs: files and their errors, splits, tokens, the rules that make the embedded ones, and ROUGE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_lm import data
from spiking_lm.data.made_pairs import to_conlang, to_telegram
from spiking_lm.errors import ConfigError, DataError
from spiking_lm.sequences import compare_texts, rouge_l, rouge_n, rouge_words

ROWS = [(f"source {i} of many", f"target {i}") for i in range(40)]


def jsonl(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "source": s, "target": t}) + "\n" for s, t in rows), encoding="utf-8")
    return path


def tsv(path: Path, rows: list[tuple[str, str]], header: str = "target\tsource") -> Path:
    path.write_text(header + "\n" + "".join(f"{t}\t{s}\n" for s, t in rows), encoding="utf-8")
    return path


def load(path: Path, tokenizer: dict[str, Any] | None = None, **options: Any) -> data.PairData:
    found = data.load({"type": "pairs", "path": str(path), **options, "tokenizer": tokenizer or {"type": "byte"}})
    assert isinstance(found, data.PairData)
    return found


def plain(split: list[data.EncodedPair]) -> list[tuple[str, str]]:
    return [(row.pair.source, row.pair.target) for row in split]


def test_one_file_is_divided_by_its_sources_alone(tmp_path: Path) -> None:
    again = [*ROWS, ("source 3 of many", "another target")]
    one = load(jsonl(tmp_path / "a.jsonl", again), valid=0.2, test=0.1)
    two = load(tsv(tmp_path / "b.tsv", again[::-1]), valid=0.2, test=0.1)
    for split in ("train", "valid", "test"):
        assert sorted(plain(getattr(one, split))) == sorted(plain(getattr(two, split)))
    parts = [{source for source, _ in plain(getattr(one, split))} for split in ("train", "valid", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40
    assert [len(part) for part in parts] == [29, 7, 4]
    assert one.sha256 != two.sha256  # the order is part of what a run learns from


def test_files_of_a_folder_are_the_splits(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS[:30])
    tsv(tmp_path / "dev.tsv", ROWS[30:35])
    found = load(tmp_path)
    assert plain(found.valid) == ROWS[30:35]
    assert sorted(plain(found.train) + plain(found.test)) == sorted(ROWS[:30])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"source": "a", "summary": "b"}\n', r"line 1: no 'target'; the fields are 'source', 'summary'"),
        ('{"source": "a", "target": 3}\n', "'target' is no text"),
        ('{"source": "a", "target": "b"}\n{"source": "a"\n', "line 2: not JSON"),
        ('{"source": "a", "target": "b"}\n[1]\n', "line 2: not a JSON object"),
        ('{"source": " ", "target": "b"}\n', "line 1: the source is empty"),
        ("source\ttarget\na\tb\nc\t\n", "line 3: the target is empty"),
        ("source\tsummary\na\tb\n", r"no column 'target'; its columns are 'source', 'summary'"),
        ("source\ttarget\na\tb\tc\n", "line 2: 3 columns, the header has 2"),
        ("source\ttarget\n", "holds no pairs"),
        ("source\ttarget\na\tb\n", "too few to be divided"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load(path)


def test_a_folder_without_pairs_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, train\.tsv"):
        load(tmp_path)


def test_targets_begin_and_end_with_one_token(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    word = {"type": "word", "split": "punctuation"}
    for tokenizer in ({"type": "byte"}, {"type": "char"}, {"type": "bpe", "vocab_size": 300}, word):
        found = load(path, tokenizer)
        batch = found.batch(found.train[:5])
        for row, pair in enumerate(found.train[:5]):
            n = int(batch.target_lengths[row])
            assert batch.target[row, 0] == batch.target[row, n] == found.end_id
            assert (batch.target[row, 1:n] != found.end_id).all()
            assert found.tokenizer.decode(batch.target[row, 1:n]) == pair.pair.target
            assert found.tokenizer.decode(batch.source[row, : batch.lengths[row]]) == pair.pair.source
    with pytest.raises(ConfigError, match="no token that could end a target"):
        load(path, {**word, "eos": False})
    two_lines = jsonl(tmp_path / "b.jsonl", [*ROWS, ("a", "b\nc")])
    with pytest.raises(DataError, match=r"pair \d+ of .*: the target holds '\\n', with which a target ends"):
        load(two_lines)


# -- the embedded ones -------------------------------------------------------------------------------------------------


def test_the_rules_are_those_that_are_stated() -> None:
    sentence = "in the garden of the house she walked slowly, without kindness to him."
    assert to_conlang(sentence) == "garden la en house la de si walkita slowe, kindeco sen lin al."
    assert to_conlang("of, the") == "de, la"
    assert to_telegram("i did not expect to receive more than my due.") == "not expect receive due"
    assert to_telegram("it was so!") == ""


@pytest.mark.parametrize(("name", "make"), [("austen-conlang", to_conlang), ("austen-telegram", to_telegram)])
def test_the_embedded_pairs_are_a_function_of_the_novels(name: str, make: Any) -> None:
    found = data.load({"type": name})
    assert isinstance(found, data.PairData)
    parts = {split: plain(getattr(found, split)) for split in ("train", "valid", "test")}
    for rows in parts.values():
        assert all(make(source) == target != source for source, target in rows)
        assert len(rows) == len(set(rows))
    known = {source for source, _ in parts["train"]}
    assert not known & {source for split in ("valid", "test") for source, _ in parts[split]}
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
    assert row.endswith("| " + " / ".join(str(len(rows)) for rows in parts.values()) + " |")


# -- ROUGE -------------------------------------------------------------------------------------------------------------


def test_rouge_of_examples_counted_by_hand() -> None:
    written, target = "the cat was found under the bed", "The cat was under the bed."
    assert rouge_n(written, target, 1) == pytest.approx(2 * 6 / (7 + 6))
    assert rouge_n(written, target, 2) == pytest.approx(2 * 4 / (6 + 5))
    assert rouge_l(written, target) == pytest.approx(2 * 6 / (7 + 6))
    assert rouge_l("bed the under was", "was under the bed") == pytest.approx(2 * 1 / 8)
    assert rouge_n("a a a", "a", 1) == pytest.approx(2 * 1 / 4)
    assert rouge_n("one", "one", 2) == 0.0
    found = compare_texts(["a b", "c"], ["a  b", "d"])
    assert found == {"exact_match": 0.5, "rouge_1": 0.5, "rouge_2": 0.5, "rouge_l": 0.5}


words = st.lists(st.sampled_from("abcd"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(words, words)
def test_rouge_l_is_the_longest_common_subsequence(ours: list[str], theirs: list[str]) -> None:
    def longest(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        return int(table[-1, -1])

    a, b = " ".join(ours), " ".join(theirs)
    shared = longest(ours, theirs)
    assert rouge_l(a, b) == pytest.approx(2 * shared / (len(ours) + len(theirs)) if shared else 0.0)
    assert rouge_l(a, b) <= rouge_n(a, b, 1) + 1e-12
    assert rouge_n(a, b, 2) == rouge_n(b, a, 2)
    assert rouge_words(a.upper()) == ours
