"""Megatron's indexed token files (``MMapIndexedDataset``), read-only."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.data.tokenizers import Tokens, token_dtype
from spiking_lm.errors import DataError
from spiking_lm.files import sha256_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f8", 8: "<u2"}
"""Code in the file -> type; codes 6 and 7 are both 64-bit floats, as the format's writers have it."""


@dataclass(frozen=True)
class BinIdx:
    """An open pair of files: all tokens as one stream, and where the sequences lie in it."""

    path: Path
    tokens: Tokens
    """Unsigned; memory-mapped, except for the 8-byte types, which are converted."""
    item_bytes: int
    """Bytes of a token in the file, in which ``pointers`` count."""
    sizes: NDArray[np.int32]
    """Tokens of each sequence."""
    pointers: NDArray[np.int64]
    """Byte offset of each sequence."""
    doc_idx: NDArray[np.int64]
    """First sequence of each document, and the end."""

    def get(self, index: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Return ``length`` tokens from ``offset`` in sequence ``index``; it may run on into the next sequences."""
        length = int(self.sizes[index]) - offset if length is None else length
        start = int(self.pointers[index]) // self.item_bytes + offset
        if not 0 <= start <= start + length <= len(self.tokens):
            raise DataError(f"{self.path} has {len(self.tokens)} tokens, not {start} to {start + length}")
        return self.tokens[start : start + length]

    @property
    def sha256(self) -> str:
        """Hash of the token file."""
        return sha256_file(self.path)


def open_binidx(path: Path) -> BinIdx:
    """Open ``PREFIX.bin`` and ``PREFIX.idx``; ``path`` is the prefix or either file.

    Raises: DataError when a file is missing, is not of this format, or does not fit the other.
    """
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    bin_path, idx_path = prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
    for file in (bin_path, idx_path):
        if not file.is_file():
            raise DataError(f"no such file: {file.absolute()}", hint="expected PREFIX.bin and PREFIX.idx (Megatron)")
    index = np.memmap(idx_path, np.uint8, mode="r") if idx_path.stat().st_size else np.zeros(0, np.uint8)
    if len(index) < _HEADER.size or bytes(index[:9]) != _MAGIC:
        raise DataError(f"{idx_path} is not a Megatron index: it does not begin with MMIDIDX")
    _, version, code, n_sequences, n_documents = _HEADER.unpack(bytes(index[: _HEADER.size]))
    if version != 1:
        raise DataError(f"{idx_path} has version {version}, only version 1 is known")
    if code not in DTYPES:
        raise DataError(f"{idx_path} has the unknown token type {code}", hint=f"known: {sorted(DTYPES)}")
    needed = _HEADER.size + 12 * n_sequences + 8 * n_documents
    if len(index) < needed:
        raise DataError(f"{idx_path} is cut off: it has {len(index):,} bytes, its header asks for {needed:,}")
    sizes, at = _read(index, _HEADER.size, "<i4", n_sequences)
    pointers, at = _read(index, at, "<i8", n_sequences)
    doc_idx, _ = _read(index, at, "<i8", n_documents)

    dtype = np.dtype(DTYPES[code])
    n_bytes = bin_path.stat().st_size
    end = int((pointers + sizes.astype(np.int64) * dtype.itemsize).max(initial=0))
    if n_bytes % dtype.itemsize or end > n_bytes:
        raise DataError(
            f"{bin_path} has {n_bytes:,} bytes of {dtype.name}; its index asks for {end:,}",
            hint="one of the two files is damaged or belongs to another",
        )
    if (n_sequences and int(pointers[0]) != 0) or (pointers % dtype.itemsize).any() or (sizes < 0).any():
        raise DataError(f"{idx_path} is damaged: its sequences do not lie at whole tokens from the start of the file")
    tokens = np.memmap(bin_path, dtype, mode="r") if n_bytes else np.zeros(0, dtype)
    return BinIdx(bin_path, _unsigned(tokens, bin_path), dtype.itemsize, sizes, pointers, doc_idx)


def _unsigned(tokens: Tokens, path: Path) -> Tokens:
    """Return the tokens in an unsigned type; raise DataError for what cannot be one."""
    if tokens.dtype.kind == "u" or not len(tokens):
        return tokens
    lowest, highest = tokens.min(), tokens.max()
    if not (lowest >= 0 and highest < 1 << 32) or (tokens.dtype.kind == "f" and (tokens != np.floor(tokens)).any()):
        raise DataError(f"{path} holds values that are no tokens: from {lowest} to {highest}")
    if tokens.dtype.itemsize == 8:
        return tokens.astype(token_dtype(int(highest) + 1))
    return tokens.view(f"<u{tokens.dtype.itemsize}")


def _read(index: NDArray[np.uint8], at: int, dtype: str, count: int) -> tuple[NDArray[Any], int]:
    end = at + np.dtype(dtype).itemsize * count
    return np.frombuffer(bytes(index[at:end]), dtype), end
