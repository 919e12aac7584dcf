"""Timings of the kernels and of SpikeGPT, always against something else measured in the same run.

Machines differ and are shared, so every figure is a ratio: the candidates of a row take turns, and the medians of their
times are divided. Milliseconds are kept beside the ratio, for information.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm.errors import MissingExtraError, UnknownNameError
from spiking_lm.kernels import lif_scan, wkv

if TYPE_CHECKING:
    from spiking_lm.interfaces import SpikingLanguageModel

Job = Callable[[], Any]
SpikingPeer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, the value, what was aimed at, and how it came about."""

    name: str
    what: str
    value: float | None
    """None when it could not be measured; ``note`` says why."""
    unit: str = "x"
    target: float | None = None
    at_most: bool = False
    """The target is an upper bound rather than a lower one."""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether the target was met; None where there is none or nothing was measured."""
        if self.target is None or self.value is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form, ``passed`` included."""
        return {**vars(self), "passed": self.passed}


def interleaved(jobs: Mapping[str, Job], repeats: int) -> dict[str, list[float]]:
    """Run the jobs in turns and return their times in milliseconds; one round beforehand is not counted."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each list."""
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads, and put the former number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- leaky integrate-and-fire ------------------------------------------------------------------------------------------


def _snntorch() -> SpikingPeer:
    from snntorch import Leaky, SpikingNeuron, surrogate

    neuron = Leaky(
        beta=0.5, threshold=1.0, reset_mechanism="zero", reset_delay=False, spike_grad=surrogate.atan(alpha=2.0)
    )
    SpikingNeuron.instances.remove(neuron)  # the class would keep it, and reset it together with a user's own

    def run(x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[0]), []
        for x_t in (0.5 * x).unbind(0):
            s, v = neuron(x_t, v)
            spikes.append(s)
        return torch.stack(spikes)

    return run


def _norse() -> SpikingPeer:
    from norse.torch.functional.lif_box import LIFBoxFeedForwardState, LIFBoxParameters
    from norse.torch.module.lif_box import LIFBoxCell

    neuron = LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(500.0)), dt=0.001)  # dt / tau = 0.5

    def run(x: Tensor) -> Tensor:
        state, spikes = LIFBoxFeedForwardState(v=torch.zeros_like(x[0])), []
        for x_t in x.unbind(0):
            s, state = neuron(x_t, state)
            spikes.append(s)
        return torch.stack(spikes)

    return run


def _spikingjelly() -> SpikingPeer:
    from spikingjelly.activation_based import functional, neuron, surrogate

    lif = neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(alpha=2.0), step_mode="m")

    def run(x: Tensor) -> Tensor:
        functional.reset_net(lif)
        spikes: Tensor = lif(x)
        return spikes

    return run


LIF_PEERS: dict[str, tuple[str, Callable[[], SpikingPeer]]] = {
    "snntorch Leaky, unbind loop": ("snntorch", _snntorch),
    "norse LIFBoxCell, unbind loop": ("norse", _norse),
    "spikingjelly LIFNode, multi-step": ("spikingjelly", _spikingjelly),
}


def _lif_peers() -> tuple[dict[str, SpikingPeer], dict[str, str]]:
    """Return the peers that can run here, and for every peer its version or why it cannot."""
    peers, remarks = {}, {}
    for name, (package, build) in LIF_PEERS.items():
        if importlib.util.find_spec(package) is None:
            remarks[name] = "not installed"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peers use what torch has deprecated
                peers[name] = build()
            remarks[name] = importlib.metadata.version(package)
        except Exception as err:  # a peer that is broken here is no reason to stop
            remarks[name] = f"does not work here: {type(err).__name__}: {err}"
    return peers, remarks


def bench_lif(shape: tuple[int, int, int], target: float, repeats: int) -> Row:
    """Time a forward and backward pass of ``lif_scan`` on ``(T, B, N)`` against the fastest peer."""
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=generator)).requires_grad_()
    gradient = torch.randn(shape, generator=generator)

    def ours(x: Tensor) -> Tensor:
        return lif_scan(x, beta=0.5, gain=0.5, threshold=1.0, final_only=True)[0]

    def forward_backward(run: SpikingPeer) -> Any:
        return torch.autograd.grad(run(x), x, gradient)

    peers, remarks = _lif_peers()
    times = interleaved(
        {name: partial(forward_backward, run) for name, run in {"lif_scan": ours, **peers}.items()}, repeats
    )
    found = medians(times)
    name = "lif/" + "x".join(map(str, shape))
    what = f"LIF forward + backward {shape} (T, B, N)"
    details = {"ms": found, "min_ms": {key: min(values) for key, values in times.items()}, "peers": remarks}
    if not peers:
        return Row(name, what, None, target=target, note="no peer is installed: pip install snntorch", details=details)
    best = min(peers, key=found.__getitem__)
    absent = [peer for peer, remark in remarks.items() if peer not in peers]
    note = f"against {best} ({found[best]:.1f} ms; ours {found['lif_scan']:.1f} ms)"
    if absent:
        note += "; not compared: " + ", ".join(f"{peer} ({remarks[peer]})" for peer in absent)
    return Row(name, what, found[best] / found["lif_scan"], target=target, note=note, details=details)


# -- wkv ---------------------------------------------------------------------------------------------------------------


def wkv_loop(time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute ``wkv`` as it is usually written: step by step, unbound, with gradients by autograd."""
    w = -torch.exp(time_decay)
    p = q = k.new_zeros(k.shape[0], k.shape[2])
    o = torch.full_like(p, -1e38)
    outputs = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
        m = torch.maximum(o, time_first + k_t)
        past, now = torch.exp(o - m), torch.exp(time_first + k_t - m)
        outputs.append((past * p + now * v_t) / (past * q + now))
        m = torch.maximum(w + o, k_t)
        past, now = torch.exp(w + o - m), torch.exp(k_t - m)
        p, q, o = past * p + now * v_t, past * q + now, m
    return torch.stack(outputs, 1)


def bench_wkv(shape: tuple[int, int, int], target: float, repeats: int) -> Row:
    """Time a forward and backward pass of ``wkv`` on ``(B, T, C)`` against an unbind loop under autograd."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    decay = torch.linspace(-5, 3, shape[2]).requires_grad_()
    first = torch.randn(shape[2], generator=generator).requires_grad_()
    gradient = torch.randn(shape, generator=generator)
    inputs = (decay, first, k, v)

    def forward_backward(run: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(run(*inputs), inputs, gradient)

    times = interleaved(
        {
            "wkv": partial(forward_backward, lambda *args: wkv(*args)[0]),
            "unbind loop": partial(forward_backward, wkv_loop),
        },
        repeats,
    )
    found = medians(times)
    return Row(
        "wkv/" + "x".join(map(str, shape)),
        f"WKV forward + backward {shape} (B, T, C)",
        found["unbind loop"] / found["wkv"],
        target=target,
        note=f"against an unbind loop under autograd ({found['unbind loop']:.1f} ms; ours {found['wkv']:.1f} ms)",
        details={"ms": found, "min_ms": {key: min(values) for key, values in times.items()}},
    )


# -- SpikeGPT ----------------------------------------------------------------------------------------------------------


def _spikegpt(n_layer: int, n_embd: int, vocab_size: int, ctx_len: int = 1024) -> SpikingLanguageModel:
    from spiking_lm.models import create_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model("spikegpt", vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd, ctx_len=ctx_len)


def matrix_products(model: nn.Module, tokens: int, dtype: torch.dtype) -> Job:
    """Return a job that does the forward and backward products of the model's linear layers, and nothing else."""
    work = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            x = torch.randn(tokens, layer.in_features, dtype=dtype).requires_grad_()
            weight = layer.weight.detach().to(dtype).requires_grad_()
            work.append((x, weight, torch.randn(tokens, layer.out_features, dtype=dtype)))

    def job() -> None:
        for x, weight, gradient in work:
            torch.autograd.grad(F.linear(x, weight), (x, weight), gradient)

    return job


def bench_training(dtype: torch.dtype, target: float | None, repeats: int) -> Row:
    """Time SpikeGPT 12 x 512, V = 5458, T = 1024, B = 1, loss included, against its matrix products alone."""
    vocab_size, length = 5458, 1024
    model = _spikegpt(12, 512, vocab_size)
    text = torch.randint(vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(text[:, :-1]).logits
        torch.autograd.backward(F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten()))

    times = interleaved({"model": step, "products": matrix_products(model, length, dtype)}, repeats)
    found = medians(times)
    rates = {name: 1e3 * length / ms for name, ms in found.items()}
    label = "bf16 autocast" if dtype == torch.bfloat16 else "fp32"
    return Row(
        f"spikegpt/train-{'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        f"SpikeGPT 12x512, V 5458, T 1024, B 1: forward + backward, {label}",
        100 * rates["model"] / rates["products"],
        unit="%",
        target=target,
        note=f"{rates['model']:.0f} tokens/s; its matrix products alone {rates['products']:.0f} tokens/s",
        details={"ms": found, "tokens_per_s": rates},
    )


def bench_generation(repeats: int) -> Row:
    """Generate 512 tokens greedily from a carried state, and again by recomputing the whole prefix for each token."""
    new_tokens = 512
    model = _spikegpt(4, 128, 256).eval()
    prompt = torch.arange(32, 64)[None]

    def cached() -> list[int]:
        output = model(prompt)
        token, state = output.logits[:, -1].argmax(-1), output.state
        tokens = [int(token)]
        while len(tokens) < new_tokens:
            logits, state = model.step(token, state)
            token = logits.argmax(-1)
            tokens.append(int(token))
        return tokens

    def recomputed() -> list[int]:
        text = prompt
        while text.shape[1] < prompt.shape[1] + new_tokens:
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        return text[0, prompt.shape[1] :].tolist()

    with torch.no_grad():
        identical = cached() == recomputed()
        times = interleaved({"cached": cached, "recomputed": recomputed}, min(repeats, 2))
    found = medians(times)
    ratio = found["recomputed"] / found["cached"]
    return Row(
        "spikegpt/generate",
        "SpikeGPT 4x128: 512 tokens from a carried state against recomputing the prefix",
        ratio if identical else None,
        note=f"tokens {'identical' if identical else 'DIFFER'}; {1e3 * new_tokens / found['cached']:.0f} tokens/s "
        f"against {1e3 * new_tokens / found['recomputed']:.0f}",
        details={"ms": found, "identical": identical, "new_tokens": new_tokens},
    )


def bench_constant_time(repeats: int) -> Row:
    """Time single steps of SpikeGPT 12 x 512 at position 8192 against position 64."""
    near, far = 64, 8192
    model = _spikegpt(12, 512, 5458).eval()
    text = torch.randint(5458, (1, far), generator=torch.Generator().manual_seed(1))
    token = text[:, 0]
    with torch.no_grad():
        states, state = {}, None
        for start, stop in [(0, near), *((i, min(i + 512, far)) for i in range(near, far, 512))]:
            state = model(text[:, start:stop], state).state
            states[stop] = state
        steps = 16

        def walk(position: int) -> None:
            state = states[position]
            for _ in range(steps):
                _, state = model.step(token, state)

        jobs = {f"position {position}": partial(walk, position) for position in (near, far)}
        found = {name: ms / steps for name, ms in medians(interleaved(jobs, 2 * repeats)).items()}
    first, last = found[f"position {near}"], found[f"position {far}"]
    return Row(
        "spikegpt/constant-time",
        f"SpikeGPT 12x512: time per token at position {far} over position {near}",
        last / first,
        target=1.1,
        at_most=True,
        note=f"{last:.1f} ms against {first:.1f} ms per token",
        details={"ms_per_token": found},
    )


# -- all of them -------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[int], Row]] = {
    "lif/1024x1x2048": partial(bench_lif, (1024, 1, 2048), 5.0),
    "lif/128x32x512": partial(bench_lif, (128, 32, 512), 1.8),
    "wkv/1x1024x512": partial(bench_wkv, (1, 1024, 512), 10.0),
    "spikegpt/train-fp32": partial(bench_training, torch.float32, 60.0),
    "spikegpt/train-bf16": partial(bench_training, torch.bfloat16, None),
    "spikegpt/generate": bench_generation,
    "spikegpt/constant-time": bench_constant_time,
}


def select(wanted: Sequence[str]) -> list[str]:
    """Return the rows whose name is, or begins with, one of ``wanted`` (all when it is empty).

    Raises: UnknownNameError for a name that fits none.
    """
    chosen: set[str] = set()
    for name in wanted:
        fitting = [row for row in ROWS if row == name or row.startswith(f"{name.rstrip('/')}/")]
        if not fitting:
            raise UnknownNameError("benchmark", name, [*ROWS, *{row.partition("/")[0] for row in ROWS}])
        chosen.update(fitting)
    return [row for row in ROWS if not wanted or row in chosen]


def run(names: Sequence[str], *, n_threads: int = 1, repeats: int = 5) -> Iterator[Row]:
    """Measure the rows one after the other; each is yielded when it is done."""
    with threads(n_threads):
        for name in names:
            yield _measure(name, repeats)


def _measure(name: str, repeats: int) -> Row:
    try:
        return ROWS[name](repeats)
    except MissingExtraError as err:
        return Row(name, name, None, note=str(err).replace("\n", ";"))


def report(rows: Sequence[Row], *, n_threads: int, repeats: int) -> dict[str, Any]:
    """Return everything as plain data: the figures, the machine and its load, and the versions."""
    from spiking_lm.manifest import describe_environment

    environment = describe_environment()
    return {
        "threads": n_threads,
        "repeats": repeats,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "hardware": environment["hardware"],
        "versions": environment["versions"],
        "git": environment["git"],
        "rows": [row.to_dict() for row in rows],
    }
