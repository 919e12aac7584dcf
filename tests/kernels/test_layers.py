"""Elastic neurons compiled together with their matrices: what neurons and matrices, one by one, compute."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm import kernels
from spiking_lm.kernels import compiled, compiled_layers, products

pytest.importorskip("numba", reason="numba is not installed: pip install 'spiking-lm[cpu]'")

WIDTHS = [(32,), (96,), (64, 32, 64)]


@pytest.fixture
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setattr(compiled, "SHARE", 50)
    monkeypatch.setattr(products, "MIN_WORK", 0)


def _layer(rows: int, steps: int, size: int, widths: tuple[int, ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = [draw(n, size).mul(size**-0.5).requires_grad_() for n in widths]
    return 2 * draw(steps, rows, size), 0.5 + draw(steps).abs(), *weights, *(draw(n).requires_grad_() for n in widths)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([1, 7, 8, 33, 131, 600]),
    steps=st.integers(1, 5),
    size=st.sampled_from([32, 96]),
    widths=st.sampled_from(WIDTHS),
    gelu=st.booleans(),
    expanded=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "beta": st.sampled_from([0.0, 0.25]),
            "bits": st.sampled_from([1, 2]),
            "reset": st.sampled_from(["asymmetric", "symmetric"]),
        }
    ),
    seed=st.integers(0, 99),
)
@pytest.mark.usefixtures("_any_size")
def test_a_layer_is_its_neurons_and_its_matrices(
    rows: int,
    steps: int,
    size: int,
    widths: tuple[int, ...],
    gelu: bool,
    expanded: bool,
    options: dict[str, Any],
    seed: int,
) -> None:
    """In float64 the plain way is the truth; spikes are those of float32 currents, so that none of them may differ."""
    x, alpha, *parameters = _layer(rows, steps, size, widths, seed)
    x = x[:1].expand(x.shape) if expanded else x
    currents = _compiled_gelu(x) if gelu else x
    weights, biases = parameters[: len(widths)], parameters[len(widths) :]
    x.requires_grad_()
    ys = compiled_layers.elastic_linears(x, alpha, [w.t() for w in weights], biases, gelu=gelu, **options)
    gs = [torch.randn_like(y) for y in ys]
    grads = torch.autograd.grad(ys, [x, *parameters], gs)

    currents.requires_grad_()
    with kernels.use(elastic_scan="reference"):
        spikes, _ = kernels.elastic_scan(currents, alpha, final=False, **options)
    exact = [spikes.double() @ w.t().double() + b.double() for w, b in zip(weights, biases, strict=True)]
    expected = torch.autograd.grad(exact, [currents, *parameters], [g.double() for g in gs])
    if gelu:
        (slope,) = torch.autograd.grad(F.gelu(x.double()).sum(), [x])
        expected = (expected[0] * slope, *expected[1:])
    for found, true in zip((*ys, *grads), (*exact, *expected), strict=True):
        torch.testing.assert_close(
            found, true.float(), rtol=1e-5, atol=1e-5 * max(1.0, float(true.detach().abs().max()))
        )


def _compiled_gelu(x: Tensor, slopes: Tensor | None = None) -> Tensor:
    from spiking_lm.kernels import jit_layers

    flat = x.detach().contiguous().view(-1)
    y, place = torch.empty_like(flat), flat[:0] if slopes is None else slopes
    cast("Any", jit_layers)._gelu(flat.numpy(), 0, len(flat), y.numpy(), place.numpy(), 0)
    return y.view(x.shape)


def test_gelu_is_nearer_to_the_truth_than_torch() -> None:
    x = torch.cat([torch.linspace(-14, 14, 200_001), torch.tensor([0.0, -0.0, 1e-30, 100.0, -100.0])])
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(x).sum(), [x])
    wide = x.detach().double().requires_grad_()
    true = F.gelu(wide)
    (true_slope,) = torch.autograd.grad(true.sum(), [wide])
    g = torch.empty(len(x))
    assert torch.equal(_compiled_gelu(x, g), _compiled_gelu(x))

    def error(y: Tensor, exact: Tensor) -> float:
        return float((y.double() - exact).abs().max())

    assert error(_compiled_gelu(x), true.detach()) <= error(F.gelu(x.detach()), true.detach())
    assert error(g, true_slope) <= 2 * torch.finfo(torch.float32).eps
    assert error(g, true_slope) <= error(slope, true_slope)
    assert _compiled_gelu(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.usefixtures("_any_size")
def test_gradients_of_plain_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, *parameters = _layer(1111, 1, 64, (64, 32), 0)
    x = x[0].requires_grad_()
    weights, biases = parameters[:2], parameters[2:]
    generator = torch.Generator().manual_seed(1)
    gs = [torch.randn(1111, n, generator=generator) for n in (64, 32)]
    exact = [x.double() @ w.t().double() + b.double() for w, b in zip(weights, biases, strict=True)]
    expected = torch.autograd.grad(exact, [x, *parameters], [g.double() for g in gs])
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        gx, gws, gbs = compiled_layers.gradients(
            x[None], compiled_layers.NONE, [w.t() for w in weights], gs, needs_x=True
        )
        assert gx is not None
        found.append([gx[0], *(g.t() for g in gws), *gbs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # sums do not depend on the number of threads
    for one, true in zip(found[0], expected, strict=True):
        # Sums of a thousand terms of either sign are right to the rounding of the largest of them.
        torch.testing.assert_close(one, true, rtol=1e-5, atol=2e-6 * float(true.abs().max()))


@pytest.mark.usefixtures("_any_size")
def test_what_is_not_for_compiled_code_goes_the_plain_way() -> None:
    x, alpha, weight, bias = _layer(16, 2, 32, (32,), 0)
    options: dict[str, Any] = {"beta": 0.25, "bits": 2, "reset": "asymmetric"}
    assert compiled_layers.takes_elastic(x, alpha, [weight.t()], [bias])
    assert not compiled_layers.takes_elastic(x, alpha.clone().requires_grad_(), [weight.t()], [bias])
    assert not compiled_layers.takes_elastic(x.double(), alpha, [weight.t()], [bias])
    assert not compiled_layers.takes_elastic(x[..., :31], alpha, [weight[:, :31].t()], [bias])
    with torch.autocast("cpu", torch.bfloat16):
        assert not compiled_layers.takes_elastic(x, alpha, [weight.t()], [bias])
    (fused,) = products.elastic_linears(x, alpha, [weight.t()], [bias], **options)
    with kernels.use(elastic_scan="torch"):
        assert not compiled_layers.takes_elastic(x, alpha, [weight.t()], [bias])
        (plain,) = products.elastic_linears(x, alpha, [weight.t()], [bias], **options)
    torch.testing.assert_close(fused, plain)
