"""Laws of the tokenizers: round trips, pieces that add up to the whole, streaming, files."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_lm.config import parse_config
from spiking_lm.data import Tokenizer, create_tokenizer, load_tokenizer, stream_decoder, tokenizers
from spiking_lm.data.configs import CharConfig
from spiking_lm.errors import ConfigError, DataError, UnknownNameError

SAMPLE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,\n"
    "must be in want of a wife.\n\nDon't you think so?"
    " 1813 -- naïve café \U0001f600\U0001f468‍\U0001f469 \0 日本語 й\r\n" * 4
)
NEOX_RUNS = "a\n\n\n  b   c    d\t\te 12345 foo_bar's they'll  \n x"
RUNS = "a\n\n b\n\n\n  c.\n\nd\r\n\r\n e   f\t\tg \n h  i\n  j " * 8  # so that runs of white space become tokens
texts = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="ab \n\t.'1é\u0301日\U0001f600\0\u00a0\u2028", max_size=120),
    st.lists(
        st.sampled_from(
            ["word", " ", "  ", "\n", "\n\n", "\n\n\n  c", " \n h", ".", "don't", " the", "\U0001f600", "é"]
        ),
        max_size=30,
    ).map("".join),
)


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "byte":
        return create_tokenizer({"type": "byte"})
    if kind == "char":
        return create_tokenizer({"type": "char"}, [SAMPLE])
    if kind == "bpe":
        return create_tokenizer({"type": "bpe", "vocab_size": 330, "min_frequency": 1}, [RUNS + SAMPLE])
    raise KeyError(kind)


@pytest.fixture(scope="module")
def neox(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "data/corpora/tokenizers/gpt_neox_20b")


@pytest.fixture(scope="module")
def sentencepiece_like(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "data/models/stories260K")


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@given(text=texts)
def test_any_text_survives_the_round_trip(kind: str, text: str) -> None:
    subject = tokenizer(kind)
    ids = subject.encode(text)
    assert ids.dtype == (np.uint8 if kind == "byte" else np.uint16)
    assert subject.decode(ids) == text
    assert subject.decode_bytes(ids) == text.encode()


@given(text=st.text(max_size=80))
def test_char_round_trip_with_unknown_characters(text: str) -> None:
    subject = tokenizer("char")
    expected = "".join(character if character in SAMPLE else "\ufffd" for character in text)
    assert subject.decode(subject.encode(text)) == expected
    assert len(subject.encode(text)) == len(text)


def test_char_vocabulary_is_in_code_point_order_and_ends_with_unk() -> None:
    subject = create_tokenizer({"type": "char"}, ["ca\U0001f600", "b"])
    assert isinstance(subject, tokenizers.CharTokenizer)
    assert subject.encode("abc\U0001f600").tolist() == [0, 1, 2, 3]
    assert (subject.vocab_size, subject.unk_id) == (5, 4)
    assert subject.encode("z").tolist() == [4]


def test_char_without_unknown_refuses_and_names_the_character() -> None:
    subject = create_tokenizer({"type": "char", "characters": "ab", "unknown": None})
    assert subject.vocab_size == 2
    with pytest.raises(DataError, match=r"'c' \(U\+0063, character 2"):
        subject.encode("abc")
    assert create_tokenizer({"type": "char", "characters": "ab", "unknown": "b"}).encode("xa").tolist() == [1, 0]
    with pytest.raises(ConfigError, match="not a character of the vocabulary"):
        create_tokenizer({"type": "char", "characters": "ab", "unknown": "c"})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8"])
def test_char_imports_the_references_vocabulary_at_its_own_size(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_bytes(json.dumps({"0": "\n", "1": "z", "2": "a", "3": "й"}, ensure_ascii=False).encode(encoding))
    subject = create_tokenizer({"type": "char", "vocab": str(path)})
    assert subject.vocab_size == 4
    assert subject.encode("az\nй").tolist() == [2, 1, 0, 3]
    subject.save(tmp_path / "tokenizer.json")
    path.unlink()  # the saved tokenizer holds the vocabulary itself
    again = load_tokenizer(tmp_path)
    assert (again.vocab_size, again.sha256, again.decode([3, 2])) == (4, subject.sha256, "йa")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a character"), ('{"1": "a"}', "not a character vocabulary"), ('{"0": "ab"}', "one character"),
     ('{"0": "a", "1": "a"}', "twice"), ('["a"]', "not a character vocabulary"), ('{"0": 5}', "one character")],
)  # fmt: skip
def test_a_malformed_vocabulary_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        create_tokenizer({"type": "char", "vocab": str(path)})


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_a_lone_surrogate_is_refused_with_its_place(kind: str) -> None:
    with pytest.raises(DataError, match=r"lone surrogate U\+D83D at character 2"):
        tokenizer(kind).encode("ab\ud83d")
    with pytest.raises(DataError, match="lone surrogate"):
        create_tokenizer({"type": kind, **({"vocab_size": 300} if kind == "bpe" else {})}, ["\udc00"]).encode("\udc00")


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_ids_outside_the_vocabulary_are_refused(kind: str) -> None:
    subject = tokenizer(kind)
    for ids in ([subject.vocab_size], [-1], np.array([0, 70000])):
        with pytest.raises(DataError, match="outside the vocabulary"):
            subject.decode(ids)
    with pytest.raises(DataError, match="flat list of integers"):
        subject.decode([0.5])  # type: ignore[list-item]
    assert subject.decode([]) == ""
    assert len(subject.encode("")) == 0


def test_bytes_that_are_not_utf8_decode_with_replacement_and_exactly() -> None:
    ids = [0x61, 0xFF, 0xE2, 0x82]
    assert tokenizer("byte").decode(ids) == "a\ufffd\ufffd"
    assert tokenizer("byte").decode_bytes(ids) == bytes(ids)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_save_and_load_give_the_same_tokenizer(tmp_path: Path, kind: str) -> None:
    subject = tokenizer(kind)
    subject.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(path)
        assert again.sha256 == subject.sha256
        assert again.vocab_size == subject.vocab_size
        assert again.encode(SAMPLE).tolist() == subject.encode(SAMPLE).tolist()
        assert (again.eos_id, again.pad_id) == (subject.eos_id, subject.pad_id) == (None, None)


def test_bpe_file_is_the_librarys_own(tmp_path: Path) -> None:
    import tokenizers as library

    subject = tokenizer("bpe")
    subject.save(tmp_path / "tokenizer.json")
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(SAMPLE).ids == subject.encode(SAMPLE).tolist()
    assert theirs.decode(theirs.encode(SAMPLE).ids) == SAMPLE


def test_bpe_training_is_deterministic_and_indifferent_to_how_the_text_arrives() -> None:
    config = {"type": "bpe", "vocab_size": 300, "min_frequency": 1}
    chunks = [SAMPLE[start : start + 7] for start in range(0, len(SAMPLE), 7)]
    assert create_tokenizer(config, chunks).sha256 == create_tokenizer(config, [SAMPLE]).sha256
    assert create_tokenizer(config, [SAMPLE]).vocab_size == 300
    # A text without pairs to merge leaves the bytes.
    assert create_tokenizer(config, ["a b"]).vocab_size < 300


def test_bpe_knows_every_byte_even_if_the_text_does_not() -> None:
    subject = create_tokenizer({"type": "bpe", "vocab_size": 260}, ["aaaa aaaa"])
    assert subject.decode(subject.encode("日本\0\U0001f600")) == "日本\0\U0001f600"


def _cut_small(subject: Tokenizer, text: str, chunk: int, size: int) -> list[str]:
    chunks = [text[start : start + chunk] for start in range(0, len(text), chunk)]
    if isinstance(subject, tokenizers.SubwordTokenizer):
        return list(subject._cut(chunks, size))
    return list(subject.pieces(chunks))


def _assert_pieces_equal_the_whole(subject: Tokenizer, text: str, chunk: int, size: int) -> int:
    pieces = _cut_small(subject, text, chunk, size)
    assert "".join(pieces) == text
    streamed = [index for piece in pieces for index in subject.encode(piece).tolist()]
    if isinstance(subject, tokenizers.SubwordTokenizer):  # the library itself, with nothing cut at all
        whole = subject._backend.encode(text, add_special_tokens=False).ids
    else:
        whole = subject.encode(text).tolist()
    assert streamed == whole
    return len(pieces)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
@settings(max_examples=200)
@given(text=texts, chunk=st.integers(1, 20), size=st.integers(1, 20))
def test_streaming_gives_the_tokens_of_the_whole(kind: str, text: str, chunk: int, size: int) -> None:
    _assert_pieces_equal_the_whole(tokenizer(kind), text, chunk, size)


@settings(max_examples=300)
@given(text=texts, chunk=st.integers(1, 20), size=st.integers(1, 20))
def test_streaming_with_gpt_neox(neox: Tokenizer, text: str, chunk: int, size: int) -> None:
    _assert_pieces_equal_the_whole(neox, text, chunk, size)


@given(text=texts, chunk=st.integers(1, 20))
def test_streaming_with_a_tokenizer_that_cannot_be_cut(sentencepiece_like: Tokenizer, text: str, chunk: int) -> None:
    assert _assert_pieces_equal_the_whole(sentencepiece_like, text, chunk, 1) <= 1


def test_ordinary_text_is_really_cut(neox: Tokenizer) -> None:
    for subject in (neox, tokenizer("bpe")):
        assert _assert_pieces_equal_the_whole(subject, SAMPLE + NEOX_RUNS, 1000, 50) > 5


def test_long_texts_without_a_place_to_cut_stay_whole() -> None:
    text = "x" * 5000 + " " * 300 + "y"
    assert _cut_small(tokenizer("bpe"), text, 100, 100) == [text]


def test_gpt_neox_ids_and_special_tokens(neox: Tokenizer) -> None:
    assert neox.vocab_size == 50277
    assert neox.encode("Hello world, it's 1984!").tolist() == [12092, 1533, 13, 352, 434, 12459, 2]
    assert neox.decode(neox.encode(SAMPLE + NEOX_RUNS)) == SAMPLE + NEOX_RUNS
    assert neox.eos_id == neox.encode("<|endoftext|>")[0] == 0
    assert neox.pad_id == 1


def test_sentencepiece_like_file_adds_no_special_token_and_round_trips(sentencepiece_like: Tokenizer) -> None:
    ids = sentencepiece_like.encode("Once upon a time, é\U0001f600")
    assert 1 not in ids
    assert sentencepiece_like.decode(ids) == "Once upon a time, é\U0001f600"
    assert sentencepiece_like.eos_id == 2


def _stream(subject: Tokenizer, ids: np.ndarray, at_once: int) -> str:  # type: ignore[type-arg]
    decoder = stream_decoder(subject)
    parts = [decoder.feed(ids[start : start + at_once]) for start in range(0, len(ids), at_once)]
    return "".join(parts) + decoder.flush()


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
@given(data=st.data(), at_once=st.integers(1, 5))
def test_stream_decoder_equals_decode_for_any_ids(kind: str, data: st.DataObject, at_once: int) -> None:
    subject = tokenizer(kind)
    ids = np.array(data.draw(st.lists(st.integers(0, subject.vocab_size - 1), max_size=40)), np.int64)
    assert _stream(subject, ids, at_once) == subject.decode(ids)


@given(text=texts, at_once=st.integers(1, 5))
def test_stream_decoder_of_text_that_depends_on_its_neighbours(
    sentencepiece_like: Tokenizer, text: str, at_once: int
) -> None:
    ids = sentencepiece_like.encode(text)
    assert _stream(sentencepiece_like, ids, at_once) == sentencepiece_like.decode(ids)


def test_stream_decoder_gives_only_complete_characters() -> None:
    decoder = stream_decoder(tokenizer("byte"))
    assert [decoder.feed(byte) for byte in "é\U0001f600!".encode()] == ["", "é", "", "", "", "\U0001f600", "!"]
    assert decoder.feed(0xE2) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(0x61) == "a"  # usable again after a flush


def test_errors_name_the_file_and_the_field(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent.json")
    (tmp_path / "a.json").write_text("{nonsense")
    with pytest.raises(DataError, match=r"a\.json is not JSON"):
        load_tokenizer(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"b\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{"spiking_lm": {"type": "bytes"}}')
    with pytest.raises(UnknownNameError, match="did you mean 'byte'"):
        load_tokenizer(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="a tokenizer has a type"):
        create_tokenizer({})
    with pytest.raises(ConfigError, match="did you mean 'vocab_size'"):
        create_tokenizer({"type": "bpe", "vocabsize": 300})
    with pytest.raises(ConfigError, match="not both"):
        parse_config(CharConfig, {"characters": "a", "vocab": "x"}, where="here")
    with pytest.raises(ConfigError, match="twice"):
        parse_config(CharConfig, {"characters": "aa"}, where="here")


@given(text=texts, cut=st.integers(1, 30), at_once=st.integers(1, 5))
def test_a_stream_goes_on_where_a_prompt_ended(
    sentencepiece_like: Tokenizer, text: str, cut: int, at_once: int
) -> None:
    ids = sentencepiece_like.encode(f"Once upon {text}")
    prompt, rest = ids[:cut], ids[cut:]
    decoder = stream_decoder(sentencepiece_like, prompt)
    parts = [decoder.feed(rest[start : start + at_once]) for start in range(0, len(rest), at_once)]
    told, whole = sentencepiece_like.decode(prompt), sentencepiece_like.decode(ids)
    if whole.startswith(told):  # not where a prompt ends within a character
        assert told + "".join(parts) + decoder.flush() == whole
