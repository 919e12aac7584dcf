"""Fixtures for authors of plugins; pytest finds this module through the entry point ``pytest11``.

It is imported in every pytest run of the environment, so it imports nothing heavy itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from spiking_lm.registry import PluginManager

pytest.register_assert_rewrite(
    *(f"spiking_lm.testing.{module}" for module in ("checks", "encoders", "models", "neurons"))
)

_SUBJECTS = ("The miller", "Her sister", "A stranger", "The old captain", "Nobody", "The younger clerk")
_VERBS = ("counted", "forgot", "mended", "carried home", "described", "waited for")
_OBJECTS = (
    "the silver coins",
    "a broken lamp",
    "the last letter",
    "his winter coat",
    "the evening boat",
    "seven apples",
)
_PLACES = ("by the river", "after supper", "in the rain", "without a word", "before the bell rang")


@pytest.fixture
def spiking_lm_manager() -> PluginManager:
    """A plugin manager that refuses discovery and knows the core only; ``register()`` your own plugin in it."""
    from spiking_lm import builtin, registry

    manager = registry.PluginManager(discover=False)
    manager.register(builtin, "core")
    return manager


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 900 English sentences (about 40 kB, always the same), enough to train on for a few steps."""
    folder = tmp_path_factory.mktemp("tiny_corpus")
    sentences = []
    for i in range(900):
        subject, verb = _SUBJECTS[i * 5 % 6 if i % 7 else i % 6], _VERBS[(i * i + 3) % 6]
        sentences.append(f"{subject} {verb} {_OBJECTS[(i * 7 + i // 6) % 6]} {_PLACES[(i + i // 5) % 5]}.")
    lines = (" ".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4))
    path = folder / "tiny.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
