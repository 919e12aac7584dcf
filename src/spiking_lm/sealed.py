"""Sealed folders: ``SHA256SUMS`` over every file, and ``COMPLETE``, written last, with the hash of ``SHA256SUMS``.

Models, checkpoints and programs are such folders, so that one that is half written, altered or rotten is found before
anything in it is used. ``sha256sum -c`` reads both files. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError

from spiking_lm.errors import CheckpointError, UsageError
from spiking_lm.files import atomic_folder, sha256_file

SUMS, COMPLETE = "SHA256SUMS", "COMPLETE"

_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9_.\-]*)")


@contextlib.contextmanager
def new_folder(folder: Path, *, ours: Collection[str], what: str = "model") -> Iterator[Path]:
    """Give a temporary folder that becomes ``folder``, sealed, when the block ends.

    A folder that is there is replaced only when it holds nothing but files named ``ours``.

    Raises: UsageError when it holds other things, CheckpointError when the disk refuses; nothing changes then.
    """
    if folder.is_dir() and (strange := sorted(set(os.listdir(folder)) - set(ours))):
        raise UsageError(
            f"{folder} holds other things than a {what} ({', '.join(strange[:3])})", hint="choose another folder"
        )
    with naming_folder(folder), atomic_folder(folder, replace=True) as temporary:
        yield temporary
        _seal(temporary)


@contextlib.contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """Turn a refusal of the file system into an error that says which folder and what has become of the old content."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written: {error}",
            hint="what was saved before is untouched; check free space and permissions, then run again",
        ) from error


def listed_files(folder: Path) -> set[str]:
    """Return the names that a folder's ``SHA256SUMS`` lists; none where it is missing or spoilt."""
    path = folder / SUMS
    plain = path.is_file() and not path.is_symlink()
    return set(_parse_sums(path) or ()) if plain else set()


def _seal(folder: Path) -> None:
    """Write the hashes of all files, then ``COMPLETE`` with the hash of the hashes."""
    names = sorted(os.listdir(folder))
    (folder / SUMS).write_bytes("".join(f"{sha256_file(folder / name)}  {name}\n" for name in names).encode())
    (folder / COMPLETE).write_bytes(f"{sha256_file(folder / SUMS)}  {SUMS}\n".encode())
    for name in names:  # safetensors makes its files readable by their owner alone
        shutil.copymode(folder / COMPLETE, folder / name)


def verify_folder(
    path: str | os.PathLike[str],
    *,
    what: str = "model",
    hint: str = "restore what is named from a copy, or use another checkpoint of the run",
) -> None:
    """Check a sealed folder, of a ``what``, against its hashes.

    Raises: CheckpointError naming every file that is altered, cut short, missing, not listed, or not a plain file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    problems = find_problems(folder, what=what)
    if problems:
        raise CheckpointError(f"{folder}: " + "; ".join(problems), hint=hint)


def find_problems(folder: Path, *, what: str = "model") -> list[str]:
    """Return in words what is wrong with a sealed folder; nothing when it is as it was saved."""
    entries = {entry.name: entry for entry in os.scandir(folder)}
    for name, entry in entries.items():
        if not entry.is_file(follow_symlinks=False):  # before anything is opened: a link may lead anywhere
            kind = "a link" if entry.is_symlink() else "a folder" if entry.is_dir() else "no plain file"
            return [f"{name} is {kind}, which a {what} folder never holds"]
    if COMPLETE not in entries:
        return [f"incomplete: {COMPLETE} is missing"]
    if SUMS not in entries:
        return [f"{SUMS} is missing"]

    listed = _parse_sums(folder / SUMS)
    problems = [] if listed else [f"{SUMS} is not what was saved"]
    for name, digest in (listed or {}).items():
        if name not in entries:
            problems.append(f"{name} is missing")
        elif sha256_file(folder / name) != digest:
            problems.append(f"{name} is not what was saved (its SHA-256 differs)")
    extra = sorted(entries.keys() - (listed or entries).keys() - {SUMS, COMPLETE})
    problems += [f"{name} is not listed in {SUMS}" for name in extra]
    if _parse_sums(folder / COMPLETE) != {SUMS: sha256_file(folder / SUMS)}:
        # Where every file fits SHA256SUMS it is COMPLETE that was altered: a change to SHA256SUMS unfits some file.
        return [f"{SUMS if problems else COMPLETE} is not what was saved"]
    return problems


def _parse_sums(path: Path) -> dict[str, str] | None:
    """Read a file in the format of ``sha256sum``; None unless every byte of it is as we write it."""
    content = path.read_bytes().decode("utf-8", "replace")
    matches = [_SUM_LINE.fullmatch(line) for line in content.split("\n")[:-1]]
    sums = {match[2]: match[1] for match in matches if match}
    whole = content.endswith("\n") and all(matches) and len(sums) == len(matches)
    return sums if whole else None
