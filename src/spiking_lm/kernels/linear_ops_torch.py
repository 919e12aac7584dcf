"""Products of one token in plain torch; what they mean is in :mod:`spiking_lm.kernels.linear_ops`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spiking_lm.kernels import events
from spiking_lm.kernels.reference import unpack_spikes

MOST_ROWS = 4
"""With more rows of spikes it is cheaper to write the weights out than to count bits for each of them."""


def spike_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum the weight rows of active sources, or multiply, whichever is cheaper."""
    flat = x.reshape(-1, x.shape[-1]).to(weight_t.dtype)
    return events.product(flat, weight_t, bias).view(*x.shape[:-1], weight_t.shape[1])


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write the codes out in the type of the sums and multiply: torch's own int8 product takes three times as long."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = (F.linear(x.to(dtype), codes.to(dtype)) * scale.to(dtype)).to(x.dtype)
    return y if bias is None else y + bias


def pack_spikes(s: Tensor, planes: int = 1) -> Tensor:
    """Put 32 spikes into a word, by way of bytes."""
    words = -(-s.shape[-1] // 32)
    bits = torch.stack([s == sign for sign in (1, -1)[:planes]], -2).to(torch.uint8)
    bits = F.pad(bits, (0, 32 * words - s.shape[-1])).view(*bits.shape[:-1], words, 4, 8)
    values = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=s.device)
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32, device=s.device)
    packed: Tensor = ((bits * values).sum(-1, dtype=torch.int32) << shifts).sum(-1, dtype=torch.int32)
    return packed


def packed_linear(words: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Count bits of few rows; for many, write spikes and weights out and multiply, which is exact up to 2^24."""
    flat = words.flatten(0, -3) if words.dim() > 2 else words[None]
    if len(flat) <= MOST_ROWS:
        counts = _counts(flat[:, :, None, None] & planes)  # (rows, P, 2, N)
        sums = counts[:, 0, 0] - counts[:, 0, 1]
        if flat.shape[1] == 2:
            sums = sums - counts[:, 1, 0] + counts[:, 1, 1]
    else:
        size = 32 * words.shape[-1]
        s, weight = (unpack_spikes(t, size).to(torch.int8) for t in (flat, planes))
        spikes = s[:, 0] if s.shape[1] == 1 else s[:, 0] - s[:, 1]
        sums = F.linear(spikes.float(), (weight[0] - weight[1]).float())
    y = sums.to(scale.dtype) * scale
    y = y if bias is None else y + bias
    return y.view(*words.shape[:-2], planes.shape[1])


def _counts(words: Tensor) -> Tensor:
    """Return how many bits are set along the last dimension of int32 ``words``."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).sum(-1, dtype=torch.int32)


def ternary_linear(x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write the weights out as int8 codes and multiply with those; whoever keeps the codes calls ``int8_linear``."""
    signs = unpack_spikes(planes, x.shape[-1]).to(torch.int8)
    return int8_linear(x, signs[0] - signs[1], scale, bias)
