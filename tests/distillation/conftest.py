"""A teacher to learn from: the kit's small encoder, with a WordPiece tokenizer as BERT has one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))

import contract_encoders as toys

from spiking_lm import registry, save_model
from spiking_lm.data import Tokenizer
from spiking_lm.data.tokenizers import parse_tokenizer

WORDS = ("the", "cat", "dog", "sat", "ran", "home", "slept", "far", "away", "today", "##s", "un", "##known", ".")
LABELLED = "\n".join(
    ["label\ttext"]
    + [f"{i % 2}\tthe {('cat', 'dog')[i % 2]} {('sat', 'ran', 'slept')[i % 3]} {('home', 'far away')[i % 5 % 2]} ."
       for i in range(60)]
)  # fmt: skip


@pytest.fixture(autouse=True)
def toy_is_registered() -> Iterator[None]:
    manager = registry.PluginManager(discover="first-party")
    manager.register(toys.EncoderPlugin(), "toy")
    previous = registry.set_manager(manager)
    yield
    registry.set_manager(previous)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKING_LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return parse_tokenizer(backend.to_str(), Path("wordpiece"))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Sixty sentences; whether it is about a cat or a dog is the label."""
    path = tmp_path / "labelled.tsv"
    path.write_text(LABELLED + "\n", encoding="utf-8")
    return path


@pytest.fixture
def teacher(tmp_path: Path, wordpiece: Tokenizer) -> Path:
    """A model folder: an encoder of four layers and no head, with its tokenizer."""
    model = toys.toy_encoder(7, vocab_size=wordpiece.vocab_size, n_layer=4, n_embd=24, n_head=4, mlm=False)
    return save_model(model, tmp_path / "teacher", tokenizer=wordpiece)
