"""Event-based gated recurrent units, compiled: what stands between torch and :mod:`spiking_lm.kernels.jit_egru`."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.kernels.compiled import fresh, memory, nothing, run, takes
from spiking_lm.kernels.products import product
from spiking_lm.kernels.reference import compute_dtype

MOST_ROWS = 4
"""Of a batch: with more, products of whole matrices read the weights less often than single rows do."""


@lru_cache(maxsize=1)
def _jit() -> ModuleType:
    from spiking_lm.kernels import jit_egru

    return jit_egru


def supports_egru_scan(
    a: Tensor,
    recurrent_kernel: Tensor,
    recurrent_bias: Tensor,
    threshold: Tensor,
    c0: Tensor | None = None,
    y0: Tensor | None = None,
    **options: Any,
) -> bool | str:
    """Say whether :func:`egru_scan` takes these inputs, or why not."""
    if a.shape[1] > MOST_ROWS:
        return f"more than {MOST_ROWS} rows share each product, which is then faster as one of matrices"
    given = a, recurrent_kernel, recurrent_bias, threshold, c0, y0, options.get("keep")
    return takes(a.shape[0] * a.shape[1] * recurrent_kernel.numel(), *given)


def egru_scan(
    a: Tensor,
    recurrent_kernel: Tensor,
    recurrent_bias: Tensor,
    threshold: Tensor,
    c0: Tensor | None = None,
    y0: Tensor | None = None,
    *,
    gamma: float,
    epsilon: float,
    keep: Tensor | None = None,
    zoneout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run event-based gated recurrent units over time; see :func:`spiking_lm.kernels.egru_scan`."""
    dtype = compute_dtype(a, recurrent_kernel, recurrent_bias, threshold, c0, y0)
    rest = a.new_zeros((a.shape[1], threshold.numel()), dtype=dtype)
    c0, y0 = (rest if s is None else s.to(dtype) for s in (c0, y0))
    a, kernel, bias, theta = (t.to(dtype) for t in (a, recurrent_kernel, recurrent_bias, threshold))
    inputs = a, kernel, bias, theta, c0, y0
    mask = None if keep is None else keep.to(dtype).contiguous()
    with torch.autocast(a.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            y, c, o = _EGRUScan.apply(*inputs, mask, zoneout, gamma, epsilon)
            return y, c, o
        return _forward(*inputs, mask, zoneout, None)


def _forward(
    a: Tensor, kernel: Tensor, bias: Tensor, theta: Tensor, c0: Tensor, y0: Tensor, keep: Any, zoneout: float, kept: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, c and o; ``kept`` are gates, g and p for the way back."""
    n_steps, batch, hidden = a.shape[0], a.shape[1], theta.numel()
    a = a if a.stride(2) == 1 or a.shape[2] == 1 else a.contiguous()
    y, c, o = (fresh(a.new_empty(n_steps, batch, hidden)) for _ in range(3))
    none = nothing(a.dtype)
    parameters = (memory(t.contiguous()) for t in (kernel, bias, theta))
    options = none if keep is None else memory(keep), none.dtype.type(zoneout)
    state = memory(c0.contiguous()), memory(y0.contiguous())
    places = (none,) * 3 if kept is None else tuple(memory(t) for t in kept)
    args = n_steps, batch, hidden, memory(a), (a.stride(0), a.stride(1)), *parameters, *options, *state, *places
    run(_jit().egru_forward, batch, a.numel() * hidden, *args, memory(y), memory(c), memory(o))
    return y, c, o


class _EGRUScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        kernel: Tensor,
        bias: Tensor,
        theta: Tensor,
        c0: Tensor,
        y0: Tensor,
        keep: Tensor | None,
        zoneout: float,
        gamma: float,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_steps, batch, hidden = a.shape[0], a.shape[1], theta.numel()
        kept = tuple(fresh(a.new_empty(n_steps, batch, n * hidden)) for n in (3, 1, 1))
        y, c, o = _forward(a, kernel, bias, theta, c0, y0, keep, zoneout, kept)
        ctx.save_for_backward(kernel, theta, c0, y0, keep, *kept, y, c)
        ctx.options = zoneout, gamma, epsilon
        ctx.set_materialize_grads(False)
        return y, c, o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        kernel, theta, c0, y0, keep, gates, g, p, y, c = ctx.saved_tensors
        none = nothing(p.dtype)
        n_steps, batch, hidden = p.shape
        gq, ga = torch.empty_like(gates), torch.empty_like(gates)
        g_theta, g_c0, g_y0 = (torch.zeros_like(c0, memory_format=torch.contiguous_format) for _ in range(3))
        options = none if keep is None else memory(keep), *(none.dtype.type(option) for option in ctx.options)
        given = (none if d is None else memory(d.contiguous()) for d in grads)
        known = (memory(t.contiguous()) for t in (c0, gates, g, p, c))
        results = (memory(t) for t in (gq, ga, g_theta, g_c0, g_y0))
        args = n_steps, batch, hidden, memory(kernel.contiguous()), memory(theta.contiguous()), *options
        run(_jit().egru_backward, batch, gates.numel() * hidden, *args, *known, *given, *results)
        read = torch.cat((y0.unsqueeze(0), y))[:-1].flatten(0, 1)
        g_kernel = product(read.t(), gq.flatten(0, 1))
        return ga, g_kernel, gq.sum((0, 1)), g_theta.sum(0), g_c0, g_y0, None, None, None, None
