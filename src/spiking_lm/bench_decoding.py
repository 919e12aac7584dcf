"""Timings of decoding: one stream, one token at a time, in one thread, against what memory allows.

Weights are cold wherever a token would find them cold: the matrices of a token are more than the caches hold, and each
is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spiking_lm.bench import Job, Row, interleaved
from spiking_lm.bench_training import spikegpt
from spiking_lm.decoding import Decoder, prepare
from spiking_lm.kernels import int8_linear, pack_spikes, pack_ternary, packed_linear, spike_linear, ternary_linear
from spiking_lm.kernels.compiled import missing
from spiking_lm.kernels.decode_plan import Instruction, Matrix, Places, Plan
from spiking_lm.kernels.decode_run import Compiled

TOKENS = 12
"""Tokens per turn of a job."""

_NO_COMPILER = "decoding at the pace of memory is compiled: pip install 'spiking-lm[cpu]'"


def _generating(decoder: Decoder, tokens: int = TOKENS) -> Job:
    """Return a job that goes on by the likeliest tokens; the text is as long as the turns make it."""
    token = 1
    for _ in range(24):  # forms of matrices are chosen in here
        token = int(decoder.feed(token).argmax())

    def job() -> None:
        nonlocal token
        for _ in range(tokens):
            token = int(decoder.feed(token).argmax())

    return job


def _reading(bytes_: int, times: int = TOKENS) -> dict[str, Job]:
    """Return jobs that read as many bytes from end to end as often as that, by torch's sum and by compiled code."""
    memory = torch.ones(-(-bytes_ // 4 // 4096), 4096)
    from spiking_lm.kernels import jit_linear

    jit: Any = jit_linear
    x, y = torch.ones(4096).numpy(), torch.empty(len(memory)).numpy()

    def summing() -> None:
        for _ in range(times):
            memory.sum()

    def multiplying() -> None:
        for _ in range(times):
            jit.rows_float(memory.data_ptr(), x, y)

    return {"sum": summing, "one long matrix": multiplying}


def decode_spikegpt(repeats: int, *, n_layer: int = 12, n_embd: int = 512, vocab_size: int = 5458) -> list[Row]:
    """Decode greedily with SpikeGPT in float32 and int8, against reading all of its matrices once per token."""
    what = f"SpikeGPT {n_layer}x{n_embd}, V {vocab_size}, cached generation"
    reason = missing()
    if reason is not None:
        return [Row("decode/spikegpt", what, None, note=f"{_NO_COMPILER} ({reason})")]
    model = spikegpt(n_layer, n_embd, vocab_size).eval()
    weights = prepare(model).bytes_per_token()
    decoders = {"float32": prepare(model), "int8": prepare(model, weights="int8")}
    by_torch, state = prepare(model, engine="torch"), model.init_state(1)

    def stepping() -> None:
        nonlocal state
        with torch.no_grad():
            for _ in range(TOKENS):
                _, state = model.step(torch.tensor([1]), state)

    jobs = {name: _generating(decoder) for name, decoder in decoders.items()}
    jobs |= {"torch": _generating(by_torch), "model.step": stepping, **_reading(weights)}
    times = interleaved(jobs, repeats)
    found = times.ms()
    rates = {name: 1e3 * TOKENS / ms for name, ms in found.items()}
    limit = max(rates.pop("sum"), rates.pop("one long matrix"))
    details = {
        **times.to_dict(),
        "tokens_per_s": rates,
        "limit_tokens_per_s": limit,
        "bandwidth": limit * weights,
        "bytes": weights,
        "forms": {name: decoder.forms() for name, decoder in decoders.items()},
    }
    bound = f"{weights / 1e6:.0f} MB of matrices at {limit * weights / 1e9:.1f} GB/s are {limit:.0f} tokens/s"
    return [
        Row(
            "decode/spikegpt-fp32",
            f"{what}, float32, over the limit of reading its matrices",
            100 * rates["float32"] / limit,
            unit="%",
            target=75,
            note=f"{rates['float32']:.0f} tokens/s; {bound}; torch alone {rates['torch']:.0f}, model.step "
            f"{rates['model.step']:.0f}",
            details=details,
        ),
        Row(
            "decode/spikegpt-int8",
            f"{what}, int8 over float32",
            rates["int8"] / rates["float32"],
            target=2.5,
            note=f"{rates['int8']:.0f} over {rates['float32']:.0f} tokens/s",
            details=details,
        ),
    ]


def _matrices(side: int, layers: int, head: int) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the matrices of a SpikeGPT."""
    blocks = [(side, side)] * 4 + [(side, 4 * side), (side, side), (4 * side, side)]
    return [*blocks * layers, (side, head)]


def _plan(weights: list[Tensor], inputs: dict[int, Tensor], by_source: bool) -> Plan:
    """Return a plan of nothing but products, each with a matrix and an input of its own."""
    places = Places()
    steps = []
    for weight in weights:
        matrix = Matrix(weight, by_source, int8=False)
        n_out, n_in = matrix.sizes
        steps.append((matrix, places.holding(inputs[n_in]), places.new(n_out)))
    block = places.block()
    instructions = [Instruction("linear", block[out], (block[x],), matrix=matrix) for matrix, x, out in steps]
    return Plan(block, instructions, instructions[-1].out, {}, 0)


def decode_events(repeats: int, *, activity: float = 0.1, side: int = 512, layers: int = 12) -> Row:
    """Do all products of a token as decoding does them, from rows of active sources, and densely."""
    generator = torch.Generator().manual_seed(0)
    sizes = _matrices(side, layers, 5458)
    by_source = [torch.randn(k, n, generator=generator) / k**0.5 for k, n in sizes]
    by_row = [w.t().contiguous() for w in by_source]
    inputs = {
        k: torch.randn(k, generator=generator) * (torch.rand(k, generator=generator) < activity)
        for k in sorted({k for k, _ in sizes})
    }

    def each(run: Callable[[Tensor, Tensor], Any], matrices: list[Tensor], side_of_input: int) -> Job:
        def job() -> None:
            with torch.no_grad():
                for matrix in matrices:
                    run(inputs[matrix.shape[side_of_input]], matrix)

        return job

    jobs = {
        "events, op by op": each(spike_linear, by_source, 0),
        "dense, torch.mv": each(lambda x, w: torch.mv(w, x), by_row, 1),
        "dense, F.linear": each(lambda x, w: torch.nn.functional.linear(x[None], w), by_row, 1),
    }
    if missing() is None:
        jobs["events, decoding"] = partial(Compiled(_plan(by_source, inputs, True)), 0)
        jobs["dense, decoding"] = partial(Compiled(_plan(by_row, inputs, False)), 0)
    times = interleaved(jobs, repeats)
    found = times.ms()
    events, dense = (min((n for n in found if n.startswith(kind)), key=found.__getitem__) for kind in ("ev", "de"))
    return Row(
        "decode/events",
        f"products of one token, {len(sizes)} cold matrices, {activity:.0%} of sources active: events against dense",
        found[dense] / found[events],
        target=3,
        note=", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items()),
        details=times.to_dict(),
    )


def packed_ternary(repeats: int, *, side: int = 512, copies: int = 120) -> list[Row]:
    """Multiply with ternary matrices, more than caches hold as floats: packed, as int8, and dense in float32."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (copies, side, side), generator=generator)
    floats, int8 = codes.float(), codes.to(torch.int8)
    planes = [pack_ternary(c) for c in int8]
    scale = torch.rand(side, generator=generator)
    spikes = (torch.rand(side, generator=generator) < 0.2).float()
    x = torch.randn(side, generator=generator)

    def each(run: Callable[[Tensor], Any], matrices: Any) -> Job:
        def job() -> None:
            with torch.no_grad():
                for matrix in matrices:
                    run(matrix)

        return job

    words = pack_spikes(spikes)
    jobs = {
        "packed, spikes": each(lambda m: packed_linear(words, m, scale), planes),
        "packed, real": each(lambda m: ternary_linear(x, m, scale), planes),
        "dense, int8": each(lambda m: int8_linear(x, m, scale), int8),
        "dense, torch.mv": each(lambda m: torch.mv(m, x), floats),
    }
    if missing() is None:  # kernels alone, as within a plan
        from spiking_lm.kernels import jit_linear

        jit: Any = jit_linear
        y, row, bits, w = torch.empty(side).numpy(), x.numpy(), words.numpy(), words.shape[1]
        jobs["packed kernel, spikes"] = each(lambda m: jit.packed(m.data_ptr(), bits, y), planes)
        jobs["packed kernel, real"] = each(lambda m: jit.ternary(m.data_ptr(), w, row.ctypes.data, y), planes)
        jobs["dense kernel"] = each(lambda m: jit.rows_float(m.data_ptr(), row, y), floats)
    times = interleaved(jobs, repeats)
    found = {name: 1e3 * ms / copies for name, ms in times.ms().items()}
    dense = min((name for name in ("dense, torch.mv", "dense kernel") if name in found), key=found.__getitem__)
    note = ", ".join(f"{name} {us:.1f} us" for name, us in found.items())
    return [
        Row(
            f"decode/ternary-{kind}",
            f"ternary {side} x {side} by {kind}, packed, against dense float32",
            found[dense] / min(us for name, us in found.items() if name.startswith("packed") and kind[:4] in name),
            target=target,
            note=note,
            details=times.to_dict(),
        )
        for kind, target in (("spikes", 3.0), ("reals", None))
    ]
