"""Reading and writing the state dicts of the released EGRU language models (EvNN, benchmarks/lm), and of ``nn.GRU``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spiking_lm import create_model
from spiking_lm.errors import DataError
from spiking_lm.models import check_sizes, take_weights
from spiking_lm_egru.model import GATES, EGRULanguageModel

# One-element tensors that every released EGRU layer has: constants of training, not weights.
_CONSTANTS = ("dampening_factor", "pseudo_derivative_support")
_CLIP = "_max_norm"
_LAYER = re.compile(r"rnns\.(\d+)\.")


def import_reference(state_dict: Mapping[str, Tensor], **config: Any) -> EGRULanguageModel:
    """Build the model whose weights are ``state_dict``; sizes come from the tensors, switches from ``config``.

    The surrogate's constants are those in the file unless ``config`` has others. GRU and LSTM baselines are read too.
    Raises DataError naming the keys that are missing, unexpected or of the wrong shape.
    """
    weights = _plain(state_dict)
    if not is_reference(weights):
        raise DataError(
            "not an EGRU language model: 'embeddings.weight', 'decoder.decoder.bias' or the layer 'rnns.0' is missing",
            hint=f"keys begin with: {', '.join(sorted(weights)[:5])}",
        )
    weights.setdefault("decoder.decoder.weight", weights["embeddings.weight"])
    sizes = _sizes(weights)
    check_sizes(sizes, config, what="EGRU")
    constants = {name: _constant(weights, name) for name in _CONSTANTS if f"rnns.0.{name}" in weights}
    weights = {key: value for key, value in weights.items() if not key.endswith((*_CONSTANTS, _CLIP))}
    model = create_model("egru", **{**constants, **sizes, **config})
    assert isinstance(model, EGRULanguageModel)
    model.to(weights["embeddings.weight"].dtype)
    take_weights(dict(model.named_parameters(remove_duplicate=False)), weights, what="EGRU")
    return model


def is_reference(source: Path | Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict has the keys of the released language models."""
    if isinstance(source, Path):
        return False
    return {"embeddings.weight", "decoder.decoder.bias"} <= source.keys() and any(
        key.startswith("rnns.0.") for key in source
    )


def to_reference(model: EGRULanguageModel, *, grads: bool = False) -> dict[str, Tensor]:
    """Return the weights, or their gradients, of a model under the released keys.

    With the weights come the constants that the released layers keep beside them. Their norm of gradient clipping is
    -1, off: how a model was clipped in training is no part of it here.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if grads:
        return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in parameters.items()}
    exported = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    if model.config.cell == "egru":
        like = model.embeddings.weight.detach()
        for layer in range(model.config.n_layer):
            for name in _CONSTANTS:
                exported[f"rnns.{layer}.{name}"] = like.new_tensor([getattr(model.config, name)])
            exported[f"rnns.{layer}.{_CLIP}"] = like.new_tensor([-1.0])
    return exported


def from_torch_gru(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a one-layer ``nn.GRU`` as those of an ``EGRU`` with the same gates.

    torch keeps (3H, I) in blocks r, z, n, EGRU (I, 3H) in blocks z, r, g. The released ``from_native_weights`` only
    transposes, which exchanges the two gates. Thresholds are not among the weights.
    """

    def blocks(name: str) -> Tensor:
        r, z, n = weights[name].chunk(3)
        return torch.cat([z, r, n])

    return {
        "kernel": blocks("weight_ih_l0").t().contiguous(),
        "recurrent_kernel": blocks("weight_hh_l0").t().contiguous(),
        "bias": blocks("bias_ih_l0"),
        "recurrent_bias": blocks("bias_hh_l0"),
    }


def _plain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the names of the released wrapper that drops recurrent weights of the baselines.

    The wrapper keeps the trained matrix as ``weight_hh_l0_raw``; its ``module.weight_hh_l0`` has holes.
    """
    plain = {re.sub(r"^(rnns\.\d+\.)module\.", r"\1", key): value for key, value in state_dict.items()}
    plain |= {key.removesuffix("_raw"): value for key, value in state_dict.items() if key.endswith("_raw")}
    return {key: value for key, value in plain.items() if not key.endswith("_raw")}


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the shapes tell of the configuration."""
    vocab_size, n_embd = _shape(weights, "embeddings.weight")
    if "rnns.0.recurrent_kernel" in weights or "rnns.0.kernel" in weights:
        cell, (units, rows) = "egru", _shape(weights, "rnns.0.recurrent_kernel")
    else:
        rows, units = _shape(weights, "rnns.0.weight_hh_l0")
        cell = "lstm" if rows == 4 * units else "gru"
    if rows != GATES[cell] * units:
        raise DataError(f"EGRU state dict: the recurrent matrix of layer 0 has {rows} rows of gates for {units} units")
    layers = {int(found[1]) for found in map(_LAYER.match, weights) if found}
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_embd": n_embd,
        "n_layer": max(layers) + 1,
        "cell": cell,
        "projection": "decoder.projection.weight" in weights,
        "tie_weights": torch.equal(weights["decoder.decoder.weight"], weights["embeddings.weight"]),
    }
    if sizes["n_layer"] > 1 or sizes["projection"]:
        sizes["n_hidden"] = units
    return sizes


def _shape(weights: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    if key not in weights:
        raise DataError(f"EGRU state dict: missing: {key}")
    if weights[key].ndim != 2:
        raise DataError(f"EGRU state dict: {key} is {tuple(weights[key].shape)}, not a matrix")
    n, m = weights[key].shape
    return n, m


def _constant(weights: Mapping[str, Tensor], name: str) -> float:
    values = {float(value) for key, value in weights.items() if key.endswith(f".{name}")}
    if len(values) > 1:
        raise DataError(
            f"EGRU state dict: {name} differs between the layers: {sorted(values)}",
            hint=f"give one for all: {name}={max(values):g}",
        )
    return values.pop()
