"""Hugging Face folders of Llama, Mistral and Qwen2 models, read without the transformers library."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spiking_lm import data
from spiking_lm.config import parse_config
from spiking_lm.errors import DataError
from spiking_lm.files import sha256_file
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.sources import HEAD, Source

SUPPORTED = ("llama", "mistral", "qwen2")

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096, "kv_heads": 8},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "sliding_window": 4096, "kv_heads": 32},
}
"""What a config.json that is silent means, by model type."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class HuggingFaceSource(Source):
    """A folder with config.json, model.safetensors or its shards and their index, and tokenizer.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = _tensor_files(path)
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            shapes |= _shapes(file, [name for name, where in self._files.items() if where == file])
        self.config = read_config(path / "config.json", tied=HEAD not in shapes)
        self._check(shapes)

    def tensor(self, name: str) -> Tensor:
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name).clone()  # memory of its own: the file need not stay mapped
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from None
        return tensor if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.float()

    @functools.cached_property
    def tokenizer(self) -> data.Tokenizer:
        """The folder's tokenizer.json."""
        if not (self.path / "tokenizer.json").is_file():
            other = "tokenizer.model" if (self.path / "tokenizer.model").is_file() else None
            raise DataError(
                f"{self.path}: no tokenizer.json" + (f", only {other}" if other else ""),
                hint="copy the model's there; transformers writes one: AutoTokenizer.from_pretrained(DIR)"
                ".save_pretrained(DIR). Without a recipe, --tokenizer names one",
            )
        return data.load_tokenizer(self.path)

    def sha256(self) -> str:
        """Return a hash over the files that hold tensors, and over config.json."""
        files = [self.path / "config.json", *sorted(set(self._files.values()))]
        return hashlib.sha256("\n".join(sha256_file(file) for file in files).encode()).hexdigest()


def read_config(path: Path, *, tied: bool = False) -> SpikeLLMConfig:
    """Read a Hugging Face ``config.json``; ``tied`` says whether head and embedding are one where the file does not.

    Raises: DataError naming the field, and which architectures are supported.
    """
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        named = ", ".join(map(str, raw.get("architectures") or [])) or "no architecture"
        raise DataError(
            f"{path}: model_type is {kind!r} ({named})", hint=f"supported are: {', '.join(SUPPORTED)} for causal text"
        )
    defaults = _DEFAULTS[kind]

    def field(name: str) -> Any:
        if (value := raw.get(name, defaults.get(name))) is None:
            raise DataError(f"{path}: field {name!r} is missing")
        return value

    for name, only in (("hidden_act", "silu"), ("mlp_bias", False)):
        if raw.get(name, only) != only:
            raise DataError(f"{path}: {name} is {raw[name]!r}", hint=f"supported is {only!r}")
    if kind != "qwen2" and raw.get("attention_bias"):
        raise DataError(
            f"{path}: attention_bias is true", hint="biases are supported as Qwen2 has them: for queries, keys, values"
        )
    theta, scaling = _rope(raw, path)
    values = {
        "vocab_size": field("vocab_size"),
        "n_layer": field("num_hidden_layers"),
        "n_embd": field("hidden_size"),
        "n_inner": field("intermediate_size"),
        "n_head": field("num_attention_heads"),
        "n_kv_head": raw.get("num_key_value_heads", defaults.get("kv_heads")),
        "head_dim": raw.get("head_dim"),
        "ctx_len": field("max_position_embeddings"),
        "sliding_window": _sliding_window(raw, defaults, path),
        "norm_eps": field("rms_norm_eps"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": kind == "qwen2",
        "tie_embeddings": raw.get("tie_word_embeddings", tied),
    }
    return parse_config(SpikeLLMConfig, values, where=str(path), error=DataError)


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """Return theta and scaling, from ``rope_theta`` and ``rope_scaling`` or from newer files' ``rope_parameters``."""
    both = raw.get("rope_parameters") or {}
    scaling = {**both, **(raw.get("rope_scaling") or {})}
    theta = raw.get("rope_theta", both.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise DataError(f"{path}: rotary scaling of type {kind!r}", hint="supported are: default, linear, llama3")
    names = {"factor": "factor"}
    if kind == "llama3":
        names |= {name: name for name in ("low_freq_factor", "high_freq_factor")}
        names["original_ctx_len"] = "original_max_position_embeddings"
    missing = [name for name in names.values() if scaling.get(name) is None]
    if missing:
        raise DataError(f"{path}: rotary scaling of type {kind!r} lacks {missing[0]!r}")
    return theta, {"type": kind, **{ours: scaling[theirs] for ours, theirs in names.items()}}


def _sliding_window(raw: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> int | None:
    kinds = set(raw.get("layer_types") or [])
    if raw["model_type"] == "llama" or raw.get("use_sliding_window", raw["model_type"] == "mistral") is False:
        return None
    window: int | None = raw.get("sliding_window", defaults.get("sliding_window"))
    if window is None or kinds == {"full_attention"}:
        return None
    first = raw.get("max_window_layers", 0) if raw["model_type"] == "qwen2" and not kinds else 0
    if kinds - {"sliding_attention"} or 0 < first < raw["num_hidden_layers"]:
        raise DataError(
            f"{path}: only some layers have a sliding window", hint="supported is one window for all layers, or none"
        )
    return None if first else window


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return which file holds each tensor."""
    if (folder / _INDEX).is_file():
        table = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise DataError(f"{folder / _INDEX}: no weight_map")
        for name in sorted(set(table.values())):
            if Path(str(name)).name != name:
                raise DataError(f"{folder / _INDEX}: {name!r} is no file beside it")
            if not (folder / name).is_file():
                count = sum(value == name for value in table.values())
                raise DataError(
                    f"{folder / name}: no such file; the index names it for {count} tensors", hint="copy this shard too"
                )
        return {tensor: folder / name for tensor, name in table.items()}
    if not (folder / _SINGLE).is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".safetensors"))
        found = f"; there is {', '.join(others[:3])}" if others else ""
        raise DataError(
            f"{folder}: neither {_SINGLE} nor {_INDEX}{found}",
            hint="transformers writes them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)",
        )
    return dict.fromkeys(_names(folder / _SINGLE), folder / _SINGLE)


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def _shapes(file: Path, names: list[str]) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            held = set(opened.keys())
            missing = [name for name in names if name not in held]
            if missing:
                raise DataError(
                    f"{file}: no tensor {missing[0]!r}, which the index names", hint="is the copy complete?"
                )
            return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: a truncated or damaged safetensors file ({error})", hint="copy the file again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", hint="a Hugging Face folder has config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})", hint="is the copy complete?") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
