"""``egru_scan`` on GPUs: per time step one matrix product, and one kernel for all that is around it.

Forward, only the products are kept; backward, gates are computed anew from them. The gradients of the weights are one
product over all steps at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spiking_lm_triton.device import egru as device
from spiking_lm_triton.machine import operator, takes
from spiking_lm_triton.sizes import cut

BLOCK, WARPS = 128, 4
"""Units of a program, and its warps."""


def supports(
    a: Tensor,
    recurrent_kernel: Tensor,
    recurrent_bias: Tensor,
    threshold: Tensor,
    c0: Tensor | None = None,
    y0: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    **_: Any,
) -> bool | str:
    """Say whether :func:`egru_scan` takes these inputs, or why not."""
    return takes(a, recurrent_kernel, recurrent_bias, threshold, c0, y0, keep)


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
    kernel, bias, theta = (t.float() for t in (recurrent_kernel, recurrent_bias, threshold))
    rest = a.new_zeros((a.shape[1], theta.numel()), dtype=torch.float32)
    inputs = (a, kernel, bias, theta, rest if c0 is None else c0.float(), rest if y0 is None else y0.float())
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y, c, o, _ = _forward(*inputs, keep, 0.0 if keep is not None else zoneout, gamma, epsilon, recorded)
    return y[1:], c[1:], o


Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""Membranes sent, y (T + 1, B, H), and kept, c, both beginning with the state; events o (T, B, H); products q."""


@operator("egru_forward")
def _forward(
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
    recorded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, c, o, q = results = _results(a, kernel, bias, theta, c0, y0, recorded)
    y[0], c[0] = y0, c0
    n_steps, batch, hidden = o.shape
    if not o.numel():
        return results
    source, bias, theta, mask = _prepared(a, bias, theta, keep)
    product = q if recorded else c0.new_empty((1, batch, 3 * hidden))
    with torch.autocast(a.device.type, enabled=False):
        for t in range(n_steps):
            torch.mm(y[t], kernel, out=product[t if recorded else 0])
            device.egru_forward[(cut(hidden, BLOCK), batch)](
                source, product, bias, theta, mask, y, c, o, t, batch, hidden, *source.stride()[:2], zoneout,
                KEEP=keep is not None, EVERY_Q=recorded, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return results


def _results(a: Tensor, kernel: Tensor, bias: Tensor, theta: Tensor, c0: Tensor, *rest: Any) -> Results:
    steps, (batch, hidden) = a.shape[0], c0.shape
    y, c = (c0.new_empty((steps + 1, batch, hidden)) for _ in range(2))
    return y, c, c0.new_empty((steps, batch, hidden)), c0.new_empty((steps if rest[-1] else 0, batch, 3 * hidden))


_forward.register_fake(_results)


def _prepared(a: Tensor, bias: Tensor, theta: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what kernels read in the layout that they expect; where there is no mask, something to point to."""
    source = a if a.stride(2) == 1 else a.contiguous()
    return source, bias.contiguous(), theta.contiguous(), theta if keep is None else keep.contiguous()


@operator("egru_backward")
def _backward(
    a: Tensor,
    kernel: Tensor,
    bias: Tensor,
    theta: Tensor,
    keep: Tensor | None,
    y: Tensor,
    c: Tensor,
    o: Tensor,
    q: Tensor,
    dy: Tensor | None,
    dc: Tensor | None,
    do: Tensor | None,
    zoneout: float,
    gamma: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    g_a, _, _, _, carry, _ = _gradient_results(a, kernel, bias, theta, keep, y, c)
    n_steps, batch, hidden = o.shape
    g_y = torch.zeros_like(y) if dy is None else dy.clone(memory_format=torch.contiguous_format)
    g_q, by_row = torch.empty_like(q), torch.zeros_like(c[0])
    carry.zero_()
    source, bias, theta, mask = _prepared(a, bias, theta, keep)
    of_c, of_o = (carry if d is None else d.contiguous() for d in (dc, do))
    back = kernel.t()
    with torch.autocast(a.device.type, enabled=False):
        for t in reversed(range(n_steps if o.numel() else 0)):
            device.egru_backward[(cut(hidden, BLOCK), batch)](
                source, q, bias, theta, mask, c, o, g_y, of_c, of_o, carry, g_a, g_q, by_row,
                t, batch, hidden, *source.stride()[:2], zoneout, gamma, epsilon,
                KEEP=keep is not None, FROM_C=dc is not None, FROM_O=do is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
            g_y[t].addmm_(g_q[t], back)
        g_kernel = y[:-1].flatten(0, 1).t() @ g_q.flatten(0, 1)
    if dc is not None:
        carry += dc[0]
    return g_a, g_kernel, g_q.sum((0, 1)), by_row.sum(0), carry, g_y[0].clone()


def _gradient_results(
    a: Tensor, kernel: Tensor, bias: Tensor, theta: Tensor, keep: Tensor | None, y: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    g_kernel, g_bias, g_theta = (t.new_empty(t.shape) for t in (kernel, bias, theta))
    g_a = a.new_empty(a.shape)
    return g_a, g_kernel, g_bias, g_theta, y.new_empty(y.shape[1:]), y.new_empty(y.shape[1:])


_backward.register_fake(_gradient_results)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, kernel, bias, theta, _, _, keep, *options, _ = inputs
    ctx.save_for_backward(a, kernel, bias, theta, keep, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dc: Tensor | None, do: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    return *_backward(*ctx.saved_tensors, dy, dc, do, *ctx.options), *[None] * 5


_forward.register_autograd(_gradients, setup_context=_keep)
