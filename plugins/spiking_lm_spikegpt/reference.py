"""Reading and writing the state dicts of the released SpikeGPT code (arXiv 2302.13939, RWKV-4 key names)."""

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
from spiking_lm_spikegpt.model import SpikeGPT

# snnTorch modules leave such buffers in a state dict; they are constants, not weights.
_NEURON_BUFFERS = re.compile(r"\.(threshold|beta|graded_spikes_factor|reset_mechanism_val|mem)$")


def import_reference(state_dict: Mapping[str, Tensor], **config: Any) -> SpikeGPT:
    """Build the model whose weights are ``state_dict``; sizes come from the tensors, switches from ``config``.

    Raises DataError naming the keys that are missing, unexpected or of the wrong shape.
    """
    weights = {key: value for key, value in state_dict.items() if not _NEURON_BUFFERS.search(key)}
    if not is_reference(weights):
        raise DataError(
            "not a SpikeGPT state dict: 'emb.weight' or 'blocks.0.ffn.time_mix_k' is missing",
            hint=f"keys begin with: {', '.join(sorted(weights)[:5])}",
        )
    layers = {int(key.split(".")[1]) for key in weights if key.startswith("blocks.")}
    sizes: dict[str, Any] = {
        "vocab_size": weights["emb.weight"].shape[0],
        "n_embd": weights["emb.weight"].shape[1],
        "n_layer": max(layers) + 1,
        "ffn_pre": any(key.startswith("blocks.0.ffnPre.") for key in weights),
    }
    if "classify_head.weight" in weights:
        sizes["num_classes"] = weights["classify_head.weight"].shape[0]
    check_sizes(sizes, config, what="SpikeGPT")
    settings = {"init": "torch", **sizes, **config}
    model = create_model("spikegpt", **settings)
    assert isinstance(model, SpikeGPT)
    model.to(weights["emb.weight"].dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    take_weights({key: parameters[name] for name, key in _keys(model).items()}, weights, what="SpikeGPT")
    return model


def is_reference(source: Path | Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict has the released SpikeGPT's keys."""
    return not isinstance(source, Path) and {"emb.weight", "blocks.0.ffn.time_mix_k"} <= source.keys()


def to_reference(model: SpikeGPT, *, grads: bool = False) -> dict[str, Tensor]:
    """Return the weights, or their gradients, of a model under the released keys.

    Raises UsageError for what the released format cannot hold: a placement or neuron with parameters of its own.
    """
    keys = _keys(model)
    own = [name for name, _ in model.named_parameters() if name not in keys]
    if own:
        raise UsageError(
            f"the released SpikeGPT format has no place for {own[0]!r} and {len(own) - 1} more parameters",
            hint="save the model with save_model instead",
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not grads:
        return {key: parameters[name].detach().clone() for name, key in keys.items()}
    return {
        key: torch.zeros_like(parameters[name]) if parameters[name].grad is None else parameters[name].grad.clone()  # type: ignore[union-attr]
        for name, key in keys.items()
    }


def _keys(model: SpikeGPT) -> dict[str, str]:
    """Map our parameter names to the released keys: equal but for the first block of ``ffnPre`` models."""
    pre = model.config.ffn_pre
    return {
        name: name.replace("blocks.0.att.", "blocks.0.ffnPre.") if pre else name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if ".neurons." not in name
    }
