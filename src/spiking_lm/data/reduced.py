"""The tokenizer of a model, whole or with only those tokens that a text has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from spiking_lm.data.configs import ModelTokenizerConfig
from spiking_lm.data.tokenizers import Ids, Tokenizer, Tokens, load_tokenizer, parse_tokenizer, token_dtype
from spiking_lm.errors import ConfigError, DataError

_FROM = "tokenizer 'model'"


class ReducedTokenizer(Tokenizer):
    """Some tokens of another tokenizer, numbered anew in the same order; the others become the unknown token.

    A text is cut as the other tokenizer cuts it, so that token by token both read the same, and ``kept[ids]`` are the
    other's ids. Raises: ConfigError when that one has no token for what is unknown.
    """

    type = "model"
    lossless = False

    def __init__(self, base: Tokenizer, kept: Iterable[int]) -> None:
        if base.unk_id is None:
            raise ConfigError(
                f"{_FROM}: a {base.type} tokenizer without an unknown token cannot be reduced",
                hint="keep: all takes it as it is",
            )
        self.base = base
        self.kept = np.unique(np.array([*kept, *_special(base)], np.int64))
        if self.kept[-1] >= base.vocab_size or self.kept[0] < 0:
            raise ConfigError(f"{_FROM}: kept goes beyond the {base.vocab_size} tokens of the whole vocabulary")
        self.vocab_size = len(self.kept)
        place = np.full(base.vocab_size, np.searchsorted(self.kept, base.unk_id))
        place[self.kept] = np.arange(self.vocab_size)
        self._place = place.astype(token_dtype(self.vocab_size))
        self.eos_id, self.pad_id, self.unk_id, self.mask_id = (
            None if index is None else int(place[index])
            for index in (base.eos_id, base.pad_id, base.unk_id, base.mask_id)
        )
        before, after = base.around
        self.around = tuple(int(place[index]) for index in before), tuple(int(place[index]) for index in after)
        self.bytes_add_up = base.bytes_add_up

    def encode(self, text: str) -> Tokens:
        """Return the ids of the tokens that are kept, in the order of the text."""
        return self._place[self.base.encode(text)]

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return what the other tokenizer makes of its own ids."""
        return self.base.decode_bytes(self.kept[self._checked(ids)])

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """Cut a text where the other tokenizer may cut it."""
        return self.base.pieces(chunks)

    def to_json(self) -> str:
        """Return the whole vocabulary and which of it is kept."""
        state = {"type": self.type, "base": json.loads(self.base.to_json()), "kept": self.kept.tolist()}
        return json.dumps({"spiking_lm": state}, ensure_ascii=False) + "\n"


def _special(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that mean something by themselves, whether a text has them or not."""
    named = [tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id]
    before, after = tokenizer.around
    return [*(index for index in named if index is not None), *before, *after]


def model_tokenizer(config: ModelTokenizerConfig, texts: Iterable[str] = ()) -> Tokenizer:
    """Return the tokenizer that lies in a model's folder, or with ``keep: seen`` what ``texts`` need of it.

    Raises: ConfigError when no folder is named, CheckpointError when there is none, DataError when it holds no
    tokenizer.
    """
    if config.base is not None and config.kept is not None:
        return ReducedTokenizer(parse_tokenizer(json.dumps(config.base), Path(f"{_FROM}, base")), config.kept)
    if config.path is None:
        raise ConfigError(
            f"{_FROM}: whose it is is not set",
            hint="give its path, or a recipe whose train stage has start or distill.teacher",
        )
    base = tokenizer_of_model(config.path)
    if config.keep == "all":
        return base
    seen = np.zeros(base.vocab_size, bool)
    for piece in base.pieces(texts):
        seen[base.encode(piece)] = True
    return ReducedTokenizer(base, np.flatnonzero(seen).tolist())


def tokenizer_of_model(path: Path | str) -> Tokenizer:
    """Read the tokenizer of a model folder or a run. Raises: CheckpointError, DataError as :func:`model_tokenizer`."""
    from spiking_lm.checkpoints import resolve_model

    folder = resolve_model(Path(path).expanduser())
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"{folder}: the model was saved without a tokenizer", hint="save_model(model, path, tokenizer=...) keeps it"
        )
    return load_tokenizer(folder)
