"""spiking-lm: train, evaluate, explain and deploy spiking language models through one plugin interface.

Importing this package imports neither torch nor any plugin; each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spiking_lm.hookspecs import hookimpl

if TYPE_CHECKING:
    from spiking_lm import kernels
    from spiking_lm.accounting import explain
    from spiking_lm.checkpoints import load_model, save_model
    from spiking_lm.generation import generate
    from spiking_lm.hardware import load_program, lower
    from spiking_lm.models import create_model, create_neuron, export_reference, import_reference
    from spiking_lm.recipe import recipes
    from spiking_lm.registry import plugins
    from spiking_lm.runs import run_recipe

__version__ = "0.1.0"

PLUGIN_API = 1
"""The version of the hooks and of :mod:`spiking_lm.interfaces`; a plugin may state the one it was written for."""

_HOMES = {
    "create_model": "models",
    "create_neuron": "models",
    "import_reference": "models",
    "export_reference": "models",
    "save_model": "checkpoints",
    "load_model": "checkpoints",
    "load_program": "hardware",
    "lower": "hardware",
    "generate": "generation",
    "explain": "accounting",
    "plugins": "registry",
    "recipes": "recipe",
    "run_recipe": "runs",
}

__all__ = [
    "PLUGIN_API",
    "__version__",
    "create_model",
    "create_neuron",
    "explain",
    "export_reference",
    "generate",
    "hookimpl",
    "import_reference",
    "kernels",
    "load_model",
    "load_program",
    "lower",
    "plugins",
    "recipes",
    "run_recipe",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("spiking_lm.kernels")
    if name in _HOMES:
        return getattr(importlib.import_module(f"spiking_lm.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'spiking_lm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
