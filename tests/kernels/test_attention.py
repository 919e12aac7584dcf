"""Attention in several steps: every fast form against the definition, and what it promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm import kernels
from spiking_lm.errors import KernelUnavailableError, UsageError
from spiking_lm.kernels import torch_attention

FAST = ("torch", "numba")


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "LEAST", 0)


def inputs(shape: tuple[int, ...], length: int, *, columns: bool, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k and v as leaves with gradients: columns of wide matrices, or heads that lie one after another."""
    n_steps, batch, heads, queries, size = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        if columns:
            wide = torch.randn(n_steps, batch, n, heads, size, generator=generator, dtype=dtype)
            return wide.transpose(2, 3).requires_grad_()
        return torch.randn(n_steps, batch, heads, n, size, generator=generator, dtype=dtype).requires_grad_()

    return [draw(queries), draw(length), draw(length)]


def run(implementation: str, leaves: list[Tensor], mask: Any, keep: Any) -> list[Tensor]:
    """Return the result and the three gradients."""
    with kernels.use(attention=implementation):
        y = kernels.attention(*leaves, mask, keep)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


@settings(max_examples=25)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 3, 3, 19, 20))),
    extra=st.integers(0, 18),
    columns=st.booleans(),
    causal=st.booleans(),
    padded=st.booleans(),
    dropout=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("implementation", FAST)
def test_fast_attention_equals_its_definition(
    implementation: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    extra: int,
    columns: bool,
    causal: bool,
    padded: bool,
    dropout: bool,
    seed: int,
) -> None:
    _, batch, heads, queries, _ = shape
    length = queries + extra
    leaves = inputs(shape, length, columns=columns, seed=seed, dtype=dtype)
    mask = torch.zeros(batch if padded else 1, 1, queries if causal else 1, length, dtype=dtype)
    if causal:
        mask = mask.masked_fill(torch.ones(queries, length).triu(extra + 1).bool(), torch.finfo(dtype).min)
    if padded:
        mask[0, ..., length - length // 2 :] = torch.finfo(dtype).min
    keep = (torch.rand(batch, heads, queries, length) < 0.7).to(dtype) / 0.7 if dropout else None
    expected = run("reference", leaves, mask if causal or padded else None, keep)
    got = run(implementation, leaves, mask if causal or padded else None, keep)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name, a, b in zip(("y", "gq", "gk", "gv"), got, expected, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, msg=lambda said, name=name: f"{name}: {said}")
    with torch.no_grad(), kernels.use(attention=implementation):
        alone = kernels.attention(*leaves, mask if causal or padded else None, keep)
    assert torch.equal(alone, got[0]), "what is kept for the way back changes nothing"
    assert alone.transpose(2, 3).is_contiguous(), "ready for the next matrix"


@settings(max_examples=15)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 2, 3, 19, 20))),
    extra=st.integers(0, 18),
    bits=st.sampled_from([1, 2]),
    dropout=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_keys_and_values_that_fire_on_the_way_are_those_of_neurons_that_forget(
    implementation: str, shape: tuple[int, ...], extra: int, bits: Any, dropout: bool, seed: int
) -> None:
    leaves = inputs(shape, shape[3] + extra, columns=True, seed=seed, dtype=torch.float64)
    keep = (torch.rand(shape[1], shape[2], shape[3], shape[3] + extra) < 0.7).double() / 0.7 if dropout else None
    amplitudes = 0.5 + torch.rand(2, shape[0], dtype=torch.float64)

    def mixed(*, apart: bool) -> list[Tensor]:
        q, k, v = leaves
        with kernels.use(attention=implementation):
            if apart:
                k, v = (
                    kernels.elastic_scan(x, a, beta=0.0, bits=bits)[0] for x, a in zip((k, v), amplitudes, strict=True)
                )
                y = kernels.attention(q, k, v, None, keep)
            else:
                y = kernels.attention(q, k, v, None, keep, amplitudes, bits=bits)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]

    for got, expected in zip(mixed(apart=False), mixed(apart=True), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


def test_amplitudes_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs((2, 1, 2, 5, 4), 5, columns=True, seed=0, dtype=torch.float32)
    for wrong in (torch.ones(2, 3), torch.ones(2, 2, requires_grad=True)):
        with pytest.raises(UsageError, match="amplitudes"):
            kernels.attention(q, k, v, None, None, wrong)


@pytest.mark.parametrize("implementation", FAST)
def test_the_same_gradient_cannot_be_taken_twice_in_silence(implementation: str) -> None:
    leaves = inputs((2, 1, 2, 5, 4), 5, columns=True, seed=0, dtype=torch.float64)
    with kernels.use(attention=implementation):
        (gradient,) = torch.autograd.grad(kernels.attention(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_rows_and_steps_do_not_know_of_each_other_and_nan_is_not_hidden(implementation: str) -> None:
    q, k, v = (x.detach() for x in inputs((2, 3, 2, 6, 8), 6, columns=True, seed=1, dtype=torch.float32))
    with kernels.use(attention=implementation):
        whole = kernels.attention(q, k, v)
        others = kernels.attention(*(torch.cat([x[:, :1], 7 - x[:, 1:]], 1) for x in (q, k, v)))
        assert torch.equal(whole[:, 0], others[:, 0])
        q[1, 2, 0, 3, 5] = math.nan
        broken = kernels.attention(q, k, v).isnan()
    expected = torch.zeros_like(broken)
    expected[1, 2, 0, 3] = True
    assert torch.equal(broken, expected)


def test_it_says_what_is_wrong_with_its_arguments() -> None:
    q, k, v = inputs((2, 3, 2, 6, 8), 7, columns=False, seed=1, dtype=torch.float32)
    with pytest.raises(UsageError, match="of one dtype"):
        kernels.attention(q, k.double(), v)
    with pytest.raises(UsageError, match="only the length may differ"):
        kernels.attention(q[:, :2], k, v)
    with pytest.raises(UsageError, match=r"mask has shape \(6, 7\)"):
        kernels.attention(q, k, v, torch.zeros(6, 7))
    with pytest.raises(UsageError, match=r"keep has shape .* not \(3, 2, 6, 7\)"):
        kernels.attention(q, k, v, None, torch.ones(3, 1, 6, 7))


def test_small_products_and_autocast_stay_with_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = inputs((2, 1, 2, 5, 4), 5, columns=True, seed=0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(dict(kernels.explain_choice("attention", *leaves))["torch"])
        assert kernels.attention(*leaves).dtype == torch.bfloat16
    monkeypatch.setattr(torch_attention, "LEAST", 8192)
    with kernels.use(attention="torch"), pytest.raises(KernelUnavailableError, match="fewer than 8192"):
        kernels.attention(*leaves)
