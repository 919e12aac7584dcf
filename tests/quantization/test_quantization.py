"""Laws of weight grids and codes, over shapes, bits, groups and conventions."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm.errors import CheckpointError, ConfigError, DataError
from spiking_lm.quantization import (
    Grid,
    QuantizedWeight,
    decode,
    encode,
    fake_quantize_weight,
    group_count,
    round_to_nearest,
    split_groups,
    ternary_grid,
    ternary_spikes,
    weight_grid,
)
from spiking_lm.schemes import WeightScheme

uniform_schemes = st.builds(
    WeightScheme, bits=st.integers(2, 15), symmetric=st.booleans(), group_size=st.none() | st.integers(1, 12)
)
ternary_schemes = st.builds(WeightScheme, type=st.just("ternary"), group_size=st.none() | st.integers(1, 12))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Matrices of any shape, magnitude and distance from zero."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 30)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    w = torch.randn(shape, generator=generator, dtype=dtype)
    return w * draw(st.sampled_from([1e-7, 1e-3, 1.0, 30.0])) + draw(st.sampled_from([0.0, 0.37, -5.0]))


def _per_weight(per_group: Tensor, inputs: int, size: int | None) -> Tensor:
    return per_group.repeat_interleave(size or inputs, 1)[:, :inputs]


@given(w=matrices(), scheme=uniform_schemes, with_zero=st.booleans())
def test_no_weight_moves_more_than_half_a_step(w: Tensor, scheme: WeightScheme, with_zero: bool) -> None:
    grid = weight_grid(w, scheme, with_zero=with_zero)
    assert grid.scale.shape == grid.zero.shape == (len(w), group_count(w.shape[1], scheme.group_size))
    assert grid.scale.dtype == grid.zero.dtype == w.dtype
    assert torch.equal(grid.zero, grid.zero.round())
    codes = encode(w, grid, scheme)
    assert codes.dtype == torch.int32
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**scheme.bits
    error = (decode(codes, grid, scheme) - w).abs()
    # A zero point 10^4 steps away leaves float32 about a thousandth of a step.
    assert bool((error <= 0.505 * _per_weight(grid.scale, w.shape[1], scheme.group_size)).all())


@given(w=matrices(), scheme=uniform_schemes, mse=st.booleans(), with_zero=st.booleans())
def test_values_of_the_grid_stay(w: Tensor, scheme: WeightScheme, mse: bool, with_zero: bool) -> None:
    grid = weight_grid(w, scheme, mse=mse, with_zero=with_zero)
    codes = encode(w, grid, scheme)
    assert torch.equal(encode(decode(codes, grid, scheme), grid, scheme), codes)


@given(w=matrices(), scheme=uniform_schemes, with_zero=st.booleans())
def test_groups_do_not_know_of_each_other(w: Tensor, scheme: WeightScheme, with_zero: bool) -> None:
    grid = weight_grid(w, scheme, with_zero=with_zero)
    codes = encode(w, grid, scheme)
    size = scheme.group_size or w.shape[1]
    for group in range(group_count(w.shape[1], scheme.group_size)):
        part = w[:, group * size : (group + 1) * size]
        alone = weight_grid(part, scheme, with_zero=with_zero)
        assert torch.equal(alone.scale[:, 0], grid.scale[:, group])
        assert torch.equal(alone.zero[:, 0], grid.zero[:, group])
        one = Grid(grid.scale[:, group : group + 1], grid.zero[:, group : group + 1])
        assert torch.equal(encode(part[:, :1], one, scheme), codes[:, group * size : group * size + 1])


@given(scheme=uniform_schemes, value=st.floats(-1e6, 1e6, width=32), inputs=st.integers(1, 9))
def test_constant_rows_return_exactly(scheme: WeightScheme, value: float, inputs: int) -> None:
    w = torch.full((2, inputs), value)
    logits = torch.zeros(2, group_count(inputs, scheme.group_size))
    assert torch.equal(round_to_nearest(w, scheme).dequantize(), w)
    assert torch.equal(fake_quantize_weight(w, scheme, logits, logits), w)
    assert torch.equal(round_to_nearest(w, WeightScheme(type="ternary")).dequantize(), w)


def test_a_range_holds_zero_only_where_it_has_to() -> None:
    w = torch.tensor([[1.0, 1.5, 2.5], [-3.0, -2.0, -1.5], [0.0, 0.0, 0.0]])
    own, with_zero = (weight_grid(w, WeightScheme(bits=2), with_zero=held) for held in (False, True))
    torch.testing.assert_close(own.scale[:2], torch.tensor([[0.5], [0.5]]))
    assert own.zero[:2].tolist() == [[-2], [6]]
    torch.testing.assert_close(with_zero.scale, torch.tensor([[2.5], [3.0], [2.0]]) / 3)
    assert with_zero.zero.tolist() == [[0], [3], [2]]
    one_sided = weight_grid(w.abs(), WeightScheme(bits=4, symmetric=True), with_zero=True)
    torch.testing.assert_close(one_sided.scale, torch.tensor([[2.5], [3.0], [1.0]]) * 2 / 15)


def test_narrower_ranges_are_searched() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(200, 300, generator=generator)
    for scheme in (WeightScheme(bits=3), WeightScheme(bits=3, symmetric=True, group_size=128)):
        whole = weight_grid(w, scheme, with_zero=True)
        best = weight_grid(w, scheme, with_zero=True, mse=True)
        errors = []
        for grid in (whole, best):
            error = (decode(encode(w, grid, scheme), grid, scheme) - w).abs() ** 2.4
            errors.append(torch.cat([part.sum(2) for part in split_groups(error, scheme.group_size)], 1))
        assert bool((errors[1] <= errors[0]).all())
        assert float(errors[1].sum()) < 0.8 * float(errors[0].sum())
        share = best.scale / whole.scale
        assert bool(((share > 0.2) & (share < 1.001)).all())


def _by_autograd(w: Tensor, scheme: WeightScheme, upper: Tensor, lower: Tensor) -> Tensor:
    """Say the same with nothing but differentiable operations."""
    values = []
    for index, part in enumerate(torch.split(w, scheme.group_size or w.shape[1], 1)):
        high = part.amax(1, keepdim=True) * upper[:, index : index + 1].sigmoid()
        low = part.amin(1, keepdim=True) * lower[:, index : index + 1].sigmoid()
        most = 2**scheme.bits - 1
        if scheme.symmetric:
            scale = torch.maximum(high.abs(), low.abs()) / (most // 2)
            zero = torch.full_like(scale, most // 2)
        else:
            scale = (high - low) / most
            zero = (-low / scale).round()
        ratio = part / scale
        code = ratio + (ratio.round() - ratio).detach() + zero
        inside = (code.detach() > 0) & (code.detach() < most)
        values.append((torch.where(inside, code, code.detach().clamp(0, most)) - zero) * scale)
    return torch.cat(values, 1)


@given(
    scheme=st.builds(
        WeightScheme, bits=st.integers(2, 8), symmetric=st.booleans(), group_size=st.sampled_from([None, 5, 8])
    ),
    seed=st.integers(0, 2**20),
)
def test_gradients_reach_weights_and_clipping(scheme: WeightScheme, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(18, scheme.group_size)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((4, 18), (4, groups), (4, groups))
    ]
    cotangent = torch.randn(4, 18, generator=generator, dtype=torch.float64)
    w, upper, lower = leaves
    # A range that clipping turns around has no meaning.
    for part in torch.split(w, scheme.group_size or 18, 1):
        assume(bool((part.amin(1) < 0).all() and (part.amax(1) > 0).all()))
    ours = fake_quantize_weight(w, scheme, upper, lower)
    theirs = _by_autograd(w, scheme, upper, lower)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad((ours * cotangent).sum(), leaves),
        torch.autograd.grad((theirs * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_clipping_is_the_true_one_where_all_is_clipped() -> None:
    w = torch.tensor([[-2.0, -1.9, 1.8, 2.0]], dtype=torch.float64)
    scheme = WeightScheme(bits=2, symmetric=True)
    logits = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fake_quantize_weight(w[:, 2:], scheme, x, x), (logits,))


def test_sixteen_bits_and_half_precision() -> None:
    w = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert fake_quantize_weight(w, WeightScheme()) is w
    for dtype in (torch.bfloat16, torch.float16):
        half = w.to(dtype)
        scheme = WeightScheme(bits=4, group_size=3)
        assert weight_grid(half, scheme).scale.dtype == torch.float32
        assert torch.equal(fake_quantize_weight(half, scheme), fake_quantize_weight(half.float(), scheme).to(dtype))
        assert torch.equal(round_to_nearest(half, scheme).dequantize(dtype), fake_quantize_weight(half, scheme))


@given(
    magnitudes=st.lists(st.floats(0, 4, width=32), min_size=1, max_size=5),
    steps=st.lists(st.integers(1, 3), min_size=5),
)
def test_no_scale_and_no_spikes_fit_ternary_weights_better(magnitudes: list[float], steps: list[int]) -> None:
    w = torch.tensor([magnitudes], dtype=torch.float64)
    most = torch.tensor(steps[: len(magnitudes)])
    scheme = WeightScheme(type="ternary")
    grid = ternary_grid(-w, most, scheme)
    codes = encode(-w, grid, scheme, most)
    assert bool((codes.abs() <= most).all())
    error = float((decode(codes, grid, scheme) + w).square().sum())
    best = float(w.square().sum())
    for code in itertools.product(*(range(step + 1) for step in most.tolist())):
        spikes = torch.tensor([code], dtype=torch.float64)
        if spikes.any():
            scale = (w * spikes).sum() / spikes.square().sum()
            best = min(best, float((w - scale * spikes).square().sum()))
    assert error <= best + 1e-9 * float(w.square().sum())


@given(w=matrices(), scheme=ternary_schemes, steps=st.integers(1, 4))
def test_ternary_spikes_sum_to_the_weights(w: Tensor, scheme: WeightScheme, steps: int) -> None:
    per_column = torch.arange(w.shape[1]) % steps + 1
    q = round_to_nearest(w, scheme, per_column)
    assert not bool(q.grid.zero.any())
    spikes = ternary_spikes(q.codes, steps)
    assert spikes.dtype == torch.int8
    assert set(spikes.unique().tolist()) <= {-1, 0, 1}
    assert torch.equal(spikes.sum(0, dtype=torch.int32), q.codes)
    assert not bool(spikes[per_column.max() :].any())
    assert q.additions_per_weight() == pytest.approx(float((spikes != 0).sum()) / w.numel())
    for column, most in enumerate(per_column.tolist()):
        assert not bool(spikes[most:, :, column].any())
    # Without a fit nothing is clipped.
    grid = ternary_grid(w, per_column, scheme, fit=False)
    error = (decode(encode(w, grid, scheme, per_column), grid, scheme) - w).abs()
    assert bool((error <= 0.5001 * _per_weight(grid.scale, w.shape[1], scheme.group_size)).all())


def test_more_steps_and_a_fit_leave_less_error() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scheme = WeightScheme(type="ternary", group_size=48)
    errors = [float((round_to_nearest(w, scheme, steps).dequantize() - w).square().sum()) for steps in (1, 2, 4)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    coarse = ternary_grid(w, 1, scheme, fit=False)
    assert float((decode(encode(w, coarse, scheme), coarse, scheme) - w).square().sum()) > 2 * errors[0]
    salient = torch.where(torch.arange(64) % 5 < 2, 2, 1)
    mixed = float((round_to_nearest(w, scheme, salient).dequantize() - w).square().sum())
    assert errors[1] < mixed < errors[0]


@given(w=matrices(), scheme=st.one_of(uniform_schemes, ternary_schemes), data=st.data())
def test_stored_matrices_return_exactly(w: Tensor, scheme: WeightScheme, data: st.DataObject) -> None:
    steps: Any = 1
    if scheme.type == "ternary":
        steps = data.draw(st.sampled_from([1, 3, torch.arange(w.shape[1]) % 4 + 1]))
    q = round_to_nearest(w, scheme, steps)
    if data.draw(st.booleans()):
        q = QuantizedWeight(q.codes, q.grid, scheme, torch.randperm(w.shape[1]), q.steps)
    stored = q.tensors()
    assert all(tensor.is_contiguous() for tensor in stored.values())
    back = QuantizedWeight.from_tensors(stored, scheme, (w.shape[0], w.shape[1]))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(torch.float64), q.dequantize(torch.float64))
    assert (back.order is None) == (q.order is None)
    assert (back.steps is None) == (q.steps is None)
    assert back.bits_per_weight() == q.bits_per_weight()


@given(w=matrices(), scheme=uniform_schemes, seed=st.integers(0, 2**20))
def test_the_order_of_the_groups_is_undone(w: Tensor, scheme: WeightScheme, seed: int) -> None:
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(seed))
    permuted = round_to_nearest(w[:, order], scheme)
    q = QuantizedWeight(permuted.codes, permuted.grid, scheme, order)
    assert torch.equal(q.dequantize(w.dtype)[:, order], permuted.dequantize(w.dtype))


def test_everything_that_is_stored_is_counted() -> None:
    w = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    per_channel = round_to_nearest(w, WeightScheme(bits=4))
    assert per_channel.bits_per_weight() == pytest.approx(4 + (32 + 4) / 576)
    symmetric = round_to_nearest(w, WeightScheme(bits=4, symmetric=True))
    assert symmetric.bits_per_weight() == pytest.approx(4 + 32 / 576 + 16 / w.numel())
    grouped = round_to_nearest(w, WeightScheme(bits=3, group_size=128))
    assert grouped.bits_per_weight() == pytest.approx(3 + 5 * (32 + 3) / 576)
    ordered = QuantizedWeight(grouped.codes, grouped.grid, grouped.scheme, torch.arange(576))
    assert ordered.bits_per_weight() == pytest.approx(grouped.bits_per_weight() + 16 / 64)
    ternary = WeightScheme(type="ternary", group_size=64)
    assert round_to_nearest(w, ternary).bits_per_weight() == pytest.approx(1.6 + 32 / 64, abs=1e-3)
    steps = torch.where(torch.arange(576) < 144, 2, 1)
    mixed = round_to_nearest(w, ternary, steps)
    assert mixed.bits_per_weight() == pytest.approx(0.75 * 1.6 + 0.25 * 8 / 3 + 32 / 64 + 8 / 64, abs=1e-3)
    short = Grid(mixed.grid.scale.bfloat16().float(), mixed.grid.zero)
    half = QuantizedWeight(encode(w, short, ternary, steps), short, ternary, steps=steps)
    assert half.bits_per_weight() == pytest.approx(mixed.bits_per_weight() - 16 / 64)
    assert half.tensors()["scale"].element_size() == 2


def test_the_example_of_the_page_runs(root: Path) -> None:
    page = (root / "docs/quantization.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(block, names)
    q, w = names["q"], names["w"]
    assert f"# {q.bits_per_weight()}: codes" in page
    assert q.grid.scale.shape == (1536, 5)
    step = _per_weight(q.grid.scale, 576, 128)
    assert bool(((q.dequantize() - w).abs() <= 0.5001 * step).all())


def test_damaged_and_foreign_tensors_are_named() -> None:
    w = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    scheme = WeightScheme(bits=4, group_size=4)
    q = round_to_nearest(w, scheme)
    stored = QuantizedWeight(q.codes, q.grid, scheme, torch.arange(10)).tensors()

    def reading(**changes: Tensor) -> QuantizedWeight:
        return QuantizedWeight.from_tensors({**stored, **changes}, scheme, (6, 10))

    with pytest.raises(CheckpointError, match="lacks 'codes'; it has order, scale, zero"):
        QuantizedWeight.from_tensors({k: v for k, v in stored.items() if k != "codes"}, scheme, (6, 10))
    with pytest.raises(CheckpointError, match=r"'scale' of a quantised matrix is \(6, 3\), not \(6, 5\)"):
        QuantizedWeight.from_tensors(stored, scheme, (6, 20))
    with pytest.raises(CheckpointError, match="no permutation"):
        reading(order=torch.zeros(10, dtype=torch.int16))
    with pytest.raises(CheckpointError, match="zero points are"):
        reading(zero=torch.zeros(6, 2, dtype=torch.int16))
    with pytest.raises(CheckpointError, match="60 codes of 16 levels are 30"):
        reading(codes=stored["codes"][:-1])
    ternary = WeightScheme(type="ternary", group_size=4)
    mixed = round_to_nearest(w, ternary, torch.arange(10) % 2 + 1).tensors()
    with pytest.raises(CheckpointError, match=r"lacks 'codes\.7'"):
        QuantizedWeight.from_tensors({**mixed, "steps": torch.full((10,), 7, dtype=torch.uint8)}, ternary, (6, 10))


def test_wrong_requests_are_named() -> None:
    w = torch.ones(2, 4)
    with pytest.raises(ConfigError, match="no uniform grid of weights that are off"):
        weight_grid(w, WeightScheme())
    with pytest.raises(ConfigError, match="no uniform grid of ternary weights"):
        fake_quantize_weight(w, WeightScheme(type="ternary"))
    with pytest.raises(ConfigError, match="no ternary grid of uniform weights"):
        ternary_grid(w, 1, WeightScheme(bits=4))
    with pytest.raises(DataError, match="not finite"):
        round_to_nearest(torch.tensor([[1.0, float("nan")]]), WeightScheme(bits=4))
