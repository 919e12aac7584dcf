"""What all tests of kernels share: compiled kernels run in them whatever the size, where numba is installed."""

from __future__ import annotations

import importlib.util

import pytest

from spiking_lm.kernels import compiled


@pytest.fixture(autouse=True)
def _compiled_at_any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("implementation") != "numba":
        return
    if importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed: pip install 'spiking-lm[cpu]'")
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setattr(compiled, "SHARE", 100)
