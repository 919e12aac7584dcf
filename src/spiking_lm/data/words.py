"""The word tokenizer: a closed vocabulary of words, as perplexity per word is published with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from spiking_lm.data.configs import WordConfig
from spiking_lm.data.sources import encode_utf8
from spiking_lm.data.tokenizers import PIECE, Ids, Tokenizer, Tokens, token_dtype
from spiking_lm.errors import ConfigError

UNKNOWN, LINE_END, MASK = "<unk>", "<eos>", "<mask>"

_WORDS_AND_MARKS = r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_"
"""Letters and digits, apostrophes between them included (don't), and every other visible character by itself."""

_NO_SPACE_BEFORE = frozenset(".,;:!?%)]}'’”…")
_NO_SPACE_AFTER = frozenset("([{“")
_NO_SPACE_AROUND = frozenset("-–—")


class WordTokenizer(Tokenizer):
    """One token per word, in the order in which the words first appear; words that are not known become ``<unk>``.

    ``encode(decode(ids)) == ids``, but a text does not come back from its tokens: spaces, unknown words and, with
    ``lowercase``, capitals are lost.
    """

    type = "word"
    lossless = False

    def __init__(self, config: WordConfig, texts: Iterable[str] = ()) -> None:
        self._lowercase, self._eos = config.lowercase, config.eos
        self._specials = [UNKNOWN, *([LINE_END] if config.eos else []), *([MASK] if config.mask else [])]
        specials = "|".join(self._specials)
        pattern = r"\S+" if config.split == "whitespace" else f"{specials}|{_WORDS_AND_MARKS}"
        self._find = re.compile(pattern).findall
        self._marks = config.split == "punctuation"
        words = config.words if config.words is not None else self._learn(texts, config.min_count)
        self.config: WordConfig = WordConfig(
            words=words, lowercase=config.lowercase, split=config.split, eos=config.eos, mask=config.mask
        )
        self._words = words
        self._ids = {word: index for index, word in enumerate(words)}
        self.vocab_size = len(words)
        if not all(word in self._ids for word in self._specials):
            needed = " and ".join(map(repr, self._specials))
            raise ConfigError(f"tokenizer 'word': words must have {needed}")
        if (odd := next((word for word in words if self._cut(word) != [word]), None)) is not None:
            raise ConfigError(
                f"tokenizer 'word': words has {odd!r}, which is never one token with split: {config.split}"
                + (" and lowercase" if config.lowercase else "")
            )
        self.unk_id = self._ids[UNKNOWN]
        self.eos_id = self._ids[LINE_END] if config.eos else None
        self.mask_id = self._ids[MASK] if config.mask else None

    def _cut(self, text: str) -> list[str]:
        text = text.lower() if self._lowercase else text
        if not self._eos:
            return self._find(text)
        first, *lines = text.split("\n")
        words = self._find(first)
        for line in lines:
            words.append(LINE_END)
            words += self._find(line)
        return words

    def _learn(self, texts: Iterable[str], min_count: int) -> list[str]:
        counts: Counter[str] = Counter()
        for text in self.pieces(texts):
            encode_utf8(text)
            counts.update(self._cut(text))
        words = [word for word, n in counts.items() if n >= min_count or word in self._specials]
        return words + [word for word in self._specials if word not in counts]

    def encode(self, text: str) -> Tokens:
        """Return one id per word and, with ``eos``, one per line end."""
        encode_utf8(text)
        unknown, known = self.unk_id, self._ids
        return np.array([known.get(word, unknown) for word in self._cut(text)], token_dtype(self.vocab_size))

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the words with spaces between them, ``<eos>`` as a line end.

        With ``split: punctuation`` no space stands before ``. , ; : ! ? % ) ] }``, an apostrophe, a closing curly quote
        and an ellipsis, after an opening bracket or curly quote, and around a hyphen or dash.
        """
        pieces: list[str] = []
        before = ""
        for index in self._checked(ids).tolist():
            word = "\n" if index == self.eos_id else self._words[index]
            if before and not self._touch(before, word):
                pieces.append(" ")
            pieces.append(word)
            before = word
        return "".join(pieces).encode("utf-8")

    def _touch(self, before: str, after: str) -> bool:
        """Tell whether two tokens stand without a space between them."""
        if "\n" in (before, after):
            return True
        return self._marks and (
            after in _NO_SPACE_BEFORE
            or before in _NO_SPACE_AFTER
            or before in _NO_SPACE_AROUND
            or after in _NO_SPACE_AROUND
        )

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """Cut at white space, where no word reaches across."""
        buffer = ""
        for chunk in chunks:
            buffer += chunk
            if len(buffer) < PIECE:
                continue
            cut = next((at for at in range(len(buffer) - 1, -1, -1) if buffer[at].isspace()), -1) + 1
            if cut:
                yield buffer[:cut]
                buffer = buffer[cut:]
        if buffer:
            yield buffer
