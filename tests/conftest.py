"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from spiking_lm import registry

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


@pytest.fixture
def add_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Put a folder where this process and its children find the distributions in it, for one test."""
    previous = registry.set_manager(None)

    def add(folder: Path) -> None:
        monkeypatch.syspath_prepend(str(folder))
        before = os.environ.get("PYTHONPATH")
        monkeypatch.setenv("PYTHONPATH", str(folder) if not before else f"{folder}{os.pathsep}{before}")

    yield add
    registry.set_manager(previous)


@pytest.fixture(autouse=True)
def _compiled_at_any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels, where a test asks for them, run whatever the size, if numba is installed."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("implementation") != "numba":
        return
    from spiking_lm.kernels import compiled

    if importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed: pip install 'spiking-lm[cpu]'")
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setattr(compiled, "SHARE", 100)


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def interruptible() -> Callable[[], None] | None:
    """What to give as ``preexec_fn`` to a child that is to be interrupted.

    A process that a script starts in the background ignores Ctrl-C, and passes that on.
    """
    return None if os.name == "nt" else _hear_ctrl_c
