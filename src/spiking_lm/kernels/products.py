"""Dense products in float32 by oneDNN, where that is faster than the BLAS torch calls otherwise.

torch sends float32 products to the BLAS it was built with. That is MKL on x86, which keeps to AVX2 on processors that
are not Intel's; oneDNN, which comes with the same torch, uses what the processor has: 180 against 78 GFLOP/s per thread
on a Zen 4. Its operator for inference is called here and given its gradients. It takes some microseconds to prepare, so
small products stay where they are, and so does everything where torch has no oneDNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.kernels import compiled_layers, compiled_linear
from spiking_lm.kernels.dispatch import traced
from spiking_lm.kernels.ops import elastic_scan

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
        and not traced()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and _onednn() is not None
    )


def dense_operator(work: int, like: Tensor) -> Callable[..., Tensor] | None:
    """Return oneDNN's ``f(x, weight, bias, "none", [], "")`` where it is faster for so many multiply-adds, or None."""
    return _onednn() if _fits(work, like) else None


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x (M, K) @ weight (K, N)``; no gradient is recorded."""
    if compiled_linear.takes_dense(x.detach(), weight.detach().t()):
        return compiled_linear.dense_linear(x, weight.t())
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
    (y,) = linears(x, (weight_t,), (bias,))
    return y


def linears(x: Tensor, weights_t: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return ``x (M, K) @ weight_t (K, N) + bias`` for each weight and bias, with gradients (which can be taken once).

    What the products send back to ``x`` is added up within them.
    """
    alike = all(t.dtype == x.dtype for t in (*weights_t, *biases))
    if alike and all(_fits(x.numel() * weight_t.shape[1], x) for weight_t in weights_t):
        ys: tuple[Tensor, ...] = _Linears.apply(x, *weights_t, *biases)
        return ys
    return tuple(_linear(x, weight_t, bias) for weight_t, bias in zip(weights_t, biases, strict=True))


def _linear(x: Tensor, weight_t: Tensor, bias: Tensor) -> Tensor:
    if compiled_linear.takes_dense(x, weight_t.t(), bias):
        return compiled_linear.dense_linear(x, weight_t.t(), bias)
    return torch.addmm(bias, x, weight_t)


def elastic_linears(
    x: Tensor,
    alpha: Tensor,
    weights_t: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    gelu: bool = False,
    **neurons: Any,
) -> tuple[Tensor, ...]:
    """Return ``s (T, M, K) @ weight_t (K, N) + bias`` for each weight, s being the spikes of currents ``x (T, M, K)``.

    With ``gelu``, x goes through that first. ``neurons`` are what ``elastic_scan`` takes: beta, bits and reset.
    Compiled where that fits, without spikes ever being written to memory; gradients can then be taken once.
    """
    work = x.numel() * min(w.shape[1] for w in weights_t)
    if work >= MIN_WORK and not traced() and compiled_layers.takes_elastic(x, alpha, weights_t, biases):
        return compiled_layers.elastic_linears(x, alpha, weights_t, biases, gelu=gelu, **neurons)
    spikes, _ = elastic_scan(F.gelu(x) if gelu else x, alpha, final=False, **neurons)
    ys = linears(spikes.flatten(0, 1), weights_t, biases)
    return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def _sum_of_products(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``x (M, K) @ weight (K, N)``; no gradient is recorded."""
    total = product(xs[0], weights[0])
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        total = torch.ops.mkldnn._linear_pointwise.binary(x, total, weight.t(), None, "add")
    return total


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights_t, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.save_for_backward(x, *weights_t)
        operator = _onednn()
        assert operator is not None
        return tuple(operator(x, w.t(), b, "none", [], "") for w, b in zip(weights_t, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *weights_t = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        n = len(weights_t)
        if all(needs) and compiled_layers.usable(x, weights_t):
            gx, gws, gbs = compiled_layers.gradients(x[None], compiled_layers.NONE, weights_t, grads, needs_x=needs_x)
            return (None if gx is None else gx[0], *gws, *gbs)
        return (
            _sum_of_products(grads, [w.t() for w in weights_t]) if needs_x else None,
            *(product(x.t(), gy) if need else None for gy, need in zip(grads, needs[:n], strict=True)),
            *(gy.sum(0) if need else None for gy, need in zip(grads, needs[n:], strict=True)),
        )
