"""What our wrapper of snnTorch must get right, each against snnTorch itself."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import snntorch
import torch
from snntorch import utils
from torch import Tensor

from spiking_lm import create_neuron
from spiking_lm.config import SurrogateConfig
from spiking_lm.errors import UsageError
from spiking_lm.kernels import spike

REFERENCE_SHAPE = (2, 256, 64)


def drive(shape: tuple[int, ...] = REFERENCE_SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.5 + 0.5


def by_hand(x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """snnTorch's own Leaky in snnTorch's own loop; spikes and the membrane it returns."""
    leaky = snntorch.Leaky(**kwargs)
    mem, spikes = torch.zeros_like(x[:, 0]), []
    for x_t in x.unbind(1):
        s_t, mem = leaky(x_t, mem)
        spikes.append(s_t)
    return torch.stack(spikes, 1), mem


def gradient(spikes: Tensor, x: Tensor) -> Tensor:
    weights = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((spikes * weights).sum(), x, retain_graph=True)[0]


def at_or_above(u: Tensor) -> Tensor:
    return spike(u, 0.0, ">=", SurrogateConfig(name="atan", alpha=2.0))


def test_default_is_snntorch_without_delay_on_half_the_input() -> None:
    x = drive().requires_grad_()
    spikes, mem = by_hand(
        0.5 * x, beta=0.5, threshold=1.0, reset_mechanism="zero", reset_delay=False, spike_grad=at_or_above
    )
    ours, v = create_neuron("snntorch.leaky")(x)
    assert torch.equal(ours, spikes)
    assert (v - mem).abs().max() <= 1e-6
    expected = gradient(spikes, x)
    assert (gradient(ours, x) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_long_sequences_agree_between_kernel_snntorch_and_lif() -> None:
    x = drive((1, 1024, 512))
    leaky = create_neuron("snntorch.leaky")
    rest = leaky.init_state((1, 512))
    with torch.no_grad():
        stepped, stepped_v = leaky.scan(x, rest)
        fast, fast_v = leaky(x)
        own, own_v = create_neuron("lif").scan(x, rest)
    assert int((fast != stepped).sum()) == 0
    assert int((own != stepped).sum()) == 0
    assert (fast_v - stepped_v).abs().max() <= 1e-6
    assert torch.equal(own_v, stepped_v)


def test_delayed_reset_has_another_gradient_and_is_what_detach_reset_means() -> None:
    x = drive().requires_grad_()
    stock, mem = by_hand(0.5 * x, beta=0.5, reset_mechanism="zero", spike_grad=at_or_above)
    ours, v = create_neuron("snntorch.leaky", detach_reset=True)(x)
    assert torch.equal(ours, stock)
    assert (gradient(ours, x) - gradient(stock, x)).abs().max() <= 1e-5
    assert torch.allclose(v, torch.where(mem >= 1, 0.0, mem), atol=1e-6)  # stock returns the membrane before the reset
    through, _ = create_neuron("snntorch.leaky")(x)
    assert torch.equal(through, stock)
    assert (gradient(through, x) - gradient(stock, x)).abs().max() > 0.1


def test_stock_surrogate_misses_ties_and_ours_does_not() -> None:
    x = torch.randint(-4, 6, REFERENCE_SHAPE, generator=torch.Generator().manual_seed(2)).float()
    stock, _ = by_hand(0.5 * x, beta=0.5, reset_mechanism="zero", reset_delay=False)
    exact, _ = create_neuron("lif").scan(x, torch.zeros(2, 64))
    assert int((stock != exact).sum()) > 100
    assert torch.equal(create_neuron("snntorch.leaky")(x)[0], exact)
    assert torch.equal(create_neuron("snntorch.leaky", compare=">")(x)[0], stock)


def test_subtract_is_not_a_soft_reset_and_so_has_no_dynamics() -> None:
    neuron = create_neuron("snntorch.leaky", reset="subtract")
    assert neuron.dynamics is None
    x = drive() * 2
    soft, _ = create_neuron("lif", reset="subtract")(x)
    assert int((neuron(x)[0] != soft).sum()) > 10


def test_snntorchs_own_default_can_be_had() -> None:
    x = drive().requires_grad_()
    stock, mem = by_hand(x, beta=0.9)
    neuron = create_neuron("snntorch.leaky", beta=0.9, gain=1.0, reset="subtract", compare=">", detach_reset=True)
    ours, v = neuron(x)
    assert torch.equal(ours, stock)
    assert torch.allclose(v, mem, atol=1e-6)
    assert torch.allclose(gradient(ours, x), gradient(stock, x), atol=1e-5)


def test_neurons_do_not_pile_up_in_snntorchs_registry() -> None:
    theirs = snntorch.Leaky(0.5)
    before = list(snntorch.SpikingNeuron.instances)
    neurons = [create_neuron("snntorch.leaky") for _ in range(20)]
    assert [a is b for a, b in zip(snntorch.SpikingNeuron.instances, before, strict=True)] == [True] * len(before)
    assert any(instance is theirs for instance in snntorch.SpikingNeuron.instances)
    gone = weakref.ref(neurons[3])
    del neurons
    gc.collect()
    assert gone() is None


def test_resetting_another_network_leaves_ours_alone() -> None:
    neuron = create_neuron("snntorch.leaky", reset="subtract")
    x = drive()
    _, state = neuron(x[:, :100])
    expected, _ = neuron(x[:, 100:], state)
    kept = state.clone()
    utils.reset(torch.nn.Sequential(snntorch.Leaky(0.5, init_hidden=True)))
    assert torch.equal(state, kept)
    assert torch.equal(neuron(x[:, 100:], state)[0], expected)


def test_nothing_of_snntorch_is_saved_cast_or_kept() -> None:
    neuron = create_neuron("snntorch.leaky", beta=0.9, threshold=0.3)
    assert not neuron.state_dict()
    assert not list(neuron.buffers())
    for dtype in (torch.bfloat16, torch.float64):
        neuron.to(dtype)
        assert neuron.leaky.beta.item() == 0.9
        assert neuron.leaky.threshold.item() == 0.3
    x = drive((1, 3, 4)).requires_grad_()
    spikes, v = neuron.step(x[:, 0], neuron.init_state((1, 4)))
    kept = weakref.ref(v)
    del spikes, v
    gc.collect()
    assert kept() is None, "the module keeps its last membrane, and with it the graph of everything before"
    copy.deepcopy(neuron)


def test_threads_do_not_meet_in_one_neuron() -> None:
    neuron = create_neuron("snntorch.leaky", reset="subtract")
    inputs = [drive((1, 300, 8), seed) for seed in range(4)]
    expected = [neuron(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(lambda x: neuron(x)[0], inputs))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_half_precision_input_keeps_its_membrane_in_float32() -> None:
    x = drive((3, 40, 16)).bfloat16()
    for name in ("lif", "snntorch.leaky"):
        neuron = create_neuron(name)
        spikes, v = neuron.scan(x, neuron.init_state((3, 16), dtype=torch.bfloat16))
        assert (spikes.dtype, v.dtype) == (torch.bfloat16, torch.float32)
        exact, _ = neuron.scan(x.float(), neuron.init_state((3, 16)))
        assert torch.equal(spikes.float(), exact)
        fast, fast_v = neuron(x)
        assert torch.equal(fast, spikes)
        assert (fast_v - v).abs().max() <= 1e-6


def test_a_membrane_of_another_shape_is_refused() -> None:
    with pytest.raises(UsageError, match=r"membrane of shape \(2, 5\) for input of shape \(2, 4\)"):
        create_neuron("snntorch.leaky").step(torch.zeros(2, 4), torch.zeros(2, 5))


def test_import_is_silent_and_listing_does_not_import_it() -> None:
    code = (
        "import sys, spiking_lm\n"
        "from spiking_lm import registry\n"
        "assert 'snntorch.leaky' in registry.all('neurons')\n"
        "assert 'snntorch' not in sys.modules and 'torch' not in sys.modules\n"
        "import spiking_lm_spikegpt.neuron\n"
        "assert 'snntorch' in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout + done.stderr
