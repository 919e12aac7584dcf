"""Text corpora in their published layouts, and what is said when they are not."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spiking_lm import data
from spiking_lm.data import TextData, TextSource, corpora, sources
from spiking_lm.data.binidx import DTYPES, open_binidx
from spiking_lm.errors import ConfigError, DataError


def load(**config: Any) -> TextData:
    loaded = data.load(config)
    assert isinstance(loaded, TextData)
    return loaded


def texts_of(loaded: TextData) -> list[str]:
    return [loaded.tokenizer.decode(getattr(loaded, split).tokens) for split in ("train", "valid", "test")]


def test_austen3_is_the_corpus_it_was_measured_on() -> None:
    austen = load(type="austen3", tokenizer={"type": "byte"})
    sizes = [len(split) for split in (austen.train, austen.valid, austen.test)]
    assert sizes == [1_611_611, 90_076, 87_992]
    assert austen.train.tokens.dtype == np.uint8
    assert texts_of(austen)[0].startswith("PRIDE AND PREJUDICE")
    assert austen.test.n_bytes == 87_992


@pytest.mark.parametrize("form", ["tokens", "raw"])
def test_wikitext(tmp_path: Path, form: str) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.{form}").write_text(f" = {split} é = \n <unk> @-@\n", encoding="utf-8")
    loaded = load(type="wikitext2", path=str(tmp_path))
    assert texts_of(loaded) == [f" = {split} é = \n <unk> @-@\n" for split in ("train", "valid", "test")]
    assert loaded.train.n_bytes == loaded.train.n_chars + 1
    assert load(type="wikitext103", path=str(tmp_path), form=form).train.sha256 == loaded.train.sha256


def test_wikitext_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looked for wiki\.train\.tokens, wiki\.train\.raw .* in ") as caught:
        load(type="wikitext2", path=str(tmp_path / "absent"))
    assert str(tmp_path / "absent") in caught.value.message
    assert "no such folder" in caught.value.message
    assert "wiki.{train,valid,test}.tokens" in (caught.value.hint or "")
    for form in ("tokens", "raw"):
        (tmp_path / f"wiki.train.{form}").write_text("x\n")
    with pytest.raises(DataError, match="both as tokens and raw"):
        load(type="wikitext2", path=str(tmp_path))
    with pytest.raises(DataError, match=r"looked for wiki\.valid\.tokens \(also"):
        load(type="wikitext2", path=str(tmp_path), form="tokens")


def test_wikitext2_validation_file(shared: Path, tmp_path: Path) -> None:
    original = shared / "data/research_only/wikitext2.valid.tokens.xz"
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens.xz").symlink_to(original)
    loaded = load(type="wikitext2", path=str(tmp_path))
    assert len(texts_of(loaded)[1].split()) + texts_of(loaded)[1].count("\n") == 217_646
    assert loaded.valid.n_bytes > loaded.valid.n_chars > 1_000_000


def test_ptb(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text(f" no it was n't {split} <unk> \n")
    assert texts_of(load(type="ptb", path=str(tmp_path)))[2] == " no it was n't test <unk> \n"
    (tmp_path / "ptb.test.txt").unlink()
    with pytest.raises(DataError, match=r"looked for ptb\.test\.txt"):
        load(type="ptb", path=str(tmp_path))


@pytest.fixture
def small_hutter(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """enwik8 in miniature: 1000 bytes cut at 900 and 950, with a three-byte character across each cut and the end."""
    monkeypatch.setattr(corpora, "HUTTER_SIZE", 1000)
    monkeypatch.setattr(corpora, "HUTTER_VALID", 900)
    monkeypatch.setattr(corpora, "HUTTER_TEST", 950)
    euro = "€".encode()
    return b"a" * 898 + euro + b"b" * 48 + euro + b"c" * 46 + euro[:2]


@pytest.mark.parametrize("name", ["enwik8", "text8"])
@pytest.mark.parametrize("packed", ["", ".xz", ".gz", ".bz2", ".zip"])
def test_enwik8_and_text8_are_cut_at_90_and_95_percent(
    tmp_path: Path, small_hutter: bytes, name: str, packed: str
) -> None:
    path = tmp_path / f"{name}{packed}"
    if packed == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, small_hutter)
    else:
        opener = {"": open, ".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}[packed]
        with opener(path, "wb") as file:
            file.write(small_hutter)
    for given in (path, tmp_path):
        loaded = load(type=name, path=str(given))
        assert texts_of(loaded) == ["a" * 898, "€" + "b" * 48, "€" + "c" * 46]
        assert [split.n_bytes for split in (loaded.train, loaded.valid, loaded.test)] == [898, 51, 49]


def test_a_cut_that_falls_between_characters_stays(tmp_path: Path, small_hutter: bytes) -> None:
    (tmp_path / "enwik8").write_bytes("é".encode() * 500)
    assert [len(text) for text in texts_of(load(type="enwik8", path=str(tmp_path)))] == [450, 25, 25]


def test_enwik8_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "enwik8").write_bytes(b"x" * 1234)
    with pytest.raises(DataError, match="has 1,234 bytes, enwik8 has 100,000,000") as caught:
        load(type="enwik8", path=str(tmp_path))
    assert "type 'text'" in (caught.value.hint or "")
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("a", "1")
        archive.writestr("b", "2")
    with pytest.raises(DataError, match="holds 2 files"):
        load(type="text8", path=str(tmp_path))
    (tmp_path / "text8.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="not a readable zip"):
        load(type="text8", path=str(tmp_path))


def test_text_file_is_cut_at_lines(tmp_path: Path) -> None:
    lines = [f"line {number} é\n" for number in range(100)]
    path = tmp_path / "book.txt"
    path.write_text("".join(lines), encoding="utf-8")
    loaded = load(type="text", path=str(path), valid=0.1, test=0.2)
    texts = texts_of(loaded)
    assert "".join(texts) == "".join(lines)
    assert all(text.endswith("\n") for text in texts)
    assert [text.count("\n") for text in texts] == pytest.approx([70, 10, 20], abs=1)
    for suffix, opener in ((".xz", lzma.open), (".gz", gzip.open), (".bz2", bz2.open)):
        packed = tmp_path / f"book.txt{suffix}"
        with opener(packed, "wt", encoding="utf-8") as file:
            file.write("".join(lines))
        assert texts_of(load(type="text", path=str(packed), valid=0.1, test=0.2)) == texts


def test_one_line_is_cut_at_words_or_else_at_characters(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("word " * 200)
    texts = texts_of(load(type="text", path=str(path)))
    assert "".join(texts) == "word " * 200
    assert all(text.endswith(" ") for text in texts)
    path.write_text("é" * 333, encoding="utf-8")
    texts = texts_of(load(type="text", path=str(path)))
    assert "".join(texts) == "é" * 333
    assert min(map(len, texts)) > 10


@pytest.mark.parametrize("content", ["", "a", "ab", "\n"])
def test_hardly_any_text_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tiny\.txt has \d bytes of text, too little"):
        load(type="text", path=str(path))


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"hello world\n" * 50)
    texts = texts_of(load(type="text", path=str(path)))
    assert texts[0].startswith("hello")
    assert "".join(texts) == "hello world\n" * 50


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("train", "dev", "test"), ("train", "val", "test")])
def test_text_in_three_files(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for name in names:
        (tmp_path / f"{name}.txt").write_bytes(f"text of {name}\r\nNUL \0 stays\r\n".encode())
    expected = [f"text of {name}\r\nNUL \0 stays\r\n" for name in names]
    assert texts_of(load(type="text", path=str(tmp_path))) == expected
    for name in names:
        with lzma.open(tmp_path / f"corpus.{name}.txt.xz", "wb") as file:
            file.write((tmp_path / f"{name}.txt").read_bytes())
    assert texts_of(load(type="text", path=str(tmp_path / "corpus"))) == expected


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("" if name == "valid" else "text\n")
    with pytest.raises(DataError, match=r"the valid text .*valid\.txt\) is empty"):
        load(type="text", path=str(tmp_path))


def test_text_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looked for train\.txt, nothing\.train\.txt"):
        load(type="text", path=str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("raw", "offset", "guess"),
    [(b"caf\xe9 au lait" * 20, 3, "latin-1"), ("Grüße".encode("utf-16") * 9, 0, "utf-16"),
     (b"a" * (1 << 20) + "é".encode() + b"\xff" + b"b" * 99, (1 << 20) + 2, "latin-1"),
     (b"a" * ((1 << 20) - 1) + b"\xe2\x82" + b"b" * 99, (1 << 20) - 1, "latin-1"),
     (b"a" * 200 + b"\xe2\x82", 200, "latin-1")],
)  # fmt: skip
def test_what_is_not_utf8_is_named_by_offset(tmp_path: Path, raw: bytes, offset: int, guess: str) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_bytes(raw)
    with pytest.raises(DataError, match=rf"train\.txt is not UTF-8: byte 0x.. at offset {offset} ") as caught:
        load(type="text", path=str(tmp_path))
    assert f"iconv -f {guess}" in (caught.value.hint or "")


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = lzma.compress(np.random.default_rng(0).bytes(5000).hex().encode())
    (tmp_path / "a.txt.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot read .*a\.txt\.xz"):
        load(type="text", path=str(tmp_path / "a.txt.xz"))
    (tmp_path / "b.txt.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match=r"cannot read .*b\.txt\.gz"):
        load(type="text", path=str(tmp_path / "b.txt.gz"))


def test_shares_must_leave_a_training_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave something to train on"):
        load(type="text", path=str(tmp_path), valid=0.5, test=0.5)
    with pytest.raises(ConfigError, match="valid"):
        load(type="text", path=str(tmp_path), valid=0)
    with pytest.raises(ConfigError, match="path"):
        load(type="text")


def test_a_source_is_read_in_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK", 10)
    for text in ("short\nlines é\n\nof a text\nwithout an end", "x" * 95, "a\n" + "b" * 50 + "\nc\n", ""):
        path = tmp_path / "a.txt"
        path.write_text(text, encoding="utf-8")
        pieces = list(TextSource.of_file(path).read())
        assert "".join(pieces) == text
        assert all(pieces)
        for piece in pieces[:-1]:
            assert piece.endswith("\n") or len(piece) >= 10
        assert max(map(len, pieces), default=0) <= 40
    path.write_text("line\n" * 100)
    assert all(piece.endswith("line\n") for piece in TextSource.of_file(path).read())


# -- Megatron BinIdx ----------------------------------------------------------------------------------------------


def write_binidx(prefix: Path, sequences: list[list[int]], code: int, dtype: str | None = None) -> None:
    arrays = [np.array(sequence, dtype or DTYPES[code]) for sequence in sequences]
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    sizes = np.array([len(array) for array in arrays], "<i4")
    pointers = np.concatenate([[0], np.cumsum([array.nbytes for array in arrays])[:-1]]).astype("<i8")
    documents = np.arange(len(arrays) + 1, dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(arrays), len(documents))
    prefix.with_name(prefix.name + ".idx").write_bytes(
        header + sizes.tobytes() + pointers.tobytes() + documents.tobytes()
    )


def test_binidx_golden(shared: Path) -> None:
    prefix = shared / "golden/spikegpt/tiny_u16"
    golden = json.loads(prefix.with_suffix(".json").read_text())
    for path in (prefix, prefix.with_suffix(".bin"), prefix.with_suffix(".idx")):
        opened = open_binidx(path)
        assert opened.sizes.tolist() == golden["sizes"]
        assert opened.doc_idx.tolist() == golden["doc_idx"]
        assert opened.pointers.tolist() == golden["pointers"]
        assert opened.tokens.tolist() == [token for document in golden["docs"] for token in document]
        assert [opened.get(index).tolist() for index in range(4)] == golden["docs"]
        assert opened.get(0, 5, 30).tolist() == golden["get_0_5_30"]
        assert opened.get(0, 35, 30).tolist() == opened.tokens[35:65].tolist()  # across documents
        with pytest.raises(DataError, match="has 73 tokens, not 60 to 80"):
            opened.get(0, 60, 20)


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_binidx_reads_every_type(tmp_path: Path, code: int) -> None:
    sequences = [[1, 2, 3], [0, 127], [5] * 15]
    write_binidx(tmp_path / "d", sequences, code)
    opened = open_binidx(tmp_path / "d")
    assert opened.tokens.dtype.kind == "u"
    assert [opened.get(index).tolist() for index in range(3)] == sequences
    loaded = load(type="binidx", path=str(tmp_path / "d"), valid=0.2, test=0.3, tokenizer={"type": "byte"})
    assert [len(split) for split in (loaded.train, loaded.valid, loaded.test)] == [10, 4, 6]
    assert loaded.train.n_bytes == loaded.train.n_chars == 10


def test_binidx_counts_the_text_its_tokens_stand_for(tmp_path: Path, shared: Path) -> None:
    neox = {"type": "file", "path": str(shared / "data/corpora/tokenizers/gpt_neox_20b")}
    tokenizer = data.create_tokenizer(neox)
    text = "Wörter und\n\n  Zeichen \U0001f600 " * 30
    write_binidx(tmp_path / "d", [tokenizer.encode(text).tolist()], 8)
    loaded = load(type="binidx", path=str(tmp_path / "d"), valid=0.3, test=0.3, tokenizer=neox)
    splits = (loaded.train, loaded.valid, loaded.test)
    assert sum(split.n_bytes for split in splits) == len(text.encode())
    assert sum(split.n_chars for split in splits) == len(text)
    with pytest.raises(DataError, match="outside the tokenizer's vocabulary of 256"):
        load(type="binidx", path=str(tmp_path / "d"), tokenizer={"type": "byte"})
    with pytest.raises(ConfigError, match="which tokenizer made them"):
        load(type="binidx", path=str(tmp_path / "d"))


def test_binidx_damage_is_named(tmp_path: Path) -> None:
    prefix = tmp_path / "d"
    with pytest.raises(DataError, match=r"no such file: .*d\.bin"):
        open_binidx(prefix)
    write_binidx(prefix, [[1, 2, 3], [4]], 8)
    index = (tmp_path / "d.idx").read_bytes()
    cases = [
        (b"", "does not begin with MMIDIDX"),
        (b"TNTIDX\0\0" + index[8:], "does not begin with MMIDIDX"),
        (index[:9] + struct.pack("<Q", 2) + index[17:], "version 2"),
        (index[:17] + b"\x09" + index[18:], "unknown token type 9"),
        (index[:-1], "cut off"),
        (index[:17] + b"\x04" + index[18:], "its index asks for"),
        (index[:34] + struct.pack("<i", -3) + index[38:], "damaged"),
        (index[:42] + struct.pack("<q", 2) + index[50:], "damaged"),
    ]
    for content, message in cases:
        (tmp_path / "d.idx").write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_binidx(prefix)
    write_binidx(prefix, [[1, -2, 3]], 3)
    with pytest.raises(DataError, match="no tokens: from -2"):
        open_binidx(prefix)
    write_binidx(prefix, [[1]], 7, "<f8")
    (tmp_path / "d.bin").write_bytes(struct.pack("<d", 1.5))
    with pytest.raises(DataError, match="no tokens"):
        open_binidx(prefix)
    write_binidx(prefix, [[1, 2]], 8)
    with pytest.raises(DataError, match="too few to be cut"):
        load(type="binidx", path=str(prefix))
