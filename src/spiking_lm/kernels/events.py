"""Products with few active inputs: only the weight rows of active sources are read.

Weights are kept with one row per source, ``(N, M)``, so that an active source is one contiguous read. It pays for
single streams, where a product is bound by reading its weights; with many rows at once dense products win. The gather
prefetches what it reads and so gets more out of the memory than a dense product of one row does, even when all sources
are active.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spiking_lm.kernels import products
from spiking_lm.kernels.dispatch import traced

GEMM_RATE = 150e9
"""Floating-point operations per second of a dense product, per thread."""
STREAM_RATE = 20e9
"""Bytes per second of weights read from end to end, out of memory."""
CACHE_RATE = 70e9
"""Bytes per second of weights read from end to end, when they fit in ``CACHE``."""
CACHE = 2**20
"""Bytes of the second-level cache, where the weights of a small layer stay from step to step."""
GATHER_RATE = 25e9
"""Bytes per second of weights read row by row."""
OVERHEAD = 8e-6
"""Seconds that an event product takes beside its reads: to list the active sources and to call the gather."""


def cheaper_product(rows: int, sources: int, targets: int, active: int, itemsize: int = 4) -> Literal["dense", "event"]:
    """Return which product costs less, ``(rows, sources) x (sources, targets)`` with ``active`` nonzero inputs.

    Dense: ``2 rows sources targets`` operations at ``GEMM_RATE``, but never less than reading all weights once.
    Event: ``active`` rows of weights at ``GATHER_RATE``, and ``OVERHEAD``. ``itemsize`` is in bytes per weight.
    The rates are those of a thread of a recent server processor; being wrong by half costs little, because the two
    differ little where the choice turns.
    """
    weights = sources * targets * itemsize
    stream_rate = CACHE_RATE if weights <= CACHE else STREAM_RATE
    dense = max(2 * rows * sources * targets / GEMM_RATE, weights / stream_rate)
    event = active * targets * itemsize / GATHER_RATE + OVERHEAD
    return "event" if event < dense else "dense"


def event_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (B, N) @ weight_t (N, M) + bias`` from the rows of ``weight_t`` whose source is not zero.

    Equal to the dense product up to rounding; a row of ``x`` without any event gives the bias. No gradient is recorded.
    """
    with torch.no_grad():
        return _gather(x, x.nonzero(), weight_t, bias)


def product(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (B, N) @ weight_t (N, M) + bias`` by whichever product is cheaper for these values, without gradients.

    On devices other than the CPU, and in half precision, it is the dense one.
    """
    with torch.no_grad():
        return _cheaper(x, weight_t, bias)


def linear(x: Tensor, weight_t: Tensor, bias: Tensor) -> Tensor:
    """Return ``x (B, N) @ weight_t (N, M) + bias`` by whichever product is cheaper for these values.

    Where gradients are recorded, on devices other than the CPU, and in half precision it is the dense one.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight_t.requires_grad or bias.requires_grad):
        return products.linear(x, weight_t, bias)
    return _cheaper(x, weight_t, bias)


def _cheaper(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    rows, (sources, targets), size = x.shape[0], weight_t.shape, weight_t.element_size()
    if (
        not traced()  # what is cheaper for some values is not part of a graph
        and size >= 4
        and x.dtype == weight_t.dtype
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and cheaper_product(rows, sources, targets, 0, size) == "event"  # else it is not worth looking
    ):
        active = x.nonzero()
        if cheaper_product(rows, sources, targets, active.shape[0], size) == "event":
            return _gather(x, active, weight_t, bias)
    return products.product(x, weight_t) if bias is None else products.linear(x, weight_t, bias)


def _gather(x: Tensor, active: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    """Sum weight rows, one bag per row of ``x``; ``active (nnz, 2)`` lists row and source of what is not zero."""
    sources = active[:, 1].contiguous()
    if x.shape[0] == 1:  # a single stream, where every microsecond counts
        values, starts = x[0].index_select(0, sources), sources.new_zeros(1)
    else:
        rows = active[:, 0].contiguous()
        values = x[rows, sources]
        # A bag begins where the earlier rows end; an empty bag sums to zero.
        starts = torch.searchsorted(rows, torch.arange(x.shape[0], device=x.device))
    y = torch.embedding_bag(
        weight_t, sources, starts, mode=0, per_sample_weights=values.to(weight_t.dtype), scale_grad_by_freq=False
    )[0]
    return y if bias is None else y.add_(bias)
