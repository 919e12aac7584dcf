"""Token files: ``<name>.bin``, the tokens and nothing else, memory-mapped, and ``<name>.json``, what they are.

A file is built in one pass and in constant memory, whatever the size of the text, and is not there until it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spiking_lm.config import StrictModel, parse_config
from spiking_lm.data.sets import SPLITS, TextCorpus, TokenSplit, joint_hash, splits_to_learn_from
from spiking_lm.data.sources import Progress, TextSource
from spiking_lm.data.tokenizers import Tokenizer, create_tokenizer, load_tokenizer, token_dtype
from spiking_lm.errors import DataError
from spiking_lm.files import atomic_folder, atomic_write, sha256_file

IN_MEMORY = 8 << 20
"""Corpora of at most so many bytes are tokenized in memory each time and never touch the disk."""


class TokenFileInfo(StrictModel):
    """The sidecar of a token file."""

    format: Literal["spiking-lm tokens 1"] = "spiking-lm tokens 1"
    tokens: int
    dtype: Literal["uint8", "uint16", "uint32"]
    """Little-endian."""
    sha256: str
    """Of the ``.bin`` file."""
    source_sha256: str
    """Of the text's UTF-8 bytes."""
    tokenizer_sha256: str
    n_bytes: int
    n_chars: int


def write_tokens(
    path: Path, source: TextSource, tokenizer: Tokenizer, *, progress: Progress | None = None
) -> TokenFileInfo:
    """Tokenize a text into ``path`` (``<name>.bin``) and its sidecar; the sidecar, written last, makes the file valid.

    Parameters: ``progress`` is called with (bytes of text done, bytes in all).
    """
    sidecar = _sidecar(path)
    sidecar.unlink(missing_ok=True)
    dtype = token_dtype(tokenizer.vocab_size)
    digest, n_tokens, done = hashlib.sha256(), 0, 0
    temporary = path.with_name(f".{path.name}.building-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for piece in tokenizer.pieces(source.read()):
                ids = tokenizer.encode(piece).astype(dtype, copy=False)
                data = ids.tobytes()
                file.write(data)
                digest.update(data)
                n_tokens += len(ids)
                done += len(piece.encode("utf-8"))
                if progress:
                    progress(done, source.n_bytes)
            file.flush()
            os.fsync(file.fileno())
        if done != source.n_bytes:
            raise DataError(f"{source.name} changed while it was read", hint="start again when nothing writes to it")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    info = TokenFileInfo(
        tokens=n_tokens,
        dtype=dtype.name,
        sha256=digest.hexdigest(),
        source_sha256=source.sha256,
        tokenizer_sha256=tokenizer.sha256,
        n_bytes=source.n_bytes,
        n_chars=source.n_chars,
    )
    atomic_write(sidecar, json.dumps(info.model_dump(), indent=2) + "\n")
    return info


def open_tokens(path: Path, *, verify: bool = False) -> tuple[TokenSplit, TokenFileInfo]:
    """Memory-map a token file. The size is always checked against the sidecar, the content when ``verify`` is set.

    Raises: DataError when either file is missing, malformed, cut off or altered.
    """
    sidecar = _sidecar(path)
    rebuild = "delete it and let it be built again"
    try:
        content = json.loads(sidecar.read_bytes())
        size = path.stat().st_size
    except OSError as err:
        raise DataError(f"incomplete token file: cannot read {err.filename}: {err.strerror}", hint=rebuild) from err
    except ValueError as err:
        raise DataError(f"{sidecar} is not JSON: {err}", hint=rebuild) from err
    if not isinstance(content, dict):
        raise DataError(f"{sidecar} does not describe a token file", hint=rebuild)
    info = parse_config(TokenFileInfo, content, where=str(sidecar), error=DataError)
    dtype = np.dtype(info.dtype).newbyteorder("<")
    if size != info.tokens * dtype.itemsize:
        raise DataError(
            f"{path} has {size:,} bytes, {info.tokens:,} tokens of {info.dtype} need {info.tokens * dtype.itemsize:,}",
            hint=rebuild,
        )
    if verify and sha256_file(path) != info.sha256:
        raise DataError(f"{path} has been altered: its SHA-256 is not the one in {sidecar.name}", hint=rebuild)
    tokens = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)  # an empty file cannot be mapped
    return TokenSplit(tokens, info.n_bytes, info.n_chars, info.source_sha256), info


def tokenize(
    name: str,
    corpus: TextCorpus,
    tokenizer_config: dict[str, Any],
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Tokenizer, list[TokenSplit]]:
    """Make the tokenizer and tokenize the three texts: small ones in memory, others once, into the cache.

    A cache entry is a folder named after the texts' and the tokenizer's hashes; one that is damaged is built again.
    """
    sources = [corpus.train, corpus.valid, corpus.test]
    learned: list[TextSource] = [getattr(corpus, split) for split in splits_to_learn_from(tokenizer_config)]
    where = f"dataset {name!r}, tokenizer"
    if sum(source.n_bytes for source in sources) <= IN_MEMORY:
        tokenizer = create_tokenizer(tokenizer_config, _read(learned), where=where)
        return tokenizer, [
            TokenSplit(tokenizer.encode(source.text()), source.n_bytes, source.n_chars, source.sha256)
            for source in sources
        ]

    cache = cache_dir or default_cache_dir()
    tokenizer = _learn_once(cache / "tokenizers", tokenizer_config, learned, where)
    key = joint_hash(*(source.sha256 for source in sources), tokenizer.sha256)
    folder = cache / "tokens" / f"{name.replace('/', '-')}-{tokenizer.type}-{key[:32]}"
    try:
        return tokenizer, _open_folder(folder, sources, tokenizer)
    except DataError:
        pass  # not there, stale or damaged
    total, before = sum(source.n_bytes for source in sources), 0

    def report(done: int, _: int) -> None:
        if progress:
            progress(before + done, total)

    with _writing_to(folder), atomic_folder(folder, replace=True) as building:
        for split, source in zip(SPLITS, sources, strict=True):
            write_tokens(building / f"{split}.bin", source, tokenizer, progress=report)
            before += source.n_bytes
    return tokenizer, _open_folder(folder, sources, tokenizer)


def _open_folder(folder: Path, sources: list[TextSource], tokenizer: Tokenizer) -> list[TokenSplit]:
    splits = []
    for split, source in zip(SPLITS, sources, strict=True):
        tokens, info = open_tokens(folder / f"{split}.bin", verify=True)
        if (info.source_sha256, info.tokenizer_sha256) != (source.sha256, tokenizer.sha256):
            raise DataError(f"{folder / split}.bin was made from another text or by another tokenizer")
        splits.append(tokens)
    return splits


def _read(sources: list[TextSource]) -> Iterator[str]:
    return itertools.chain.from_iterable(source.read() for source in sources)


def _learn_once(folder: Path, config: dict[str, Any], sources: list[TextSource], where: str) -> Tokenizer:
    """Return the tokenizer; words and byte-pair encoding, which are slow to learn, are kept for the next time."""
    if config.get("type") not in ("bpe", "word"):
        return create_tokenizer(config, _read(sources), where=where)
    hashes = [source.sha256 for source in sources]
    key = joint_hash(*hashes, json.dumps(config, sort_keys=True, default=str))[:32]
    path, seal = folder / f"{key}.json", folder / f"{key}.sha256"
    try:
        known = load_tokenizer(path)
        if seal.read_text(encoding="ascii") == known.sha256:
            known.type = config["type"]  # the library's own JSON does not say that we trained it
            return known
    except (DataError, OSError, ValueError):
        pass  # not there or damaged
    tokenizer = create_tokenizer(config, _read(sources), where=where)
    with _writing_to(folder):
        tokenizer.save(path)
        atomic_write(seal, tokenizer.sha256)
    return tokenizer


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise DataError(
            f"cannot write the token cache {folder}: {err.strerror or err}",
            hint="set SPIKING_LM_CACHE to a folder with room that you may write to",
        ) from err


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def default_cache_dir() -> Path:
    """Return ``$SPIKING_LM_CACHE``, or ``spiking-lm`` in the user's cache folder of this platform."""
    stated = os.environ.get("SPIKING_LM_CACHE")
    if stated:
        return Path(stated).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spiking-lm"
