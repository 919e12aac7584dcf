"""Conformance kits: inherit a class, override one fixture, and every law of the contract is tested.

::

    import pytest
    import spiking_lm
    from spiking_lm.testing import NeuronContract

    class TestMyNeuron(NeuronContract):
        @pytest.fixture
        def neuron(self):
            return spiking_lm.create_neuron("mine", size=5)

Nothing here is imported before it is used: pytest loads this package in every project of the environment.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spiking_lm.testing.checks import TOLERANCES, assert_close, assert_kind
    from spiking_lm.testing.models import ModelContract
    from spiking_lm.testing.neurons import NeuronContract

_HOMES = {
    "TOLERANCES": "checks",
    "assert_close": "checks",
    "assert_kind": "checks",
    "ModelContract": "models",
    "NeuronContract": "neurons",
}

__all__ = ["TOLERANCES", "ModelContract", "NeuronContract", "assert_close", "assert_kind"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"spiking_lm.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'spiking_lm.testing' has no attribute {name!r}")
