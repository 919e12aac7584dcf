"""The fast forms of the ops in plain PyTorch: autograd Functions with one or two small operations per time step.

Everything that does not depend on the previous step is hoisted out of the time loop and done for a chunk of steps at
once; a chunk is small enough for its temporaries to stay in the L2 cache. The loops run on views made by ``unbind``
and write in place, so a step allocates nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.config import SurrogateConfig
from spiking_lm.kernels.reference import WKVState, compute_dtype, empty_wkv_state

CHUNK = 32768
"""Elements per chunk: a handful of float32 temporaries of this size fit in 1 MiB, and torch does not thread them."""


_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def supports_lif_scan(x: Tensor, v0: Tensor | None = None, **_: Any) -> bool | str:
    """Say whether :func:`lif_scan` takes these inputs, or why not."""
    return x.dtype in _DTYPES or f"{x.dtype} is not one of float16, bfloat16, float32, float64"


def supports_wkv(
    time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None
) -> bool | str:
    """Say whether :func:`wkv` takes these inputs, or why not."""
    for tensor in (k, v):
        if tensor.dtype not in _DTYPES:
            return f"{tensor.dtype} is not one of float16, bfloat16, float32, float64"
    return True


def _chunks(n_steps: int, step_size: int) -> list[tuple[int, int]]:
    """Cut ``n_steps`` steps of ``step_size`` elements into runs ``(start, stop)`` of about CHUNK elements."""
    length = max(1, CHUNK // max(1, step_size))
    return [(start, min(start + length, n_steps)) for start in range(0, n_steps, length)]


class _LIF(NamedTuple):
    beta: float
    gain: float
    threshold: float
    v_reset: float | None
    compare: str
    surrogate: SurrogateConfig
    detach_reset: bool
    final_only: bool


@lru_cache(maxsize=256)
def _bound(threshold: float, compare: str, dtype: torch.dtype) -> float:
    """Return ``b`` such that a neuron fires exactly when ``-h <= b`` in ``dtype``."""
    bound = torch.tensor(-threshold, dtype=dtype)
    if compare == ">":
        bound = torch.nextafter(bound, torch.tensor(-math.inf, dtype=dtype))
    return float(bound)


def lif_scan(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    beta: float,
    gain: float,
    threshold: float,
    v_reset: float | None = 0.0,
    compare: str = ">=",
    surrogate: SurrogateConfig,
    detach_reset: bool = False,
    final_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run leaky integrate-and-fire neurons over time; see :func:`spiking_lm.kernels.lif_scan`."""
    lif = _LIF(beta, gain, threshold, v_reset, compare, surrogate, detach_reset, final_only)
    if torch.is_grad_enabled() and (x.requires_grad or (v0 is not None and v0.requires_grad)):
        spikes, v = _LIFScan.apply(x, v0, lif)
        return spikes, v
    if x.shape[0] == 1:
        return _lif_step(x, v0, lif)
    spikes, v, _ = _lif_forward(x, v0, lif, keep=False)
    return spikes, v


def _lif_forward(x: Tensor, v0: Tensor | None, lif: _LIF, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return spikes, membranes, and with ``keep`` the membranes before reset, negated.

    The loop works with n = -h: then the hard reset is the one operation ``threshold``, which replaces every n at or
    below a bound by a constant, lets NaN through, and writes into a given tensor.
    """
    dtype = compute_dtype(x, v0)
    n_steps = x.shape[0]
    nv = x.new_zeros(x.shape[1:], dtype=dtype) if v0 is None else torch.neg(v0.to(dtype))
    spikes = torch.empty_like(x)
    kept = torch.empty_like(x, dtype=dtype) if keep else None
    membranes = None if lif.final_only else torch.empty_like(x, dtype=dtype)
    bound = _bound(lif.threshold, lif.compare, dtype)
    beta, gain, v_reset = lif.beta, lif.gain, lif.v_reset
    scratch = None
    for start, stop in _chunks(n_steps, nv.numel()):
        x_c, s_c = x[start:stop], spikes[start:stop]
        if kept is not None:
            n_c = kept[start:stop]
        else:
            scratch = torch.empty_like(x_c, dtype=dtype) if scratch is None else scratch
            n_c = scratch[: stop - start]
        if x.dtype == dtype:
            torch.mul(x_c, -gain, out=n_c) if gain != 1 else torch.neg(x_c, out=n_c)
        else:
            n_c.copy_(x_c).mul_(-gain)
        if v_reset is not None:
            if v_reset != 0:
                n_c.add_(-(1 - beta) * v_reset)
            for n in n_c.unbind(0):
                n.add_(nv, alpha=beta)
                torch.threshold(n, bound, -v_reset, out=nv)
            torch.le(n_c, bound, out=s_c)
            if membranes is not None:
                torch.threshold(n_c, bound, -v_reset, out=membranes[start:stop]).neg_()
        else:
            fired = s_c if x.dtype == dtype else torch.empty_like(n_c)
            for n, s in zip(n_c.unbind(0), fired.unbind(0), strict=True):
                n.add_(nv, alpha=beta)
                torch.le(n, bound, out=s)
                torch.add(n, s, alpha=lif.threshold, out=nv)
            if fired is not s_c:
                s_c.copy_(fired)
            if membranes is not None:
                torch.add(n_c, fired, alpha=lif.threshold, out=membranes[start:stop]).neg_()
        s_c.add_(n_c, alpha=0)  # a membrane that is not finite must not pass for a silent one
    return spikes, nv.neg_() if membranes is None else membranes, kept


def _lif_step(x: Tensor, v0: Tensor | None, lif: _LIF) -> tuple[Tensor, Tensor]:
    """Do a single step, as in generation: the same arithmetic as the scan, bit for bit, without its preparations."""
    dtype = compute_dtype(x, v0)
    h = x.to(dtype) * lif.gain
    if lif.v_reset:
        h.add_((1 - lif.beta) * lif.v_reset)
    if v0 is not None:
        h.add_(v0, alpha=lif.beta)
    fires = h >= lif.threshold if lif.compare == ">=" else h > lif.threshold
    spikes = fires.to(x.dtype)
    v = h.sub(spikes, alpha=lif.threshold) if lif.v_reset is None else h.masked_fill(fires, lif.v_reset)
    return spikes.add_(h, alpha=0), v[0] if lif.final_only else v


class _LIFScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v0: Tensor | None, lif: _LIF) -> tuple[Tensor, Tensor]:
        spikes, v, kept = _lif_forward(x, v0, lif, keep=True)
        ctx.save_for_backward(kept)
        ctx.lif, ctx.dtypes = lif, (x.dtype, None if v0 is None else v0.dtype)
        ctx.set_materialize_grads(False)
        return spikes, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """Go back in time: g_t = gs_t ds/dh + (gv_t + beta g_{t+1}) dv/dh, then gx = gain g and gv0 = beta g_0."""
        gs, gv = grads
        if gs is None and gv is None:
            return None, None, None
        (kept,) = ctx.saved_tensors
        lif: _LIF = ctx.lif
        dtype, (x_dtype, v0_dtype) = kept.dtype, ctx.dtypes
        gx = torch.empty_like(kept, dtype=x_dtype)
        # The gradient that arrives from the next step, and its weight; the last step has no next one.
        carry, weight = kept.new_zeros(kept.shape[1:]), 1.0
        if lif.final_only and gv is not None:
            carry, gv = gv, None
        chunks = _chunks(kept.shape[0], carry.numel())
        scratch = [torch.empty_like(kept[: chunks[0][1]]) for _ in range(3)] if chunks else []
        for start, stop in reversed(chunks):
            n_c = kept[start:stop]
            g_c, ds, dv = (buffer[: stop - start] for buffer in scratch)
            if x_dtype == dtype:
                g_c = gx[start:stop]
            _surrogate_(torch.add(n_c, lif.threshold, out=ds), lif.surrogate)
            if gs is None:
                g_c.zero_()
            else:
                torch.mul(gs[start:stop], ds, out=g_c)
            if _reset_slope(n_c, ds, lif, out=dv):
                if gv is not None:
                    g_c.addcmul_(gv[start:stop], dv)
                for g, d in zip(reversed(g_c.unbind(0)), reversed(dv.unbind(0)), strict=True):
                    g.addcmul_(carry, d, value=weight)
                    carry, weight = g, lif.beta
            else:
                if gv is not None:
                    g_c.add_(gv[start:stop])
                for g in reversed(g_c.unbind(0)):
                    g.add_(carry, alpha=weight)
                    carry, weight = g, lif.beta
            if x_dtype != dtype:
                carry = carry.clone()
                gx[start:stop].copy_(g_c.mul_(lif.gain))
            elif lif.gain != 1:
                carry = carry.clone()
                g_c.mul_(lif.gain)
        return gx, None if v0_dtype is None else (carry * weight).to(v0_dtype), None


def _surrogate_(u: Tensor, surrogate: SurrogateConfig) -> Tensor:
    """Turn ``u`` into the surrogate derivative at distance ``u``, in place; all of them are even in ``u``."""
    alpha = surrogate.alpha
    if surrogate.name == "atan":  # (alpha/2) / (1 + c^2 u^2) as (alpha/2 / c^2) / (1/c^2 + u^2)
        scale = (2 / (math.pi * alpha)) ** 2
        torch.addcmul(u.new_full((), scale), u, u, out=u)
        return u.reciprocal_().mul_(alpha / 2 * scale)
    if surrogate.name == "fast_sigmoid":
        return u.abs_().mul_(alpha).add_(1).square_().reciprocal_()
    if surrogate.name == "sigmoid":
        u.abs_().mul_(-alpha).sigmoid_()
        return u.addcmul_(u, u, value=-1).mul_(alpha)
    return u.abs_().mul_(-alpha * alpha).add_(alpha).clamp_(min=0)


def _reset_slope(n: Tensor, ds: Tensor, lif: _LIF, *, out: Tensor) -> bool:
    """Write dv/dh, the slope of the membrane after reset over the one before, ``-n``; False when it is 1 all over."""
    if lif.v_reset is None:
        if lif.detach_reset:
            return False
        torch.mul(ds, -lif.threshold, out=out).add_(1)
        return True
    torch.gt(n, _bound(lif.threshold, lif.compare, n.dtype), out=out)
    if not lif.detach_reset:  # 1 - s + (v_reset - h) ds/dh
        out.addcmul_(n, ds)
        if lif.v_reset != 0:
            out.add_(ds, alpha=lif.v_reset)
    return True


# -- wkv ---------------------------------------------------------------------------------------------------------------

_FAR = 40.0
"""A bonus term of exp(40) outweighs any past by 1e17 over its length: larger exponents alter no digit."""


def wkv(
    time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Run the RWKV-4 recurrence over time; see :func:`spiking_lm.kernels.wkv`."""
    dtype = compute_dtype(k, v)
    w, u = -torch.exp(time_decay.to(dtype)), time_first.to(dtype)
    p, q, o = (s.to(dtype) for s in state) if state is not None else empty_wkv_state(k, dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (w, u, k, v, p, q)):
        y, p, q, o = _WKV.apply(w, u, k, v, p, q, o)
        return y, (p, q, o)
    if k.shape[1] == 1:
        y, state = _wkv_step(w, u, k[:, 0].to(dtype), v[:, 0].to(dtype), p, q, o)
        return y.unsqueeze(1).to(v.dtype), state
    y, state, _ = _wkv_forward(w, u, k, v, p, q, o, keep=False)
    return y, state


def _wkv_step(w: Tensor, u: Tensor, k: Tensor, v: Tensor, p: Tensor, q: Tensor, o: Tensor) -> tuple[Tensor, WKVState]:
    """Do a single step, as in generation, on ``(B, C)``: the stable recurrence itself."""
    bonus = torch.add(k, u).sub_(o).clamp_(max=_FAR).exp_()
    y = torch.addcmul(p, bonus, v).div_(bonus + q)
    decayed = w + o
    o = torch.maximum(decayed, k)
    decay, gate = decayed.sub_(o).exp_(), torch.sub(k, o).exp_()
    return y, ((gate * v).addcmul_(decay, p), gate.addcmul_(decay, q), o)


class _Kept(NamedTuple):
    """What the backward pass of wkv needs, time-major: sums (2, T+1, B, C), the rest (T, B, C)."""

    sums: Tensor
    decay: Tensor
    gate: Tensor
    bonus: Tensor


def _wkv_forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, p: Tensor, q: Tensor, o: Tensor, *, keep: bool
) -> tuple[Tensor, WKVState, _Kept | None]:
    """Return the output, the state after the last step, and with ``keep`` what the backward pass needs.

    With the running exponents o known beforehand (a running maximum), a step is one operation on S = (p, q):
    S_t = decay_t S_{t-1} + gate_t (v_t, 1), decay_t = exp((o_{t-1} - o_t) + w), gate_t = exp(k_t - o_t), and the output
    is y_t = (p + bonus_t v_t) / (q + bonus_t) over the sums before the step, bonus_t = exp((u + k_t) - o_{t-1}).
    """
    n_steps, dtype = k.shape[1], w.dtype
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    y = torch.empty_like(v)
    chunks = _chunks(n_steps, p.numel())
    kept = None
    if keep:
        kept = _Kept(w.new_empty((2, n_steps + 1, *p.shape)), *(w.new_empty((n_steps, *p.shape)) for _ in range(3)))
    elapsed = w * torch.arange(chunks[0][1] + 1 if chunks else 0, dtype=dtype, device=w.device)[:, None, None]
    last = torch.stack((p, q))
    for start, stop in chunks:
        n = stop - start
        k_c, v_c = k[start:stop].to(dtype), v[start:stop].to(dtype)
        # o_t = max(w + o_{t-1}, k_t) = t w + max over s <= t of (k_s - s w), with the carried exponent as s = 0.
        exponents = w.new_empty((n + 1, *p.shape))
        exponents[0] = o
        torch.sub(k_c, elapsed[1 : n + 1], out=exponents[1:])
        exponents = _running_max(exponents).add_(elapsed[: n + 1])
        before, after, o = exponents[:-1], exponents[1:], exponents[-1]
        if kept is not None:
            sums = kept.sums[:, start : stop + 1]
            decay, gate, bonus = (buffer[start:stop] for buffer in kept[1:])
        else:
            sums = w.new_empty((2, n + 1, *p.shape))
            decay, gate, bonus = (w.new_empty((n, *p.shape)) for _ in range(3))
        # The order of these subtractions matters: o_{t-1} - o_t is exact in floating point, w + o_{t-1} is not.
        torch.sub(before, after, out=decay).add_(w).exp_()
        torch.sub(k_c, after, out=gate).exp_()
        torch.add(k_c, u, out=bonus).sub_(before).clamp_(max=_FAR).exp_()
        sums[:, 0] = last
        torch.mul(gate, v_c, out=sums[0, 1:])
        sums[1, 1:] = gate
        steps = sums.unbind(1)
        for previous, following, a in zip(steps[:-1], steps[1:], decay.unbind(0), strict=True):
            following.addcmul_(a, previous)
        last = steps[-1]
        torch.div(torch.addcmul(sums[0, :-1], bonus, v_c), sums[1, :-1] + bonus, out=y[start:stop])
    return y.transpose(0, 1), (last[0].clone(), last[1].clone(), o.clone()), kept


def _running_max(x: Tensor) -> Tensor:
    """Return the running maximum over dimension 0, by doubling; torch.cummax gives the same, 8 times slower."""
    other = torch.empty_like(x)
    step = 1
    while step < x.shape[0]:
        other[:step] = x[:step]
        torch.maximum(x[step:], x[:-step], out=other[step:])
        x, other = other, x
        step *= 2
    return x


class _WKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, u: Tensor, k: Tensor, v: Tensor, p: Tensor, q: Tensor, o: Tensor) -> Any:
        y, (p, q, o), kept = _wkv_forward(w, u, k, v, p, q, o, keep=True)
        assert kept is not None
        ctx.save_for_backward(v, *kept)
        ctx.k_dtype = k.dtype
        ctx.mark_non_differentiable(o)
        ctx.set_materialize_grads(False)
        return y, p, q, o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """Go back in time with G_t = (gn_t, gd_t) + decay_t G_{t+1}, the gradient of the sums before step t."""
        gy, gp, gq, _ = grads
        v, sums, decay, gate, bonus = ctx.saved_tensors
        dtype, (n_steps, *shape) = decay.dtype, decay.shape
        v = v.transpose(0, 1)
        gy = torch.zeros_like(v) if gy is None else gy.transpose(0, 1)
        gk, gv = torch.empty_like(v, dtype=ctx.k_dtype), torch.empty_like(v)
        carry = torch.stack([torch.zeros_like(sums[0, 0]) if g is None else g for g in (gp, gq)])
        gw, gu = (sums.new_zeros(shape) for _ in range(2))
        for start, stop in reversed(_chunks(n_steps, carry[0].numel())):
            (p, q), v_c = sums[:, start:stop], v[start:stop].to(dtype)
            a, b, r = decay[start:stop], gate[start:stop], bonus[start:stop]
            g_sums = sums.new_empty((2, stop - start + 1, *shape))
            g_sums[:, -1] = carry
            gn, gd = g_sums[:, :-1]
            total = q + r
            torch.div(gy[start:stop], total, out=gn)
            torch.div(torch.addcmul(p, r, v_c), total, out=gd).mul_(gn).neg_()
            g_value = gn * r
            # v - y as (q v - p) / total: exactly 0 where there is no past yet.
            g_bonus = torch.mul(q, v_c).sub_(p).div_(total).mul_(g_value)
            steps = g_sums.unbind(1)
            for following, previous, a_t in zip(steps[:0:-1], steps[-2::-1], reversed(a.unbind(0)), strict=True):
                previous.addcmul_(a_t, following)
            carry = steps[0]
            g_p, g_q = g_sums[:, 1:]
            gu.add_(g_bonus.sum(0))
            gw.add_((g_p * p).addcmul_(g_q, q).mul_(a).sum(0))
            torch.addcmul(g_bonus, b, torch.addcmul(g_q, g_p, v_c), out=gk[start:stop])
            torch.addcmul(g_value, b, g_p, out=gv[start:stop])
        return gw.sum(0), gu.sum(0), gk.transpose(0, 1), gv.transpose(0, 1), carry[0], carry[1], None
