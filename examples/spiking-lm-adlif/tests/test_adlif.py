"""The conformance kit on ``adlif``, and what is particular to it."""

from __future__ import annotations

import pytest
import torch

from spiking_lm import create_neuron
from spiking_lm.interfaces import Neuron
from spiking_lm.testing import NeuronContract


class TestContract(NeuronContract):
    name = "adlif"

    @pytest.fixture(params=[{}, {"beta": 0.9, "rho": 0.5, "strength": 2.0}], ids=["defaults", "strong"])
    def neuron(self, request: pytest.FixtureRequest) -> Neuron:
        return create_neuron("adlif", size=5, **request.param)


class TestContractWithOneStrengthForAll(NeuronContract):
    @pytest.fixture
    def neuron(self) -> Neuron:
        return create_neuron("adlif")


def test_a_constant_input_is_answered_less_and_less() -> None:
    neuron = create_neuron("adlif", beta=0.9, gain=1.0, rho=0.98, strength=4.0)
    with torch.no_grad():
        spikes, state = neuron(torch.full((1, 300, 1), 1.5))
    early, late = spikes[0, :20].mean(), spikes[0, -100:].mean()
    assert 0 < late < 0.7 * early
    assert state.a.item() == pytest.approx(late.item(), abs=0.05)  # the adaptation is the recent rate


def test_without_adaptation_it_is_a_lif_with_reset_by_subtraction() -> None:
    x = 2 * torch.randn(3, 100, 8, generator=torch.Generator().manual_seed(0))
    ours, _ = create_neuron("adlif", strength=1e-9)(x)
    lif, _ = create_neuron("lif", reset="subtract")(x)
    assert torch.equal(ours, lif)


def test_a_spike_by_hand() -> None:
    neuron = create_neuron("adlif", beta=0.5, gain=1.0, threshold=1.0, rho=0.75, strength=2.0)
    spikes, (v, a) = neuron.step(torch.tensor([[1.75]]), neuron.init_state((1, 1)))
    assert (spikes.item(), v.item(), a.item()) == (1.0, 0.75, 0.25)
    spikes, (v, a) = neuron.step(torch.tensor([[1.0]]), neuron.init_state((1, 1))._replace(v=v, a=a))
    # theta = 1 + 2 * 0.25 = 1.5, h = 0.375 + 1 = 1.375: silent, where a LIF would have fired
    assert (spikes.item(), v.item(), a.item()) == (0.0, 1.375, 0.1875)


def test_the_strength_is_learned_per_neuron() -> None:
    neuron = create_neuron("adlif", size=4, strength=0.5)
    assert torch.allclose(torch.nn.functional.softplus(neuron.raw_strength), torch.full((4,), 0.5))
    x = 3 * torch.rand(2, 30, 4, generator=torch.Generator().manual_seed(1))
    neuron(x)[0].sum().backward()
    assert neuron.raw_strength.grad is not None
    assert (neuron.raw_strength.grad < 0).all()  # a higher threshold means fewer spikes
