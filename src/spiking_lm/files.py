"""Files that matter: written whole or not at all, and hashed.

A write goes to ``.<name>.tmp-<pid>-<host>-<n>`` beside its target, is synced to the disk and renamed into place, so
a reader sees the old content or the new, whatever happens in between: an exception, a full disk, ``kill -9``, a power
cut. What a killed process left behind is removed by the next write in the same folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_HOST = re.sub(r"[^A-Za-z0-9.]", "_", platform.node())[:60] or "localhost"
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<role>tmp|old)-(?P<pid>\d+)-(?P<host>[^-]+)-\d+$")
_counter = itertools.count()
_in_use: set[Path] = set()
"""Temporary paths of this process: another one with our pid is left from an earlier life (pid 1 in a container)."""


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) to ``path``, making its folder; on any failure the previous content stays.

    Raises: OSError, e.g. for a full disk; nothing is left behind.
    """
    target = _real(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target.parent)
    with _temporary(target) as temporary:
        with open(temporary, "xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    _sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes ``path`` when the block ends; an exception discards it.

    ``replace`` allows a folder that is already there to be exchanged for the new one; without it a folder with content
    raises FileExistsError before the block starts.
    """
    target = _real(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target.parent)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is in the way of a folder", str(target))
    if not replace and target.exists() and any(target.iterdir()):
        raise FileExistsError(errno.EEXIST, "the folder exists and is not empty", str(target))
    with _temporary(target) as temporary:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync_file(Path(folder, name))
            _sync_folder(Path(folder))
        _move_folder(temporary, target)
    _sync_folder(target.parent)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file or a folder so that it is never seen half removed."""
    target = _real(path)
    with _temporary(target) as temporary:
        os.rename(target, temporary)


def clean_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left in ``folder``; put back a folder caught in its replacement."""
    folder = _real(folder)
    for entry in list(os.scandir(folder)):
        match = _TEMPORARY.match(entry.name)
        if match is None or match["host"] != _HOST or Path(entry.path) in _in_use or _is_running(int(match["pid"])):
            continue
        target = folder / match["name"]
        if match["role"] == "old" and not target.exists():
            with contextlib.suppress(OSError):
                os.rename(entry.path, target)
        else:
            _remove(Path(entry.path))


def _real(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))  # a link to the target stays a link


@contextlib.contextmanager
def _temporary(target: Path, role: str = "tmp") -> Iterator[Path]:
    """Reserve a temporary name beside ``target``; whatever is still there when the block ends is removed."""
    temporary = target.with_name(f".{target.name}.{role}-{os.getpid()}-{_HOST}-{next(_counter)}")
    _in_use.add(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _in_use.discard(temporary)


def _move_folder(source: Path, target: Path) -> None:
    if not target.exists():
        os.rename(source, target)
    elif _exchange(source, target):
        pass  # ``source`` now holds the previous content and is removed by the caller
    else:
        # Two renames: killed in between, the previous content is put back by the next clean_leftovers.
        with _temporary(target, "old") as old:
            os.rename(target, old)
            try:
                os.rename(source, target)
            except BaseException:
                os.rename(old, target)
                raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step where the system can (Linux: renameat2); False if it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _sync_file(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make names in a folder durable; Windows has no such call, and some network file systems refuse it."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _is_running(pid: int) -> bool:
    """Whether a process exists; our own pid counts as dead, for live paths of ours are known by name."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # os.kill(pid, 0) would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
