"""A run directory made by hand, in the formats that runs are written in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spiking_lm.accounting import explain, save_raster
from spiking_lm.config import ModelConfig
from spiking_lm.graph import LMGraph, Op
from spiking_lm.interfaces import LMOutput, SpikeSite, SpikingLanguageModel

TEXT = "It was </script> true,\nthat naïve 𝔖 spikes.\x00\x1b"


class BytesConfig(ModelConfig):
    model_type: ClassVar[str] = "bytes"
    vocab_size: int = 256
    ctx_len: int = 16


class Bytes(SpikingLanguageModel):
    """Two layers of spikes in front of matrices, the second one adding to a real stream."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BytesConfig()
        self.emb = nn.Embedding(256, 12)
        self.first = nn.Linear(12, 20)
        self.head = nn.Linear(20, 256)

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> tuple[()]:
        return ()

    def forward(self, tokens: Tensor, state: Any = None, *, return_spikes: bool = False) -> LMOutput:
        early = (self.emb(tokens) > 0.5).float()
        drive = self.first(early)
        late = (drive > 0).float()
        spikes = {"blocks.0.in": early, "blocks.1.$out$": late} if return_spikes else None
        return LMOutput(self.head(drive + late), (), spikes)

    def spike_sites(self) -> list[SpikeSite]:
        return [SpikeSite("blocks.0.in", "binary", ("first",)), SpikeSite("blocks.1.$out$", "binary", ("add",))]

    def graph(self) -> LMGraph:
        return LMGraph(
            (
                Op("emb", "embedding", ("tokens",), "real", 12, module="emb"),
                Op("blocks.0.in", "neuron", ("emb",), "binary", 12, other_ops=12),
                Op("first", "linear", ("blocks.0.in",), "real", 20, module="first", weight=(20, 12)),
                Op("blocks.1.$out$", "neuron", ("first",), "binary", 20, other_ops=20),
                Op("add", "residual", ("first", "blocks.1.$out$"), "real", 20, other_ops=20),
                Op("head", "linear", ("add",), "real", 256, module="head", weight=(256, 20)),
            )
        )


class ByteTokens:
    def decode(self, ids: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.fixture
def model() -> Bytes:
    torch.manual_seed(0)
    return Bytes()


@pytest.fixture
def run_dir(tmp_path: Path, model: Bytes) -> Path:
    """A complete run with everything in it, hostile text included."""
    run = tmp_path / "runs" / "demo" / "20260101-000000-abcdef"
    run.mkdir(parents=True)
    name = "<script>alert(1)</script> & 'demo'"
    (run / "recipe.yaml").write_text(
        "schema: 1\n" + f"name: {json.dumps(name)}\n" + "description: a <b>bold</b> one\nseed: 3\n"
        "data: {type: austen3}\nmodel: {type: bytes}\ntrain: {steps: 40}\ngenerate: {temperature: 0.7}\n",
        encoding="utf-8",
    )
    write_json(
        run / "manifest.json",
        {
            "recipe": name,
            "status": "complete",
            "started": "2026-01-01T00:00:00+00:00",
            "seed": 3,
            "stages": {"train": {"seconds": 100.0}, "evaluate": {"seconds": 3}},
            "command": ["spiking-lm", "run", "demo recipe", "--set", "seed=3"],
            "versions": {"python": "3.11.7", "spiking-lm": "0.1.0", "torch": "2.6.0+cpu"},
            "plugins": [{"name": "core", "version": "0.1.0", "status": "active"}],
            "git": {"source": {"revision": "0123abcd", "dirty": True}},
            "hardware": {"cpu": "A <fast> one", "usable_cores": 2, "memory_bytes": 2**33, "accelerators": []},
            "data": {"dataset": "austen3", "sha256": "ab" * 32, "tokenizer": {"type": "byte"}},
            "model": {"type": "bytes", "parameters": 8_888},
        },
    )
    lines = []
    for step in range(1, 41):
        rates = {"blocks.0.in": 0.3 + step / 1000, "blocks.1.$out$": 0.5}
        bpb = 8 / step**0.3
        entry = {"split": "train", "step": step, "loss": bpb * 0.69, "bpb": bpb, "lr": 1e-3, "rates": rates}
        lines.append(json.dumps({**entry, "elapsed_s": 6.255 * step}))  # 250.2 s in all, of two processes
        if step % 10 == 0:
            lines.append(json.dumps({"split": "valid", "step": step, "loss": bpb * 0.7, "bpb": bpb * 1.01}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(
        run / "evaluation.json",
        {
            "task": "text",
            "split": "test",
            "metrics": {"bits_per_byte": 2.6491, "perplexity": 6.27, "accuracy": 0.4},
            "protocol": "1,000 tokens of the test split, window 256, stride 128",
            "baselines": {"interpolated byte 3-gram": 2.08, "interpolated byte 5-gram": 1.7312},
        },
    )
    tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)
    write_json(run / "explanation.json", explain(model, tokens, sample="47 tokens of the test split").to_dict())
    save_raster(model, tokens, ByteTokens(), run / "raster.npz")
    (run / "samples.txt").write_text(TEXT, encoding="utf-8")
    return run


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
