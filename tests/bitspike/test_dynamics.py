"""Simulation, equilibrium, gradients: each against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm import create_model
from spiking_lm_bitspike import dynamics
from spiking_lm_bitspike.broyden import find_root
from spiking_lm_bitspike.dynamics import pack_bits, unpack_bits
from spiking_lm_bitspike.model import Bitspike

TOKENS = torch.randint(23, (3, 9), generator=torch.Generator().manual_seed(4))
LENGTHS = torch.tensor([9, 4, 7])


def build(seed: int = 1, **config: Any) -> Bitspike:
    torch.manual_seed(seed)
    small = {"vocab_size": 23, "n_layer": 2, "n_embd": 12, "n_head": 3, "n_hidden": 20, "ctx_len": 12, "steps": 10}
    model = create_model("bitspike", **{**small, **config})
    assert isinstance(model, Bitspike)
    if model.chain.feedback is not None:
        model.chain.feedback.weight.data *= 0.3
    return model.double().eval()


def step_by_step(model: Bitspike, charge: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The definition: every population in every step, one after the other; returns the spikes of each, (T, B, S, N)."""
    config = model.config
    consistent = config.mode == "rate-consistent"
    membranes: dict[str, Any] = {}
    sums: dict[str, Any] = {}
    charged: dict[str, Any] = {}
    spikes: dict[str, list[Tensor]] = {name: [] for name in model.chain.names()}

    def fire(name: str, current: Tensor) -> Tensor:
        u = membranes.get(name, config.leak * config.charge * config.vth) + current
        s = (u >= config.vth).to(u.dtype)
        membranes[name] = config.leak * (u - config.vth * s)
        spikes[name].append(s)
        return s

    def so_far(name: str, x: Tensor, t: int) -> Tensor:
        """Return x itself, or in rate-consistent mode its mean over the steps so far."""
        sums[name] = sums.get(name, 0.0) + x
        return sums[name] / t if consistent else x

    def increment(name: str, value: Tensor, t: int) -> Tensor:
        """Return the value itself, or what is missing for it to have been the charge of every step so far."""
        before = charged.get(name, 0.0)
        charged[name] = t * value
        return charged[name] - before if consistent else value

    for t in range(1, config.steps + 1):
        current = charge
        if model.chain.feedback is not None and t > 1:
            current = current + spikes[model.chain.ends()[-1]][-1] @ model.chain.feedback.weight.T
        x = fire("input", current)
        for block in model.layers():
            p, h = block.name, config.n_head

            def linear(layer: Any, y: Tensor) -> Tensor:
                return F.linear(y, layer.effective_weight(), layer.bias)

            keys = so_far(f"{p}.keys", fire(f"{p}.keys", linear(block.key, x)), t)
            values = so_far(f"{p}.values", fire(f"{p}.values", linear(block.value, x)), t)
            query = so_far(f"{p}.query", linear(block.query, x), t)
            q, k, v = (y.unflatten(-1, (h, -1)).transpose(1, 2) for y in (query, keys, values))
            weights = (q @ k.transpose(2, 3) / k.shape[-1] ** 0.5 + mask).softmax(-1)
            context = (weights @ v).transpose(1, 2).flatten(2)
            context = fire(f"{p}.context", increment(f"{p}.context", context, t))
            mixed = block.mix_norm(so_far(f"{p}.mixed", linear(block.mix, context) + x, t))
            mixed = fire(f"{p}.mixed", increment(f"{p}.mixed", mixed, t))
            inner = F.gelu(so_far(f"{p}.inner", linear(block.up, mixed), t))
            inner = fire(f"{p}.inner", increment(f"{p}.inner", inner, t))
            output = block.down_norm(so_far(f"{p}.output", linear(block.down, inner) + mixed, t))
            x = fire(f"{p}.output", increment(f"{p}.output", output, t))
    return {name: torch.stack(steps) for name, steps in spikes.items()}


@pytest.mark.parametrize("at_once", [2**24, 1400], ids=["at once", "in pieces"])
@pytest.mark.parametrize(
    "config",
    [
        {"mode": "released"},
        {"mode": "released", "leak": 0.9, "vth": 0.7, "weights": "binary"},
        {"mode": "rate-consistent", "weights": "ternary"},
        {"mode": "rate-consistent", "feedback": True},
        {"mode": "released", "feedback": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_population_by_population_is_step_by_step(
    config: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamics, "AT_ONCE", at_once)
    model = build(**config)
    batch = model._batch(TOKENS, lengths=LENGTHS)
    simulated = model.simulate(batch, keep=model.chain.names())
    for name, spikes in step_by_step(model, batch.charge, batch.mask).items():
        assert torch.equal(simulated.spikes[name], spikes), name
        torch.testing.assert_close(simulated.rates[name], spikes.mean(0))
    assert simulated.steps.tolist() == [10, 10, 10]


@torch.no_grad()
def test_sequential_populations_have_rounded_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation of constant currents, one population after the other, is the clamp network with T + 1 levels."""
    model = build(mode="sequential", weights="ternary")
    batch = model._batch(TOKENS, lengths=LENGTHS)
    rounded, simulated = model.clamp(batch, rounding=True).values, model.simulate(batch)
    for name, rates in simulated.rates.items():
        torch.testing.assert_close(rates, rounded[name], rtol=0, atol=1e-12)
    monkeypatch.setattr(dynamics, "AT_ONCE", 1)  # one text at a time
    for name, rates in model.simulate(batch).rates.items():
        assert torch.equal(rates, simulated.rates[name])


@torch.no_grad()
def test_where_rates_converge() -> None:
    def gaps(mode: str, steps: int) -> list[float]:
        gap = build(mode=mode, steps=steps).rate_gap(TOKENS, LENGTHS)
        return [gap[name] for name in ("input", "blocks.0.keys", "blocks.0.mixed", "blocks.1.output")]

    for mode in ("rate-consistent", "sequential"):
        few, many = gaps(mode, 16), gaps(mode, 512)
        assert all(b < a / 8 for a, b in zip(few, many, strict=True)), mode
    few, many = gaps("released", 16), gaps("released", 512)
    assert all(b < a / 8 for a, b in zip(few[:2], many[:2], strict=True))  # nothing but currents: converges
    assert many[2] > 0.02  # the mean of a norm is not the norm of the mean


@pytest.mark.parametrize("by", ["simulation", "populations", "rounding"])
def test_what_replaces_values(by: str) -> None:
    model = build(replace={"by": by}, mode="sequential", num_classes=2).train()
    twin = build(replace={"by": "none"}, mode="sequential", num_classes=2).train()
    hidden, plain = model.encode(TOKENS, LENGTHS).hidden, twin.encode(TOKENS, LENGTHS).hidden
    with torch.no_grad():
        rates = model.eval().encode(TOKENS, LENGTHS).hidden
    for ours, theirs, rate in zip(hidden, plain, rates, strict=True):
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, rate, rtol=0, atol=1e-12)
    if by == "simulation":  # a loss whose gradient does not depend on the values: it is the clamp network's
        weights = [torch.randn_like(h) for h in hidden]
        for encoded in (hidden, plain):
            torch.stack([(w * h).sum() for w, h in zip(weights, encoded, strict=True)]).sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            if not name.startswith("classifier"):
                assert ours.grad is not None
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_half_a_replacement_is_half_way() -> None:
    values = {}
    for share in (0.25, 1.0):
        values[share] = build(replace={"share": share}).train().encode(TOKENS, LENGTHS).hidden[-1].detach()
    plain = build(replace={"by": "none"}).train().encode(TOKENS, LENGTHS).hidden[-1].detach()
    torch.testing.assert_close(values[0.25], 0.25 * values[1.0] + 0.75 * plain)


def test_implicit_gradients_are_finite_differences() -> None:
    """With feedback, through the solver; smooth between the kinks of the clamp, so that differences can be taken."""
    model = build(feedback=True, replace={"by": "none"}, steps=4).train()
    weight = torch.randn(3, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        hidden = model.encode(TOKENS, LENGTHS).hidden
        return torch.stack([(weight * h).sum() for h in hidden]).sum()

    loss().backward()
    assert model.chain.feedback is not None
    block = model.layers()[0]
    for parameter in (model.chain.feedback.weight, block.query.weight, block.up.weight, block.mix_norm.weight):
        gradient = parameter.grad
        assert gradient is not None
        index = int(gradient.abs().argmax())
        values = []
        for change in (1e-6, -1e-6):
            parameter.data.view(-1)[index] += change
            with torch.no_grad():
                values.append(float(loss()))
            parameter.data.view(-1)[index] -= change
        difference = (values[0] - values[1]) / 2e-6
        assert difference == pytest.approx(float(gradient.view(-1)[index]), rel=1e-5)


@torch.no_grad()
def test_feedback_simulates_towards_the_equilibrium() -> None:
    few, many = (build(feedback=True, steps=steps).rate_gap(TOKENS, LENGTHS) for steps in (16, 400))
    assert all(many[name] < few[name] / 4 for name in few)


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4), size=st.integers(1, 12), norm=st.floats(0.0, 0.9))
def test_broyden_finds_roots(seed: int, rows: int, size: int, norm: float) -> None:
    """Of z = clamp(F z + b), a contraction: there is one root, and iterating finds it too."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(size, size, generator=generator, dtype=torch.float64)
    f *= norm / torch.linalg.matrix_norm(f, 2)
    b = torch.randn(rows, size, generator=generator, dtype=torch.float64)

    def map_(z: Tensor) -> Tensor:
        return (z @ f.T + b).clamp(0, 1)

    z = torch.zeros_like(b)
    for _ in range(400):
        z = map_(z)
    root = find_root(lambda x: map_(x) - x, torch.zeros_like(b))
    torch.testing.assert_close(root.x, z, rtol=0, atol=1e-8)
    alone = find_root(lambda x: (x @ f.T + b[:1]).clamp(0, 1) - x, torch.zeros_like(b[:1]))
    torch.testing.assert_close(alone.x, root.x[:1], rtol=0, atol=1e-9)


@torch.no_grad()
def test_texts_stop_when_their_rates_have_settled() -> None:
    settings: dict[str, Any] = {"steps": 60, "num_classes": 2}
    model, full = build(**settings, tolerance=0.05), build(**settings)
    steps = model.steps_taken(TOKENS, LENGTHS)
    assert int(steps.min()) >= 6
    assert int(steps.max()) < 60
    batch = model._batch(TOKENS, lengths=LENGTHS)
    simulated = model.simulate(batch, keep=["input", "blocks.1.output"])
    last = full.simulate(batch).rates["blocks.1.output"]
    for row, (length, n) in enumerate(zip(LENGTHS, steps.tolist(), strict=True)):
        # Alone, a text stops at the same step with the same rates.
        alone = model._batch(TOKENS[row : row + 1, :length], lengths=LENGTHS[row : row + 1])
        assert model.simulate(alone).steps.tolist() == [n]
        rate = simulated.rates["blocks.1.output"][row, :length]
        torch.testing.assert_close(model.simulate(alone).rates["blocks.1.output"][0], rate)
        # What it had fired by then is what it fires without a tolerance.
        spikes = simulated.spikes["blocks.1.output"][:, row]
        assert not bool(spikes[n:].any())
        torch.testing.assert_close(spikes[:n].mean(0)[:length], rate)
        assert float((rate - last[row, :length]).abs().mean()) < 0.15
    careful = build(**settings, tolerance=0.02)
    assert bool((careful.steps_taken(TOKENS, LENGTHS) > steps).all())
    never = build(**settings, tolerance=1e-9)
    torch.testing.assert_close(never.classify(TOKENS, LENGTHS), full.classify(TOKENS, LENGTHS))


@given(
    seed=st.integers(0, 1000),
    steps=st.integers(1, 5),
    rows=st.integers(1, 3),
    n=st.integers(0, 4),
    size=st.integers(1, 19),
)
def test_spikes_are_packed_into_bits(seed: int, steps: int, rows: int, n: int, size: int) -> None:
    spikes = torch.randint(2, (steps, rows, n, size), generator=torch.Generator().manual_seed(seed)).float()
    bits = pack_bits(spikes)
    assert bits.dtype == torch.uint8
    assert bits.shape == (rows, n, steps, -(-size // 8))
    assert torch.equal(unpack_bits(bits, size, torch.float32), spikes)
