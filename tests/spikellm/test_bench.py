"""The benchmarks of forward passes and of the memory of conversions, on sizes that take no time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spiking_lm import registry
from spiking_lm_spikellm import bench_memory
from spiking_lm_spikellm.bench import FORMS
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.sources import open_source, tensor_shapes

SMALL: dict[str, Any] = {"n_embd": 24, "n_inner": 40, "n_head": 4, "n_kv_head": 2}


def test_every_form_is_measured_against_the_float_model() -> None:
    forward = registry.get("benchmarks", "spikellm/forward").load("function")
    rows = forward(1, tokens=8, n_layer=1, **SMALL)
    assert [row.name for row in rows] == [f"spikellm/forward-{name}" for name in FORMS]
    for row in rows:
        assert row.value is not None
        assert row.value > 0
        ours, peer = (float(part.split()[0]) for part in row.note.replace("float ", "").split("; "))
        assert abs(row.value - ours / peer) < 0.2 * row.value + 0.1 / peer
    assert [row.target for row in rows] == [target for _, target in FORMS.values()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc/self/status tells the memory of a process")
def test_conversions_are_measured_in_a_process_of_their_own() -> None:
    rows = bench_memory.memory(1, **SMALL, n_layer=3, blocks=2)
    names = [f"spikellm-memory/{name}{more}" for name in bench_memory.METHODS for more in ("", "-7b")]
    assert [row.name for row in rows] == names
    for row in rows:
        assert row.value is not None
        assert len(row.details["seconds"]) == 2
        assert 0.05e9 < row.details["at_start"] <= row.details["between_blocks"] <= row.details["peak"]
        if row.name.endswith("-7b"):
            assert row.target is None
            assert "projection" in row.what
            assert row.note.startswith("projection from measured parts")
            growth = row.details["growth"]
            assert growth > 1000  # a block of the larger model over this one's
            block = row.details["peak"] - row.details["between_blocks"]
            assert row.value == pytest.approx((row.details["between_blocks"] + growth * block) / 1e9)
        else:
            assert row.target == 6.0
            assert row.value == row.details["peak"] / 1e9


def test_the_synthetic_model_is_a_llama_in_shards(tmp_path: Path) -> None:
    config = SpikeLLMConfig(**{**SMALL, "vocab_size": 50, "n_layer": 3, "head_dim": 6})
    bench_memory.write_synthetic(tmp_path / "model", config)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3  # tables, two blocks, one block
    source = open_source(tmp_path / "model")
    assert source.config == config
    assert source.tensor("lm_head.weight").dtype == torch.bfloat16
    assert not torch.equal(source.block(0)["mlp.up_proj.weight"], source.block(2)["mlp.up_proj.weight"])
    assert bench_memory.SIZES["n_layer"] == 22
    sizes = tensor_shapes(SpikeLLMConfig(**bench_memory.SIZES)).values()
    assert 1.0e9 < sum(torch.Size(shape).numel() for shape in sizes) < 1.2e9


def test_a_full_disk_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(bench_memory, "write_synthetic", None)
    (row,) = bench_memory.memory(1)
    assert row.value is None
    assert "no place for 2.8 GB" in row.note or not Path("/proc/self/status").exists()
