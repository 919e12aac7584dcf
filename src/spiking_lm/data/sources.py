"""Text on disk: finding, opening, checking and cutting the files of a corpus."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar, cast

from spiking_lm.errors import DataError

T = TypeVar("T")

BLOCK = 1 << 20
"""Bytes read at a time."""

COMPRESSED = ("", ".xz", ".gz", ".bz2")
"""Suffixes that are opened transparently."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed when its suffix is .xz, .gz, .bz2 or .zip (one member)."""
    try:
        if path.suffix == ".xz":
            return lzma.open(path)
        if path.suffix == ".gz":
            return cast(IO[bytes], gzip.open(path))
        if path.suffix == ".bz2":
            return bz2.open(path)
        if path.suffix == ".zip":
            return _open_zip(path)
        return path.open("rb")
    except OSError as err:
        raise DataError(f"cannot open {path}: {err.strerror or err}") from err


def _open_zip(path: Path) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as err:
        raise DataError(f"{path} is not a readable zip archive: {err}", hint="download it again") from err
    members = [info for info in archive.infolist() if not info.is_dir()]
    if len(members) != 1:
        raise DataError(
            f"{path} holds {len(members)} files, one was expected", hint="unpack it and give the path of the text file"
        )
    return archive.open(members[0])


def read_blocks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the (decompressed) bytes ``start:stop`` of a file, a block at a time."""
    try:
        with open_binary(path) as file:
            if start:
                file.seek(start)
            left = stop - start if stop is not None else None
            while left is None or left > 0:
                block = file.read(BLOCK if left is None else min(BLOCK, left))
                if not block:
                    return
                if left is not None:
                    left -= len(block)
                yield block
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, OSError) as err:
        raise DataError(f"cannot read {path}: {err}", hint="the file is damaged or cut off: fetch it again") from err


def decode_blocks(blocks: Iterable[bytes], name: str, offset: int = 0) -> Iterator[str]:
    """Decode UTF-8 a block at a time; a bad byte raises DataError with its offset in the file ``name``."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    fed = offset
    for block in blocks:
        yield _decode(decoder, block, name, fed, final=False)
        fed += len(block)
    yield _decode(decoder, b"", name, fed, final=True)


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, name: str, fed: int, *, final: bool) -> str:
    pending = decoder.getstate()[0]
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as err:
        where = fed - len(pending) + err.start
        data = pending + block
        guess = "utf-16" if where == 0 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
        raise DataError(
            f"{name} is not UTF-8: byte 0x{data[err.start]:02x} at offset {where} ({err.reason})",
            hint=f"convert it, e.g. with: iconv -f {guess} -t utf-8 FILE > FILE.utf8 (if it is {guess})",
        ) from None


@dataclass(frozen=True)
class TextSource:
    """A text that can be read any number of times in pieces: known hash and size, valid UTF-8, never all in memory."""

    name: str
    """What a person would look at: a path, or the name of an embedded text."""
    sha256: str
    """Of the text's UTF-8 bytes."""
    n_bytes: int
    n_chars: int
    blocks: Callable[[], Iterator[bytes]]
    """Opens the text anew and yields its bytes."""

    def read(self) -> Iterator[str]:
        """Yield the text in pieces that end with a line, or, in lines of more than a megabyte, with a character."""
        rest = ""
        for text in decode_blocks(self.blocks(), self.name):
            cut = text.rfind("\n") + 1 or (len(text) if len(rest) >= BLOCK else 0)
            if cut:
                yield rest + text[:cut]
            rest = text[cut:] if cut else rest + text
        if rest:
            yield rest

    def text(self) -> str:
        """Return the whole text."""
        return "".join(self.read())

    @classmethod
    def of(cls, text: str, name: str = "text") -> TextSource:
        """Make a source of a string. Raises DataError when it holds lone surrogates, which no text file can."""
        data = encode_utf8(text, name)
        return cls(name, hashlib.sha256(data).hexdigest(), len(data), len(text), lambda: iter((data,) if data else ()))

    @classmethod
    def of_file(cls, path: Path, start: int = 0, stop: int | None = None) -> TextSource:
        """Make a source of the bytes ``start:stop`` of a file, reading it once to hash it and to check its UTF-8."""
        digest, n_bytes, n_chars = hashlib.sha256(), 0, 0

        def counted() -> Iterator[bytes]:
            nonlocal n_bytes
            for block in read_blocks(path, start, stop):
                digest.update(block)
                n_bytes += len(block)
                yield block

        for text in decode_blocks(counted(), str(path), start):
            n_chars += len(text)
        return cls(str(path), digest.hexdigest(), n_bytes, n_chars, lambda: read_blocks(path, start, stop))


def encode_utf8(text: str, name: str = "the text") -> bytes:
    """Encode as UTF-8; a lone surrogate raises DataError with its position."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise DataError(
            f"{name} holds a lone surrogate U+{ord(text[err.start]):04X} at character {err.start}, which is not text",
            hint="it usually comes from decoding with errors='surrogateescape'; decode with errors='replace' instead",
        ) from None


def size_of(path: Path) -> int:
    """Return the number of (decompressed) bytes of a file."""
    if path.suffix not in (".xz", ".gz", ".bz2", ".zip"):
        return path.stat().st_size
    return sum(len(block) for block in read_blocks(path))


def text_start(path: Path) -> int:
    """Return where the text of a file begins: 3 after a UTF-8 byte order mark, else 0."""
    first = next(read_blocks(path, 0, 3), b"")
    return 3 if first == codecs.BOM_UTF8 else 0


def char_border(path: Path, position: int) -> int:
    """Return the last position at or before ``position`` that does not lie inside a UTF-8 character."""
    before = b"".join(read_blocks(path, max(0, position - 3), position))
    for back in range(1, len(before) + 1):
        byte = before[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return position - back if length > back else position
    return position


def line_border(path: Path, position: int, limit: int) -> int:
    """Return a good place to cut a text: after the line at ``position``, else after the word, else the character.

    Looks at most 64 KiB ahead and never at or beyond ``limit``.
    """
    ahead = b"".join(read_blocks(path, position, min(position + 65536, limit - 1)))
    for mark in (b"\n", b" "):
        found = ahead.find(mark)
        if found >= 0:
            return position + found + 1
    return char_border(path, position)


def find_one(candidates: Sequence[Path], what: str, layout: str) -> Path:
    """Return the first of ``candidates``, each also tried compressed, or raise DataError with what was looked for."""
    found = find_optional(candidates)
    if found is None:
        folders = sorted({str(path.parent.absolute()) for path in candidates})
        names = ", ".join(dict.fromkeys(path.name for path in candidates))
        missing = [folder for folder in folders if not Path(folder).is_dir()]
        raise DataError(
            f"{what}: looked for {names} (also with .xz, .gz, .bz2) in {', '.join(folders)}"
            + (f"; no such folder: {', '.join(missing)}" if missing else ""),
            hint=f"expected {layout}",
        )
    return found


def find_optional(candidates: Sequence[Path]) -> Path | None:
    """Return the first of ``candidates``, each also tried compressed, or None."""
    for path in candidates:
        for suffix in COMPRESSED:
            file = path.with_name(path.name + suffix)
            if file.is_file():
                return file
    return None


def split_names(path: Path, split: str, extensions: Sequence[str]) -> list[Path]:
    """Return the names under which a split may lie: in the folder ``path``, or beginning with ``path``."""
    names = {"valid": ("valid", "dev", "val", "validation")}.get(split, (split,))
    files = [f"{name}.{extension}".rstrip(".") for name in names for extension in extensions]
    path = path.absolute()
    return [path / file for file in files] + [path.with_name(f"{path.name}.{file}") for file in files if path.name]


def find_splits(path: Path, what: str, extensions: Sequence[str], layout: str) -> tuple[Path, Path | None, Path | None]:
    """Return the files of train, valid and test; None for what is missing, or all in one file."""
    if path.is_file():
        return path, None, None
    if path.suffix.lstrip(".") in extensions and not path.is_dir():
        raise DataError(f"{what}: {path}: no such file", hint=f"expected {layout}")
    train = find_one(split_names(path, "train", extensions), what, layout)
    valid, test = (find_optional(split_names(path, split, extensions)) for split in ("valid", "test"))
    return train, valid, test


def fill_splits(
    train: list[T],
    valid: list[T] | None,
    test: list[T] | None,
    shares: tuple[float, float],
    hold_out: Callable[[list[T], float], tuple[list[T], list[T]]],
) -> tuple[list[T], list[T], list[T]]:
    """Return train, valid and test; what is missing is held out of the first, by the ``shares`` of valid and test."""
    if test is None:
        train, test = hold_out(train, shares[1])
    if valid is None:
        train, valid = hold_out(train, shares[0])
    return train, valid, test


def read_lines(path: Path, *, latin1: bool = False) -> list[str]:
    """Return the lines of a (small) file, without line ends and byte order mark.

    ``latin1`` reads bytes that are not UTF-8 as Latin-1: only for sets that are published so.
    """
    data = b"".join(read_blocks(path))
    data = data[3:] if data.startswith(codecs.BOM_UTF8) else data
    try:
        text = "".join(decode_blocks([data], str(path)))
    except DataError:
        if not latin1:
            raise
        text = data.decode("latin-1")
    return [line.rstrip("\r\n") for line in io.StringIO(text, newline="\n")]
