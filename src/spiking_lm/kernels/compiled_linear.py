"""Compiled products of one token: what stands between torch and :mod:`spiking_lm.kernels.jit_linear`."""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spiking_lm.kernels.compiled import missing, nothing, takes
from spiking_lm.kernels.dispatch import traced

MOST_ROWS = 4
"""With more rows, products that read the weights once for all of them are faster."""


@lru_cache(maxsize=1)
def _jit() -> ModuleType:
    from spiking_lm.kernels import jit_linear

    return jit_linear


def _takes(x: Tensor, rows: int, work: int, *reals: Tensor | None) -> bool | str:
    if any(t is not None and t.dtype != torch.float32 for t in reals):
        return "only float32 is compiled"
    if rows > MOST_ROWS:
        return f"more than {MOST_ROWS} rows share the weights"
    return takes(work, *(t for t in (x, *reals) if t is not None and t.dtype.is_floating_point))


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _or_nothing(t: Tensor | None) -> Any:
    return nothing(torch.float32) if t is None else t.detach().contiguous().numpy()


LEAST_WEIGHTS = 65536
"""Of a dense matrix, from which it is worth leaving torch."""


def takes_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Say whether :func:`dense_linear` takes ``x (..., K)`` and ``weight (N, K)``: few rows and no gradient."""
    return (
        weight.numel() >= LEAST_WEIGHTS
        and not traced()  # asked before sizes are, which a tracer would take for conditions
        and 0 < x.numel() <= MOST_ROWS * weight.shape[1]
        and x.shape[-1] == weight.shape[1]
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        and not torch.is_autocast_enabled("cpu")
        and missing() is None
    )


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (..., K) @ weight (N, K).T + bias`` for few rows, as fast as memory gives out the weights."""
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(flat), weight.shape[0])
    _jit().dense_linear(weight.data_ptr(), flat.numpy(), y.numpy(), _or_nothing(bias))
    return y.view(*x.shape[:-1], weight.shape[0])


def supports_spike_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> bool | str:
    """Say whether :func:`spike_linear` takes these inputs, or why not."""
    if not weight_t.is_contiguous():
        return "the weights do not lie one row per source"
    return _takes(x, _rows(x), weight_t.numel(), x, weight_t, bias)


def spike_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum the weight rows of active sources; see :func:`spiking_lm.kernels.spike_linear`."""
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(flat), weight_t.shape[1])
    _jit().spike_linear(weight_t.data_ptr(), flat.numpy(), y.numpy(), _or_nothing(bias))
    return y.view(*x.shape[:-1], weight_t.shape[1])


def supports_int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> bool | str:
    """Say whether :func:`int8_linear` takes these inputs, or why not."""
    if not codes.is_contiguous():
        return "the codes do not lie row by row"
    return _takes(x, _rows(x), codes.numel(), x, scale, bias)


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply with int8 codes; see :func:`spiking_lm.kernels.int8_linear`."""
    flat = x.detach().reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(flat), codes.shape[0])
    _jit().int8_linear(codes.data_ptr(), flat.numpy(), y.numpy(), _or_nothing(scale), _or_nothing(bias))
    return y.view(*x.shape[:-1], codes.shape[0])


def supports_pack_spikes(s: Tensor, planes: int = 1) -> bool | str:
    """Say whether :func:`pack_spikes` takes these inputs, or why not."""
    if s.dtype not in (torch.float32, torch.float64, torch.int8):
        return f"{s.dtype} is not one of float32, float64, int8"
    return "it is compiled for the processor" if s.device.type != "cpu" else takes(64 * s.numel())


def pack_spikes(s: Tensor, planes: int = 1) -> Tensor:
    """Put 32 spikes into a word; see :func:`spiking_lm.kernels.pack_spikes`."""
    flat = s.reshape(-1, s.shape[-1]).contiguous()
    words = torch.empty(len(flat), planes, -(-s.shape[-1] // 32), dtype=torch.int32)
    _jit().pack_spikes(flat.numpy(), words.numpy())
    return words.view(*s.shape[:-1], *words.shape[1:])


def supports_packed_linear(words: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> bool | str:
    """Say whether :func:`packed_linear` takes these inputs, or why not."""
    if not planes.is_contiguous():
        return "the planes do not lie row by row"
    return _takes(scale, math.prod(words.shape[:-2]), 32 * planes.numel(), scale, bias)


def packed_linear(words: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply packed spikes with packed ternary weights; see :func:`spiking_lm.kernels.packed_linear`."""
    flat = words.reshape(-1, *words.shape[-2:]).contiguous()
    y = scale.new_empty(len(flat), planes.shape[1])
    _jit().packed_linear(planes.data_ptr(), flat.numpy(), y.numpy(), _or_nothing(scale), _or_nothing(bias))
    return y.view(*words.shape[:-2], planes.shape[1])


def supports_ternary_linear(x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> bool | str:
    """Say whether :func:`ternary_linear` takes these inputs, or why not."""
    if not planes.is_contiguous():
        return "the planes do not lie row by row"
    return _takes(x, _rows(x), 16 * planes.numel(), x, scale, bias)


def ternary_linear(x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply real numbers with packed ternary weights; see :func:`spiking_lm.kernels.ternary_linear`."""
    flat = x.detach().reshape(-1, x.shape[-1])
    flat = F.pad(flat, (0, -x.shape[-1] % 32)).contiguous()
    y = x.new_empty(len(flat), planes.shape[1])
    args = flat.numpy(), y.numpy(), _or_nothing(scale), _or_nothing(bias)
    _jit().ternary_linear(planes.data_ptr(), planes.shape[2], *args)
    return y.view(*x.shape[:-1], planes.shape[1])
