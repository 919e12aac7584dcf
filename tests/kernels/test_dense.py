"""Linear layers by another library are linear layers, gradients included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spiking_lm.kernels import dense, products


@pytest.mark.parametrize("shape", [(4, 40, 96), (160, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_large_products_equal_those_of_torch(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = dense.Linear(96, 160, bias=bias)
    plain = nn.Linear(96, 160, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape).transpose(0, -2).clone().transpose(0, -2).requires_grad_()
    gradient = torch.randn(*shape[:-1], 160)
    called: list[int] = []
    operator = products.dense_operator
    monkeypatch.setattr(dense, "dense_operator", lambda work, like: (called.append(work), operator(work, like))[1])
    monkeypatch.setattr(products, "MIN_WORK", 1)
    ours = torch.autograd.grad(layer(x), (x, *layer.parameters()), gradient)
    theirs = torch.autograd.grad(plain(x), (x, *plain.parameters()), gradient)
    assert called == [160 * 96 * 160]
    for found, expected in zip(ours, theirs, strict=True):
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_for_it_is_done_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens, other precisions and autocast, and whatever a subclass of a tensor is."""
    monkeypatch.setattr(products, "MIN_WORK", 1)
    layer = dense.Linear(64, 64)
    for x, module in (
        (torch.randn(2, 64), layer),
        (torch.randn(0, 64), layer),
        (torch.randn(32, 64, dtype=torch.float64), copy.deepcopy(layer).double()),
        (torch.randn(32, 64, dtype=torch.bfloat16), copy.deepcopy(layer).bfloat16()),
    ):
        assert torch.equal(module(x), torch.nn.functional.linear(x, module.weight, module.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(32, 64)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(32, 65))
