"""Make models and neurons by registry name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from spiking_lm import registry
from spiking_lm.config import parse_config
from spiking_lm.errors import DataError, UsageError
from spiking_lm.interfaces import Neuron, SpikingLanguageModel


def create_model(name: str, **config: Any) -> SpikingLanguageModel:
    """Build the model registered as ``name`` from its configuration fields.

    Weights are drawn from torch's global generator: seed it with ``torch.manual_seed`` for a reproducible model.

    Raises: UnknownNameError, MissingExtraError, ConfigError (names the field, with did-you-mean).
    """
    entry = registry.get("models", name)
    parsed = parse_config(entry.load("config"), config, where=f"model {name!r}")
    model: SpikingLanguageModel = entry.load("factory")(parsed)
    return model


def create_neuron(name: str, *, size: int | None = None, **params: Any) -> Neuron:
    """Build the neuron registered as ``name``; ``size`` is the population, for neurons with learned parameters.

    Raises: UnknownNameError, MissingExtraError, ConfigError.
    """
    entry = registry.get("neurons", name)
    parsed = parse_config(entry.load("config"), params, where=f"neuron {name!r}")
    neuron: Neuron = entry.load("factory")(parsed, size=size)
    return neuron


def import_reference(name: str, state_dict: Mapping[str, Tensor], **config: Any) -> SpikingLanguageModel:
    """Build model ``name`` from a state dict in its paper's own keys; sizes are inferred from the tensors.

    ``config`` sets what tensors cannot tell, e.g. quirk switches. Raises DataError naming missing or misshapen tensors.
    """
    entry = registry.get("models", name)
    if entry.spec.importer is None:
        raise UsageError(f"model {name!r} has no reference importer")
    model: SpikingLanguageModel = entry.load("importer")(state_dict, **config)
    return model


def export_reference(model: SpikingLanguageModel, *, grads: bool = False) -> dict[str, Tensor]:
    """Return the model's weights (or, with ``grads``, their gradients) under its paper's own state-dict keys."""
    return model.to_reference(grads=grads)


# -- for importers -----------------------------------------------------------------------------------------------------


def check_sizes(told: Mapping[str, Any], config: Mapping[str, Any], *, what: str) -> None:
    """Raise UsageError where ``config`` contradicts what the tensors have ``told``; ``what`` names the architecture."""
    for name, value in told.items():
        if config.get(name, value) != value:
            raise UsageError(f"{what}: {name}={config[name]} but the tensors say {value}", hint=f"leave out {name}")


@torch.no_grad()
def take_weights(
    parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, what: str, optional: Collection[str] = ()
) -> None:
    """Copy ``weights`` into ``parameters``, both under the keys of the paper's own code; ``what`` names it.

    Raises: DataError naming the keys that are missing (unless ``optional``), unexpected or of the wrong shape.
    """
    shapes = [
        f"{key}: {tuple(weights[key].shape)} instead of {tuple(parameter.shape)}"
        for key, parameter in parameters.items()
        if key in weights and weights[key].shape != parameter.shape
    ]
    wrong = {
        "missing": sorted(parameters.keys() - weights.keys() - set(optional)),
        "unexpected": sorted(weights.keys() - parameters.keys()),
        "of the wrong shape": shapes,
    }
    told = [f"{how}: {', '.join(keys[:5])}{' ...' * (len(keys) > 5)}" for how, keys in wrong.items() if keys]
    if told:
        raise DataError(f"{what} state dict: {'; '.join(told)}")
    for key, tensor in weights.items():
        parameters[key].copy_(tensor)
