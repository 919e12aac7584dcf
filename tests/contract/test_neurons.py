"""The conformance kit on every first-party neuron, in every form that its configuration offers."""

from __future__ import annotations

from typing import Any

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


NORSE_BOX_FORMS = {
    "defaults": {},
    "spikegpt": {"tau_mem_inv": 500.0},
    "subtract": {"tau_mem_inv": 500.0, "reset_method": "subtract"},
    "below-zero": {"tau_mem_inv": 300.0, "v_leak": -0.25, "v_reset": -0.25},
    "undershoot": {"tau_mem_inv": 500.0, "v_reset": -0.5},  # no dynamics: it rests elsewhere than it resets to
    "triangle": {"tau_mem_inv": 500.0, "method": "triangle"},
    "steep-triangle": {"tau_mem_inv": 500.0, "method": "triangle", "alpha": 0.3},  # no dynamics, as those below
    "tanh": {"tau_mem_inv": 700.0, "method": "tanh", "alpha": 2.0},
    "circ": {"tau_mem_inv": 500.0, "method": "circ", "alpha": 0.5},
    "erfc": {"dt": 0.01, "tau_mem_inv": 50.0, "method": "heavi_erfc"},
}
NORSE_BOX_WITHOUT_DYNAMICS = {"undershoot", "steep-triangle", "circ", "erfc"}

NORSE_LIF_FORMS = {
    "defaults": {},
    "fast": {"tau_mem_inv": 500.0, "tau_syn_inv": 500.0},
    "no-current-left": {"tau_mem_inv": 500.0, "tau_syn_inv": 1000.0, "v_leak": 0.1, "v_reset": -0.2},
    "triangle": {"tau_mem_inv": 500.0, "tau_syn_inv": 700.0, "method": "triangle", "alpha": 0.3},
}


class TestNorseLIFBox(NeuronContract):
    name = "norse.lif_box"

    @pytest.fixture(params=NORSE_BOX_FORMS)
    def neuron(self, request: pytest.FixtureRequest) -> Neuron:
        neuron = create_neuron("norse.lif_box", **NORSE_BOX_FORMS[request.param])
        assert (neuron.dynamics is None) == (request.param in NORSE_BOX_WITHOUT_DYNAMICS)
        return neuron

    def inputs(self, neuron: Neuron, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * super().inputs(neuron, *args, **kwargs)


class TestNorseLIF(NeuronContract):
    name = "norse.lif"

    @pytest.fixture(params=NORSE_LIF_FORMS)
    def neuron(self, request: pytest.FixtureRequest) -> Neuron:
        return create_neuron("norse.lif", **NORSE_LIF_FORMS[request.param])


SLAYER_FORMS = {
    "defaults": {},
    "no-current-left": {"current_decay": 1.0, "voltage_decay": 0.5, "threshold": 0.7},
    "no-leak": {"current_decay": 0.5, "voltage_decay": 0.0, "tau_grad": 1.0, "scale_grad": 1.0},
    "all-leaks": {"current_decay": 0.1, "voltage_decay": 1.0, "threshold": 3.0},
}


class TestSlayerCuba(NeuronContract):
    name = "slayer.cuba"

    @pytest.fixture(params=SLAYER_FORMS)
    def neuron(self, request: pytest.FixtureRequest) -> Neuron:
        return create_neuron("slayer.cuba", **SLAYER_FORMS[request.param])


IF_FORMS = {
    "defaults": {},
    "above": {"compare": ">", "threshold": 1.5},
    "detached": {"detach_reset": True, "surrogate": {"name": "triangle", "alpha": 0.5}},
}
GIF_FORMS = {
    "defaults": {},
    "one-level": {"levels": 1},
    "detached": {"levels": 3, "threshold": 0.5, "detach_reset": True},
}
TERNARY_FORMS = {"defaults": {}, "detached": {"threshold": 2.0, "detach_reset": True, "surrogate": "sigmoid"}}


class TestIF(NeuronContract):
    name = "if"

    @pytest.fixture(params=IF_FORMS)
    def neuron(self, request: pytest.FixtureRequest) -> Neuron:
        return create_neuron("if", **IF_FORMS[request.param])


class TestGIF(NeuronContract):
    name = "gif"

    @pytest.fixture(params=GIF_FORMS)
    def neuron(self, request: pytest.FixtureRequest) -> Neuron:
        return create_neuron("gif", **GIF_FORMS[request.param])


class TestTernaryGIF(NeuronContract):
    name = "gif.ternary"

    @pytest.fixture(params=TERNARY_FORMS)
    def neuron(self, request: pytest.FixtureRequest) -> Neuron:
        return create_neuron("gif.ternary", **TERNARY_FORMS[request.param])


ELASTIC_FORMS = {
    "defaults": {},
    "symmetric": {"steps": 64, "reset": "symmetric", "k": 1.0},
    "signs": {"steps": 64, "bits": 1},
    "learned": {"steps": 3, "learn_alpha": True, "beta": 0.5},
}


class TestElastic(NeuronContract):
    """Calibrated, so that nothing changes in the module."""

    name = "elastic"

    @pytest.fixture(params=ELASTIC_FORMS)
    def neuron(self, request: pytest.FixtureRequest) -> Neuron:
        neuron = create_neuron("elastic", **ELASTIC_FORMS[request.param])
        neuron.calibrate(self.inputs(neuron, batch=4, steps=64))
        return neuron

    def inputs(self, neuron: Neuron, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Small ones: the amplitude is the decay too, so that membranes grow without bound where it is above 2."""
        return 0.3 * super().inputs(neuron, *args, **kwargs)

    def test_some_fire_and_some_are_silent(self, neuron: Neuron) -> None:
        if neuron.config.bits == 1:
            pytest.skip("a sign is never silent")
        super().test_some_fire_and_some_are_silent(neuron)


def test_every_first_party_neuron_is_under_contract() -> None:
    from spiking_lm import registry

    ours = (TestLIF, TestIF, TestGIF, TestTernaryGIF, TestElastic)
    contracts = (*ours, TestSnnTorchLeaky, TestNorseLIFBox, TestNorseLIF, TestSlayerCuba)
    covered = {c.name for c in contracts}
    first_party = {name for name, entry in registry.all("neurons").items() if entry.plugin.first_party}
    assert first_party == covered


def test_the_forms_really_differ() -> None:
    x = torch.randn(4, 50, 20, generator=torch.Generator().manual_seed(0)) * 3
    seen = [
        create_neuron("lif", **form)(x)[0] for form in FORMS.values() if not {"surrogate", "detach_reset"} & form.keys()
    ]
    for i, spikes in enumerate(seen):
        assert not any(torch.equal(spikes, other) for other in seen[:i])
