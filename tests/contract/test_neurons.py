"""The conformance kit on every first-party neuron, in every form that its configuration offers."""

from __future__ import annotations

import pytest
import torch

from spiking_lm import create_neuron
from spiking_lm.interfaces import Neuron
from spiking_lm.testing import NeuronContract

FORMS = {
    "defaults": {},
    "subtract": {"reset": "subtract"},
    "detached": {"detach_reset": True},
    "subtract-detached": {"reset": "subtract", "detach_reset": True},
    "above": {"compare": ">", "beta": 0.9, "gain": 1.0, "threshold": 1.5},
    "no-leak": {"beta": 1.0, "gain": 0.25, "threshold": 0.3},
    "no-memory-of-a-third": {"beta": 1 / 3, "gain": 0.7, "surrogate": {"name": "sigmoid", "alpha": 4.0}},
    "fast-sigmoid": {"surrogate": {"name": "fast_sigmoid", "alpha": 1.5}},
    "triangle": {"surrogate": {"name": "triangle", "alpha": 0.5}},
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> dict:
    return FORMS[request.param]


class TestLIF(NeuronContract):
    name = "lif"

    @pytest.fixture
    def neuron(self, form: dict) -> Neuron:
        return create_neuron("lif", **form)


class TestSnnTorchLeaky(NeuronContract):
    name = "snntorch.leaky"

    @pytest.fixture
    def neuron(self, form: dict) -> Neuron:
        return create_neuron("snntorch.leaky", **form)


def test_every_first_party_neuron_is_under_contract() -> None:
    from spiking_lm import registry

    covered = {c.name for c in (TestLIF, TestSnnTorchLeaky)}
    first_party = {name for name, entry in registry.all("neurons").items() if entry.plugin.first_party}
    assert first_party == covered


def test_the_forms_really_differ() -> None:
    x = torch.randn(4, 50, 20, generator=torch.Generator().manual_seed(0)) * 3
    seen = [
        create_neuron("lif", **form)(x)[0] for form in FORMS.values() if not {"surrogate", "detach_reset"} & form.keys()
    ]
    for i, spikes in enumerate(seen):
        assert not any(torch.equal(spikes, other) for other in seen[:i])
