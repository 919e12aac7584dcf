"""A real, tiny model: what 4 bits cost it, rounded to the nearest and converted with all that there is."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import spiking_lm
from spiking_lm.data import TextData, load
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm_spikellm import pipeline
from spiking_lm_spikellm.conversion_config import SpikeLLMConversion
from spiking_lm_spikellm.sources import convert

FOUR_BITS: dict[str, Any] = {"weights": {"bits": 4}, "activations": {"bits": 4}}
BEST: dict[str, Any] = {
    "weights": {"bits": 4},
    "activations": {"bits": 4, "salient": {"rate": 0.3, "steps": 8}},
    "rotation": True,
    "gptq": {"follow": 0.5},
}


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data" / "models" / "stories260K"


@pytest.fixture(scope="module")
def stories(folder: Path) -> Tensor:
    """Stories that the float model wrote, (200, 256): its perplexity on them is its own entropy."""
    return torch.from_numpy(np.load(folder / "stories260K_selfsample_dev.npy").astype(np.int64))


@pytest.fixture(scope="module")
def own_text(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextData:
    """Other stories by the float model: it needs no text of anyone else to be calibrated on."""
    model = convert(folder)
    written = spiking_lm.generate(model, torch.ones(256, 1, dtype=torch.long), max_new_tokens=255, seed=1)
    note = tmp_path_factory.mktemp("text") / "text.txt"
    note.write_text("Once upon a time.\n" * 50, encoding="utf-8")
    tokenizer = {"type": "file", "path": str(folder / "tokenizer.json")}
    data = load({"type": "text", "path": str(note), "tokenizer": tokenizer})
    assert isinstance(data, TextData)
    return replace(data, train=replace(data.train, tokens=written.flatten().numpy()))


def perplexity(model: SpikingLanguageModel, stories: Tensor) -> float:
    with torch.no_grad():
        logits = torch.cat([model(rows[:, :-1]).logits for rows in stories.split(25)])
    return float(F.cross_entropy(logits.flatten(0, 1), stories[:, 1:].flatten()).exp())


@pytest.mark.slow
def test_four_bits_of_weights_and_activations(
    folder: Path, stories: Tensor, own_text: TextData, tmp_path: Path
) -> None:
    def converted(**options: Any) -> float:
        calibration = {"samples": 256, "window": 256}
        parsed = SpikeLLMConversion.model_validate({"source": str(folder), "calibration": calibration, **options})
        quiet = Console(file=io.StringIO())
        model, _ = pipeline.calibrate(parsed, own_text, tmp_path / "work", seed=0, console=quiet)
        return perplexity(model, stories)

    assert perplexity(convert(folder).eval(), stories) == pytest.approx(3.599, abs=2e-3)
    assert converted(**FOUR_BITS, rounding="nearest") == pytest.approx(
        5.042, abs=0.03
    )  # the table of words is in 16 bits here
    assert converted(**BEST) <= 4.1
