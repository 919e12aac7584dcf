"""The fast form of ``attention`` on CPUs: one step and one head at a time, so that weights never leave the cache.

Heads are read where they lie, as columns of what a matrix has put out: joining the batch into the first dimension of a
product needs no copy for one head, and would for all. Only the weights behind the softmax are kept for the way back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.kernels import ops

LEAST = 8192
"""Attention weights of one head and step from which the products outweigh the preparations."""


def supports_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, keep: Tensor | None = None, *_: Any, **__: Any
) -> bool | str:
    """Say whether :func:`attention` takes these inputs, or why not."""
    if q.device.type != "cpu":
        return f"it goes head by head, which suits caches and not the {q.device.type} device"
    if q.dtype not in (torch.float32, torch.float64):
        return f"{q.dtype} is not one of float32, float64"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast torch chooses the precision of each product"
    if q.shape[1] * q.shape[3] * k.shape[3] < LEAST:
        return f"fewer than {LEAST} weights a head"
    return True


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    amplitudes: Tensor | None = None,
    *,
    bits: Literal[1, 2] = 2,
) -> Tensor:
    """Mix values by attention; see :func:`spiking_lm.kernels.attention`."""
    if amplitudes is not None:
        k, v = (
            ops.elastic_scan(x, a, beta=0.0, bits=bits, final=False)[0] for x, a in zip((k, v), amplitudes, strict=True)
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        y: Tensor = _Attention.apply(q, k, v, mask, keep)
        return y
    return _forward(q, k, v, mask, keep, kept=None)


def _of_head(t: Tensor | None, head: int) -> Tensor | None:
    """Return what a mask ``(B or 1, heads or 1, S or 1, L)`` says of one head."""
    return None if t is None else t[:, head if t.shape[1] > 1 else 0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor | None, *, kept: Tensor | None
) -> Tensor:
    """Return what is mixed; the weights go to ``kept (T, heads, B, S, L)`` where it is given."""
    n_steps, batch, heads, length, size = q.shape
    shape = batch, length, k.shape[3]
    y = q.new_empty(n_steps, batch, length, heads, size).transpose(2, 3)
    weights, dropped = q.new_empty(shape), q.new_empty(shape)
    for t in range(n_steps):
        for i in range(heads):
            w = weights if kept is None else kept[t, i]
            added, left = _of_head(mask, i), _of_head(keep, i)
            scored = w if added is None else added.expand(shape)
            beta = 0.0 if added is None else 1.0
            torch.baddbmm(scored, q[t, :, i], k[t, :, i].transpose(1, 2), beta=beta, alpha=size**-0.5, out=w)
            torch.softmax(w, -1, out=w)
            if left is not None:
                w = torch.mul(w, left, out=dropped)
            y[t, :, i] = torch.bmm(w, v[t, :, i])
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor | None) -> Tensor:
        kept = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3], k.shape[3])
        y = _forward(q, k, v, mask, keep, kept=kept)
        ctx.save_for_backward(q, k, v, keep, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """Go back through the second product, the dropout, the softmax and the first product."""
        (gy,) = grads
        q, k, v, keep, kept = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        # Memory in the order (T, B, S, heads, d), in which the matrices behind q, k and v want it.
        gq, gk, gv = (x.new_empty(x.transpose(2, 3).shape).transpose(2, 3) for x in (q, k, v))
        weights, slope = torch.empty_like(kept[0, 0]), torch.empty_like(kept[0, 0])
        for t in range(len(q)):
            for i in range(q.shape[2]):
                w, g, left = kept[t, i], gy[t, :, i], _of_head(keep, i)
                mixed = w if left is None else torch.mul(w, left, out=weights)
                gv[t, :, i] = torch.bmm(mixed.transpose(1, 2), g)
                torch.bmm(g, v[t, :, i].transpose(1, 2), out=weights)
                if left is not None:
                    weights.mul_(left)
                torch.ops.aten._softmax_backward_data.out(weights, w, -1, w.dtype, grad_input=slope)
                slope.mul_(scale)
                gq[t, :, i] = torch.bmm(slope, k[t, :, i])
                gk[t, :, i] = torch.bmm(slope.transpose(1, 2), q[t, :, i])
        return gq, gk, gv, None, None
