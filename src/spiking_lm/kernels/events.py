"""Products with few active inputs: only the weight rows of active sources are read.

Weights are kept with one row per source, ``(N, M)``, so that an active source is one contiguous read. It pays for
single streams, where a product is bound by reading its weights; with many rows at once dense products win. The gather
prefetches what it reads and so gets more out of the memory than a dense product of one row does, even when all sources
are active.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from spiking_lm.errors import UsageError
from spiking_lm.kernels import compiled_linear, products
from spiking_lm.kernels.dispatch import call, traced

ENVIRONMENT = "SPIKING_LM_RATES"


@dataclass(frozen=True)
class Rates:
    """How fast this machine multiplies, per thread; the defaults are those of a recent server processor."""

    gemm: float = 150e9
    """Floating-point operations per second of a dense product of many rows."""
    stream: float = 20e9
    """Bytes per second of float weights read from end to end, out of memory."""
    cached: float = 70e9
    """Bytes per second of weights read from end to end, when they fit in ``cache``."""
    cache: float = 2**20
    """Bytes of the second-level cache, where the weights of a small layer stay from step to step."""
    gather: float = 25e9
    """Bytes per second of float weights read row by row."""
    int8_stream: float = 20e9
    """Bytes per second of int8 weights read from end to end."""
    int8_gather: float = 10e9
    """Bytes per second of int8 weights read row by row."""
    packed: float = 15e9
    """Bytes per second of packed ternary weights, by counting bits."""
    overhead: float = 8e-6
    """Seconds that an event product takes beside its reads: to list the active sources and to call the gather."""


DEFAULT_RATES = Rates()


def cheaper_product(
    rows: int, sources: int, targets: int, active: int, itemsize: int = 4, rates: Rates = DEFAULT_RATES
) -> Literal["dense", "event"]:
    """Return which product costs less, ``(rows, sources) x (sources, targets)`` with ``active`` nonzero inputs.

    Dense: ``2 rows sources targets`` operations at the rate of a GEMM, but never less than reading all weights once.
    Event: ``active`` rows of weights at the rate of a gather, and its overhead. ``itemsize`` is in bytes per weight.
    Being wrong by half costs little, because the two differ little where the choice turns.
    """
    weights = sources * targets * itemsize
    stream_rate = rates.cached if weights <= rates.cache else rates.stream
    dense = max(2 * rows * sources * targets / rates.gemm, weights / stream_rate)
    event = active * targets * itemsize / rates.gather + rates.overhead
    return "event" if event < dense else "dense"


def form_costs(sources: int, targets: int, active: float, rates: Rates) -> dict[str, float]:
    """Return the seconds that a product of one row takes, by how its weights lie; ``active`` sources are not silent."""
    weights, read = sources * targets, active * targets
    return {
        "rows": 4 * weights / rates.stream,
        "sources": 4 * read / rates.gather + rates.overhead,
        "int8 rows": weights / rates.int8_stream,
        "int8 sources": read / rates.int8_gather + rates.overhead,
        "packed": weights / 4 / rates.packed,
    }


def cheaper_form(sources: int, targets: int, active: float, forms: Sequence[str], rates: Rates) -> str:
    """Return the form of least cost among ``forms``, the first of them when it is a draw."""
    costs = form_costs(sources, targets, active, rates)
    return min(forms, key=costs.__getitem__)


@lru_cache(maxsize=2)
def rates(compiled: bool = False) -> Rates:
    """Return the rates of this machine, of torch's products or compiled ones, measured once per process.

    It takes some milliseconds.

    ``SPIKING_LM_RATES=default`` takes the built-in ones, and ``="gather=2e10,stream=3e10"`` sets some of them: what is
    chosen by them is then the same in every process. Raises: UsageError for what it does not understand.
    """
    setting = os.environ.get(ENVIRONMENT, "")
    if setting == "default":
        return DEFAULT_RATES
    if setting:
        return replace(DEFAULT_RATES, **_parse(setting))
    return replace(DEFAULT_RATES, **(_measured_compiled() if compiled else _measured()))


def _parse(setting: str) -> dict[str, float]:
    known = {field.name for field in fields(Rates)}
    found = {}
    for part in setting.split(","):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found = {}
        if not found or not known >= set(found) or min(found.values()) <= 0:
            raise UsageError(
                f"environment variable {ENVIRONMENT}: cannot read {part!r}",
                hint=f"write 'default' or for example 'gather=2e10,stream=3e10'; rates are {', '.join(sorted(known))}",
            )
    return found


_SIDE, _COPIES = 512, 8
"""Matrices that are measured: 1 MiB of floats each, and 8 MiB of them, more than a core's own caches hold."""


def _measured() -> dict[str, float]:
    """Time torch's products on matrices that are not in the core's own caches."""
    weights = torch.ones(_COPIES, _SIDE, _SIDE)
    x, total = torch.ones(_SIDE), weights.numel() * 4
    half, nothing = x * (torch.arange(_SIDE) % 2), torch.zeros(_SIDE)
    stream = _seconds([partial(torch.mv, w, x) for w in weights])
    gather = _seconds([partial(event_linear, half[None], w) for w in weights])
    none = _seconds([partial(event_linear, nothing[None], w) for w in weights])
    read = max(gather - none, gather / 4)  # a machine that is busy could make the difference nothing
    return {"stream": total / stream, "gather": total / 2 / read, "overhead": none / _COPIES}


def _measured_compiled() -> dict[str, float]:
    """Time the compiled products on matrices that are not in the core's own caches."""
    from spiking_lm.kernels import jit_linear

    jit: Any = jit_linear
    weights = torch.ones(_COPIES, _SIDE, _SIDE)
    codes = weights.view(torch.int8).view(-1, _SIDE, _SIDE)
    planes = codes.view(-1, _SIDE * _SIDE // 4)
    x, total = torch.ones(_SIDE), weights.numel() * 4
    half = (x * (torch.arange(_SIDE) % 2)).numpy()
    y, active = torch.empty(_SIDE).numpy(), torch.empty(_SIDE + 1, dtype=torch.int64).numpy()
    words = torch.ones(1, _SIDE // 32, dtype=torch.int32).numpy()

    def seconds(matrices: Tensor, kernel: Callable[..., object], *args: object) -> float:
        return _seconds([partial(kernel, m.data_ptr(), *args) for m in matrices])

    return {
        "stream": total / seconds(weights, jit.rows_float, x.numpy(), y),
        "gather": total / 2 / seconds(weights, jit.sources_float, half, y, active),
        "int8_stream": total / seconds(codes, jit.rows_int8, x.numpy(), y),
        "int8_gather": total / 2 / seconds(codes, jit.sources_int8, half, y, active),
        "packed": total / seconds(planes, jit.packed, words, y),
        "overhead": seconds(weights, jit.sources_float, 0 * half, y, active) / _COPIES,
    }


def _seconds(jobs: Sequence[Callable[[], object]]) -> float:
    """Return the least time that all jobs took in three rounds; one beforehand is not counted."""
    least = float("inf")
    for round_ in range(4):
        start = time.perf_counter()
        for job in jobs:
            job()
        if round_:
            least = min(least, time.perf_counter() - start)
    return least


def event_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (B, N) @ weight_t (N, M) + bias`` from the rows of ``weight_t`` whose source is not zero.

    Equal to the dense product up to rounding; a row of ``x`` without any event gives the bias. No gradient is recorded.
    """
    with torch.no_grad():
        return _gather(x, x.nonzero(), weight_t, bias)


def product(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x (B, N) @ weight_t (N, M) + bias`` by whichever product is cheaper for these values, without gradients.

    On devices other than the CPU, and in half precision, it is the dense one. For one row the measured rates decide.
    """
    with torch.no_grad():
        return _cheaper(x, weight_t, bias, rates() if len(x) == 1 else DEFAULT_RATES)


def linear(x: Tensor, weight_t: Tensor, bias: Tensor) -> Tensor:
    """Return ``x (B, N) @ weight_t (N, M) + bias`` by whichever product is cheaper for these values.

    Where gradients are recorded, on devices other than the CPU, and in half precision it is the dense one. One row
    always goes by events where those are compiled. Else it is the built-in rates that decide: what models compute does
    not depend on a measurement.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight_t.requires_grad or bias.requires_grad):
        return products.linear(x, weight_t, bias)
    plain = len(x) == 1 and not traced() and not torch.is_autocast_enabled("cpu")
    if plain and compiled_linear.supports_spike_linear(x, weight_t, bias) is True:
        y: Tensor = call("spike_linear", x.detach(), weight_t, bias)
        return y
    return _cheaper(x, weight_t, bias, DEFAULT_RATES)


def _cheaper(x: Tensor, weight_t: Tensor, bias: Tensor | None, rates: Rates) -> Tensor:
    rows, (sources, targets), size = x.shape[0], weight_t.shape, weight_t.element_size()
    if (
        not traced()  # what is cheaper for some values is not part of a graph
        and size >= 4
        and x.dtype == weight_t.dtype
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and cheaper_product(rows, sources, targets, 0, size, rates) == "event"  # else it is not worth looking
    ):
        active = x.nonzero()
        if cheaper_product(rows, sources, targets, active.shape[0], size, rates) == "event":
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
