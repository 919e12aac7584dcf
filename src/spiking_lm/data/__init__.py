"""Text and labelled sets, tokenizers and token files. Importing this imports neither torch nor ``tokenizers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spiking_lm.config import parse_config
from spiking_lm.data.sets import Example, LabelledCorpus, LabelledData, TextCorpus, TextData, TokenCorpus, TokenSplit
from spiking_lm.data.sets import joint_hash
from spiking_lm.data.sources import Progress, TextSource
from spiking_lm.data.tokenizers import StreamDecoder, Tokenizer, create_tokenizer, load_tokenizer, stream_decoder
from spiking_lm.errors import ConfigError

__all__ = [
    "Example",
    "LabelledCorpus",
    "LabelledData",
    "StreamDecoder",
    "TextCorpus",
    "TextData",
    "TextSource",
    "TokenCorpus",
    "TokenSplit",
    "Tokenizer",
    "create_tokenizer",
    "load",
    "load_tokenizer",
    "stream_decoder",
]


def load(
    config: dict[str, Any], *, cache_dir: Path | None = None, progress: Progress | None = None
) -> TextData | LabelledData:
    """Load a dataset as a recipe's ``data`` mapping describes it: ``type``, its options, and ``tokenizer``.

    Parameters: ``progress`` is called with (bytes done, bytes in all) while a large text is tokenized.

    Raises: UnknownNameError, ConfigError (names the field), DataError (names the file), MissingExtraError.
    """
    from spiking_lm import registry

    values = dict(config)
    name = values.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError("data: a dataset has a type", hint=f"one of: {', '.join(registry.all('datasets'))}")
    choice = values.pop("tokenizer", {"type": "byte"})
    entry = registry.get("datasets", name)
    parsed = parse_config(entry.load("config"), values, where=f"dataset {name!r}")
    corpus = entry.load("factory")(parsed)
    tokenizer = create_tokenizer(choice, corpus.train.read(), where="data.tokenizer")
    splits = []
    for source in (corpus.train, corpus.valid, corpus.test):
        tokens = tokenizer.encode(source.text())
        splits.append(TokenSplit(tokens, source.n_bytes, source.n_chars, source.sha256))
    digest = joint_hash(*(split.sha256 for split in splits), tokenizer.sha256)
    return TextData(name, tokenizer, *splits, digest)
