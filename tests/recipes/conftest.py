"""A small text, a recipe that learns it in a second, and the loaded first-party registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SENTENCE = "the cat sat on the mat and the dog lay on the rug while it rained on the town.\n"

RECIPE = """\
schema: 1
name: tests/tiny
seed: 3
data: {{type: text, path: {text}, tokenizer: {{type: byte}}}}
model: {{type: spikegpt, n_layer: 1, n_embd: 16, ctx_len: 32, dropout: 0.1}}
train:
  steps: 12
  batch_size: 2
  seq_len: 16
  log_every: 2
  eval_every: 6
  eval_tokens: 64
  save_every: 4
  optimizer: {{lr: 1.0e-2}}
evaluate: {{window: 32, stride: 16, max_tokens: 200}}
generate: {{prompt: "the ", max_new_tokens: 20}}
explain: {{tokens: 64}}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(SENTENCE * 120, encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(text=tmp_path / "text.txt"), encoding="utf-8")
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of the test's folder and return its path."""

    def write(text: str | bytes, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write
