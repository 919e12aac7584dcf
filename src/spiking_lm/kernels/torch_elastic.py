"""The fast form of ``elastic_scan`` on CPUs: one autograd Function over all steps, five operations a step, three back.

Neurons do not know of each other, so a piece of them goes through all of its steps before the next one begins: what is
carried from step to step then stays in the cache. Nothing is divided or rounded: ``m/A`` rounds to something else than
0 exactly where ``|m| > A/2``. The first membrane is the input itself, so a single step keeps nothing for the way back
but its input and its output, which others keep too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.kernels.reference import LEAST_AMPLITUDE, amplitude_gradient, compute_dtype

CHUNK = 131072
"""Neurons per piece."""

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class _Elastic(NamedTuple):
    beta: float
    bits: int
    reset: str
    final: bool


def supports_elastic_scan(x: Tensor, *_: object, **__: object) -> bool | str:
    """Say whether :func:`elastic_scan` takes these inputs, or why not."""
    if x.device.type != "cpu":
        return f"it reads the amplitudes as numbers, for which it would have to wait for the {x.device.type} device"
    return x.dtype in _DTYPES or f"{x.dtype} is not one of float16, bfloat16, float32, float64"


def elastic_scan(
    x: Tensor, alpha: Tensor, carried: Tensor | None = None, *, beta: float, bits: int, reset: str, final: bool
) -> tuple[Tensor, Tensor | None]:
    """Run elastic bi-spiking neurons over their steps; see :func:`spiking_lm.kernels.elastic_scan`."""
    dtype = compute_dtype(x, alpha, carried)
    if len(x) == 0:
        rest = torch.zeros(x.shape[1:], dtype=dtype) if carried is None else carried.to(dtype)
        return x, rest if final else None
    options = _Elastic(beta, bits, reset, final)
    flat = x.reshape(len(x), math.prod(x.shape[1:])).to(dtype)
    before = None if carried is None else carried.reshape(-1).to(dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, alpha, carried)):
        spikes, after = _ElasticScan.apply(flat, alpha, before, options)
    else:
        spikes, after, _ = _forward(flat, alpha, before, options, keep=False)
    return spikes.to(x.dtype).view(x.shape), None if after is None else after.view(x.shape[1:])


def _pieces(x: Tensor) -> Iterator[slice]:
    for start in range(0, x.shape[1], CHUNK):
        yield slice(start, start + CHUNK)


def _fire(m: Tensor, amplitude: float, bits: int, out: Tensor) -> None:
    """Write the spikes of membranes ``m``; one that is no number passes, so as not to be taken for a silent one."""
    if bits == 1:
        torch.sign(m, out=out).mul_(amplitude).add_(m, alpha=0)
    else:  # what lies beyond A/2, doubled, lies beyond A
        torch.ops.aten.hardshrink.out(m, amplitude / 2, out=out).mul_(2).clamp_(-amplitude, amplitude)


def _rest(a: Tensor, spikes: Tensor, e: _Elastic, out: Tensor) -> Tensor:
    """Write by what a membrane is multiplied on its way to the next step, but for beta: ``a - s``, or ``a - |s|``."""
    return torch.sub(a, torch.abs(spikes, out=out) if e.reset == "symmetric" else spikes, out=out)


def _forward(
    x: Tensor, alpha: Tensor, before: Tensor | None, e: _Elastic, *, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return spikes ``(T, M)``, what is carried on ``(M,)``, and with ``keep`` the membranes ``(T, M)``.

    The membranes lack the first one where that is the input.
    """
    raw = alpha.detach().to(x.dtype)
    amplitudes = raw.clamp(min=LEAST_AMPLITUDE).tolist()
    spikes = torch.empty_like(x)
    membranes = torch.empty_like(x[1:] if before is None else x) if keep else None
    after = torch.empty_like(x[0]) if e.final else None
    for piece in _pieces(x):
        steps = x[:, piece].unbind(0)
        rest = torch.empty_like(steps[0])
        places = [torch.empty_like(rest)] * len(steps) if membranes is None else list(membranes[:, piece].unbind(0))
        if before is None:
            m, places = steps[0], [steps[0], *places]
        else:
            m = torch.add(steps[0], before[piece], out=places[0])
        for t, s in enumerate(spikes[:, piece].unbind(0)):
            if t > 0:
                m = torch.addcmul(steps[t], rest, m, value=e.beta, out=places[t])
            _fire(m, amplitudes[t], e.bits, s)
            if e.final or t + 1 < len(steps):
                _rest(raw[t], s, e, rest)
        if after is not None:
            torch.mul(rest.mul_(e.beta), m, out=after[piece])
    return spikes, after, membranes


class _ElasticScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, before: Tensor | None, e: _Elastic) -> tuple[Tensor, Tensor | None]:
        spikes, after, membranes = _forward(x, alpha, before, e, keep=True)
        ctx.save_for_backward(x, alpha, before, spikes, membranes)
        ctx.e = e
        ctx.set_materialize_grads(False)
        return spikes, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """Go back in time: g_t = gs_t [|m_t| <= A_t] + g_{t+1} beta (a_t - s_t), where the amplitudes are constants."""
        x, alpha, before, spikes, membranes = ctx.saved_tensors
        gs, after = grads
        if gs is None and after is None:
            return None, None, None, None
        gs = torch.zeros_like(x) if gs is None else gs
        raw = alpha.detach().to(x.dtype)
        amplitudes = raw.clamp(min=LEAST_AMPLITUDE)
        bounds = torch.nextafter(amplitudes, torch.full_like(raw, math.inf)).tolist()  # the window includes its ends
        kept = membranes.unbind(0) if before is not None else (x[0], *membranes.unbind(0))
        gx = torch.empty_like(x)
        for piece in _pieces(x):
            steps, rest = gx[:, piece].unbind(0), torch.empty_like(gx[0, piece])
            g = None if after is None else after[piece]
            for t in reversed(range(len(steps))):
                arriving = gs[t, piece], kept[t][piece], -bounds[t], bounds[t]
                torch.ops.aten.hardtanh_backward.grad_input(*arriving, grad_input=steps[t])
                if g is not None:
                    steps[t].addcmul_(_rest(raw[t], spikes[t, piece], ctx.e, rest), g, value=ctx.e.beta)
                g = steps[t]
        ga = None
        if ctx.needs_input_grad[1]:
            each = [amplitude_gradient(g, m / a, ctx.e.bits) for g, m, a in zip(gs, kept, amplitudes, strict=True)]
            ga = torch.stack(each).to(alpha.dtype)
        return gx, ga, gx[0] if ctx.needs_input_grad[2] else None, None
