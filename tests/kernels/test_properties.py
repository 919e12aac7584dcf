"""What must hold for every shape, dtype and layout: the fast forms equal the definitions, and time can be cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm import kernels
from spiking_lm.config import LIFConfig, SurrogateConfig
from spiking_lm.errors import ConfigError, UsageError
from spiking_lm.kernels import torch_fast

LENGTHS = st.sampled_from([0, 1, 2, 17, 63, 64, 65])
WIDTHS = st.sampled_from([1, 5, 32, 33])
BATCHES = st.sampled_from([1, 2, 3])
SURROGATES = st.sampled_from(["atan", "fast_sigmoid", "sigmoid", "triangle"])
FAST = ["torch", "numba"]
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make short sequences cross several chunk borders."""
    monkeypatch.setattr(torch_fast, "CHUNK", 200)


def _normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _grads(outputs: list[Tensor], inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Gradients of a random projection of all outputs; zero where an input does not matter."""
    loss = sum((o * _normal(seed + i, *o.shape, dtype=o.dtype)).sum() for i, o in enumerate(outputs))
    if not loss.requires_grad:  # no step was taken
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _lif(implementation: str, inputs: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    with kernels.use(lif_scan=implementation if inputs[0].numel() else "torch"):  # nothing is worth compiling for
        return kernels.lif_scan(*inputs, **options)


def _wkv(implementation: str, inputs: list[Tensor], state: Any = None) -> tuple[Tensor, Any]:
    with kernels.use(wkv=implementation if inputs[2].numel() else "torch"):
        return kernels.wkv(*inputs, state)


# -- lif_scan ----------------------------------------------------------------------------------------------------------

lif_options = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "gain": st.sampled_from([0.5, 1.0, -0.7, 0.0]),
        "threshold": st.sampled_from([1.0, 0.3]),
        "v_reset": st.sampled_from([0.0, -0.2, 0.1, None]),
        "compare": st.sampled_from([">=", ">"]),
        "surrogate": st.builds(SurrogateConfig, name=SURROGATES, alpha=st.sampled_from([0.7, 2.0])),
        "detach_reset": st.booleans(),
        "final_only": st.booleans(),
    }
)


@quick
@given(
    steps=LENGTHS, batch=BATCHES, width=WIDTHS, options=lif_options, transposed=st.booleans(), seed=st.integers(0, 99)
)
@pytest.mark.parametrize("implementation", FAST)
def test_fast_lif_equals_its_definition(
    implementation: str, steps: int, batch: int, width: int, options: dict[str, Any], transposed: bool, seed: int
) -> None:
    x = 2 * (_normal(seed, batch, steps, width).transpose(0, 1) if transposed else _normal(seed, steps, batch, width))
    results = []
    for name in ("reference", implementation):
        inputs = [x.detach().requires_grad_(), _normal(seed + 1, batch, width).requires_grad_()]
        spikes, v = _lif(name, inputs, **options)
        results.append([spikes, v, *_grads([spikes, v], inputs, seed)])
        with torch.no_grad():
            again, v_again = _lif(name, inputs, **options)
        assert torch.equal(again, spikes)
        assert torch.allclose(v_again, v, rtol=0, atol=1e-15)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@quick
@given(steps=LENGTHS, width=WIDTHS, cut=st.integers(0, 65), options=lif_options, seed=st.integers(0, 99))
@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
def test_lif_can_be_cut_in_time(
    implementation: str, steps: int, width: int, cut: int, options: dict[str, Any], seed: int
) -> None:
    options = {**options, "final_only": True}
    x = 2 * _normal(seed, steps, 2, width, dtype=torch.float32)
    whole, v = _lif(implementation, [x], **options)
    first, v_mid = _lif(implementation, [x[:cut]], **options)
    second, v_end = _lif(implementation, [x[cut:], v_mid], **options)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(v_end, v)


@quick
@given(steps=LENGTHS, width=WIDTHS, options=lif_options, seed=st.integers(0, 99))
@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
def test_lif_rows_are_independent(
    implementation: str, steps: int, width: int, options: dict[str, Any], seed: int
) -> None:
    x = 2 * _normal(seed, steps, 3, width, dtype=torch.float32)
    spikes, v = _lif(implementation, [x], **options)
    for row in range(3):
        alone, v_alone = _lif(implementation, [x[:, row]], **options)
        assert torch.equal(alone, spikes[:, row])
        assert torch.equal(v_alone, v[row] if options["final_only"] else v[:, row])


@quick
@given(steps=LENGTHS, width=WIDTHS, options=lif_options, seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", FAST)
def test_lif_in_every_dtype(
    implementation: str, dtype: torch.dtype, steps: int, width: int, options: dict[str, Any], seed: int
) -> None:
    """The membrane is kept in float32 whatever the input, so results differ from float64 only near the threshold."""
    options = {**options, "final_only": False}
    x = (2 * _normal(seed, steps, 2, width)).to(dtype)
    inputs, exact = [x.clone().requires_grad_()], [x.double().requires_grad_()]
    (spikes, v), (spikes64, v64) = _lif(implementation, inputs, **options), _lif("reference", exact, **options)
    assert spikes.dtype == dtype
    assert v.dtype == torch.float32
    # Neurons whose membrane came within rounding of the threshold may part ways; all others agree.
    same = (spikes.double() == spikes64).all(0)
    assert same.double().mean() > 0.9 or same.numel() < 30
    torch.testing.assert_close(v.double()[:, same], v64[:, same], rtol=1e-4, atol=1e-4)
    got, expected = _grads([spikes.float()], inputs, seed)[0], _grads([spikes64.float()], exact, seed)[0]
    assert got.dtype == dtype
    loose = 3e-5 if dtype == torch.float32 else 2e-2
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    held = same & (expected.abs() < torch.finfo(dtype).max / 2)  # undamped gradients outgrow float16
    torch.testing.assert_close(got.double()[held], expected[held], rtol=loose, atol=loose * scale)


@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
@pytest.mark.parametrize("compare", [">=", ">"])
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("threshold", [1.0, 0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lif_at_the_threshold(
    implementation: str, compare: str, v_reset: float | None, steps: int, threshold: float, dtype: torch.dtype
) -> None:
    at = torch.tensor(threshold, dtype=dtype)
    below, above = (torch.nextafter(at, torch.tensor(end, dtype=dtype)) for end in (-math.inf, math.inf))
    x = torch.stack([below, at, above]).repeat(steps, 1)
    with torch.no_grad():
        spikes, _ = _lif(implementation, [x], beta=0.0, gain=1.0, threshold=threshold, v_reset=v_reset, compare=compare)
    assert spikes.tolist() == [[0.0, float(compare == ">="), 1.0]] * steps


@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("train", [False, True])
def test_lif_does_not_hide_nan(implementation: str, v_reset: float | None, steps: int, train: bool) -> None:
    x = torch.zeros(steps, 3)
    x[0, 1] = math.nan
    x.requires_grad_(train)
    spikes, v = _lif(implementation, [x], beta=0.5, gain=0.5, threshold=1.0, v_reset=v_reset)
    broken = torch.tensor([False, True, False]).expand(steps, 3)
    assert torch.equal(spikes.isnan(), broken)
    assert torch.equal(v.isnan(), broken)


@given(u=st.floats(-50, 50), alpha=st.floats(0.1, 20), name=SURROGATES)
@settings(deadline=None)
@example(u=0.0, alpha=2.0, name="atan")
def test_surrogates_are_even_bounded_and_as_documented(u: float, alpha: float, name: Any) -> None:
    surrogate = SurrogateConfig(name=name, alpha=alpha)
    left, right = kernels.surrogate_gradient(torch.tensor([-u, u], dtype=torch.float64), surrogate).tolist()
    sigma = 1 / (1 + math.exp(-min(alpha * abs(u), 700)))
    formula = {
        "atan": alpha / 2 / (1 + (math.pi / 2 * alpha * u) ** 2),
        "fast_sigmoid": 1 / (1 + alpha * abs(u)) ** 2,
        "sigmoid": alpha * sigma * (1 - sigma),
        "triangle": alpha * max(0.0, 1 - alpha * abs(u)),
    }[name]
    assert left == right
    assert right == pytest.approx(formula, rel=1e-9, abs=1e-14)
    in_place = torch_fast._surrogate_(torch.tensor([u], dtype=torch.float64), surrogate).item()
    assert in_place == pytest.approx(formula, rel=1e-9, abs=1e-14)


def test_lif_says_what_is_wrong_with_its_arguments() -> None:
    options = {"beta": 0.5, "gain": 0.5, "threshold": 1.0}
    with pytest.raises(UsageError, match="floating-point"):
        kernels.lif_scan(torch.zeros(3, 2, dtype=torch.int64), **options)
    with pytest.raises(UsageError, match=r"v0 has shape \(3,\)"):
        kernels.lif_scan(torch.zeros(3, 2), torch.zeros(3), **options)
    with pytest.raises(UsageError, match="compare"):
        kernels.lif_scan(torch.zeros(3, 2), compare="=>", **options)


# -- wkv ---------------------------------------------------------------------------------------------------------------


def _wkv_inputs(seed: int, batch: int, steps: int, width: int, spread: float, time_major: bool) -> list[Tensor]:
    decay = torch.linspace(-20, 0, width, dtype=torch.float64) if width > 1 else torch.tensor([-1.0]).double()
    shape = (steps, batch, width) if time_major else (batch, steps, width)
    k, v = (_normal(seed + i, *shape) for i in range(2))
    if time_major:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    return [decay, _normal(seed + 2, width), spread * k, v]


def _wkv_state(seed: int, batch: int, width: int) -> list[Tensor]:
    return [_normal(seed, batch, width), _normal(seed + 1, batch, width).exp(), _normal(seed + 2, batch, width)]


@quick
@given(
    steps=LENGTHS,
    batch=BATCHES,
    width=WIDTHS,
    spread=st.sampled_from([1.0, 10.0]),
    time_major=st.booleans(),
    carried=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("implementation", FAST)
def test_fast_wkv_equals_its_definition(
    implementation: str, steps: int, batch: int, width: int, spread: float, time_major: bool, carried: bool, seed: int
) -> None:
    """Outputs, the state in its invariant form (p e^o, q e^o), and the gradients of all five inputs from both."""
    values = _wkv_inputs(seed, batch, steps, width, spread, time_major)
    start = _wkv_state(seed, batch, width)
    results, top = [], 0.0
    for name in ("reference", implementation):
        inputs = [t.detach().requires_grad_() for t in (*values, *start[:2])]
        state = (*inputs[4:], start[2]) if carried else None
        y, (p, q, o) = _wkv(name, inputs[:4], state)
        top = top or o.amax().item()  # the same for both, so that exp does not overflow
        outputs = [y, p * torch.exp(o - top), q * torch.exp(o - top)]
        grads = _grads(outputs, inputs if carried else inputs[:4], seed)
        results.append([*outputs, *grads])
        with torch.no_grad():
            torch.testing.assert_close(_wkv(name, inputs[:4], state)[0], y, rtol=1e-10, atol=1e-11)
    for expected, got in zip(*results, strict=True):
        scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10 * scale)


@quick
@given(steps=LENGTHS, width=WIDTHS, cut=st.integers(0, 65), seed=st.integers(0, 99))
@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
@pytest.mark.parametrize("train", [False, True])
def test_wkv_can_be_cut_in_time(implementation: str, train: bool, steps: int, width: int, cut: int, seed: int) -> None:
    decay, first, k, v = (t.requires_grad_(train) for t in _wkv_inputs(seed, 2, steps, width, 3.0, False))
    whole, (p, q, o) = _wkv(implementation, [decay, first, k, v])
    one, middle = _wkv(implementation, [decay, first, k[:, :cut], v[:, :cut]])
    two, (p2, q2, o2) = _wkv(implementation, [decay, first, k[:, cut:], v[:, cut:]], middle)
    torch.testing.assert_close(torch.cat([one, two], 1), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(q2 * torch.exp(o2 - o), q, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(p2 * torch.exp(o2 - o), p, rtol=1e-9, atol=1e-11)
    if train and steps:
        weight = _normal(seed + 9, *whole.shape)
        inputs = [decay, first, k, v]
        for joined, apart in zip(
            torch.autograd.grad((whole * weight).sum(), inputs, allow_unused=True),
            torch.autograd.grad((torch.cat([one, two], 1) * weight).sum(), inputs, allow_unused=True),
            strict=True,
        ):
            if joined is not None:
                torch.testing.assert_close(apart, joined, rtol=1e-9, atol=1e-9)


@quick
@given(steps=LENGTHS, width=WIDTHS, seed=st.integers(0, 99))
@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
def test_wkv_rows_are_independent(implementation: str, steps: int, width: int, seed: int) -> None:
    decay, first, k, v = (t.float() for t in _wkv_inputs(seed, 3, steps, width, 3.0, False))
    y, (p, q, o) = _wkv(implementation, [decay, first, k, v])
    for row in range(3):
        here = torch.arange(3)[:, None, None] == row
        others, state = _wkv(implementation, [decay, first, k.where(here, 5 - k), v.where(here, -v)])
        assert torch.equal(others[row], y[row]), "bit for bit, whatever the other rows hold"
        assert all(torch.equal(other[row], own[row]) for other, own in zip(state, (p, q, o), strict=True))
        alone, (p1, q1, o1) = _wkv(implementation, [decay, first, k[row : row + 1], v[row : row + 1]])
        torch.testing.assert_close(alone[0], y[row], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(p1[0] * torch.exp(o1[0] - o[row]), p[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(q1[0] * torch.exp(o1[0] - o[row]), q[row], rtol=1e-4, atol=1e-5)


@quick
@given(steps=LENGTHS, batch=BATCHES, width=WIDTHS, seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", FAST)
def test_wkv_in_every_dtype(
    implementation: str, dtype: torch.dtype, steps: int, batch: int, width: int, seed: int
) -> None:
    values = [t.to(dtype) for t in _wkv_inputs(seed, batch, steps, width, 3.0, True)]
    values[:2] = [t.float() for t in values[:2]]  # the parameters stay in float32 under mixed precision
    inputs, exact = ([t.to(d or t.dtype).requires_grad_() for t in values] for d in (None, torch.float64))
    (y, state), (y64, _) = _wkv(implementation, inputs), _wkv("reference", exact)
    assert y.dtype == dtype
    assert all(s.dtype == torch.float32 for s in state)
    loose = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y.double(), y64, rtol=loose, atol=loose * 4)
    if steps:
        weight = _normal(seed, *y.shape)
        for source, got, expected in zip(
            inputs,
            torch.autograd.grad((y.double() * weight).sum(), inputs),
            torch.autograd.grad((y64 * weight).sum(), exact, allow_unused=True),
            strict=True,
        ):
            assert got.dtype == source.dtype
            expected = torch.zeros_like(got, dtype=torch.float64) if expected is None else expected
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=(2e-4 if loose < 1e-3 else 4e-2) * scale)


@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
def test_wkv_gradcheck(implementation: str) -> None:
    decay, first, k, v = (t.requires_grad_() for t in _wkv_inputs(3, 2, 5, 3, 2.0, False))
    p, q, o = _wkv_state(4, 2, 3)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, (p, q, o) = _wkv(implementation, list(tensors[:4]), (*tensors[4:], o_start))
        return y, p * o.exp(), q * o.exp()

    o_start = o
    inputs = (decay.detach().clamp(-3, 0).requires_grad_(), first, k, v, p.requires_grad_(), q.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
@pytest.mark.parametrize("level", [-80.0, 80.0, "both"])
@pytest.mark.parametrize("steps", [1, 2, 64, 300])
def test_wkv_stays_finite(implementation: str, level: float | str, steps: int) -> None:
    decay = torch.linspace(-20, 0, 33).requires_grad_()
    first = torch.linspace(-5, 5, 33).requires_grad_()
    noise = _normal(5, 2, steps, 33, dtype=torch.float32)
    k = (80 * noise.sign() + noise if level == "both" else level + noise).requires_grad_()
    v = _normal(6, 2, steps, 33, dtype=torch.float32).requires_grad_()
    inputs = [decay, first, k, v]
    y, state = _wkv(implementation, inputs)
    for tensor in (y, *state, *_grads([y], inputs, 7)):
        assert tensor.isfinite().all()
    assert y.abs().max() <= v.abs().max() * (1 + 1e-5), "y is a weighted mean of the values"


@pytest.mark.parametrize("implementation", ["reference", "torch", "numba"])
@pytest.mark.parametrize("where", [2, 3])
@pytest.mark.parametrize("train", [False, True])
def test_wkv_does_not_hide_nan(implementation: str, where: int, train: bool) -> None:
    inputs = [t.float() for t in _wkv_inputs(1, 1, 9, 4, 1.0, False)]
    inputs[where][0, 4, 2] = math.nan
    y, _ = _wkv(implementation, [t.requires_grad_(train) for t in inputs])
    broken = torch.zeros(9, 4, dtype=torch.bool)
    broken[4:, 2] = True
    assert torch.equal(y[0].isnan(), broken)


def test_wkv_of_views_keeps_their_layout() -> None:
    decay, first, k, v = (t.float().requires_grad_() for t in _wkv_inputs(1, 3, 20, 8, 1.0, True))
    y, _ = kernels.wkv(decay, first, k, v)
    assert y.transpose(0, 1).is_contiguous(), "time-major in, time-major out"
    y, _ = kernels.wkv(decay, first, k.contiguous(), v.contiguous())
    assert y.is_contiguous()


def test_wkv_says_what_is_wrong_with_its_arguments() -> None:
    decay, first, k, v = _wkv_inputs(1, 2, 4, 3, 1.0, False)
    with pytest.raises(UsageError, match="one shape"):
        kernels.wkv(decay, first, k, v[:, :2])
    with pytest.raises(UsageError, match="one value per channel"):
        kernels.wkv(decay[:2], first, k, v)
    with pytest.raises(UsageError, match=r"needs three of \(2, 3\)"):
        kernels.wkv(decay, first, k, v, (k[0], k[0], k[0]))


def test_surrogates_may_be_named() -> None:
    x = torch.randn(9, 2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def gradient(surrogate: Any) -> torch.Tensor:
        spikes, _ = kernels.lif_scan(x, beta=0.5, gain=1.0, threshold=1.0, surrogate=surrogate)
        return torch.autograd.grad(spikes.sum(), x)[0]

    assert torch.equal(gradient("sigmoid"), gradient(SurrogateConfig(name="sigmoid")))
    assert torch.equal(gradient({"name": "atan", "alpha": 3}), gradient(SurrogateConfig(alpha=3)))
    assert LIFConfig.model_validate({"surrogate": "triangle"}).surrogate.name == "triangle"
    with pytest.raises(ConfigError, match="lif_scan: surrogate"):
        gradient("atanh")
