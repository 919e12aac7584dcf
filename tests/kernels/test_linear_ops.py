"""Products of one token: every implementation against the golden data, the definition, and what they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm import kernels
from spiking_lm.errors import UsageError
from spiking_lm.kernels import compiled_linear, dense, products
from spiking_lm.kernels.reference import unpack_spikes

OPS = ("spike_linear", "int8_linear", "pack_spikes", "packed_linear", "ternary_linear")
IMPLEMENTATIONS = ("reference", "torch", "numba")


CASES = tuple(f"mm_{i:02d}" for i in range(6))


def _run(implementation: str, op: str, *args: Any) -> Tensor:
    """Run an op by one implementation, or by the definition where that does not take the arguments."""
    if dict(kernels.explain_choice(op, *args))[implementation] is not True:
        implementation = "reference"
    with kernels.use(**{op: implementation}):
        y: Tensor = getattr(kernels, op)(*args)
        return y


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_golden(shared: Path, name: str, implementation: str) -> None:
    folder = shared / "golden" / "kernels"
    kind = json.loads((folder / "mm_cases.json").read_text())[name]["kind"]
    data = np.load(folder / f"{name}.npz")
    s, weight, bias = (torch.tensor(data[key], dtype=torch.float32) for key in ("s", "W", "bias"))
    codes, scale = torch.tensor(data["W_ternary"]), torch.tensor(data["row_scale"])
    most = max(1.0, float((s != 0).sum(1).max()))
    bound = 1e-5 * most**0.5 * (s.abs() @ weight.abs().T + 1).double()
    y = _run(implementation, "spike_linear", s, weight.T.contiguous(), bias)
    assert ((y.double() - torch.tensor(data["y"])).abs() <= bound).all()

    planes = kernels.pack_ternary(codes)
    assert [plane.numpy().view(np.uint32).tolist() for plane in planes] == [
        data["W_plus_bits"].tolist(),
        data["W_minus_bits"].tolist(),
    ]
    exact, scaled = torch.tensor(data["y_ternary_int"]), torch.tensor(data["y_ternary_scaled"])
    ones = torch.ones_like(scale)
    for op, weights in (("int8_linear", codes), ("ternary_linear", planes)):
        assert torch.equal(_run(implementation, op, s, weights, ones).long(), exact)
        y = _run(implementation, op, s.double(), weights, scale.double())
        torch.testing.assert_close(y, scaled, rtol=1e-12, atol=1e-12)
    if kind != "graded":
        words = _run(implementation, "pack_spikes", s, 2)
        assert words[:, 0].numpy().view(np.uint32).tolist() == data["s_pos_bits"].tolist()
        assert words[:, 1].numpy().view(np.uint32).tolist() == data["s_neg_bits"].tolist()
        assert torch.equal(_run(implementation, "packed_linear", words, planes, ones).long(), exact)
        y = _run(implementation, "packed_linear", words, planes, scale.double())
        torch.testing.assert_close(y, scaled, rtol=1e-12, atol=1e-12)
    if kind == "binary":
        words = _run(implementation, "pack_spikes", s, 1)
        assert words[:, 0].numpy().view(np.uint32).tolist() == data["s_pos_bits"].tolist()
        assert torch.equal(_run(implementation, "packed_linear", words, planes, ones).long(), exact)


@pytest.mark.parametrize("implementation", ["torch", "numba"])
@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([(), (1,), (3,), (2, 5), (0,)]),
    sources=st.sampled_from([1, 31, 32, 33, 64, 100, 259]),
    targets=st.sampled_from([1, 2, 7, 16, 33, 130]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    with_bias=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_as_the_definition(
    implementation: str,
    rows: tuple[int, ...],
    sources: int,
    targets: int,
    density: float,
    dtype: torch.dtype,
    with_bias: bool,
    turned: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand((*rows, sources), generator=generator) < density
    x = torch.randn((*rows, sources), generator=generator, dtype=dtype) * active
    s = torch.where(active, x.sign(), 0)
    weight = torch.randn((targets, sources), generator=generator, dtype=dtype)
    codes = torch.randint(-127, 128, (targets, sources), generator=generator, dtype=torch.int8)
    signs = codes.sign()
    scale = torch.rand(targets, generator=generator, dtype=dtype)
    bias = torch.randn(targets, generator=generator, dtype=dtype) if with_bias else None
    if turned:  # other strides mean the same
        codes, weight = codes.T.contiguous().T, weight.T.contiguous().T
        x = torch.stack([x, x], -1)[..., 0]
    planes = kernels.pack_ternary(signs)
    tolerance = {"rtol": 1e-12, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-3}
    for op, args in (
        ("spike_linear", (x, weight.T, bias)),
        ("int8_linear", (x, codes, scale / 127, bias)),
        ("ternary_linear", (x, planes, scale, bias)),
        ("packed_linear", (kernels.pack_spikes(s, 2), planes, scale, bias)),
        ("packed_linear", (kernels.pack_spikes(s.abs()), planes, scale, bias)),
    ):
        found, defined = (_run(name, op, *args) for name in (implementation, "reference"))
        assert found.dtype == dtype
        torch.testing.assert_close(found, defined, **tolerance)
    for n_planes, spikes in ((1, s.abs()), (2, s)):
        words = _run(implementation, "pack_spikes", spikes, n_planes)
        assert torch.equal(words, _run("reference", "pack_spikes", spikes, n_planes))
        bits = unpack_spikes(words, sources)
        back = bits[..., 0, :] - bits[..., 1, :] if n_planes == 2 else bits[..., 0, :]
        assert torch.equal(back.to(dtype), spikes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_are_independent(implementation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 70, generator=generator) * (torch.rand(6, 70, generator=generator) < 0.2)
    planes = kernels.pack_ternary(torch.randint(-1, 2, (40, 70), generator=generator))
    words, scale = kernels.pack_spikes(x.sign(), 2), torch.rand(40, generator=generator)
    whole = _run(implementation, "packed_linear", words, planes, scale)
    for row in range(6):
        assert torch.equal(_run(implementation, "packed_linear", words[row], planes, scale), whole[row])


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"-1\.0 is not a spike of 1 plane"):
        kernels.pack_spikes(torch.tensor([0.0, -1.0]))
    with pytest.raises(UsageError, match=r"2\.0 is not a spike of 2 planes"):
        kernels.pack_spikes(torch.tensor([0.0, 2.0]), 2)
    with pytest.raises(UsageError, match="nan is not a spike"):
        kernels.pack_spikes(torch.tensor([0.0, torch.nan]), 2)
    with pytest.raises(UsageError, match="planes is 1 or 2"):
        kernels.pack_spikes(torch.zeros(3), 3)
    x, planes = torch.zeros(3), torch.zeros(2, 4, 1, dtype=torch.int32)
    for call in (
        lambda: kernels.spike_linear(x, torch.zeros(4, 3)),
        lambda: kernels.int8_linear(x, torch.zeros(4, 3), torch.ones(4)),
        lambda: kernels.int8_linear(x, torch.zeros(4, 3, dtype=torch.int8), torch.ones(3)),
        lambda: kernels.ternary_linear(torch.zeros(33), planes, torch.ones(4)),
        lambda: kernels.packed_linear(torch.zeros(1, 1, dtype=torch.int64), planes, torch.ones(4)),
        lambda: kernels.packed_linear(torch.zeros(3, 1, dtype=torch.int32), planes, torch.ones(4)),
        lambda: kernels.ternary_linear(x, planes, torch.ones(4), torch.zeros(3)),
    ):
        with pytest.raises(UsageError, match=r"do not fit|bias has shape"):
            call()


def test_no_gradient_is_recorded() -> None:
    x, weight_t = torch.ones(4, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    assert not kernels.spike_linear(x, weight_t).requires_grad
    assert not kernels.int8_linear(x, torch.ones(2, 4, dtype=torch.int8), torch.ones(2)).requires_grad


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_dense_products_of_few_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled up to four rows where no gradient is recorded, and the same numbers either way."""
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 260, generator=generator), torch.randn(259, 260, generator=generator)
    bias = torch.randn(259, generator=generator, requires_grad=True)
    taken: list[int] = []
    run = compiled_linear.dense_linear
    monkeypatch.setattr(compiled_linear, "dense_linear", lambda x, *rest: (taken.append(len(x)), run(x, *rest))[1])
    expected = (x.double() @ weight.double().T).float()
    with torch.no_grad():
        for found, offset in (
            (dense.linear(x, weight), 0),
            (dense.linear(x, weight, bias), bias),
            (products.linear(x, weight.T, bias), bias),
            (products.product(x, weight.T), 0),
        ):
            torch.testing.assert_close(found, expected + offset, rtol=1e-5, atol=1e-4)
    assert taken == ([rows] * 4 if rows <= 4 else [])
    for y in (
        dense.linear(x, weight, bias),
        products.linear(x, weight.T, bias),
        dense.linear(x.requires_grad_(), weight),
    ):
        assert y.requires_grad
    assert len(taken) in (0, 4)
    with torch.no_grad():  # what is no plain row of float32 weights
        dense.linear(x.double(), weight.double())
        dense.linear(x, weight.T.contiguous().T)
    assert len(taken) in (0, 4)
