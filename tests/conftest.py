"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# Machines are noisy and torch's first call is slow: how long an example takes says nothing here.
settings.register_profile("spiking-lm", deadline=None)
settings.load_profile("spiking-lm")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden data and corpora that lies beside the repository on developers' and CI machines."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("golden data is not here: expected the folder 'shared' beside the repository")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
