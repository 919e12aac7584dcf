"""load(): names come from the registry, so strangers' datasets and tokenizers work like ours; errors name the field."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spiking_lm import builtin, data, hookimpl, registry
from spiking_lm.errors import ConfigError, DataError, PluginError, UnknownNameError
from spiking_lm.records import DatasetSpec, TokenizerSpec

STRANGER = '''
import numpy as np
from spiking_lm.config import DatasetConfig, TokenizerConfig
from spiking_lm.data import Example, LabelledCorpus, TextCorpus, TextSource, TokenCorpus, Tokenizer

class DiaryConfig(DatasetConfig):
    days: int = 3

def diary(config):
    return TextCorpus(*(TextSource.of(f"Day {day}: rain.\\n" * config.days) for day in ("one", "two", "three")))

def tokens(config):
    return TokenCorpus(np.array([1, 2, 3, 1], np.uint16), np.array([1], np.uint16), np.array([2], np.uint16), "hash")

def moods(config):
    return LabelledCorpus(["sad", "glad"], [Example("rain", 0), Example("sun", 1)], [Example("snow", 1)], [])

def nothing(config):
    return "a text"

class VowelConfig(TokenizerConfig):
    vowels: str | None = None

class VowelTokenizer(Tokenizer):
    """Learns which vowels the text has; every other character is token 0."""
    type = "vowels"
    def __init__(self, config, texts=()):
        vowels = config.vowels
        if vowels is None:
            vowels = "".join(sorted(set("".join(texts)) & set("aeiou")))
        self.config = VowelConfig(vowels=vowels)
        self.alphabet = "-" + vowels
        self.vocab_size = len(self.alphabet)
    def encode(self, text):
        return np.array([self.alphabet.find(c) if c in self.alphabet else 0 for c in text], np.uint8)
    def decode_bytes(self, ids):
        return "".join(self.alphabet[i] for i in ids).encode()
'''


class StrangersPlugin:
    @hookimpl
    def spiking_lm_datasets(self, register: object) -> None:
        for name in ("diary", "tokens", "moods", "nothing"):
            register(DatasetSpec(name=name, config="stranger:DiaryConfig", factory=f"stranger:{name}"))  # type: ignore[operator]

    @hookimpl
    def spiking_lm_tokenizers(self, register: object) -> None:
        register(TokenizerSpec(name="vowels", config="stranger:VowelConfig", factory="stranger:VowelTokenizer"))  # type: ignore[operator]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(str(tmp_path))
    manager = registry.PluginManager(discover=False)
    manager.register(builtin, "core", distribution="spiking-lm")
    manager.register(StrangersPlugin(), "stranger", distribution="stranger")
    previous = registry.set_manager(manager)
    yield
    registry.set_manager(previous)
    sys.modules.pop("stranger", None)


@pytest.mark.usefixtures("stranger")
def test_a_strangers_text_and_tokenizer(tmp_path: Path) -> None:
    loaded = data.load({"type": "diary", "days": 2, "tokenizer": {"type": "vowels"}})
    assert isinstance(loaded, data.TextData)
    assert loaded.tokenizer.decode(loaded.train.tokens) == "-a--o-e---ai---" * 2
    assert loaded.train.n_bytes == len("Day one: rain.\n") * 2
    assert loaded.describe()["tokenizer"]["type"] == "vowels"
    # What a tokenizer does not promise is not assumed: texts stay whole, and streaming looks at the neighbours.
    assert list(loaded.tokenizer.pieces(["Day ", "one"])) == ["Day one"]
    decoder = data.stream_decoder(loaded.tokenizer)
    assert "".join([decoder.feed(index) for index in loaded.train.tokens]) + decoder.flush() == "-a--o-e---ai---" * 2
    loaded.tokenizer.save(tmp_path / "tokenizer.json")
    again = data.load_tokenizer(tmp_path)
    assert (again.type, again.sha256) == ("vowels", loaded.tokenizer.sha256)


@pytest.mark.usefixtures("stranger")
def test_a_strangers_tokens_and_labels() -> None:
    tokens = data.load({"type": "tokens", "tokenizer": {"type": "byte"}})
    assert isinstance(tokens, data.TextData)
    assert tokens.train.tokens.tolist() == [1, 2, 3, 1]
    moods = data.load({"type": "moods"})
    assert isinstance(moods, data.LabelledData)
    assert moods.describe()["splits"] == {
        "train": {"examples": 2, "per_label": [1, 1]},
        "valid": {"examples": 1, "per_label": [0, 1]},
        "test": {"examples": 0, "per_label": [0, 0]},
    }


@pytest.mark.usefixtures("stranger")
def test_a_factory_that_returns_something_else_is_named() -> None:
    with pytest.raises(PluginError, match="dataset 'nothing' returned a str"):
        data.load({"type": "nothing"})
    with pytest.raises(ConfigError, match=r"dataset 'diary': unknown field 'day'.*\n.*did you mean 'days'"):
        data.load({"type": "diary", "day": 3})


def test_every_shipped_record_loads() -> None:
    for kind in ("datasets", "tokenizers"):
        for entry in registry.all(kind).values():
            assert callable(entry.load("factory"))
            assert entry.load("config").__doc__
            assert entry.spec.summary
    tasks = {name: entry.spec.task for name, entry in registry.all("datasets").items()}
    assert tasks["austen3"] == "text"
    assert tasks["authors4"] == "classification"


def test_errors_name_the_field() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'austen3'"):
        data.load({"type": "austen"})
    with pytest.raises(ConfigError, match=r"a dataset has a type[\s\S]*austen3"):
        data.load({"tokenizer": {"type": "byte"}})
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'byte'"):
        data.load({"type": "austen3", "tokenizer": "byte"})
    with pytest.raises(UnknownNameError, match="unknown tokenizer 'bytes'"):
        data.load({"type": "austen3", "tokenizer": {"type": "bytes"}})
    with pytest.raises(ConfigError, match="dataset 'austen3': unknown field 'path'"):
        data.load({"type": "austen3", "path": "x"})
    with pytest.raises(DataError, match="no such tokenizer"):
        data.load({"type": "austen3", "tokenizer": {"type": "file", "path": "/absent/tokenizer.json"}})


def test_the_hash_is_that_of_texts_and_tokenizer() -> None:
    byte, char, again = (data.load({"type": "austen3", "tokenizer": {"type": t}}) for t in ("byte", "char", "byte"))
    assert byte.sha256 == again.sha256 != char.sha256
    assert byte.describe()["splits"]["train"]["sha256"] == char.describe()["splits"]["train"]["sha256"]


def test_the_config_is_left_alone() -> None:
    config = {"type": "austen3", "tokenizer": {"type": "byte"}}
    data.load(config)
    assert config == {"type": "austen3", "tokenizer": {"type": "byte"}}


def test_loading_bytes_imports_neither_torch_nor_tokenizers() -> None:
    code = (
        "import sys; from spiking_lm import data; data.load({'type': 'austen3'}); data.load({'type': 'authors4'});"
        "print(*[name for name in ('torch', 'tokenizers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == ""


def test_tokens_of_the_embedded_corpus_are_bytes_of_the_text() -> None:
    loaded = data.load({"type": "austen3"})
    assert isinstance(loaded, data.TextData)
    source = data.TextSource.of_file(Path(data.__file__).parent / "embedded/austen3.test.txt.xz")
    assert bytes(np.asarray(loaded.test.tokens)) == source.text().encode()
    assert source.sha256 == loaded.test.sha256
