"""Products of few rows on GPUs: by active sources, by bits, by int8 codes. They cost what reading the weights costs.

More than ``MOST_ROWS`` rows are left to torch: its dense products read the weights once for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spiking_lm_triton.device import linear as device
from spiking_lm_triton.machine import operator, takes
from spiking_lm_triton.sizes import GATHER_K, GATHER_N, MOST_ROWS, cut, parts

COMPACT = {"BLOCK": 1024, "num_warps": 4}
GATHER = {"BLOCK_N": GATHER_N, "BLOCK_K": GATHER_K, "num_warps": 4}
COMBINE = {"BLOCK": 256, "num_warps": 2}
PACK = {"BLOCK": 32, "num_warps": 2}
PACKED = {"BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4}
TERNARY = {"BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4}
INT8 = {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4}
"""How kernels are cut: outputs and sources (or words) of a program, and its warps."""


def supports(x: Tensor, *others: Tensor | None) -> bool | str:
    """Say whether the products take these inputs, or why not."""
    rows = x.numel() // max(x.shape[-1], 1)
    return _answer(rows, x, *others)


def supports_packed_linear(words: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> bool | str:
    """Say whether :func:`packed_linear` takes these inputs, or why not."""
    return _answer(words[..., 0, 0].numel() if words.shape[-1] else 0, scale, bias, words, planes)


def supports_pack_spikes(s: Tensor, planes: int = 1) -> bool | str:
    """Say whether :func:`pack_spikes` takes these inputs, or why not."""
    return takes(s)


def _answer(rows: int, *tensors: Tensor | None) -> bool | str:
    real = takes(*(t for t in tensors if t is not None and t.is_floating_point()))
    together = takes(*tensors, dtypes=None) if real is True else real
    if together is not True:
        return together
    return rows <= MOST_ROWS or f"more than {MOST_ROWS} rows, for which a dense product reads the weights once"


def spike_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum the weight rows of sources that are not silent; see :func:`spiking_lm.kernels.spike_linear`."""
    y: Tensor = _spike_linear(_rows(x), weight_t, bias)
    return y.view(*x.shape[:-1], weight_t.shape[1])


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply with int8 codes, each row with its scale; see :func:`spiking_lm.kernels.int8_linear`."""
    y: Tensor = _int8_linear(_rows(x), codes, scale, bias)
    return y.view(*x.shape[:-1], codes.shape[0])


def pack_spikes(s: Tensor, planes: int = 1) -> Tensor:
    """Put 32 spikes into a word; see :func:`spiking_lm.kernels.pack_spikes`."""
    words: Tensor = _pack_spikes(_rows(s), planes)
    return words.view(*s.shape[:-1], planes, words.shape[-1])


def packed_linear(words: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply packed spikes with packed ternary weights; see :func:`spiking_lm.kernels.packed_linear`."""
    y: Tensor = _packed_linear(words.reshape(-1, *words.shape[-2:]), planes, scale, bias)
    return y.view(*words.shape[:-2], planes.shape[1])


def ternary_linear(x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply real numbers with packed ternary weights; see :func:`spiking_lm.kernels.ternary_linear`."""
    y: Tensor = _ternary_linear(_rows(x), planes, scale, bias)
    return y.view(*x.shape[:-1], planes.shape[1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.numel() // max(x.shape[-1], 1), x.shape[-1]).contiguous()


def _sums(out: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a product without sources is."""
    return out.zero_() if bias is None else out.copy_(bias.expand_as(out))


@operator("spike_linear")
def _spike_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    (rows, sources), targets = x.shape, weight_t.shape[1]
    out = weight_t.new_empty((rows, targets))
    if not x.numel() or not targets:
        return _sums(out, bias)
    weights, biases = weight_t.contiguous(), weight_t if bias is None else bias.contiguous()
    index = x.new_empty(x.shape, dtype=torch.int32)
    value = x.new_empty(x.shape, dtype=torch.float32)
    count = x.new_empty(rows, dtype=torch.int32)
    device.compact[(rows,)](x.to(weight_t.dtype), index, value, count, sources, **COMPACT)
    n_parts = parts(rows, sources, targets)
    sums = out if n_parts == 1 else x.new_empty((n_parts, rows, targets), dtype=torch.float32)
    device.gather[(cut(targets, GATHER_N), rows, n_parts)](
        index, value, count, weights, biases, sums, rows, sources, targets,
        BIASED=bias is not None, PARTS=n_parts, **GATHER,
    )  # fmt: skip
    if n_parts > 1:
        device.combine[(cut(targets, COMBINE["BLOCK"]), rows)](
            sums, biases, out, rows, targets, BIASED=bias is not None, PARTS=n_parts, **COMBINE
        )
    return out


@_spike_linear.register_fake
def _(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    return weight_t.new_empty((x.shape[0], weight_t.shape[1]))


@operator("int8_linear")
def _int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty((x.shape[0], codes.shape[0]))
    if not x.numel() or not out.numel():
        return _sums(out, bias)
    biases = scale if bias is None else bias.contiguous()
    device.int8_product[(cut(codes.shape[0], INT8["BLOCK_N"]), x.shape[0])](
        x, codes.contiguous(), scale.contiguous(), biases, out, x.shape[1], codes.shape[0],
        BIASED=bias is not None, **INT8,
    )  # fmt: skip
    return out


@_int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


@operator("pack_spikes")
def _pack_spikes(s: Tensor, planes: int) -> Tensor:
    words = s.new_empty((s.shape[0], planes, cut(s.shape[1], 32)), dtype=torch.int32)
    if words.numel():
        device.pack[(s.shape[0], cut(words.shape[2], PACK["BLOCK"]))](
            s, words, s.shape[1], words.shape[2], PLANES=planes, **PACK
        )
    return words


@_pack_spikes.register_fake
def _(s: Tensor, planes: int) -> Tensor:
    return s.new_empty((s.shape[0], planes, cut(s.shape[1], 32)), dtype=torch.int32)


@operator("packed_linear")
def _packed_linear(words: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = scale.new_empty((words.shape[0], planes.shape[1]))
    if not words.numel() or not out.numel():
        return _sums(out, bias)
    biases = scale if bias is None else bias.contiguous()
    device.packed_product[(cut(planes.shape[1], PACKED["BLOCK_N"]), words.shape[0])](
        words.contiguous(), planes.contiguous(), scale.contiguous(), biases, out, words.shape[2], planes.shape[1],
        BIASED=bias is not None, PLANES=words.shape[1], **PACKED,
    )  # fmt: skip
    return out


@_packed_linear.register_fake
def _(words: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return scale.new_empty((words.shape[0], planes.shape[1]))


@operator("ternary_linear")
def _ternary_linear(x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty((x.shape[0], planes.shape[1]))
    if not x.numel() or not out.numel():
        return _sums(out, bias)
    biases = scale if bias is None else bias.contiguous()
    device.ternary_product[(cut(planes.shape[1], TERNARY["BLOCK_N"]), x.shape[0])](
        x, planes.contiguous(), scale.contiguous(), biases, out, x.shape[1], planes.shape[2], planes.shape[1],
        BIASED=bias is not None, **TERNARY,
    )  # fmt: skip
    return out


@_ternary_linear.register_fake
def _(x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], planes.shape[1]))
