"""Whole layers in compiled code: elastic neurons with the matrices behind them, and gradients of plain matrices.

What stands between torch and the loops of :mod:`spiking_lm.kernels.jit_layers`; :mod:`.products` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.kernels import dispatch
from spiking_lm.kernels.compiled import elastic_factors, fresh, memory, nothing, run, takes

MOST = 131072
"""Weights of a matrix up to which it stays in the second-level cache, with what else a layer needs."""
MULTIPLE = 32
"""Rows and columns of matrices are multiples of this."""
SHARE, SHARES = 512, 16
"""Rows whose sums for the gradient of a weight are one share, and how many shares there may be."""


@lru_cache(maxsize=1)
def _jit() -> ModuleType:
    from spiking_lm.kernels import jit_layers

    return jit_layers


def usable(x: Tensor, weights_t: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> bool:
    """Tell whether matrices ``(K, N)`` that read ``x (..., K)`` can go to compiled code, which knows float32 only."""
    given = (x, *weights_t, *biases)
    return (
        all(t.dtype == torch.float32 for t in given)
        and not torch.is_autocast_enabled("cpu")
        and all(n % MULTIPLE == 0 for w in weights_t for n in w.shape)
        and all(0 < w.numel() <= MOST for w in weights_t)
        and takes(x.numel(), *given) is True
    )


def takes_elastic(x: Tensor, alpha: Tensor, weights_t: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Tell whether :func:`elastic_linears` takes these, and nobody asks for other code for the neurons."""
    forced = dispatch.forced("elastic_scan")
    fixed = not (alpha.requires_grad and torch.is_grad_enabled()) and alpha.dtype == torch.float32
    return (forced is None or forced[0] == "numba") and fixed and usable(x, weights_t, biases)


def _panels(matrices: Sequence[Tensor]) -> Any:
    """Return matrices ``(rows, columns)`` one after the other, each as blocks of columns."""
    wide = _jit().COLUMNS
    blocks = (m.detach().reshape(len(m), -1, wide).transpose(0, 1).reshape(-1) for m in matrices)
    return torch.cat(list(blocks)).numpy()


def elastic_linears(
    x: Tensor,
    alpha: Tensor,
    weights_t: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    gelu: bool,
    beta: float,
    bits: int,
    reset: str,
) -> tuple[Tensor, ...]:
    """Return ``s @ weight_t + bias`` for each weight, with s the spikes of currents ``x (T, M, K)``; they are not kept.

    With ``gelu``, of currents gelu(x). Like ``elastic_scan`` and a product, whose rounding, as that of GELU, differs;
    gradients can be taken once.
    """
    factors = elastic_factors(alpha, torch.float32, beta=beta, bits=bits, reset=reset)
    x = x if x[0].is_contiguous() else x.contiguous()
    ys: tuple[Tensor, ...] = _ElasticLinears.apply(x, gelu, factors, *weights_t, *biases)
    return ys


class _ElasticLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gelu: bool, factors: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights_t, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.save_for_backward(x, *weights_t)
        ctx.gelu, ctx.factors = gelu, factors
        ctx.set_materialize_grads(False)
        n_steps, n_rows, size = x.shape
        widths = tuple(w.shape[1] for w in weights_t)
        ys = tuple(fresh(torch.empty(n_steps, n_rows, n)) for n in widths)
        matrices = _panels(weights_t), torch.cat(list(biases)).numpy(), widths
        args = n_rows, size, memory(x), x.stride(0), gelu, factors, *matrices
        outputs = tuple(memory(y) for y in ys)
        run(_jit().layer_forward, n_rows, x.numel(), *args, outputs, block=_jit().CHUNK)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *weights_t = ctx.saved_tensors
        gx, gws, gbs = gradients(x, ctx.factors, weights_t, grads, gelu=ctx.gelu, needs_x=ctx.needs_input_grad[0])
        return (gx, None, None, *gws, *gbs)


def gradients(
    x: Tensor,
    factors: Any,
    weights_t: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    needs_x: bool,
    gelu: bool = False,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Return the gradients of ``x (T, M, K)``, of the weights and of the biases.

    Without factors, ``NONE``, there are no neurons and no steps: the matrices read ``x (1, M, K)``.
    """
    n_steps, n_rows, size = x.shape
    widths = tuple(w.shape[1] for w in weights_t)
    arrived = [
        torch.zeros(n_steps * n_rows * n) if g is None else g.contiguous() for g, n in zip(grads, widths, strict=True)
    ]
    share = SHARE * math.ceil(n_rows / SHARE / SHARES)
    shares, columns = -(-n_rows // share), sum(widths)
    gx = fresh(torch.empty(x.shape)) if needs_x else None
    gw, gb = torch.zeros(shares, columns, size), torch.zeros(shares, columns)
    args = share, n_rows, size, memory(x), x.stride(0), gelu, factors, _panels([w.t() for w in weights_t]), widths
    out = nothing(x.dtype) if gx is None else memory(gx), memory(gw), memory(gb)
    run(_jit().layer_backward, shares, x.numel(), *args, tuple(memory(g) for g in arrived), *out)
    return gx, [g.t() for g in torch.split(gw.sum(0), list(widths))], list(torch.split(gb.sum(0), list(widths)))


NONE = np.zeros((0, 5), np.float32)
"""The factors of no neurons at all."""
