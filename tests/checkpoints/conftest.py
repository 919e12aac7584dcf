"""A tiny model from a third-party plugin that is found like any installed one, in this process and in children."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spiking_lm import create_model

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture(autouse=True)
def tiny_plugin(add_plugins: Callable[[Path], None]) -> None:
    add_plugins(PLUGIN)


@pytest.fixture
def tiny() -> Callable[..., Any]:
    def make(seed: int = 0, **config: Any) -> Any:
        torch.manual_seed(seed)
        model = create_model("tiny", **config)
        model.seen.fill_(seed + 3)
        return model

    return make
