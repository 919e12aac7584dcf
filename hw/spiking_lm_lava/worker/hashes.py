"""The one thing in lava-nc 0.10.0 that Python 3.11 and later refuse, mended while Lava is imported.

``lava.magma.compiler.var_model`` has dataclasses whose fields default to an instance of another dataclass. Python 3.11
takes a default that cannot be hashed for a mutable one, and a dataclass with ``__eq__`` cannot be hashed. So, while
:func:`hashable_dataclasses` is entered, dataclasses of modules of ``lava`` hash by identity, as any object does.
Nothing on disk changes, no other package is touched, and nothing in Lava uses the hash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def hashable_dataclasses(package: str = "lava") -> Iterator[None]:
    """Let dataclasses that are defined meanwhile in ``package`` hash by identity, on Pythons that ask for it."""
    if sys.version_info < (3, 11):
        yield
        return
    original = dataclasses.dataclass

    def dataclass(cls: Any = None, /, **options: Any) -> Any:
        def decorate(cls: Any) -> Any:
            made = original(cls, **options)
            if made.__module__.partition(".")[0] == package and made.__hash__ is None:
                made.__hash__ = object.__hash__
            return made

        return decorate if cls is None else decorate(cls)

    dataclasses.dataclass = dataclass
    try:
        yield
    finally:
        dataclasses.dataclass = original
