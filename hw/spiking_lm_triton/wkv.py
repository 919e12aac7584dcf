"""``wkv`` on GPUs: sequential over time, a thread for a few channels, with no limit on the length.

Forward, a state is put down every ``CHUNK`` steps; backward, the ones between are computed anew, chunk by chunk. Sums
over rows of the batch are made in a fixed order, so gradients are the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spiking_lm.kernels import WKVState
from spiking_lm_triton.device import wkv as device
from spiking_lm_triton.machine import operator, stages, takes
from spiking_lm_triton.sizes import CHUNK, cut

BLOCK, WARPS = 64, 1
"""Channels of a program, and its warps: so a thread has two, and copies both at once."""


def supports(time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None) -> bool | str:
    """Say whether :func:`wkv` takes these inputs, or why not."""
    answer = takes(k, v)
    return takes(k.detach(), time_decay, time_first, *(state or ()), dtypes=None) if answer is True else answer


def wkv(
    time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Run the RWKV-4 recurrence over time; see :func:`spiking_lm.kernels.wkv`."""
    w, u = -torch.exp(time_decay.float()), time_first.float()
    p, q, o = (None, None, None) if state is None else (s.float().contiguous() for s in state)
    given = (w, u, k, v, p, q)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, p, q, o, _ = _forward(w.contiguous(), u.contiguous(), k, v, p, q, o, recorded)
    return y, (p, q, o)


def _places(p: Tensor, n_steps: int, recorded: bool) -> Tensor:
    """Return room for marks, ``(3, ceil(T / CHUNK), B, C)``, or none."""
    return p.new_empty((3, cut(n_steps, CHUNK) if recorded else 0, *p.shape))


@operator("wkv_forward")
def _forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    p0: Tensor | None,
    q0: Tensor | None,
    o0: Tensor | None,
    recorded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, p, q, o, marks = _results(w, u, k, v, p0, q0, o0, recorded)
    batch, n_steps, channels = k.shape
    start = (k, k, k) if p0 is None else (p0, q0, o0)
    if p.numel():
        device.wkv_forward[(cut(channels, BLOCK), batch)](
            w, u, k, v, *start, y, p, q, o, marks, n_steps, batch, channels,
            *k.stride(), *v.stride(), *y.stride(),
            STARTED=p0 is not None, MARK=recorded, CHUNK=CHUNK, BLOCK=BLOCK, STAGES=stages(), num_warps=WARPS,
        )  # fmt: skip
    return y, p, q, o, marks


def _results(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p, q, o = (w.new_empty((k.shape[0], k.shape[2])) for _ in range(3))
    return torch.empty_like(v), p, q, o, _places(p, k.shape[1], rest[-1])


_forward.register_fake(_results)


@operator("wkv_backward")
def _backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    marks: Tensor,
    g_y: Tensor | None,
    g_p: Tensor | None,
    g_q: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gk, gv, gp, gq = results = _gradient_results(w, u, k, v)
    batch, n_steps, channels = k.shape
    if not gp.numel():
        return results
    scratch = w.new_empty((3, CHUNK, batch, channels))
    after = g_p is not None or g_q is not None
    of_state = [(torch.zeros_like(gp) if g is None else g.contiguous()) if after else w for g in (g_p, g_q)]
    of_y = v if g_y is None else g_y
    device.wkv_backward[(cut(channels, BLOCK), batch)](
        w, u, k, v, marks, scratch, of_y, *of_state, gk, gv, gw, gu, gp, gq, n_steps, batch, channels,
        *k.stride(), *v.stride(), *of_y.stride(), *gk.stride(), *gv.stride(),
        FROM_Y=g_y is not None, FROM_STATE=after, CHUNK=CHUNK, BLOCK=BLOCK, STAGES=stages(), num_warps=WARPS,
    )  # fmt: skip
    return results


def _gradient_results(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gp, gq = (w.new_empty((k.shape[0], k.shape[2])) for _ in range(4))
    return gw, gu, torch.empty_like(k), torch.empty_like(v), gp, gq


_backward.register_fake(_gradient_results)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    w, u, k, v, p0, *_ = inputs
    ctx.save_for_backward(w, u, k, v, output[4])
    ctx.started = p0 is not None
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, g_y: Tensor | None, g_p: Tensor | None, g_q: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    gw, gu, gk, gv, gp, gq = _backward(*ctx.saved_tensors, g_y, g_p, g_q)
    return gw.sum(0), gu.sum(0), gk, gv, *((gp, gq) if ctx.started else (None, None)), None, None


_forward.register_autograd(_gradients, setup_context=_keep)
