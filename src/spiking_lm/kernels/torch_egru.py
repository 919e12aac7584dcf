"""The fast form of ``egru_scan`` in plain PyTorch: one product and a few small operations per time step.

With p the state before the reset, y and c after it, s the surrogate at p - threshold and capital letters for total
gradients, the reverse step is::

    dP_t = (o + s p) dY_t + (1 - s threshold) dC_t + s do_t
    dQ_t = (k_z, k_r, k_q) dP_t        dY_{t-1} += dQ_t R^T        dC_{t-1} += k_c dP_t

where all that multiplies a gradient is known before the loop, for all steps at once. dC is not needed in the loop: what
it hands from dP_t to dP_{t-1} is a known factor too. The gradients of weights, biases and thresholds are one product or
sum each after the loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.kernels.events import linear
from spiking_lm.kernels.products import adder, product
from spiking_lm.kernels.reference import compute_dtype

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def supports_egru_scan(a: Tensor, *_: Any, **__: Any) -> bool | str:
    """Say whether :func:`egru_scan` takes these inputs, or why not."""
    return a.dtype in _DTYPES or f"{a.dtype} is not one of float16, bfloat16, float32, float64"


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
    a, kernel, bias, theta = (t.to(dtype) for t in (a, recurrent_kernel, recurrent_bias, threshold))
    rest = a.new_zeros((a.shape[1], theta.numel()))
    c0 = rest if c0 is None else c0.to(dtype)
    y0 = rest if y0 is None else y0.to(dtype)
    keep = None if keep is None else keep.to(dtype)
    inputs = (a, kernel, bias, theta, c0, y0)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if a.shape[0] == 1 and not recorded and not torch.is_autocast_enabled(a.device.type):
        return _step(*inputs, keep, zoneout)
    with torch.autocast(a.device.type, enabled=False):
        if recorded:
            y, c, o = _EGRUScan.apply(*inputs, keep, zoneout, gamma, epsilon)
            return y, c, o
        return _forward_only(*inputs, keep, zoneout)


def _step(
    a: Tensor,
    kernel: Tensor,
    bias: Tensor,
    theta: Tensor,
    c: Tensor,
    y: Tensor,
    keep: Tensor | None,
    zoneout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do a single step, ``a (1, B, 3H)``; the product reads only the rows of active units where that is cheaper.

    In generation, reading the weights has emptied the caches, so that every call here costs several times what it would
    otherwise.
    """
    hidden = theta.numel()
    q = linear(y, kernel, bias)
    z_r, q_g = q[:, : 2 * hidden], q[:, 2 * hidden :]
    z_r.add_(a[0, :, : 2 * hidden]).sigmoid_()
    g = torch.addcmul(a[..., 2 * hidden :], z_r[:, hidden:], q_g).tanh_()
    p = torch.lerp(g, c, z_r[:, :hidden])
    if keep is not None:
        p = torch.lerp(c, p, keep)
    elif zoneout:
        p.lerp_(c.expand_as(p), zoneout)
    o = torch.gt(p, theta).to(p.dtype)
    return p * o, torch.addcmul(p, o, theta, value=-1), o


def _forward_only(
    a: Tensor,
    kernel: Tensor,
    bias: Tensor,
    theta: Tensor,
    c: Tensor,
    y: Tensor,
    keep: Tensor | None,
    zoneout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan :func:`_step`."""
    steps = []
    for start in range(a.shape[0]):
        one = slice(start, start + 1)
        step = _step(a[one], kernel, bias, theta, c, y, None if keep is None else keep[one], zoneout)
        y, c = step[0][0], step[1][0]
        steps.append(step)
    if not steps:
        return a.new_empty((0, *c.shape)), a.new_empty((0, *c.shape)), a.new_empty((0, *c.shape))
    y, c, o = (torch.cat(parts) for parts in zip(*steps, strict=True))
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
        n_steps, batch, _ = a.shape
        hidden = theta.numel()
        # z, r and q_g; the product of a step is added to what is known beforehand.
        gates = a.new_empty((n_steps, batch, 3 * hidden))
        torch.add(a[..., : 2 * hidden], bias[: 2 * hidden], out=gates[..., : 2 * hidden])
        gates[..., 2 * hidden :] = bias[2 * hidden :]
        g, p, y, c, o = (a.new_empty((n_steps, batch, hidden)) for _ in range(5))
        z_r, q_g, a_g = gates[..., : 2 * hidden], gates[..., 2 * hidden :], a[..., 2 * hidden :]
        z, r = z_r.chunk(2, -1)
        steps = (x.unbind(0) for x in (gates, z_r, z, r, q_g, a_g, g, p, y, c, o))
        add_product = adder(kernel, batch)
        y_last, c_last = y0, c0
        for t, (gates_t, z_r_t, z_t, r_t, q_t, a_t, g_t, p_t, y_t, c_t, o_t) in enumerate(zip(*steps, strict=True)):
            add_product(gates_t, y_last)
            z_r_t.sigmoid_()
            torch.addcmul(a_t, r_t, q_t, out=g_t).tanh_()
            torch.lerp(g_t, c_last, z_t, out=p_t)
            if keep is not None:
                torch.lerp(c_last, p_t, keep[t], out=p_t)
            elif zoneout:
                p_t.lerp_(c_last, zoneout)
            torch.gt(p_t, theta, out=o_t)
            torch.mul(p_t, o_t, out=y_t)
            torch.addcmul(p_t, o_t, theta, value=-1, out=c_t)
            y_last, c_last = y_t, c_t
        ctx.save_for_backward(kernel, theta, c0, y0, keep, gates, g, p, y, c)
        ctx.options = zoneout, gamma, epsilon
        ctx.set_materialize_grads(False)
        return y, c, o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        dy, dc, do = grads
        kernel, theta, c0, y0, keep, gates, g, p, y, c = ctx.saved_tensors
        zoneout, gamma, epsilon = ctx.options
        n_steps, batch, hidden = p.shape
        # Total gradients of y, that of the initial one first: the loop adds to them what comes through the recurrence.
        gy = p.new_empty((n_steps + 1, batch, hidden))
        gy[0] = 0
        gy[1:] = 0 if dy is None else dy

        v = p - theta
        fires = v > 0
        slope = v.abs_().mul_(-gamma * epsilon).add_(gamma).clamp_(min=0)
        dp_dc = torch.mul(slope, theta).neg_().add_(1)
        dp_dy = torch.mul(slope, p).add_(fires)
        gp = torch.zeros_like(p) if do is None else slope.mul_(do)
        if dc is not None:
            gp.addcmul_(dp_dc, dc)

        z, r, q_g = gates.chunk(3, -1)
        updates = 1 - z
        if keep is not None:
            updates.mul_(keep)
        elif zoneout:
            updates.mul_(1 - zoneout)
        carries = 1 - updates
        into_g = torch.mul(g, g).neg_().add_(1).mul_(updates)
        gq = torch.empty_like(gates)
        k_z, k_r, k_q = gq.chunk(3, -1)
        torch.sub(c0, g[:1], out=k_z[:1])
        torch.sub(c[:-1], g[1:], out=k_z[1:])
        k_z.mul_(z).mul_(updates)
        torch.mul(into_g, r, out=k_q)
        torch.mul(k_q, q_g, out=k_r).mul_(1 - r)

        # dP_t takes what it gets through c from dP_{t+1} directly; the last step has no next one.
        dp_dp = dp_dc[:-1].mul_(carries[1:]).unbind(0)
        add_product = adder(kernel.t(), batch)
        gys, gqs, gps, dp_dys = (x.unbind(0) for x in (gy, gq, gp, dp_dy))
        gates_of, gps_of = gq.view(n_steps, batch, 3, hidden).unbind(0), gp.unsqueeze(2).unbind(0)
        for t in reversed(range(n_steps)):
            gps[t].addcmul_(dp_dys[t], gys[t + 1])
            if t + 1 < n_steps:
                gps[t].addcmul_(dp_dp[t], gps[t + 1])
            gates_of[t].mul_(gps_of[t])
            add_product(gys[t], gqs[t])

        ga = gq.clone()
        torch.mul(into_g, gp, out=ga[..., 2 * hidden :])
        g_kernel = product(torch.cat((y0.unsqueeze(0), y))[:-1].flatten(0, 1).t(), gq.flatten(0, 1))
        carries.mul_(gp)
        gc = torch.zeros_like(p) if dc is None else dc.clone()
        gc[:-1].add_(carries[1:])
        g_c0 = carries[0] if n_steps else torch.zeros_like(c0)
        g_theta = torch.where(fires, gy[1:], gc).sub_(gp).sum((0, 1))
        return ga, g_kernel, gq.sum((0, 1)), g_theta, g_c0, gy[0], None, None, None, None
