"""A small model and a backend for it from a third-party plugin, found like any installed one, here and in children."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spiking_lm import create_model

PLUGIN = Path(__file__).parent / "plugin"

RECIPE = """\
schema: 1
name: toy
seed: 1
data: {{type: text, path: {text}}}
model: {{type: toy, width: 12}}
train: {{steps: 20, batch_size: 4, seq_len: 16, eval_tokens: 64, save_every: 10, log_every: 5, threads: 1,
         optimizer: {{lr: 1.0e-2}}}}
prune: {{sparsity: 0.75, steps: 20, every: 4, ramp: 0.5}}
evaluate: {{window: 32, stride: 16, max_tokens: 200}}
explain: {{tokens: 64}}
deploy: {{backend: toy, tokens: 100, bits: 8}}
report: {{raster_tokens: 40}}
"""


@pytest.fixture(autouse=True)
def toy_plugin(add_plugins: Callable[[Path], None]) -> None:
    add_plugins(PLUGIN)


@pytest.fixture
def toy() -> Callable[..., Any]:
    def make(seed: int = 0, **config: Any) -> Any:
        torch.manual_seed(seed)
        return create_model("toy", **{"vocab_size": 256, **config}).eval()

    return make


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe that trains, prunes, deploys and reports, in a folder with its text."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog lay on the rug.\n" * 100, encoding="utf-8")
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE.format(text=text), encoding="utf-8")
    return path
