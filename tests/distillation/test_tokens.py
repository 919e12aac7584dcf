"""A model's tokenizer, reduced to what a text needs, what stands around a text, and hidden tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spiking_lm import data
from spiking_lm.data import Tokenizer, create_tokenizer, load_tokenizer
from spiking_lm.data.masking import Frame, HiddenTokens
from spiking_lm.data.reduced import ReducedTokenizer
from spiking_lm.errors import CheckpointError, ConfigError, DataError

keep_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
sentences = st.lists(
    st.sampled_from(["the", "cats", "Dog", "sat", "unknown", "far", "zebra", "."]), max_size=12
).map(" ".join)  # fmt: skip


def test_a_template_is_found(wordpiece: Tokenizer) -> None:
    assert wordpiece.around == ((2,), (3,))
    assert (wordpiece.unk_id, wordpiece.pad_id, wordpiece.mask_id) == (1, 0, 4)
    assert not wordpiece.lossless, "WordPiece loses capitals and spaces"
    assert wordpiece.encode("the cats").tolist() == [5, 6, 15], "no template around running text"


def test_bpe_has_no_template_and_a_mask_on_request() -> None:
    plain, masked = (
        create_tokenizer({"type": "bpe", "vocab_size": 300, "mask": m}, ["a b c d"]) for m in (False, True)
    )
    assert (plain.around, plain.mask_id) == (((), ()), None)
    assert masked.mask_id is not None
    assert masked.encode("[MASK]").tolist() == [masked.mask_id]
    assert masked.decode(masked.encode("a b")) == "a b"


def test_words_have_a_mask_on_request(tmp_path: Path) -> None:
    subject = create_tokenizer({"type": "word", "mask": True, "eos": False}, ["a b a"])
    assert subject.mask_id is not None
    assert subject.vocab_size == 4
    subject.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert (again.mask_id, again.sha256) == (subject.mask_id, subject.sha256)
    with pytest.raises(ConfigError, match="must have '<unk>' and '<mask>'"):
        create_tokenizer({"type": "word", "mask": True, "eos": False, "words": ["<unk>", "a"]})


@keep_fixtures
@given(learned=st.lists(sentences, min_size=1, max_size=4), text=sentences)
def test_a_reduced_tokenizer_reads_what_the_whole_one_reads(
    wordpiece: Tokenizer, learned: list[str], text: str
) -> None:
    seen = {int(i) for part in learned for i in wordpiece.encode(part)}
    subject = ReducedTokenizer(wordpiece, seen)
    assert set(subject.kept.tolist()) == seen | {0, 1, 2, 3, 4}
    for known in learned:
        assert (subject.kept[subject.encode(known)] == wordpiece.encode(known)).all()
        assert subject.decode(subject.encode(known)) == wordpiece.decode(wordpiece.encode(known))
    whole = wordpiece.encode(text)
    expected = np.where(np.isin(whole, subject.kept), whole, wordpiece.unk_id)
    assert (subject.kept[subject.encode(text)] == expected).all()
    around = [tuple(subject.kept[list(ids)]) for ids in subject.around]
    assert around == [tuple(ids) for ids in wordpiece.around]
    assert subject.kept[subject.mask_id] == wordpiece.mask_id


def test_a_reduced_tokenizer_is_kept_in_one_file(wordpiece: Tokenizer, tmp_path: Path) -> None:
    subject = ReducedTokenizer(wordpiece, [5, 6, 7])
    subject.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(again, ReducedTokenizer)
    assert again.sha256 == subject.sha256
    assert again.base.sha256 == wordpiece.sha256
    assert again.encode("the dog").tolist() == subject.encode("the dog").tolist()


def test_data_is_read_with_the_tokens_of_a_model(teacher: Path, labelled: Path, wordpiece: Tokenizer) -> None:
    every = data.load({"type": "tsv", "path": str(labelled), "tokenizer": {"type": "model", "path": str(teacher)}})
    assert every.tokenizer.sha256 == wordpiece.sha256
    seen = data.load(
        {"type": "tsv", "path": str(labelled), "tokenizer": {"type": "model", "path": str(teacher), "keep": "seen"}}
    )
    assert isinstance(seen, data.LabelledData)
    assert isinstance(seen.tokenizer, ReducedTokenizer)
    assert seen.tokenizer.vocab_size == wordpiece.vocab_size - 4, "today, ##s, un and ##known are never read"
    assert seen.sha256 != every.sha256
    inputs, lengths = seen.batch([data.Example("the cat sat home .", 0), data.Example("the dog", 1)], 6)
    whole = seen.tokenizer.kept[inputs]
    assert whole.tolist() == [[2, 5, 6, 8, 10, 3], [2, 5, 7, 3, 0, 0]], "cut, but between [CLS] and [SEP]"
    assert lengths.tolist() == [6, 4]


def test_whose_tokens_must_be_known(tmp_path: Path, labelled: Path) -> None:
    corpus = {"type": "tsv", "path": str(labelled)}
    with pytest.raises(ConfigError, match="whose it is is not set"):
        data.load({**corpus, "tokenizer": {"type": "model"}})
    with pytest.raises(CheckpointError, match="no such folder"):
        data.load({**corpus, "tokenizer": {"type": "model", "path": str(tmp_path / "nobody")}})


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    import contract_encoders as toys

    from spiking_lm import save_model

    save_model(toys.toy_encoder(), tmp_path / "mute")
    with pytest.raises(DataError, match="mute: the model was saved without a tokenizer"):
        create_tokenizer({"type": "model", "path": str(tmp_path / "mute")})


def test_byte_level_tokens_cannot_be_reduced() -> None:
    with pytest.raises(ConfigError, match="without an unknown token"):
        ReducedTokenizer(create_tokenizer({"type": "byte"}), [1, 2])


# -- hidden tokens -----------------------------------------------------------------------------------------------------


@keep_fixtures
@given(
    rows=st.integers(1, 5),
    length=st.integers(4, 40),
    rate=st.floats(0.05, 0.9),
    seed=st.integers(0, 9),
    index=st.integers(0, 9),
)
def test_hidden_tokens(wordpiece: Tokenizer, rows: int, length: int, rate: float, seed: int, index: int) -> None:
    hidden = HiddenTokens(wordpiece, length, rate)
    assert hidden.room == length - 2
    text = np.random.default_rng(seed).integers(5, wordpiece.vocab_size, (rows, hidden.room))
    batch = hidden.hide(text, seed=seed, index=index)
    again = hidden.hide(text, seed=seed, index=index)
    assert all((a == b).all() for a, b in zip(batch, again, strict=True))
    n = max(1, round(rate * hidden.room))
    assert batch.inputs.shape == (rows, length)
    assert (batch.inputs[:, 0] == 2).all()
    assert (batch.inputs[:, -1] == 3).all()
    assert (batch.places.sum(1) == n).all()
    assert not batch.places[:, [0, -1]].any(), "what stands around a text is never hidden"
    inner = batch.places[:, 1:-1]
    assert (text[inner] == batch.targets.flatten()).all()
    assert (batch.inputs[:, 1:-1][~inner] == text[~inner]).all(), "the rest is as it was"


def test_of_the_hidden_most_are_masked_some_replaced_some_kept(wordpiece: Tokenizer) -> None:
    hidden = HiddenTokens(wordpiece, 102, 0.15)
    text = np.random.default_rng(0).integers(5, wordpiece.vocab_size, (400, 100))
    batch = hidden.hide(text, seed=0, index=0)
    read, true = batch.inputs[batch.places], batch.targets.flatten()
    masked, kept = read == wordpiece.mask_id, read == true
    n = len(read)
    assert n == 400 * 15
    # A token that is drawn anew is itself, or the mask, one time in 19.
    assert masked.mean() == pytest.approx(0.8 + 0.1 / 19, abs=4 * np.sqrt(0.16 / n))
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 19, abs=4 * np.sqrt(0.09 / n))
    other = hidden.hide(text, seed=0, index=1)
    assert (other.places != batch.places).any(), "each batch hides other tokens"


def test_a_window_needs_room_and_a_mask(wordpiece: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no room"):
        Frame(wordpiece, 2)
    with pytest.raises(ConfigError, match="no token for what is hidden"):
        HiddenTokens(create_tokenizer({"type": "byte"}), 16, 0.15)
