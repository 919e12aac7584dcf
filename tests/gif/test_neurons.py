"""What the integrate-and-fire neurons promise: counts are merged sub-steps, and spikes are a quantiser's codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm import create_model, create_neuron, kernels


def whole_steps(seed: int, *shape: int) -> Tensor:
    """Charges in eighths of the threshold, so that sums of them are exact."""
    return torch.randint(-16, 33, shape, generator=torch.Generator().manual_seed(seed)).double() / 8


def run(neuron: Any, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    spikes, state = neuron(x, v)
    return spikes, state


thresholds = st.sampled_from([0.25, 1.0, 2.0])


@settings(max_examples=40)
@given(levels=st.sampled_from([1, 3, 15]), threshold=thresholds, seed=st.integers(0, 999))
def test_merged_sub_steps_are_one_step_of_gif(levels: int, threshold: float, seed: int) -> None:
    gif = create_neuron("gif", levels=levels, threshold=threshold)
    integrate = create_neuron("if", threshold=threshold)
    x, v = whole_steps(seed, 2, 6, 5) * threshold, whole_steps(seed + 1, 2, 5) * threshold
    charges = torch.zeros(2, 6, levels, 5, dtype=x.dtype)
    charges[:, :, 0] = x  # a charge arrives with the first sub-step
    fine, fine_v = run(integrate, charges.flatten(1, 2), v)
    counts, counts_v = run(gif, x, v)
    assert torch.equal(counts, fine.unflatten(1, (6, levels)).sum(2))
    assert torch.equal(counts_v, fine_v)


@settings(max_examples=40)
@given(steps=st.integers(1, 20), threshold=thresholds, half=st.booleans(), seed=st.integers(0, 999))
def test_spikes_of_a_charge_are_the_code_of_a_quantiser(steps: int, threshold: float, half: bool, seed: int) -> None:
    charge = whole_steps(seed, 3, 7) * 4 * threshold
    v = torch.full_like(charge, threshold / 2 if half else 0.0)
    x = torch.zeros(3, steps, 7, dtype=charge.dtype)
    x[:, 0] = charge
    units = charge / threshold
    code = torch.floor(units + 0.5) if half else torch.floor(units)  # half a threshold turns floor into round
    expected = code.clamp(0, steps)
    assert torch.equal(run(create_neuron("if", threshold=threshold), x, v)[0].sum(1), expected)
    assert torch.equal(run(create_neuron("gif", levels=steps, threshold=threshold), x[:, :1], v)[0][:, 0], expected)


@settings(max_examples=30)
@given(name=st.sampled_from(["if", "gif", "gif.ternary"]), threshold=thresholds, seed=st.integers(0, 999))
def test_nothing_is_lost(name: str, threshold: float, seed: int) -> None:
    x, v = whole_steps(seed, 2, 9, 5), whole_steps(seed + 1, 2, 5)
    spikes, left = run(create_neuron(name, threshold=threshold), x, v)
    assert torch.equal(spikes.sum(1) * threshold + left, x.sum(1) + v)


def test_ternary_spikes_are_those_of_a_positive_and_a_negative_neuron() -> None:
    neuron = create_neuron("gif.ternary", threshold=0.75)
    h = torch.tensor([[-2.0, -0.75, -0.5, 0.0, 0.5, 0.75, 2.0]])
    spikes, v = neuron.step(h, torch.zeros_like(h))
    assert spikes.tolist() == [[-1, -1, 0, 0, 0, 1, 1]]
    assert v.tolist() == [[-1.25, 0.0, -0.5, 0.0, 0.5, 0.0, 1.25]]


def test_gif_is_straight_through_within_its_range() -> None:
    x = torch.tensor([[-0.1, 0.0, 0.7, 1.9, 2.0, 2.1]], requires_grad=True)
    spikes, v = create_neuron("gif", levels=3, threshold=0.5).step(x, torch.zeros(1, 6))
    assert spikes.tolist() == [[0, 0, 1, 3, 3, 3]]
    (gradient,) = torch.autograd.grad(spikes.sum(), x, retain_graph=True)
    assert gradient.tolist() == [[0, 2, 2, 2, 0, 0]]
    (gradient,) = torch.autograd.grad(v.sum(), x)
    assert gradient.tolist() == [[1, 0, 0, 0, 1, 1]], "what is left on the membrane varies beyond the range only"


def test_if_runs_the_kernel_and_is_lif_without_leak() -> None:
    x = 2 * torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    neuron, twin = create_neuron("if"), create_neuron("lif", beta=1.0, gain=1.0, reset="subtract")
    assert neuron.dynamics == twin.dynamics
    assert torch.equal(neuron(x)[0], twin(x)[0])
    with kernels.use(lif_scan="reference"):
        assert torch.equal(neuron(x)[0], twin(x)[0])


@pytest.mark.parametrize(("name", "kind"), [("if", "binary"), ("gif", "integer"), ("gif.ternary", "ternary")])
def test_spikegpt_trains_with_it_and_declares_its_kind(name: str, kind: str) -> None:
    torch.manual_seed(0)
    model = create_model(
        "spikegpt", vocab_size=17, n_layer=2, n_embd=16, ctx_len=32, neuron={"type": name, "threshold": 0.3}
    )
    tokens = torch.randint(0, 17, (2, 9))
    output = model(tokens, return_spikes=True)
    output.logits.square().mean().backward()
    kinds = {site.name: site.kind for site in model.spike_sites()}
    assert set(kinds.values()) == {"binary", kind}, "the embedding is binary"
    seen = torch.cat([spikes.flatten() for site, spikes in output.spikes.items() if kinds[site] == kind])
    expected = {"binary": seen.max() == 1, "integer": seen.max() > 1, "ternary": seen.min() == -1}
    assert expected[kind]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    logits, state = [], model.init_state(2)
    for token in tokens.unbind(1):
        row, state = model.step(token, state)
        logits.append(row)
    torch.testing.assert_close(torch.stack(logits, 1), output.logits, rtol=1e-4, atol=1e-5)
