"""A tiny model from a third-party plugin that is found like any installed one, in this process and in children."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spiking_lm import create_model, registry

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture(autouse=True)
def tiny_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(PLUGIN))
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", str(PLUGIN) if not before else f"{PLUGIN}{os.pathsep}{before}")
    previous = registry.set_manager(None)
    yield
    registry.set_manager(previous)


@pytest.fixture
def tiny() -> Callable[..., Any]:
    def make(seed: int = 0, **config: Any) -> Any:
        torch.manual_seed(seed)
        model = create_model("tiny", **config)
        model.seen.fill_(seed + 3)
        return model

    return make
