"""Laws of the word tokenizer, and the vocabularies that published figures rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_lm import data
from spiking_lm.config import parse_config
from spiking_lm.data import create_tokenizer, load_tokenizer, stream_decoder, tokenfile, tokenizers
from spiking_lm.data.configs import WordConfig
from spiking_lm.errors import ConfigError, DataError

settings_of_words = st.fixed_dictionaries(
    {
        "lowercase": st.booleans(),
        "split": st.sampled_from(["whitespace", "punctuation"]),
        "eos": st.booleans(),
        "min_count": st.integers(1, 2),
    }
)
texts = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="aB1é \n\t.,'’-_\"(<>İΣ\u0301日\U0001f600\u2028\x1c", max_size=80),
    st.lists(
        st.sampled_from(["It", "it", "don't", " ", "\n", "--", ".", "<unk>", "<eos>", "< unk >", "sisters'", "(", ")"]),
        max_size=40,
    ).map("".join),
)


def words(text: str | list[str], **options: Any) -> data.Tokenizer:
    return create_tokenizer({"type": "word", **options}, [text] if isinstance(text, str) else text)


def vocabulary(tokenizer: data.Tokenizer) -> list[str]:
    assert isinstance(tokenizer.config, WordConfig)
    assert tokenizer.config.words is not None
    return tokenizer.config.words


@settings(max_examples=300)
@given(learned=texts, options=settings_of_words, choose=st.data())
def test_any_tokens_survive_the_round_trip(learned: str, options: dict[str, Any], choose: st.DataObject) -> None:
    subject = words(learned, **options)
    ids = choose.draw(st.lists(st.integers(0, subject.vocab_size - 1), max_size=30))
    assert subject.encode(subject.decode(ids)).tolist() == ids


@given(learned=texts, other=texts, options=settings_of_words)
def test_what_is_not_known_is_unknown_and_stays_so(learned: str, other: str, options: dict[str, Any]) -> None:
    subject = words(learned, **options)
    ids = subject.encode(other)
    assert subject.encode(subject.decode(ids)).tolist() == ids.tolist()
    if options["eos"]:
        assert int((ids == subject.eos_id).sum()) == other.count("\n") + subject._cut(other.replace("\n", " ")).count(  # type: ignore[attr-defined]
            "<eos>"
        )


@settings(max_examples=200)
@given(text=texts, options=settings_of_words, chunk=st.integers(1, 20), size=st.integers(1, 20))
def test_pieces_give_the_tokens_of_the_whole(text: str, options: dict[str, Any], chunk: int, size: int) -> None:
    from spiking_lm.data import words as module

    subject = words(text, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        pieces = list(subject.pieces(text[start : start + chunk] for start in range(0, len(text), chunk)))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in subject.encode(piece).tolist()] == subject.encode(text).tolist()


@given(learned=texts, options=settings_of_words, choose=st.data(), at_once=st.integers(1, 4))
def test_stream_decoder_equals_decode(
    learned: str, options: dict[str, Any], choose: st.DataObject, at_once: int
) -> None:
    subject = words(learned, **options)
    ids = choose.draw(st.lists(st.integers(0, subject.vocab_size - 1), max_size=30))
    decoder = stream_decoder(subject)
    parts = [decoder.feed(ids[start : start + at_once]) for start in range(0, len(ids), at_once)]
    assert "".join(parts) + decoder.flush() == subject.decode(ids)


@given(learned=texts, options=settings_of_words)
def test_save_and_load_give_the_same_tokenizer(
    learned: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    subject = words(learned, **options)
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    subject.save(path)
    again = load_tokenizer(path)
    assert (again.type, again.sha256, again.vocab_size) == ("word", subject.sha256, subject.vocab_size)
    assert (again.eos_id, again.unk_id, again.lossless) == (subject.eos_id, subject.unk_id, False)
    assert again.encode(learned).tolist() == subject.encode(learned).tolist()


def test_published_convention() -> None:
    """Order of first appearance, ``<eos>`` at each line end, ``<unk>`` where the text has it."""
    text = " the <unk> of the N\n the end \n"
    subject = words(text)
    assert vocabulary(subject) == ["the", "<unk>", "of", "N", "<eos>", "end"]
    assert subject.encode(text).tolist() == [0, 1, 2, 0, 3, 4, 0, 5, 4]
    assert subject.encode("the start").tolist() == [0, 1]
    assert (subject.eos_id, subject.unk_id, subject.pad_id) == (4, 1, None)
    assert subject.decode([0, 5, 4, 0, 3]) == "the end\nthe N"


def test_rare_words_are_unknown() -> None:
    subject = words("a b a c b a", min_count=2, eos=False)
    assert vocabulary(subject) == ["a", "b", "<unk>"]
    assert subject.encode("c a d").tolist() == [2, 0, 2]
    assert subject.eos_id is None


def test_words_and_marks() -> None:
    text = "He _said_, \"Oh--don't (my well-bred sisters' 3 aunts)!\""
    subject = words(text, split="punctuation", lowercase=True, eos=False)
    assert vocabulary(subject)[:9] == ["he", "_", "said", ",", '"', "oh", "-", "don't", "("]
    assert subject.decode(subject.encode(text)) == "he _ said _, \" oh--don't (my well-bred sisters' 3 aunts)! \""
    assert subject.decode(subject.encode("<unk>, he said")) == "<unk>, he said"


def test_a_vocabulary_that_cannot_be() -> None:
    for vocab, message in ((["a b", "<unk>", "<eos>"], "never one token"), (["a"], "must have"), (["<unk>"], "<eos>")):
        with pytest.raises(ConfigError, match=message):
            words("", words=vocab)
    with pytest.raises(ConfigError, match="'A', which is never one token with split: whitespace and lowercase"):
        words("", words=["<unk>", "<eos>", "A"], lowercase=True)
    with pytest.raises(ConfigError, match="twice"):
        parse_config(WordConfig, {"words": ["a", "a"]}, where="here")
    with pytest.raises(DataError, match=r"lone surrogate U\+D83D at character 2"):
        words("a").encode("ab\ud83d")
    with pytest.raises(DataError, match="outside the vocabulary"):
        words("a").decode([3])


def test_figures_of_the_embedded_corpus() -> None:
    """The setting in which perplexities on austen3 are compared: 344,065 tokens, 4,983 words and <unk>."""
    options = {"lowercase": True, "split": "punctuation", "min_count": 3, "eos": False}
    austen = data.load({"type": "austen3", "tokenizer": {"type": "word", **options}})
    assert isinstance(austen, data.TextData)
    assert (austen.tokenizer.vocab_size, len(austen.train), len(austen.valid)) == (4984, 344_065, 19_223)
    unknown = (austen.valid.tokens == austen.tokenizer.unk_id).mean()
    assert 0.02 < unknown < 0.03
    assert not austen.tokenizer.lossless
    assert austen.tokenizer.decode(austen.train.tokens[4:31]) == (
        "jane austen chapter 1 it is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in want of"
    )


@pytest.fixture
def ptb(tmp_path: Path) -> Path:
    for split, text in (("train", " a <unk> b \n a a \n"), ("valid", " c a \n"), ("test", " b d \n")):
        (tmp_path / f"ptb.{split}.txt").write_text(text)
    return tmp_path


@pytest.mark.parametrize("large", [False, True])
def test_vocabulary_of_all_texts(ptb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    if large:
        monkeypatch.setattr(tokenfile, "IN_MEMORY", 0)
    for _ in range(2):  # the second time a large corpus's vocabulary comes from the cache
        for source, expected in (
            ("train", ["a", "<unk>", "b", "<eos>"]),
            ("all", ["a", "<unk>", "b", "<eos>", "c", "d"]),
        ):
            config = {"type": "ptb", "path": str(ptb), "tokenizer": {"type": "word", "vocab_from": source}}
            loaded = data.load(config, cache_dir=tmp_path / "cache")
            assert isinstance(loaded, data.TextData)
            assert vocabulary(loaded.tokenizer) == expected
            assert loaded.tokenizer.type == "word"
            assert loaded.train.tokens.tolist() == [0, 1, 2, 3, 0, 0, 3]
            assert loaded.test.tokens.tolist() == [2, expected.index("d") if source == "all" else 1, 3]
    assert len(list((tmp_path / "cache").glob("tokenizers/*.json"))) == (2 if large else 0)


def test_labelled_texts_too(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("label\ttext\n" + "".join(f"{i % 2}\tw{i} x\n" for i in range(20)))
    (tmp_path / "test.tsv").write_text("label\ttext\n0\tonly here\n1\tx\n")
    sizes = []
    for source in ("train", "all"):
        tokenizer = {"type": "word", "vocab_from": source}
        sizes.append(data.load({"type": "tsv", "path": str(tmp_path), "tokenizer": tokenizer}).tokenizer)
    assert {"only", "here"} <= set(vocabulary(sizes[1])) - set(vocabulary(sizes[0]))


def test_the_pieces_of_a_long_text_are_not_the_whole() -> None:
    text = "word " * tokenizers.PIECE
    assert max(len(piece) for piece in words("word").pieces(iter([text[:300_000], text[300_000:]]))) < len(text)
