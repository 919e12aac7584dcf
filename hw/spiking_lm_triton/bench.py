"""Measurements on a GPU: each kernel against torch's form of the same op on the same device, and against its memory.

They are what replaces the predictions of :mod:`spiking_lm_triton.roofline`, at the same sizes. Work is repeated on
copies of its data that no cache holds together, and recorded in a CUDA graph, so that Python's share is left out; where
it cannot be recorded, calls are timed as Python makes them, and the row says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spiking_lm import kernels
from spiking_lm.bench import Row
from spiking_lm.errors import KernelUnavailableError
from spiking_lm.gif import gif_quantize
from spiking_lm.schemes import ActivationScheme
from spiking_lm_triton.machine import available, interpreted
from spiking_lm_triton.roofline import CASES, MACHINES, Case

Job = Callable[[], Any]

COLD = 1 << 28
"""Bytes of data that a round goes through: more than the caches of any GPU hold."""


@dataclass(frozen=True)
class Trial:
    """A call in both forms on data of its own."""

    triton: Job
    torch: Job


def _trained(op: str, call: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> Trial:
    leaves = [t.requires_grad_() for t in inputs]

    def run(implementation: str) -> None:
        with kernels.use(**{op: implementation}):
            output = call(*leaves)[0]
        torch.autograd.grad(output, leaves, output.detach())

    return Trial(partial(run, "triton"), partial(run, "torch"))


def _asked(op: str, *args: Any) -> Trial:
    function = getattr(kernels, op)

    def run(implementation: str) -> None:
        with torch.no_grad(), kernels.use(**{op: implementation}):
            function(*args)

    return Trial(partial(run, "triton"), partial(run, "torch"))


def trial(case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> Trial:
    """Return the call of a case on random data; EGRU is measured in float32, as it keeps its state."""
    sizes, normal = case.sizes, partial(torch.randn, device=device)
    if case.op == "lif_scan":
        options: dict[str, Any] = {"beta": 0.5, "gain": 0.5, "threshold": 1.0, "final_only": True}
        return _trained(case.op, lambda x: kernels.lif_scan(x, **options), [2 * normal(sizes, dtype=dtype)])
    if case.op == "wkv":
        decay, first = torch.linspace(-5, 3, sizes[2], device=device), normal(sizes[2])
        pair = [normal(sizes, dtype=dtype) for _ in range(2)]
        return _trained(case.op, lambda *t: (kernels.wkv(*t)[0],), [decay, first, *pair])
    if case.op == "egru_scan":
        n_steps, batch, hidden = sizes
        inputs = [normal(n_steps, batch, 3 * hidden), normal(hidden, 3 * hidden) / hidden**0.5, normal(3 * hidden)]
        inputs.append(normal(hidden).abs() / 10)
        return _trained(case.op, lambda *t: kernels.egru_scan(*t, gamma=0.7, epsilon=1.0), inputs)
    scheme = ActivationScheme(bits=4)
    if case.op == "gif_linear":
        return _quantising(normal(sizes, dtype=dtype), scheme)
    rows, sources, targets, *more = sizes
    x, bias = normal(rows, sources, dtype=dtype), normal(targets, dtype=dtype)
    if case.op == "spike_linear":
        active = torch.rand(rows, sources, device=device) < more[0] / 100
        return _asked(case.op, x * active, normal(sources, targets, dtype=dtype), bias)
    codes, scale = torch.randint(-127, 128, (targets, sources), dtype=torch.int8, device=device), normal(targets).abs()
    if case.op == "int8_linear":
        return _asked(case.op, x, codes, scale, bias)
    if case.op == "gif_int8_linear":
        return _on_codes(x, codes, scale, scheme)
    planes = kernels.pack_ternary(codes.sign())
    if case.op == "ternary_linear":
        return _asked(case.op, x, planes, scale, bias)
    return _asked(case.op, kernels.pack_spikes((x > 1).to(dtype), more[0]), planes, scale, bias.float())


def _quantising(x: Tensor, scheme: ActivationScheme) -> Trial:
    from spiking_lm_triton.gif import _quantize

    top = 2**scheme.bits - 1
    return Trial(lambda: _quantize(x, None, None, top, top), lambda: gif_quantize(x, scheme))


def _on_codes(x: Tensor, codes: Tensor, scale: Tensor, scheme: ActivationScheme) -> Trial:
    """Torch has no product for these: it multiplies quantised values with the weights written out, in their type."""
    from spiking_lm_triton.gif import gif_int8_linear

    weight = (codes * scale[:, None]).to(x.dtype)
    return Trial(
        lambda: gif_int8_linear(x, codes, scale, None, scheme), lambda: F.linear(gif_quantize(x, scheme), weight)
    )


def _seconds(job: Job, repeats: int) -> list[float]:
    """Return the seconds of ``job`` on the GPU, or while it is interpreted, by the clock."""
    job()
    found = []
    for _ in range(repeats):
        if interpreted():
            begin = time.perf_counter()
            job()
            found.append(time.perf_counter() - begin)
            continue
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin_event.record()
        job()
        end_event.record()
        end_event.synchronize()
        found.append(begin_event.elapsed_time(end_event) / 1e3)
    return found


def _recorded(job: Job) -> Job | None:
    """Return ``job`` as a CUDA graph, None where it does something that cannot be recorded."""
    if interpreted():
        return None
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            job()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            job()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


@lru_cache(maxsize=1)
def copy_rate(size: int = COLD) -> float:
    """Return the bytes per second that a copy on this device reads and writes: what memory really gives."""
    source = torch.empty(size, dtype=torch.uint8, device="cpu" if interpreted() else "cuda")
    target = torch.empty_like(source)
    return 2 * size / statistics.median(_seconds(lambda: target.copy_(source), 5))


def measure(case: Case, repeats: int, *, cold: int = COLD, dtype: torch.dtype = torch.bfloat16) -> Row:
    """Measure a case and return how many times as fast as torch's form the kernel is.

    Details hold the times of both, bytes per second, their share of what a copy reaches, and the prediction.
    Raises: KernelUnavailableError when there is no GPU that the kernels run on.
    """
    answer = available()
    if answer is not True:
        raise KernelUnavailableError(f"Triton kernels cannot be measured here: {answer}")
    device = "cpu" if interpreted() else "cuda"
    copies = max(1, min(64, cold // max(case.work.bytes, 1)))
    trials = [trial(case, device, dtype) for _ in range(copies)]
    found: dict[str, float] = {}
    clocks: dict[str, str] = {}
    for form in ("triton", "torch"):
        jobs = [getattr(one, form) for one in trials]

        def round_(jobs: list[Job] = jobs) -> None:
            for job in jobs:
                job()

        graph = _recorded(round_)
        clocks[form] = "CUDA graph" if graph else "interpreter" if interpreted() else "calls from Python"
        found[form] = statistics.median(_seconds(graph or round_, repeats)) / copies
    name = "the interpreter" if interpreted() else torch.cuda.get_device_name()
    rate, whole = case.work.bytes / found["triton"], copy_rate()
    known = next((m for m in MACHINES if m.name in name), None)
    predicted = None if known is None else case.work.predicted(known)
    note = (
        f"{1e6 * found['triton']:.0f} µs, torch {1e6 * found['torch']:.0f} µs; {rate / 1e9:.0f} GB/s, "
        f"{100 * rate / whole:.0f} % of a copy"
    )
    if predicted is not None and known is not None:
        note += f"; predicted for {known.name}: {1e6 * predicted:.0f} µs"
    slow = [form for form, clock in clocks.items() if clock == "calls from Python"]
    if slow:
        note += f"; {' and '.join(slow)} with Python's share"
    return Row(
        case.name,
        f"{case.op} {case.what}",
        found["torch"] / found["triton"],
        note=note,
        details={
            "seconds": found, "timed": clocks, "bytes": case.work.bytes, "operations": case.work.operations,
            "bytes_per_s": rate, "copy_bytes_per_s": whole, "predicted_s": predicted, "device": name,
            "copies": copies,
        },
    )  # fmt: skip


def _of(op: str, repeats: int) -> list[Row]:
    return [measure(one, repeats) for one in CASES if one.op == op]


lif_scan = partial(_of, "lif_scan")
wkv = partial(_of, "wkv")
egru_scan = partial(_of, "egru_scan")
spike_linear = partial(_of, "spike_linear")
packed_linear = partial(_of, "packed_linear")
ternary_linear = partial(_of, "ternary_linear")
int8_linear = partial(_of, "int8_linear")
gif_linear = partial(_of, "gif_linear")
gif_int8_linear = partial(_of, "gif_int8_linear")
