"""Makes ``lava_nets`` importable: pytest's importlib mode adds no folder to the path. And Lava, where it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from spiking_lm.errors import PluginError
from spiking_lm_lava.executor import LavaExecutor

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def lava() -> LavaExecutor:
    """Lava in its worker; without it the test is skipped."""
    try:
        return LavaExecutor.find()
    except PluginError as error:
        pytest.skip(f"{error.message}: {error.hint}")
