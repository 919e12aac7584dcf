"""Reading and writing the state dicts of the released SpikingBERT (Bal & Sengupta, arXiv 2308.10873)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spiking_lm import create_model
from spiking_lm.errors import DataError, UsageError
from spiking_lm.models import check_sizes, take_weights
from spiking_lm_bitspike.model import Bitspike

RELEASED = {"mode": "released", "charge": 0.0, "steps": 100, "n_head": 12, "pooling": "cls"}
"""What the released code does and its tensors do not say; ``config`` may say otherwise."""

_READ = re.compile(r"(network_x|network_s\d+|fit_dense|classification)\.")
"""The keys that are read: the released files hold every tensor up to six times, and a pooler that nothing uses."""

_LAYERS = {"key": (1, "dense"), "value": (2, "dense"), "query": (3, "query"), "mix": (4, "dense"), "up": (5, "dense")}
_LAYERS |= {"down": (6, "dense"), "mix_norm": (4, "LayerNorm"), "down_norm": (6, "LayerNorm")}
"""Module of a block -> which of the block's populations, and the name there."""


def import_reference(state_dict: Mapping[str, Tensor], **config: Any) -> Bitspike:
    """Build the model whose weights are ``state_dict``; sizes come from the tensors, the rest from ``config``.

    ``n_head`` and ``steps`` are in no tensor: 12 and 100 unless given. With ``weights: ternary`` or ``binary`` the
    tensors are the weights behind the levels. Raises DataError naming the keys that are missing or of the wrong shape.
    """
    weights = {key: value for key, value in state_dict.items() if _READ.match(key)}
    if not is_reference(weights):
        raise DataError(
            "not a SpikingBERT state dict: 'network_x.word_embeddings.weight' or 'network_s1.dense.weight' is missing",
            hint=f"keys begin with: {', '.join(sorted(state_dict)[:5])}",
        )
    last = max(
        int(key.split(".")[0].removeprefix("network_s"))
        for key in weights
        if key.endswith("dense.weight") and key.startswith("network_s")
    )
    words = weights["network_x.word_embeddings.weight"]
    sizes: dict[str, Any] = {
        "vocab_size": words.shape[0],
        "n_embd": words.shape[1],
        "n_layer": -(-last // 6),
        "n_hidden": _rows(weights, "network_s5.dense.weight"),
        "ctx_len": _rows(weights, "network_x.position_embeddings.weight"),
        "token_types": _rows(weights, "network_x.token_type_embeddings.weight"),
        "teacher_embd": _rows(weights, "fit_dense.weight"),
        "num_classes": _rows(weights, "classification.weight"),
    }
    sizes = {name: size for name, size in sizes.items() if size is not None}
    check_sizes(sizes, config, what="SpikingBERT")
    model = create_model("bitspike", **{**RELEASED, **sizes, **config})
    assert isinstance(model, Bitspike)
    model.to(words.dtype)
    parameters = {key: model.get_parameter(name) for name, key in _keys(model).items()}
    known = {key: tensor for key, tensor in weights.items() if key in parameters}  # the files hold unused ones too
    take_weights(parameters, known, what="SpikingBERT")
    return model


def is_reference(source: Path | Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict has the released SpikingBERT's keys."""
    return (
        not isinstance(source, Path)
        and {
            "network_x.word_embeddings.weight",
            "network_s1.dense.weight",
        }
        <= source.keys()
    )


def to_reference(model: Bitspike, *, grads: bool = False) -> dict[str, Tensor]:
    """Return the weights behind the levels, or their gradients, under the released keys, each once.

    Raises UsageError for what the released format cannot hold: a head that scores tokens, packed weights.
    """
    keys = _keys(model)
    parameters = dict(model.named_parameters())
    missing = sorted(keys.keys() - parameters.keys())
    foreign = sorted(parameters.keys() - keys.keys())
    if missing:
        raise UsageError(f"the released SpikingBERT format has real weights; {missing[0]!r} is packed")
    if foreign:
        raise UsageError(
            f"the released SpikingBERT format has no place for {foreign[0]!r}", hint="use save_model instead"
        )
    held: dict[str, Tensor] = {}
    for name, key in keys.items():
        value = parameters[name]
        if grads:
            held[key] = torch.zeros_like(value) if value.grad is None else value.grad.clone()
        else:
            held[key] = value.detach().clone()
    return held


def _keys(model: Bitspike) -> dict[str, str]:
    """Map our parameter names to the released keys."""
    keys = {
        "embed.weight": "network_x.word_embeddings.weight",
        "positions.weight": "network_x.position_embeddings.weight",
    }
    if model.types is not None:
        keys["types.weight"] = "network_x.token_type_embeddings.weight"
    pairs = {"norm": "network_x.LayerNorm"}
    for i in range(model.config.n_layer):
        for ours, (population, theirs) in _LAYERS.items():
            pairs[f"chain.blocks.{i}.{ours}"] = f"network_s{6 * i + population}.{theirs}"
    if model.teacher_map is not None:
        pairs["teacher_map"] = "fit_dense"
    if model.classifier is not None:
        pairs["classifier"] = "classification"
    keys |= {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in pairs.items() for leaf in ("weight", "bias")}
    if model.chain.feedback is not None:
        keys["chain.feedback.weight"] = f"network_s{6 * model.config.n_layer + 1}.fc.weight"
    return keys


def _rows(weights: Mapping[str, Tensor], key: str) -> int | None:
    return weights[key].shape[0] if key in weights else None
