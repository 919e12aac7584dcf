"""Dense products in float32 by oneDNN, where that is faster than the BLAS torch calls otherwise.

torch sends float32 products to the BLAS it was built with. That is MKL on x86, which keeps to AVX2 on processors that
are not Intel's; oneDNN, which comes with the same torch, uses what the processor has: 180 against 78 GFLOP/s per thread
on a Zen 4. Its operator for inference is called here and given its gradients. It takes some microseconds to prepare, so
small products stay where they are, and so does everything where torch has no oneDNN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_WORK = 2_000_000
"""Multiply-adds from which a product is worth oneDNN's preparations, about 12 microseconds."""


@lru_cache(maxsize=1)
def _onednn() -> Callable[..., Tensor] | None:
    """Return oneDNN's ``f(x, weight, ...) = x @ weight.T``, or None where it is missing or does not work as known."""
    try:
        operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
        works = torch.equal(operator(x, weight.t(), None, "none", [], ""), x @ weight)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operator if works else None


def _fits(work: int, like: Tensor) -> bool:
    """True when a product of so many multiply-adds, of tensors like ``like``, should go to oneDNN."""
    return bool(
        work >= MIN_WORK
        and like.dtype == torch.float32
        and like.device.type == "cpu"
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and _onednn() is not None
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x (M, K) @ weight (K, N)``; no gradient is recorded."""
    operator = _onednn() if _fits(x.numel() * weight.shape[1], x) else None
    return x @ weight if operator is None else operator(x, weight.t(), None, "none", [], "")


def adder(weight: Tensor, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``f(out, x)`` that adds ``x (rows, K) @ weight (K, N)`` to ``out``, for many products by one weight.

    What can be prepared once is: the choice of the library and the layout of the weight. No gradient is recorded.
    """
    operator = _onednn() if _fits(rows * weight.numel(), weight) else None
    if operator is None:
        return lambda out, x: out.addmm_(x, weight)
    transposed = weight.contiguous().t()  # a third faster than a weight that lies the other way round
    return lambda out, x: out.add_(operator(x, transposed, None, "none", [], ""))


def linear(x: Tensor, weight_t: Tensor, bias: Tensor) -> Tensor:
    """Return ``x (M, K) @ weight_t (K, N) + bias``, with gradients (which can be taken once)."""
    if x.dtype == weight_t.dtype == bias.dtype and _fits(x.numel() * weight_t.shape[1], x):
        y: Tensor = _Linear.apply(x, weight_t, bias)
        return y
    return torch.addmm(bias, x, weight_t)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_t: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_t)
        return product(x, weight_t).add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (gy,) = grads
        x, weight_t = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(gy, weight_t.t()) if needs_x else None,
            product(x.t(), gy) if needs_weight else None,
            gy.sum(0) if needs_bias else None,
        )
