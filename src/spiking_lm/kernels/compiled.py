"""Compiled CPU kernels, by numba: what stands between torch and the loops of :mod:`spiking_lm.kernels.jit`.

numba brings its compiler along, so nothing else has to be installed. It is imported when a call is first large enough
to be worth it, and its machine code is kept on disk (``$SPIKING_LM_CACHE``), so that it compiles once per machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.config import SurrogateConfig
from spiking_lm.kernels.reference import LEAST_AMPLITUDE, WKVState, compute_dtype, empty_wkv_state

LEAST = 16384
"""Elements of the inputs from which a call goes to compiled code, and would make numba be imported."""
MOST = 65536
"""Weights of a head that stay in the second-level cache, with what else attention needs."""
SHARE = 32768
"""Elements of work that one thread should have at least."""

LANES = 64
"""Threads part neurons and channels at multiples of this, so that no two write to one line of the cache."""

_LARGE, _PAGE = 1 << 22, 4096

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@lru_cache(maxsize=1)
def _jit() -> ModuleType:
    _keep_memory()
    from spiking_lm.kernels import jit

    return jit


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Import the loops; say why compiled code cannot run here, for example that numba does not know this numpy yet."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'spiking-lm[cpu]'"
    try:
        _jit()
    except (ImportError, AttributeError, OSError) as err:
        return f"numba cannot be used here: {err}"
    return None


def takes(size: int, *tensors: Tensor | None) -> bool | str:
    given = [t for t in tensors if t is not None]
    for t in given:
        if t.device.type != "cpu":
            return f"it is compiled for the processor, not for the {t.device.type} device"
        if t.dtype not in _DTYPES:
            return f"{t.dtype} is not one of float16, bfloat16, float32, float64"
    if size < max(LEAST, 1):
        return f"fewer than {LEAST} elements"
    return missing() or True


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="spiking-lm")


def run(kernel: Callable[..., None], units: int, work: int, *args: Any, block: int = 1) -> None:
    """Call ``kernel(start, stop, *args)`` for all units, in as many threads as torch may use and the work is worth."""
    threads = min(torch.get_num_threads(), max(1, work // SHARE), -(-units // block))
    if threads <= 1:
        kernel(0, units, *args)
        return
    each = -(-units // (threads * block)) * block
    cuts = [*range(0, units, each), units]
    jobs = [_pool(threads, os.getpid()).submit(kernel, a, b, *args) for a, b in pairwise(cuts[1:])]
    try:
        kernel(cuts[0], cuts[1], *args)
    finally:
        wait(jobs)
    for job in jobs:
        job.result()


def memory(t: Tensor) -> Any:
    """Return the memory from the first to the last element of ``t`` as a one-dimensional array."""
    if t.is_contiguous():
        return t.detach().view(-1).numpy()
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.detach().as_strided((span,), (1,)).numpy()


def _keep_memory() -> None:
    """Have the C library keep memory that was freed, up to 1 GB, for what is asked for next (Linux with glibc).

    It would else go back to Linux after each training step and come again page by page in the next: a tenth of the
    time. Whoever sets MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ has decided.
    """
    if sys.platform != "linux" or any(f"MALLOC_{what}_THRESHOLD_" in os.environ for what in ("TRIM", "MMAP")):
        return
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    set_option(-1, 1 << 30)  # M_TRIM_THRESHOLD
    set_option(-3, 1 << 25)  # M_MMAP_THRESHOLD, the highest there is


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast("Callable[[int, int, int], int]", advise)


def fresh(t: Tensor) -> Tensor:
    """Ask for large pages for the new tensor ``t``, and return it.

    A kernel that takes a millisecond writes its results faster than Linux hands out memory 4 KB at a time.
    """
    size, advise = t.numel() * t.element_size(), _madvise()
    if size >= _LARGE and advise is not None:
        begin = -(-t.data_ptr() // _PAGE) * _PAGE
        advise(begin, (t.data_ptr() + size - begin) // _PAGE * _PAGE, 14)  # MADV_HUGEPAGE; a no changes nothing
    return t


@lru_cache(maxsize=8)
def nothing(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy()


def _or_nothing(t: Tensor | None, dtype: torch.dtype) -> Any:
    return nothing(dtype) if t is None else memory(t)


# -- elastic_scan ------------------------------------------------------------------------------------------------------


def supports_elastic_scan(x: Tensor, alpha: Tensor, carried: Tensor | None = None, **_: Any) -> bool | str:
    """Say whether :func:`elastic_scan` takes these inputs, or why not."""
    if alpha.requires_grad and torch.is_grad_enabled():
        return "amplitudes that are learned need sums over all neurons, which torch does as fast"
    return takes(x.numel(), x, alpha, carried)


def elastic_scan(
    x: Tensor, alpha: Tensor, carried: Tensor | None = None, *, beta: float, bits: int, reset: str, final: bool
) -> tuple[Tensor, Tensor | None]:
    """Run elastic bi-spiking neurons over their steps; see :func:`spiking_lm.kernels.elastic_scan`."""
    dtype = compute_dtype(x, alpha, carried)
    flat = x.reshape(len(x), math.prod(x.shape[1:])).to(dtype)
    before = None if carried is None else carried.reshape(-1).to(dtype)
    factors = elastic_factors(alpha, dtype, beta=beta, bits=bits, reset=reset)
    if torch.is_grad_enabled() and (flat.requires_grad or (before is not None and before.requires_grad)):
        spikes, after = _Elastic.apply(flat, before, factors, final)
    else:
        spikes, after = _elastic_forward(flat, before, factors, final)
    return spikes.to(x.dtype).view(x.shape), None if after is None else after.view(x.shape[1:])


def elastic_factors(alpha: Tensor, dtype: torch.dtype, *, beta: float, bits: int, reset: str) -> Any:
    """Return ``(T, 5)``, per step: bound, amplitude, and what a membrane is multiplied with where it is carried on."""
    return _elastic_factors(tuple(alpha.tolist()), dtype, beta, bits, reset)


@lru_cache(maxsize=256)
def _elastic_factors(alpha: tuple[float, ...], dtype: torch.dtype, beta: float, bits: int, reset: str) -> Any:
    a = torch.tensor(alpha, dtype=torch.float64).to(dtype).numpy()
    size, half = np.maximum(a, a.dtype.type(LEAST_AMPLITUDE)), a.dtype.type(0.5 if bits == 2 else 0.0)
    rest = [a - size, a - size if reset == "symmetric" else a + size, a]
    return np.stack([half * size, size, *(a.dtype.type(beta) * r for r in rest)], 1)


def _elastic_forward(x: Tensor, before: Tensor | None, factors: Any, final: bool) -> tuple[Tensor, Tensor | None]:
    spikes = fresh(torch.empty(x.shape, dtype=x.dtype))
    after = torch.empty(x.shape[1:], dtype=x.dtype) if final else None
    x = x if x.stride(1) == 1 else x.contiguous()
    start = None if before is None else before.contiguous()
    args = memory(x), x.stride(0), _or_nothing(start, x.dtype), factors, memory(spikes), _or_nothing(after, x.dtype)
    run(_jit().elastic_forward, x.shape[1], x.numel(), *args, block=_jit().BLOCK)
    return spikes, after


class _Elastic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor | None, factors: Any, final: bool) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, before)
        ctx.factors = factors
        ctx.set_materialize_grads(False)
        return _elastic_forward(x, before, factors, final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, before = ctx.saved_tensors
        gs, after = grads
        if gs is None and after is None:
            return None, None, None, None
        gs = torch.zeros(x.shape, dtype=x.dtype) if gs is None else gs.contiguous()
        gx = fresh(torch.empty(x.shape, dtype=x.dtype))
        x = x if x.stride(1) == 1 else x.contiguous()
        start, after = (None if t is None else t.contiguous() for t in (before, after))
        args = memory(x), x.stride(0), _or_nothing(start, x.dtype), ctx.factors
        out = memory(gs), _or_nothing(after, x.dtype), memory(gx)
        run(_jit().elastic_backward, x.shape[1], 2 * x.numel(), *args, *out, block=_jit().BLOCK)
        return gx, gx[0] if ctx.needs_input_grad[1] else None, None, None


# -- attention ---------------------------------------------------------------------------------------------------------


def supports_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, keep: Tensor | None = None, *_: Any, **__: Any
) -> bool | str:
    """Say whether :func:`attention` takes these inputs, or why not."""
    if q.dtype not in (torch.float32, torch.float64):
        return f"{q.dtype} is not one of float32, float64"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast torch chooses the precision of each product"
    if q.shape[3] * k.shape[3] > MOST:
        return f"more than {MOST} weights a head, which do not stay in the cache"
    return takes(q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3] * k.shape[3], q, k, v, mask, keep)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    amplitudes: Tensor | None = None,
    *,
    bits: int = 2,
) -> Tensor:
    """Mix values by attention; see :func:`spiking_lm.kernels.attention`."""
    fires = None
    if amplitudes is not None:
        options: dict[str, Any] = {"beta": 0.0, "bits": bits, "reset": "asymmetric"}
        fires = np.stack([elastic_factors(alpha, q.dtype, **options) for alpha in amplitudes])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        y: Tensor = _Attention.apply(q, k, v, mask, keep, fires)
        return y
    return _attention_forward(*_attention_arguments(q, k, v, mask, keep, fires), q)


def _rows(t: Tensor) -> tuple[Any, tuple[int, ...]]:
    """Return memory of ``t (T, B, heads, S, d)`` and its distances between steps, rows, heads and places."""
    t = t if t.stride(4) == 1 or t.shape[4] == 1 else t.contiguous()
    return memory(t), t.stride()[:4]


def _attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor | None, fires: Any
) -> tuple[Any, ...]:
    (q_data, q_at), (k_data, k_at), (v_data, v_at) = (_rows(x) for x in (q, k, v))
    mask_at = (0, 0)
    if mask is not None:
        mask = mask.to(q.dtype).contiguous()
        mask_at = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2) if mask.shape[2] > 1 else 0)
    keep = None if keep is None else keep.to(q.dtype).contiguous()
    shape = (*q.shape[:4], k.shape[3], q.shape[4])
    scale = q_data.dtype.type(q.shape[-1] ** -0.5)
    masks = _or_nothing(mask, q.dtype), mask_at, _or_nothing(keep, q.dtype)
    fires = np.zeros((0, 0, 5), scale.dtype) if fires is None else fires
    return shape, q_data, k_data, v_data, q_at, k_at, v_at, fires, *masks, scale


def _attention_forward(shape: tuple[int, ...], *args: Any) -> Tensor:
    *rest, q = args
    n_steps, batch, heads, queries, length, size = shape
    y = fresh(q.new_empty(n_steps, batch, queries, heads, size))
    units = n_steps * batch * heads
    run(_jit().attention_forward, units, units * queries * length, shape, *rest, memory(y))
    return y.transpose(2, 3)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, keep: Any, fires: Any) -> Tensor:
        ctx.save_for_backward(q, k, v, mask, keep)
        ctx.fires = fires
        return _attention_forward(*_attention_arguments(q, k, v, mask, keep, fires), q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, mask, keep = ctx.saved_tensors
        shape, *rest = _attention_arguments(q, k, v, mask, keep, ctx.fires)
        n_steps, batch, heads, queries, length, size = shape
        gq, gk, gv = (fresh(q.new_empty(n_steps, batch, n, heads, size)) for n in (queries, length, length))
        units = n_steps * batch * heads
        args = *rest, *_rows(grads[0]), *(memory(g) for g in (gq, gk, gv))
        run(_jit().attention_backward, units, 2 * units * queries * length, shape, *args)
        return gq.transpose(2, 3), gk.transpose(2, 3), gv.transpose(2, 3), None, None, None


# -- lif_scan ----------------------------------------------------------------------------------------------------------

_SURROGATES = {"atan": 0, "fast_sigmoid": 1, "sigmoid": 2, "triangle": 3}


class _LIF(NamedTuple):
    numbers: Any
    """beta, gain, drift, bound, threshold, reset, in the type of the state."""
    soft: bool
    detach: bool
    surrogate: int
    alpha: Any
    final_only: bool


def supports_lif_scan(x: Tensor, v0: Tensor | None = None, **_: Any) -> bool | str:
    """Say whether :func:`lif_scan` takes these inputs, or why not."""
    return takes(x.numel(), x, v0)


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
    dtype = compute_dtype(x, v0)
    real = np.float64 if dtype == torch.float64 else np.float32
    at = real(threshold)
    bound = at if compare == ">=" else np.nextafter(at, real(np.inf))
    drift = 0.0 if v_reset is None else (1 - beta) * v_reset
    numbers = np.array([beta, gain, drift, bound, threshold, v_reset or 0.0], real)
    lif = _LIF(
        numbers, v_reset is None, detach_reset, _SURROGATES[surrogate.name], real(surrogate.alpha), final_only
    )  # fmt: skip
    currents = x.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (v0 is not None and v0.requires_grad)):
        spikes, v = _LIFScan.apply(currents, v0, lif)
    else:
        spikes, v, _ = _lif_forward(currents, v0, lif, keep=False)
    return spikes.to(x.dtype), v


def _rows_of_steps(x: Tensor) -> tuple[Tensor, int, int]:
    """Return ``x (T, ...)`` or a copy, and as what a step lies in memory: rows of so many elements, so far apart."""
    if x[0].is_contiguous():
        return x, max(x[0].numel(), 1), 0
    if x.dim() == 3 and x.stride(2) == 1:
        return x, x.shape[2], x.stride(1)
    return _rows_of_steps(x.contiguous())


def _alike(t: Tensor, like: Tensor) -> Tensor:
    """Return ``t``, or a copy, in the layout of ``like``."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def _lif_forward(x: Tensor, v0: Tensor | None, lif: _LIF, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return spikes, membranes, and with ``keep`` the membranes before reset."""
    spikes = fresh(torch.empty_like(x))
    x, width, row = _rows_of_steps(_alike(x, spikes))
    spikes = spikes if spikes.stride() == x.stride() else fresh(torch.empty_like(x))
    last = x.new_zeros(x.shape[1:]) if v0 is None else v0.to(x.dtype).contiguous().clone()
    kept = fresh(torch.empty_like(x)) if keep else None
    membranes = None if lif.final_only else fresh(torch.empty_like(x))
    args = width, len(x), memory(x), x.stride(0), row, memory(last), tuple(lif.numbers), lif.soft, memory(spikes)
    outputs = (_or_nothing(t, x.dtype) for t in (kept, membranes))
    run(_jit().lif_forward, last.numel(), x.numel(), *args, *outputs, block=LANES)
    return spikes, last if membranes is None else membranes, kept


class _LIFScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v0: Tensor | None, lif: _LIF) -> tuple[Tensor, Tensor]:
        spikes, v, kept = _lif_forward(x, v0, lif, keep=True)
        ctx.save_for_backward(kept)
        ctx.lif, ctx.v0_dtype = lif, None if v0 is None else v0.dtype
        ctx.set_materialize_grads(False)
        return spikes, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (kept,) = ctx.saved_tensors
        gs, gv = grads
        if gs is None and gv is None:
            return None, None, None
        lif: _LIF = ctx.lif
        _, width, row = _rows_of_steps(kept)
        carry = kept.new_zeros(kept.shape[1:])
        if lif.final_only and gv is not None:
            carry.copy_(gv)
            gv = None
        gx = fresh(torch.empty_like(kept))
        gs, gv = (None if g is None else _alike(g, kept) for g in (gs, gv))
        args = width, len(kept), memory(kept), kept.stride(0), row, tuple(lif.numbers), lif.soft, lif.detach
        gradients = _or_nothing(gs, kept.dtype), _or_nothing(gv, kept.dtype), memory(carry), memory(gx)
        kernel = _jit().lif_backward
        run(kernel, carry.numel(), kept.numel(), *args, lif.surrogate, lif.alpha, *gradients, block=LANES)
        return gx, None if ctx.v0_dtype is None else carry.to(ctx.v0_dtype), None


# -- wkv ---------------------------------------------------------------------------------------------------------------

_FAR = 40.0
"""A bonus term of exp(40) outweighs any past by 1e17 over its length: larger exponents alter no digit."""


def supports_wkv(
    time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None
) -> bool | str:
    """Say whether :func:`wkv` takes these inputs, or why not."""
    return takes(k.numel(), time_decay, time_first, k, v, *(state or ()))


def wkv(
    time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Run the RWKV-4 recurrence over time; see :func:`spiking_lm.kernels.wkv`."""
    dtype = compute_dtype(k, v)
    w, u = -torch.exp(time_decay.to(dtype)), time_first.to(dtype)
    p, q, o = (s.to(dtype) for s in (empty_wkv_state(k, dtype) if state is None else state))
    keys, values = k.to(dtype), v.to(dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (w, u, keys, values, p, q)):
        y, p, q, o = _WKV.apply(w, u, keys, values, p, q, o)
    else:
        y, (p, q, o), _ = _wkv_forward(w, u, keys, values, p, q, o, keep=False)
    return y.to(v.dtype), (p, q, o)


def _channels(t: Tensor) -> tuple[Any, tuple[int, int]]:
    """Return memory, and distances between rows and steps, of ``t (B, T, C)``."""
    t = t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
    return memory(t), (t.stride(0), t.stride(1))


def _wkv_forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, p: Tensor, q: Tensor, o: Tensor, *, keep: bool
) -> tuple[Tensor, WKVState, Tensor | None]:
    """Return the output, the state after the last step, and with ``keep`` that before each, ``(3, T, B, C)``."""
    state = p.contiguous().clone(), q.contiguous().clone(), o.contiguous().clone()
    kept = fresh(k.new_empty(3, k.shape[1], *p.shape)) if keep else None
    y = fresh(torch.empty_like(v if v.stride(2) == 1 else v.contiguous()))
    args = k.shape[2], k.shape[1], memory(w.contiguous()), memory(u.contiguous()), *_channels(k), *_channels(v)
    far = args[2].dtype.type(_FAR)
    outputs = *(memory(s) for s in state), _or_nothing(kept, k.dtype), *_channels(y)
    run(_jit().wkv_forward, p.numel(), 4 * k.numel(), *args, far, *outputs, block=LANES)
    return y, state, kept


class _WKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, u: Tensor, k: Tensor, v: Tensor, p: Tensor, q: Tensor, o: Tensor) -> Any:
        y, (p, q, o), kept = _wkv_forward(w, u, k, v, p, q, o, keep=True)
        ctx.save_for_backward(w, u, k, v, kept)
        ctx.mark_non_differentiable(o)
        ctx.set_materialize_grads(False)
        return y, p, q, o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        gy, *g_sums, _ = grads
        w, u, k, v, kept = ctx.saved_tensors
        gp, gq = (torch.zeros_like(kept[0, 0]) if g is None else g.contiguous().clone() for g in g_sums)
        gw, gu = torch.zeros_like(gp), torch.zeros_like(gp)
        gk = fresh(torch.empty_like(v if v.stride(2) == 1 else v.contiguous()))
        gv = fresh(torch.empty_like(gk))
        gy = torch.zeros_like(gk) if gy is None else gy
        args = k.shape[2], k.shape[1], memory(w.contiguous()), memory(u.contiguous()), *_channels(k), *_channels(v)
        sums = (memory(g) for g in (gp, gq, gw, gu, gk))
        far, outputs = args[2].dtype.type(_FAR), (*sums, *_channels(gv))
        run(
            _jit().wkv_backward, gp.numel(), 6 * k.numel(), *args, far, memory(kept), *_channels(gy), *outputs,
            block=LANES,
        )  # fmt: skip
        return gw.sum(0), gu.sum(0), gk, gv, gp, gq, None
