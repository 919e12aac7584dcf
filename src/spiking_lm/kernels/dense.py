"""Linear layers whose float32 products go to the faster of the libraries that torch brings, in training too.

On a Zen 4, oneDNN does all three products of a training step at twice the rate of MKL; see :mod:`.products`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spiking_lm.kernels import compiled_linear
from spiking_lm.kernels.dispatch import traced
from spiking_lm.kernels.products import dense_operator

LEAST_ROWS = 16
"""Rows from which a product is bound by arithmetic; those of single tokens are bound by reading the weights."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (..., K) @ weight (N, K).T + bias``: ``F.linear``, by other products where they are faster.

    Those are for float32 on a CPU, and differ by rounding: for LEAST_ROWS rows or more, whose gradients can then be
    taken once, and without gradients for the few rows of single tokens.
    """
    if traced():
        return F.linear(x, weight, bias)
    if compiled_linear.takes_dense(x, weight, bias):
        return compiled_linear.dense_linear(x, weight, bias)
    rows = x.numel() // max(x.shape[-1], 1)
    operator = dense_operator(rows * weight.numel(), x) if rows >= LEAST_ROWS else None
    if operator is None or weight.dtype != x.dtype or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight, bias)
    y: Tensor = _Dense.apply(x.reshape(rows, -1), weight, bias, operator)
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operator: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.operator = operator
        y: Tensor = operator(x, weight, bias, "none", [], "")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        operator, g = ctx.operator, grads[0].contiguous()
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            operator(g, weight.t(), None, "none", [], "") if needs_x else None,
            operator(g.t(), x.t(), None, "none", [], "") if needs_weight else None,
            g.sum(0) if needs_bias else None,
            None,
        )
