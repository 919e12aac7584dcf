"""The spikes kept for the report's picture."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spiking_lm.accounting import load_raster, record_raster, save_raster
from spiking_lm.config import ModelConfig
from spiking_lm.errors import DataError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.interfaces import LMOutput, SpikeSite, SpikingLanguageModel


class CounterConfig(ModelConfig):
    model_type: ClassVar[str] = "counter"
    vocab_size: int = 256


class Counter(SpikingLanguageModel):
    """Channel i of the site carries (i + token) % 5 - 2; a second site has few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.config = CounterConfig()
        self.anchor = nn.Parameter(torch.zeros(1))

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> tuple[()]:
        return ()

    def forward(self, tokens: Tensor, state: Any = None, *, return_spikes: bool = False) -> LMOutput:
        wide = ((torch.arange(1000) + tokens[..., None]) % 5 - 2).float()
        return LMOutput(
            wide, (), {"layer/0": wide, "small": tokens[..., None].float() * 100} if return_spikes else None
        )

    def spike_sites(self) -> list[SpikeSite]:
        return [SpikeSite("layer/0", "integer"), SpikeSite("small", "integer")]

    def graph(self) -> LMGraph:
        wide = Op("layer/0", "neuron", ("tokens",), "integer", 1000)
        return LMGraph((wide, Op("small", "neuron", ("tokens",), "integer", 1)))


TOKENIZER = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"))


def test_raster_keeps_an_even_choice_of_channels() -> None:
    raster = record_raster(Counter(), [0, 1, 2])
    wide = raster["layer/0"]
    assert (wide.shape, wide.dtype) == ((3, 128), np.uint8)
    chosen = np.round(np.linspace(0, 999, 128)).astype(int)
    expected = [[abs((c + t) % 5 - 2) for c in chosen] for t in range(3)]
    assert wide.tolist() == expected
    assert raster["small"].tolist() == [[0], [100], [200]]


def test_saved_raster_comes_back_without_pickle(tmp_path: Path) -> None:
    tokens = np.frombuffer("naïve".encode(), np.uint8)
    save_raster(Counter(), tokens, TOKENIZER, tmp_path / "raster.npz", n_tokens=4)
    raster = load_raster(tmp_path / "raster.npz")
    assert raster.text == ["n", "a", "\ufffd", "\ufffd"]
    assert raster.channels == {"layer/0": 1000, "small": 1}
    for site, spikes in record_raster(Counter(), tokens[:4]).items():
        np.testing.assert_array_equal(raster.spikes[site], spikes)
    with zipfile.ZipFile(tmp_path / "raster.npz") as archive:
        assert {info.filename for info in archive.infolist()} == {
            *("text.npy", "sites.npy", "channels.npy", "spikes_0.npy", "spikes_1.npy")
        }
    assert [p.name for p in tmp_path.iterdir()] == ["raster.npz"]


def test_damaged_and_pickled_rasters_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "raster.npz"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match=r"raster\.npz"):
        load_raster(path)
    np.savez(path, text=np.array([{"a": 1}], dtype=object), sites=np.array([{}], dtype=object), channels=np.array([]))
    with pytest.raises(DataError, match="pickle"):
        load_raster(path)


def test_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="256"):
        record_raster(Counter(), [256])
