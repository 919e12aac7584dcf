"""State dicts of the released SpikeLM code, and of BERT, whose names it has: reading and writing.

An amplitude is there a tensor per step, ``act_clip_val.{t}``, and 1.0 in all of them means that a neuron has not been
calibrated yet. BERT's own checkpoints have no amplitudes and become the dense twin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spiking_lm import create_model
from spiking_lm.errors import DataError, UsageError
from spiking_lm.models import check_sizes, take_weights
from spiking_lm_spikelm.model import SpikeLM
from spiking_lm_spikelm.neuron import Elastic

HEAD_SIZE = 64
"""Channels of a head in every BERT that was published, where nobody says how many heads there are."""

_MODULES = {
    "word": "bert.embeddings.word_embeddings",
    "position": "bert.embeddings.position_embeddings",
    "kind": "bert.embeddings.token_type_embeddings",
    "norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "mlm_head.dense": "cls.predictions.transform.dense",
    "mlm_head.norm": "cls.predictions.transform.LayerNorm",
    "mlm_head": "cls.predictions",
    "nsp_head": "cls.seq_relationship",
    "classify_head": "classifier",
}
_IN_BLOCK = {
    "attention": "attention.self",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "output": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
_UNUSED = re.compile(r"(\.weight_clip_val|\.position_ids)$")
"""What the released code keeps, and computes nothing with."""
_AMPLITUDE = re.compile(r"\.(act_clip_val|clip_key|clip_value)\.(\d+)$")
_DECODER = "cls.predictions.decoder"


def is_reference(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict has the keys of the released code, or of BERT."""
    return any(f"{prefix}embeddings.word_embeddings.weight" in tensors for prefix in ("bert.", "")) and any(
        key.endswith("encoder.layer.0.attention.self.query.weight") for key in tensors
    )


def import_reference(state_dict: Mapping[str, Tensor], **config: Any) -> SpikeLM:
    """Build the model whose weights are ``state_dict``; sizes come from the tensors, switches from ``config``.

    Without ``n_head`` there is a head for every 64 channels. Heads that the configuration switches off (``mlm``,
    ``nsp``, ``pooling``, ``causal``) are left out. Raises DataError naming the keys that are missing, unexpected or of
    the wrong shape.
    """
    prefixed = "bert.embeddings.word_embeddings.weight" in state_dict
    own = ("bert.", "cls.", "classifier.")
    weights = {key if prefixed or key.startswith(own) else f"bert.{key}": t for key, t in state_dict.items()}
    if not is_reference(weights):
        raise DataError(
            "not a SpikeLM or BERT state dict: its embedding or its first layer is missing",
            hint=f"keys begin with: {', '.join(sorted(state_dict)[:5])}",
        )
    weights = {key: tensor for key, tensor in weights.items() if not _UNUSED.search(key)}
    settings = {**_settings(weights, config), **config}
    if settings["n_head"] is None:
        raise UsageError(
            f"{settings['n_embd']} channels, and the tensors do not tell how many heads there are",
            hint="say it: n_head=8, or --set n_head=8",
        )
    with torch.random.fork_rng(devices=[]):
        model = create_model("spikelm", **settings)
    assert isinstance(model, SpikeLM)
    model.to(weights["bert.embeddings.word_embeddings.weight"].dtype)
    _take_amplitudes(model, weights)
    _take_weights(model, weights)
    return model.eval()


def to_reference(model: SpikeLM, *, grads: bool = False) -> dict[str, Tensor]:
    """Return weights and amplitudes, or the weights' gradients, under the released keys."""
    config = model.config
    if config.weights != "full" or config.embedding != "full":
        raise UsageError("the released format holds real weights only", hint="save the model with save_model instead")
    if config.neuron is not None and config.neuron["type"] != "elastic":
        raise UsageError(f"the released format has no {config.neuron['type']} neurons", hint="use save_model")
    parameters = {name: p for name, p in model.named_parameters() if not name.endswith(".alpha")}
    if grads:
        return {_key(name): torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    exported = {_key(name): p.detach().clone() for name, p in parameters.items()}
    like = model.norm.weight.detach()
    exported["bert.embeddings.position_ids"] = torch.arange(config.ctx_len)[None]
    if model.mlm_head is not None:
        exported[f"{_DECODER}.weight"] = model.word.weight.detach().clone()
        exported[f"{_DECODER}.bias"] = model.mlm_head.bias.detach().clone()
    for key, neuron in _neurons(model):
        settled = bool(neuron.initialized.all())
        amplitudes = neuron.all_amplitudes(config.time_steps) if settled else torch.ones(config.time_steps)
        for t, amplitude in enumerate(amplitudes.to(like.dtype)):
            exported[f"{key}.{t}"] = amplitude.clone()
        if key.endswith("act_clip_val"):
            exported[f"{key.removesuffix('act_clip_val')}weight_clip_val"] = like.new_ones(1)
    return exported


def _settings(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the tensors tell of the configuration."""
    vocab_size, n_embd = _matrix(weights, "bert.embeddings.word_embeddings.weight")
    layers = {int(found[1]) for key in weights if (found := re.match(r"bert\.encoder\.layer\.(\d+)\.", key))}
    steps = {int(found[2]) + 1 for key in weights if (found := _AMPLITUDE.search(key))}
    causal = bool(config.get("causal", False))
    told: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_embd": n_embd,
        "n_layer": max(layers) + 1,
        "n_hidden": _matrix(weights, "bert.encoder.layer.0.intermediate.dense.weight")[0],
        "ctx_len": _matrix(weights, "bert.embeddings.position_embeddings.weight")[0],
        "type_vocab_size": _matrix(weights, "bert.embeddings.token_type_embeddings.weight")[0],
    }
    if steps:
        told["steps"] = max(steps)
    if "classifier.weight" in weights:
        told["num_classes"] = _matrix(weights, "classifier.weight")[0]
    fixed = {name: value for name, value in told.items() if name != "num_classes"}  # another head is a new one
    check_sizes(fixed, config, what="SpikeLM")
    return {
        **told,
        "n_head": n_embd // HEAD_SIZE if n_embd % HEAD_SIZE == 0 else None,
        "neuron": {"type": "elastic"} if steps else None,
        "mlm": "cls.predictions.bias" in weights and not causal,
        "nsp": "cls.seq_relationship.weight" in weights and not causal,
        "pooling": "cls" if "bert.pooler.dense.weight" in weights and not causal else "mean",
        "dropout": 0.1,
    }


def _matrix(weights: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    if key not in weights or weights[key].ndim != 2:
        found = "missing" if key not in weights else f"{tuple(weights[key].shape)}, not a matrix"
        raise DataError(f"SpikeLM state dict: {key} is {found}")
    rows, columns = weights[key].shape
    return rows, columns


def _key(name: str) -> str:
    """Return the released name of one of our parameters."""
    owner, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", owner)
    if block:
        return f"bert.encoder.layer.{block[1]}.{_IN_BLOCK[block[2]]}.{leaf}"
    return f"{_MODULES[owner]}.{leaf}"


def _neurons(model: SpikeLM) -> Iterator[tuple[str, Elastic]]:
    """Yield the released name of every neuron's amplitudes, but for the step, and the neuron."""
    for name, module in model.named_modules():
        if not isinstance(module, Elastic):
            continue
        owner, _, leaf = name.rpartition(".")
        kept = {"neuron": "act_clip_val", "key_neuron": "clip_key", "value_neuron": "clip_value"}[leaf]
        yield _key(f"{owner}.{kept}"), module


def _take_amplitudes(model: SpikeLM, weights: dict[str, Tensor]) -> None:
    """Move the amplitudes out of ``weights`` into the neurons."""
    found: dict[str, dict[int, Tensor]] = {}
    for key in [key for key in weights if _AMPLITUDE.search(key)]:
        name, _, step = key.rpartition(".")
        found.setdefault(name, {})[int(step)] = weights.pop(key)
    if not found:
        return  # BERT's weights for a spiking model: training will calibrate it
    for key, neuron in _neurons(model):
        steps = found.pop(key, {})
        if sorted(steps) != list(range(model.config.time_steps)) or any(a.numel() != 1 for a in steps.values()):
            raise DataError(
                f"SpikeLM state dict: {key} has {len(steps)} amplitudes for {model.config.time_steps} steps",
                hint="every neuron has one per step",
            )
        amplitudes = torch.stack([steps[t].reshape(()) for t in range(len(steps))])
        neuron.set_amplitudes(None if bool((amplitudes == 1).all()) else amplitudes)
    if found and model.config.neuron is not None:
        raise DataError(f"SpikeLM state dict: unexpected: {', '.join(sorted(found)[:5])}")


def _take_weights(model: SpikeLM, weights: dict[str, Tensor]) -> None:
    """Copy ``weights`` into the parameters; heads that the model does not have are left out."""
    tied = weights.pop(f"{_DECODER}.weight", None)
    if tied is not None and not torch.equal(tied, weights["bert.embeddings.word_embeddings.weight"]):
        raise DataError(f"SpikeLM state dict: {_DECODER}.weight is another matrix than the word embedding")
    bias = weights.pop(f"{_DECODER}.bias", None)
    if bias is not None:
        weights.setdefault("cls.predictions.bias", bias)
    absent = {
        "bert.pooler.": model.pooler is None,
        "cls.predictions.": model.mlm_head is None,
        "cls.seq_relationship.": model.nsp_head is None,
        "classifier.": model.classify_head is None,
    }
    left_out = tuple(prefix for prefix, gone in absent.items() if gone)
    weights = {key: tensor for key, tensor in weights.items() if not (left_out and key.startswith(left_out))}
    parameters = {_key(name): p for name, p in model.named_parameters() if not name.endswith(".alpha")}
    new_head = () if "classifier.weight" in weights else ("classifier.weight", "classifier.bias")
    take_weights(parameters, weights, what="SpikeLM", optional=new_head)
