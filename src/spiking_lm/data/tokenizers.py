"""Tokenizers: bytes, characters, byte-pair encoding trained on the corpus, and any Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.config import TokenizerConfig, parse_config
from spiking_lm.data.configs import BPEConfig, ByteConfig, CharConfig, FileConfig
from spiking_lm.data.sources import encode_utf8
from spiking_lm.errors import ConfigError, DataError
from spiking_lm.files import atomic_write

if TYPE_CHECKING:
    import tokenizers

Tokens = NDArray[Any]
"""A 1-D array of uint8, uint16 or uint32."""
Ids = Sequence[int] | Tokens

PIECE = 1 << 18
"""Characters after which a long text is cut, for the subword tokenizers, whose own structures take 100 times that."""
ENCODED_AT_ONCE = 1 << 16
"""Characters that one thread of the subword tokenizers encodes at a time."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest little-endian unsigned type that holds every token of a vocabulary."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


class Tokenizer(ABC):
    """Text to token ids and back. ``decode(encode(text)) == text`` wherever the vocabulary covers the text.

    Subclasses set ``type`` and ``vocab_size`` and write ``encode`` and ``decode_bytes``. A tokenizer whose registered
    configuration describes it wholly sets ``config`` and gets ``to_json`` for nothing; others override it.
    """

    type: str
    vocab_size: int
    config: TokenizerConfig
    eos_id: int | None = None
    """The token that ends a text, if there is one."""
    pad_id: int | None = None
    unk_id: int | None = None
    """The token that stands for what the vocabulary lacks."""
    mask_id: int | None = None
    """The token that stands for one that is hidden."""
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """The tokens that an encoder reads before and after a text, such as ``[CLS]`` and ``[SEP]``."""
    bytes_add_up: bool = False
    """Whether the bytes of a sequence are the bytes of its tokens one after the other, whatever their neighbours."""
    lossless: bool = True
    """Whether texts come back from their tokens; where they do not, bits per byte mean nothing and are left out."""

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Return the token ids of a text, in the smallest unsigned type. Raises DataError for lone surrogates."""

    @abstractmethod
    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the exact bytes that the tokens stand for. Raises DataError for an id outside the vocabulary."""

    def decode(self, ids: Ids) -> str:
        """Return the text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """Cut a text that arrives in chunks so that encoding each piece gives the tokens of the whole text.

        Here: not at all, which is always right, but keeps the text in memory.
        """
        whole = "".join(chunks)
        return iter([whole] if whole else [])

    def to_json(self) -> str:
        """Return what :func:`load_tokenizer` reads."""
        state = self.config.model_dump(mode="json", exclude_defaults=True)
        return json.dumps({"spiking_lm": {"type": self.type, **state}}, ensure_ascii=False, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the tokenizer to one JSON file, atomically."""
        atomic_write(path, self.to_json())

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the tokenizer: equal hashes give equal tokens."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def _checked(self, ids: Ids) -> Tokens:
        array = np.asarray(ids)
        if array.size == 0:
            return np.zeros(0, np.int64)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise DataError(f"token ids are a flat list of integers, not {array.dtype} of shape {array.shape}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size} tokens",
                hint="was it made with another tokenizer?",
            )
        return array


class _CharacterWise(Tokenizer):
    """A tokenizer that looks at one character at a time, so that a text may be cut between any two."""

    bytes_add_up = True

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        return (chunk for chunk in chunks if chunk)


class ByteTokenizer(_CharacterWise):
    """One token per UTF-8 byte; ids are the byte values."""

    type = "byte"
    vocab_size = 256

    def __init__(self, config: ByteConfig | None = None, texts: Iterable[str] = ()) -> None:
        self.config = config or ByteConfig()

    def encode(self, text: str) -> Tokens:
        """Return the UTF-8 bytes."""
        return np.frombuffer(encode_utf8(text), np.uint8)

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the ids as bytes."""
        return self._checked(ids).astype(np.uint8).tobytes()


class CharTokenizer(_CharacterWise):
    """One token per character (Unicode code point)."""

    type = "char"

    def __init__(self, config: CharConfig, texts: Iterable[str] = ()) -> None:
        characters = config.characters
        if characters is None:
            characters = _read_vocab(config.vocab) if config.vocab else _characters_of(texts)
        self.config: CharConfig = CharConfig(characters=characters, unknown=config.unknown)
        self.vocab_size = len(characters)
        if config.unknown == "<unk>":
            self.unk_id = len(characters)
            self.vocab_size += 1
        elif config.unknown is not None:
            self.unk_id = characters.find(config.unknown)
            if self.unk_id < 0:
                raise ConfigError(f"tokenizer 'char': unknown {config.unknown!r} is not a character of the vocabulary")
        points = np.array([ord(character) for character in characters], np.uint32)
        order = np.argsort(points)
        self._points, self._ids = points[order], order.astype(token_dtype(self.vocab_size))
        self._characters = np.append(points, np.uint32(0xFFFD)).astype("<u4")  # <unk> is written as U+FFFD

    def encode(self, text: str) -> Tokens:
        """Return one id per character. Raises DataError for an unknown one when ``unknown`` is None."""
        encode_utf8(text)
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        place = np.searchsorted(self._points, points)
        place[place == len(self._points)] = 0
        known = self._points[place] == points if len(self._points) else np.zeros(len(points), bool)
        ids = self._ids[place] if len(self._points) else np.zeros(len(points), token_dtype(self.vocab_size))
        if not known.all():
            if self.unk_id is None:
                where = int(np.argmin(known))
                raise DataError(
                    f"the vocabulary has no {text[where]!r} (U+{ord(text[where]):04X}, character {where} of the text)",
                    hint="set the tokenizer's option 'unknown' to a character that stands for such",
                )
            ids[~known] = self.unk_id
        return ids

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the characters as UTF-8."""
        return self._characters[self._checked(ids)].tobytes().decode("utf-32-le").encode("utf-8")


def _characters_of(texts: Iterable[str]) -> str:
    found = np.zeros(0x110000, bool)
    for text in texts:
        encode_utf8(text)
        found[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
    return "".join(map(chr, np.flatnonzero(found)))


def _read_vocab(path: Path) -> str:
    try:
        data = path.read_bytes()
        vocab = json.loads(data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"))
        characters = [vocab[str(index)] for index in range(len(vocab))]
    except OSError as err:
        raise DataError(f"cannot read the vocabulary {path}: {err.strerror}") from err
    except (ValueError, KeyError, TypeError) as err:
        hint = 'expected JSON: {"0": "a", "1": "b"}'
        raise DataError(f"{path} is not a character vocabulary ({type(err).__name__}: {err})", hint=hint) from err
    text = "".join(character for character in characters if isinstance(character, str))
    if len(text) != len(characters) or any(len(character) != 1 for character in characters):
        raise DataError(f"{path}: every entry of a character vocabulary is one character")
    if len(set(text)) != len(text):
        raise DataError(f"{path} names a character twice")
    encode_utf8(text, str(path))
    return text


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face ``tokenizers`` library; its JSON file is that library's own, unchanged.

    Special tokens written in the text are recognised, none is added around it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, type: str = "file") -> None:
        backend.no_truncation()
        backend.no_padding()
        self.type = type
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError("the tokenizer has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = _first(vocabulary, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")
        self.pad_id = _first(vocabulary, "<pad>", "[PAD]", "<|padding|>", "<|pad|>")
        self.unk_id = _first(vocabulary, "[UNK]", "<unk>")
        self.mask_id = _first(vocabulary, "[MASK]", "<mask>")
        self.around = _template(backend)
        layout = json.loads(backend.to_str())
        self.lossless = layout["model"]["type"] != "WordPiece"  # capitals and spaces are lost
        self.bytes_add_up = (layout.get("decoder") or {}).get("type") == "ByteLevel"
        self._can_cut = self.bytes_add_up and _splits_at_spaces(layout)
        self._token_bytes = self._byte_table(vocabulary) if self.bytes_add_up else []

    def _byte_table(self, vocabulary: dict[str, int]) -> list[bytes]:
        byte_of = {character: value for value, character in enumerate(_byte_alphabet())}
        added = self._backend.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            if index not in added and all(character in byte_of for character in token):
                table[index] = bytes(byte_of[character] for character in token)
            else:
                table[index] = token.encode("utf-8", errors="replace")
        return table

    def encode(self, text: str) -> Tokens:
        """Return the library's ids, without special tokens around the text."""
        encode_utf8(text)
        dtype = token_dtype(self.vocab_size)
        parts = [np.zeros(0, dtype)]
        for piece in self._cut([text], PIECE):
            batch = list(self._cut([piece], ENCODED_AT_ONCE))  # the library works on a batch in parallel
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            parts += [np.array(encoding.ids, dtype) for encoding in encodings]
        return np.concatenate(parts)

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the exact bytes of a byte-level tokenizer; of others, the UTF-8 of the decoded text."""
        checked: list[int] = self._checked(ids).tolist()
        if self.bytes_add_up:
            return b"".join([self._token_bytes[index] for index in checked])
        return self._backend.decode(checked, skip_special_tokens=False).encode("utf-8")

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """Cut after a line end between two visible characters, or before a single space between two words.

        There every GPT-like byte-level tokenizer splits anyway, so the tokens do not change. A text without such a
        place, and any text for other kinds of tokenizer, is kept whole in memory.
        """
        return self._cut(chunks, PIECE)

    def _cut(self, chunks: Iterable[str], size: int) -> Iterator[str]:
        return _cut_at_words(chunks, size) if self._can_cut else super().pieces(chunks)

    def to_json(self) -> str:
        """Return the library's JSON."""
        text: str = self._backend.to_str(pretty=True)
        return text


def _template(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that the tokenizer's own template puts before and after a text."""
    encoding = backend.encode("a")
    special = encoding.special_tokens_mask
    before = len(list(itertools.takewhile(bool, special)))
    after = len(list(itertools.takewhile(bool, reversed(special[before:]))))
    return tuple(encoding.ids[:before]), tuple(encoding.ids[len(special) - after :])


def _first(vocabulary: dict[str, int], *names: str) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _byte_alphabet() -> list[str]:
    """Return the 256 printable characters by which byte-level vocabularies write the bytes, in order of the bytes."""
    alphabet, spare = [], 256
    for value in range(256):
        if 33 <= value <= 126 or 161 <= value <= 172 or value >= 174:
            alphabet.append(chr(value))
        else:
            alphabet.append(chr(spare))
            spare += 1
    return alphabet


def _splits_at_spaces(layout: dict[str, Any]) -> bool:
    """Tell whether a tokenizer's file says that it splits at spaces, and that no token reaches across such a split."""
    if (layout.get("normalizer") or {"type": "NFC"})["type"] not in ("NFC", "NFD", "Lowercase"):
        return False
    for token in layout.get("added_tokens") or []:
        content = token["content"]
        if token["lstrip"] or token["rstrip"] or "\n" in content or (not content.isspace() and " " in content):
            return False
    splitter = layout.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    if any(step.get("add_prefix_space") for step in steps):
        return False
    return any(step["type"] == "Split" or (step["type"] == "ByteLevel" and step["use_regex"]) for step in steps if step)


def _cut_at_words(chunks: Iterable[str], size: int) -> Iterator[str]:
    """Join and cut a text into pieces of about ``size`` characters, at places where any such tokenizer splits."""
    buffer, tried = "", 0
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            buffer += chunk[start : start + size]
            if len(buffer) < size:
                continue
            cut = _last_cut(buffer, tried)
            if cut is None:
                tried = max(0, len(buffer) - 2)  # a cut is recognised by the character before and the one after
            else:
                yield buffer[:cut]
                buffer, tried = buffer[cut:], 0
    if buffer:
        yield buffer


def _last_cut(text: str, start: int) -> int | None:
    """Return the last safe place to cut ``text[start:]``, or None."""
    at = last = len(text) - 1
    while (at := text.rfind("\n", start + 1, at)) > start:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
    at = last
    while (at := text.rfind(" ", start + 1, at)) > start:
        if not text[at - 1].isspace() and text[at + 1].isalpha():
            return at
    return None


def train_bpe(config: BPEConfig, texts: Iterable[str]) -> SubwordTokenizer:
    """Train byte-level BPE on a text; the same text gives the same tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["[MASK]"] if config.mask else [],
        show_progress=False,
    )
    backend.train_from_iterator(_cut_at_words(_valid(texts), ENCODED_AT_ONCE), trainer)
    return SubwordTokenizer(backend, "bpe")


def _valid(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        encode_utf8(text)
        yield text


def read_tokenizer_file(config: FileConfig, texts: Iterable[str] = ()) -> SubwordTokenizer:
    """Read a Hugging Face ``tokenizer.json``; ``path`` may be the folder that holds it."""
    path = config.path.expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    return _from_library_json(_read_json_text(path), path)


def _read_json_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"no such tokenizer: {path.absolute()}", hint="expected a tokenizer.json") from None
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"cannot read the tokenizer {path}: {err}") from err


def _from_library_json(text: str, path: Path) -> SubwordTokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as err:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json of the tokenizers library: {err}") from err
    return SubwordTokenizer(backend)


def create_tokenizer(config: dict[str, Any], texts: Iterable[str] = (), *, where: str = "tokenizer") -> Tokenizer:
    """Build a tokenizer from ``{"type": name, ...}``; ``texts`` is what those that learn from the text learn from.

    Raises: UnknownNameError, ConfigError, MissingExtraError, DataError.
    """
    from spiking_lm import registry

    values = dict(config)
    name = values.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError(f"{where}: a tokenizer has a type", hint=f"one of: {', '.join(registry.all('tokenizers'))}")
    entry = registry.get("tokenizers", name)
    parsed = parse_config(entry.load("config"), values, where=f"{where} {name!r}")
    tokenizer: Tokenizer = entry.load("factory")(parsed, texts)
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read what :meth:`Tokenizer.save` wrote, or any Hugging Face ``tokenizer.json``; a folder means the one inside."""
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    return parse_tokenizer(_read_json_text(path), path)


def parse_tokenizer(text: str, path: Path) -> Tokenizer:
    """Build a tokenizer from the text of its file; ``path`` is what errors name."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as err:
        raise DataError(f"the tokenizer {path} is not JSON: {err}") from err
    if isinstance(content, dict) and isinstance(content.get("spiking_lm"), dict):
        return create_tokenizer(content["spiking_lm"], where=f"{path}, tokenizer")
    return _from_library_json(text, path)


class StreamDecoder:
    """Turns tokens into text as they come, giving characters only when they are complete."""

    def __init__(self, tokenizer: Tokenizer, after: Ids = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # What a text goes on from tells whether a space stands before the first new token.
        self._ids: list[int] = [] if tokenizer.bytes_add_up else [int(index) for index in after]
        self._shown = len(self._ids)  # tokens of _ids whose text has been given

    def feed(self, ids: int | Ids) -> str:
        """Take one token or several; return the text that they complete, which may be empty."""
        ids = [int(ids)] if isinstance(ids, (int, np.integer)) else [int(index) for index in ids]
        if self._tokenizer.bytes_add_up:
            return self._utf8.decode(self._tokenizer.decode_bytes(ids))
        given = ""
        for index in ids:
            self._ids.append(index)
            new = self._new_text()
            if new and not new.endswith("\ufffd"):
                given += new
                self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return given

    def flush(self) -> str:
        """Return what is left when no more tokens come: an incomplete character becomes U+FFFD."""
        rest = self._utf8.decode(b"", final=True) + self._new_text()
        self._utf8.reset()
        self._ids, self._shown = [], 0
        return rest

    def _new_text(self) -> str:
        # A token's text depends on the one before it (a leading space, a shared character), so the tokens that gave
        # the last text are decoded again with the new ones.
        known = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(known) :]


def stream_decoder(tokenizer: Tokenizer, after: Ids = ()) -> StreamDecoder:
    """Return a decoder for streaming generation: ``feed`` ids, get text, ``flush`` at the end.

    ``after`` are the tokens that the text goes on from; theirs is not given again.
    """
    return StreamDecoder(tokenizer, after)
