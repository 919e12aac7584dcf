"""The products of which decoding one token consists, declared once: what they mean, and what their arguments must be.

All are inference: no gradient is recorded. Right is what :mod:`spiking_lm.kernels.reference` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spiking_lm.errors import UsageError
from spiking_lm.kernels.dispatch import call


def spike_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (..., K) @ weight_t (K, N) + bias`` from the rows of ``weight_t`` whose source is not zero, (..., N).

    Weights lie one row per source, so that an active source is one contiguous read. A row of ``x`` without an event
    gives the bias, or zeros. The result has the type of the weights.
    """
    _check("spike_linear", x, weight_t.shape[-1:], weight_t.dim() == 2 and x.shape[-1:] == weight_t.shape[:1], bias)
    with torch.no_grad():
        y: Tensor = call("spike_linear", x, weight_t, bias)
    return y


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (..., K) @ (codes (N, K) * scale (N,)[:, None]).T + bias``, (..., N), in the type of ``x``.

    Weights are int8 with a scale per output; ``x`` is not quantised. Sums are kept in float32, or in float64 when ``x``
    is float64.
    """
    fits = codes.dim() == 2 and codes.dtype == torch.int8 and x.shape[-1:] == codes.shape[1:]
    _check("int8_linear", x, codes.shape[:1], fits and scale.shape == codes.shape[:1], bias)
    with torch.no_grad():
        y: Tensor = call("int8_linear", x, codes, scale, bias)
    return y


def pack_spikes(s: Tensor, planes: int = 1) -> Tensor:
    """Return spikes ``s (..., K)`` as bits, ``(..., planes, W)`` int32 with W = ceil(K / 32).

    Bit j of word i is source 32 i + j, bits past K are 0. One plane is for spikes 0 and 1; of two planes the first
    marks +1 and the second -1. Raises: UsageError for anything else in ``s``.
    """
    if planes not in (1, 2):
        raise UsageError(f"pack_spikes: planes is 1 or 2, not {planes!r}")
    if s.dim() == 0:
        raise UsageError("pack_spikes: spikes are (..., K), not a single number")
    known = (s == 0) | (s == 1) if planes == 1 else (s == 0) | (s == 1) | (s == -1)
    if not bool(known.all()):
        value = s[~known].flatten()[0].item()
        raise UsageError(
            f"pack_spikes: {value} is not a spike of {planes} plane{'s' if planes > 1 else ''}",
            hint="planes=2 takes -1, 0 and 1" if value == -1 else "only spikes of size 1 are bits",
        )
    words: Tensor = call("pack_spikes", s.detach(), planes)
    return words


def packed_linear(words: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply packed spikes ``words (..., P, W)`` with ternary weights ``planes (2, N, W)``; return ``(..., N)``.

    The sum over sources is a whole number, found by AND and counting of bits; then come ``scale (N,)`` and ``bias``.
    ``words`` are those of :func:`pack_spikes`, and so is each plane of the weights: the first marks +1, the second -1.
    The result has the type of ``scale``.
    """
    fits = words.dim() >= 2 and words.dtype == planes.dtype == torch.int32 and words.shape[-2] in (1, 2)
    fits = fits and _are_planes(planes, words.shape[-1]) and scale.shape == planes.shape[1:2]
    _check("packed_linear", words, planes.shape[1:2], fits, bias)
    with torch.no_grad():
        y: Tensor = call("packed_linear", words, planes, scale, bias)
    return y


def ternary_linear(x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply real ``x (..., K)`` with ternary weights ``planes (2, N, W)`` and ``scale (N,)``; return ``(..., N)``.

    Weights are as in :func:`packed_linear`. Sums are kept in float32, or in float64 when ``x`` is float64; the result
    has the type of ``x``.
    """
    fits = x.dim() > 0 and planes.dtype == torch.int32 and _are_planes(planes, -(-x.shape[-1] // 32))
    _check("ternary_linear", x, planes.shape[1:2], fits and scale.shape == planes.shape[1:2], bias)
    with torch.no_grad():
        y: Tensor = call("ternary_linear", x, planes, scale, bias)
    return y


def pack_ternary(codes: Tensor) -> Tensor:
    """Return ternary weights ``codes (N, K)`` of -1, 0 and 1 as planes ``(2, N, W)`` int32, for :func:`packed_linear`.

    Raises: UsageError for any other code.
    """
    return pack_spikes(codes, 2).movedim(-2, 0).contiguous()


def _are_planes(planes: Tensor, words: int) -> bool:
    return planes.dim() == 3 and planes.shape[0] == 2 and planes.shape[2] == words


def _check(op: str, x: Tensor, targets: tuple[int, ...], fits: bool, bias: Tensor | None) -> None:
    if not fits or (op != "packed_linear" and not x.dtype.is_floating_point):
        raise UsageError(
            f"{op}: {x.dtype} {tuple(x.shape)} and weights for {tuple(targets)} outputs do not fit in shape or type",
            hint=f"see spiking_lm.kernels.{op}",
        )
    if bias is not None and bias.shape != targets:
        raise UsageError(f"{op}: bias has shape {tuple(bias.shape)}, not {tuple(targets)}")
