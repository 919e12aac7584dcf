"""The op egru_scan: the fast form equals its definition for every shape, layout and option; and event products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm import kernels
from spiking_lm.errors import UsageError
from spiking_lm.kernels import events, products
from spiking_lm.kernels.reference import egru_event

quick = settings(deadline=None, max_examples=25)
OPTIONS = {"gamma": 0.7, "epsilon": 1.0}


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(seed: int, steps: int, batch: int, hidden: int) -> list[Tensor]:
    """a, recurrent kernel, recurrent bias, threshold, c0, y0."""
    threshold = 0.3 * _normal(seed + 3, hidden).abs()
    threshold[::3] = 0.0
    return [
        _normal(seed, steps, batch, 3 * hidden),
        _normal(seed + 1, hidden, 3 * hidden) / hidden**0.5,
        0.3 * _normal(seed + 2, 3 * hidden),
        threshold,
        0.3 * _normal(seed + 4, batch, hidden),
        0.3 * _normal(seed + 5, batch, hidden).relu(),
    ]


def _scan(implementation: str, inputs: list[Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    with kernels.use(egru_scan=implementation):
        return kernels.egru_scan(*inputs, **{**OPTIONS, **options})


def _grads(outputs: list[Tensor], inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Gradients of a random projection of the outputs; zero where an input does not matter."""
    loss = torch.stack([(o * _normal(seed + i, *o.shape).to(o.dtype)).sum() for i, o in enumerate(outputs)]).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@quick
@given(
    steps=st.sampled_from([0, 1, 2, 7]),
    batch=st.sampled_from([1, 3]),
    hidden=st.sampled_from([1, 5, 8]),
    gamma=st.sampled_from([0.0, 0.7, 3.6]),
    epsilon=st.sampled_from([0.5, 1.0, 3.6]),
    zoneout=st.sampled_from(["none", "mask", "mean"]),
    carried=st.booleans(),
    transposed=st.booleans(),
    used=st.sampled_from(["y", "c", "o", "yco"]),
    seed=st.integers(0, 999),
)
@pytest.mark.parametrize("implementation", ["torch", "numba"])
def test_fast_forms_equal_the_definition(
    implementation: str,
    steps: int,
    batch: int,
    hidden: int,
    gamma: float,
    epsilon: float,
    zoneout: str,
    carried: bool,
    transposed: bool,
    used: str,
    seed: int,
) -> None:
    """Same events, and states and all gradients to rounding, whichever outputs the loss looks at."""
    assume(steps > 0 or implementation == "torch")  # compiled code is not called for nothing
    values = _inputs(seed, steps, batch, hidden)[: 6 if carried else 4]
    if transposed:  # batch-first memory
        values[0] = values[0].transpose(0, 1).contiguous().transpose(0, 1)
        values[1] = values[1].t().contiguous().t()
    options: dict[str, Any] = {"gamma": gamma, "epsilon": epsilon}
    if zoneout == "mask":
        options["keep"] = (_normal(seed + 6, steps, batch, hidden) > -0.5).double()
    elif zoneout == "mean":
        options["zoneout"] = 0.3
    results = []
    for form in ("reference", implementation):
        inputs = [value.detach().requires_grad_() for value in values]
        y, c, o = _scan(form, inputs, **options)
        chosen = [x for name, x in zip("yco", (y, c, o), strict=True) if name in used]
        results.append([o, y, c, *_grads(chosen, inputs, seed)])
        with torch.no_grad():
            again = _scan(form, inputs, **options)
        assert torch.equal(again[2], o)
        torch.testing.assert_close(again[:2], (y, c), rtol=1e-12, atol=1e-14)
    (o, *expected), (o_fast, *got) = results
    assert torch.equal(o_fast, o)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11 * scale)


@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
@pytest.mark.parametrize("options", [{}, {"zoneout": 0.25}, {"keep": True}], ids=["plain", "mean", "mask"])
def test_gradients_are_true_where_the_surrogate_is_zero(implementation: str, options: dict[str, Any]) -> None:
    """With gamma = 0 the event is a constant almost everywhere, and differences of the outputs are the derivative."""
    steps, batch, hidden = 3, 2, 4
    inputs = _inputs(1, steps, batch, hidden)
    if options.get("keep"):
        options = {"keep": (_normal(9, steps, batch, hidden) > -0.5).double()}
    with torch.no_grad():
        _, c, o = _scan(implementation, inputs, **options)
        before = c + o * inputs[3]
        assert (before - inputs[3]).abs().min() > 1e-4, "no membrane may be at its threshold"
        assert 0 < o.sum() < o.numel()
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *args: _scan(implementation, list(args), **{**options, "gamma": 0.0})[:2], leaves, eps=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("v", [-2.0, -0.3, 0.0, 0.2, 5.0])
def test_the_surrogate_is_the_scaled_triangle(v: float) -> None:
    x = torch.tensor(v, dtype=torch.float64, requires_grad=True)
    e = egru_event(x, 0.7, 1.7)
    e.backward()
    assert e.item() == float(v > 0), "an event is strictly above the threshold"
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(0.7 * max(0.0, 1 - 1.7 * abs(v)))


@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
@pytest.mark.parametrize("train", [False, True])
def test_time_can_be_cut(implementation: str, train: bool) -> None:
    a, *parameters = _inputs(2, 9, 2, 6)
    leaves = [x.requires_grad_(train) for x in (a, *parameters)]
    whole = _scan(implementation, leaves)
    first = _scan(implementation, [leaves[0][:4], *leaves[1:]])
    second = _scan(implementation, [leaves[0][4:], *leaves[1:4], first[1][-1], first[0][-1]])
    for one, two, both in zip(first, second, whole, strict=True):
        torch.testing.assert_close(torch.cat([one, two]), both, rtol=1e-12, atol=1e-13)
    if train:
        joined = _grads(list(whole), leaves, 5)
        apart = _grads([torch.cat(pair) for pair in zip(first, second, strict=True)], leaves, 5)
        torch.testing.assert_close(apart, joined, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
@pytest.mark.parametrize("train", [False, True])
def test_state_is_float32_for_bfloat16_and_under_autocast(implementation: str, train: bool) -> None:
    inputs = [x.float() for x in _inputs(3, 5, 2, 6)]
    inputs[0] = inputs[0].bfloat16()
    expected = _scan(implementation, [inputs[0].float(), *inputs[1:]])
    leaves = [x.clone().requires_grad_(train) for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _scan(implementation, leaves)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    if train:
        grads = _grads(list(got), leaves, 1)
        assert [g.dtype for g in grads] == [x.dtype for x in leaves]
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
@pytest.mark.parametrize("train", [False, True])
def test_nan_is_not_hidden(implementation: str, train: bool) -> None:
    inputs = _inputs(4, 3, 2, 4)
    inputs[0][0, 1, 9] = float("nan")  # the candidate of one unit of one row
    y, c, _ = _scan(implementation, [x.requires_grad_(train) for x in inputs])
    assert y[0, 1].isnan().tolist() == c[0, 1].isnan().tolist() == [False, True, False, False]
    assert y[1:, 1].isnan().all()
    assert not y[:, 0].isnan().any()


def test_large_layers_go_through_the_same_arithmetic() -> None:
    """Big enough for oneDNN where there is one: float32 results and gradients are those of float64 to rounding."""
    steps, batch, hidden = 3, 24, 176
    values = _inputs(6, steps, batch, hidden)
    assert batch * hidden * 3 * hidden > products.MIN_WORK
    exact = [x.requires_grad_() for x in values]
    rounded = [x.detach().float().requires_grad_() for x in values]
    expected, got = _scan("reference", exact), _scan("torch", rounded)
    same = (got[2] == expected[2]).all(0).all(1)  # rows in which no membrane came within rounding of its threshold
    assert same.sum() > batch // 2
    torch.testing.assert_close(got[1][:, same].double(), expected[1][:, same], rtol=0, atol=1e-5)
    mask = same[None, :, None].double()
    wanted = torch.autograd.grad((expected[0] * mask).sum(), exact)
    found = torch.autograd.grad((got[0] * mask.float()).sum(), rounded)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_it_says_what_is_wrong_with_its_arguments() -> None:
    a, kernel, bias, threshold, c0, y0 = _inputs(0, 3, 2, 4)
    for wrong, message in (
        ([a[0], kernel, bias, threshold], r"\(T, B, 3H\)"),
        ([a[..., :9], kernel, bias, threshold], "a has shape"),
        ([a, kernel.t(), bias, threshold], "recurrent_kernel has shape"),
        ([a, kernel, bias, threshold, c0[:1]], "c0 has shape"),
        ([a, kernel, bias, threshold, c0, y0[0]], "y0 has shape"),
    ):
        with pytest.raises(UsageError, match=message):
            _scan("torch", wrong)
    for options in ({"gamma": -1.0}, {"epsilon": 0.0}, {"zoneout": 1.0}):
        with pytest.raises(UsageError, match="gamma must be at least 0"):
            _scan("torch", [a, kernel, bias, threshold], **options)
    with pytest.raises(UsageError, match="give one of them"):
        _scan("torch", [a, kernel, bias, threshold], zoneout=0.1, keep=torch.ones(3, 2, 4))


# -- products ----------------------------------------------------------------------------------------------------------


@quick
@given(
    rows=st.sampled_from([0, 1, 2, 5]),
    sources=st.sampled_from([1, 7, 64]),
    targets=st.sampled_from([1, 12]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_event_products_equal_dense_ones(
    rows: int, sources: int, targets: int, density: float, biased: bool, seed: int
) -> None:
    chance = torch.rand(rows, sources, generator=torch.Generator().manual_seed(seed))
    x = _normal(seed, rows, sources) * (chance < density)
    weight_t, bias = _normal(seed + 1, sources, targets), _normal(seed + 2, targets)
    got = events.event_linear(x, weight_t, bias if biased else None)
    torch.testing.assert_close(got, x @ weight_t + (bias if biased else 0.0), rtol=1e-12, atol=1e-12)


def test_the_cost_rule() -> None:
    """Single streams through large layers are events; small or batched products are dense."""
    assert events.cheaper_product(1, 1350, 4050, 0) == "event"
    assert events.cheaper_product(1, 1350, 4050, 270) == "event"
    assert events.cheaper_product(1, 1350, 4050, 1350) == "event", "a gather reads faster than a product of one row"
    assert events.cheaper_product(2, 1350, 4050, 2 * 1350) == "dense"
    assert events.cheaper_product(1, 64, 192, 0) == "dense"
    assert events.cheaper_product(1, 256, 768, 51) == "dense", "weights that stay in the cache are read quickly"
    assert events.cheaper_product(64, 1350, 4050, 64 * 270) == "dense"
    turns = [events.cheaper_product(2, 1350, 4050, active) for active in range(0, 2701, 50)]
    assert turns == sorted(turns, reverse=True), "once dense is cheaper, more activity does not change it back"
    # A wide product costs its operations, a narrow one the reading of its weights.
    assert events.cheaper_product(100, 1000, 1000, 800) == "event"
    assert events.cheaper_product(100, 1000, 1000, 100 * 200) == "dense"


def test_the_choice_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    gather = events._gather

    def spy(x: Tensor, active: Tensor, *rest: Any) -> Tensor:
        asked.append(len(active))
        return gather(x, active, *rest)

    monkeypatch.setattr(events, "_gather", spy)
    monkeypatch.setenv("SPIKING_LM_KERNELS", "spike_linear=torch")
    monkeypatch.setattr(events, "rates", lambda: events.DEFAULT_RATES)
    x = _normal(0, 1, 900).float() * (torch.arange(900) % 10 == 0)
    weight_t, bias = _normal(1, 900, 900).float(), _normal(2, 900).float()
    expected = torch.addmm(bias, x, weight_t)
    torch.testing.assert_close(events.linear(x, weight_t, bias), expected, rtol=1e-5, atol=1e-4)
    assert asked == [90], "few events, and no gradient is recorded"
    events.linear(_normal(3, 4, 900).float(), weight_t, bias)
    assert asked == [90], "all sources of four rows are active"
    y = events.linear(x, weight_t.requires_grad_(), bias)
    assert asked == [90], "gradients are recorded"
    y.sum().backward()
    torch.testing.assert_close(weight_t.grad, x.t().expand(900, 900))
    with torch.no_grad():
        events.linear(x, weight_t, bias)
    assert asked == [90, 90]


def test_large_dense_products_have_the_gradients_of_small_ones() -> None:
    x, weight_t, bias = (_normal(i, *shape).requires_grad_() for i, shape in enumerate([(40, 200), (200, 300), (300,)]))
    single = [t.detach().float().requires_grad_() for t in (x, weight_t, bias)]
    assert products.MIN_WORK < 40 * 200 * 300
    got, expected = products.linear(*single), torch.addmm(bias, x, weight_t)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    for one, other in zip(_grads([got], single, 7), _grads([expected], [x, weight_t, bias], 7), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)
    only_bias = products.linear(single[0].detach(), single[1].detach(), single[2])
    assert torch.equal(torch.autograd.grad(only_bias.sum(), single[2])[0], torch.full((300,), 40.0))


def test_products_do_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = _normal(0, 40, 200).float(), _normal(1, 200, 300).float()
    with_it = products.product(x, weight)
    monkeypatch.setattr(products, "_onednn", lambda: None)
    out = torch.zeros(40, 300)
    products.adder(weight, 40)(out, x)
    torch.testing.assert_close(out, with_it, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(products.product(x, weight), with_it, rtol=1e-5, atol=1e-4)
