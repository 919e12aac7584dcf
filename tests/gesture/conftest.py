"""A cache of its own for every test session, a small set of synthetic clips, and ``gesture_aedat`` importable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spiking_lm import data

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode adds no folder of tests to the path

SMALL: dict[str, Any] = {"type": "gestures11", "size": 16, "subjects": 5, "clips": 1, "min_s": 0.3, "max_s": 0.4}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where clips are kept, for all tests of them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def cache(folder: Path) -> Iterator[Path]:
    """The folder in which clips are kept, for as long as tests of clips run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKING_LM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def small(folder: Path) -> data.ClipData:
    """55 clips of 16 x 16 pixels, 12 to 16 frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKING_LM_CACHE", str(folder))
        clips = data.load(SMALL)
    assert isinstance(clips, data.ClipData)
    return clips
