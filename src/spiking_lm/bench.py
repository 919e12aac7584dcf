"""Benchmarks: the core's timings of kernels and of SpikeGPT, and a way to run those that plugins register.

A timing is always against something else measured in the same run.

Machines differ and are shared, so every figure is a ratio: the candidates of a row take turns, and the medians of their
times are divided. With one thread these are processor times, which other processes do not stretch; with more, times by
the wall clock. Both are kept beside the ratio, for information.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spiking_lm import registry
from spiking_lm.errors import MissingExtraError, PluginError, UnknownNameError
from spiking_lm.kernels import explain_choice, lif_scan, wkv
from spiking_lm.provenance import describe

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


class Times:
    """Milliseconds per job, one entry per turn, by the wall clock and by the processor time of this process."""

    def __init__(self, jobs: Iterable[str]) -> None:
        self.wall: dict[str, list[float]] = {name: [] for name in jobs}
        self.cpu: dict[str, list[float]] = {name: [] for name in self.wall}
        self.by_cpu = torch.get_num_threads() == 1

    def ms(self) -> dict[str, float]:
        """Return the median of each job: processor time for one thread, which other processes cannot stretch."""
        return {name: statistics.median(times) for name, times in (self.cpu if self.by_cpu else self.wall).items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the medians and minima of both clocks, and which one counted."""
        return {
            "clock": "processor time" if self.by_cpu else "wall clock",
            "ms": self.ms(),
            "wall_ms": {name: statistics.median(times) for name, times in self.wall.items()},
            "min_wall_ms": {name: min(times) for name, times in self.wall.items()},
            "min_cpu_ms": {name: min(times) for name, times in self.cpu.items()},
        }


def interleaved(jobs: Mapping[str, Job], repeats: int) -> Times:
    """Run the jobs in turns and time them; one round beforehand is not counted."""
    times = Times(jobs)
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            job()
            if turn > 0:
                times.wall[name].append(1e3 * (time.perf_counter() - wall))
                times.cpu[name].append(1e3 * (time.process_time() - cpu))
    return times


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


Targets = Mapping[str, float]
"""By implementation of an op, e.g. ``"numba"``, how many times as fast as its peer it should be."""


def chosen_for(op: str, *args: Any, **options: Any) -> str:
    """Return the implementation that runs this call."""
    return next(name for name, answer in explain_choice(op, *args, **options) if answer is True)


def bench_lif(shape: tuple[int, int, int], targets: Targets, repeats: int) -> Row:
    """Time a forward and backward pass of ``lif_scan`` on ``(T, B, N)`` against the fastest peer."""
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=generator)).requires_grad_()
    gradient = torch.randn(shape, generator=generator)

    neurons: dict[str, Any] = {"beta": 0.5, "gain": 0.5, "threshold": 1.0, "final_only": True}
    chosen = chosen_for("lif_scan", x, **neurons)
    target = targets.get(chosen)

    def ours(x: Tensor) -> Tensor:
        return lif_scan(x, **neurons)[0]

    def forward_backward(run: SpikingPeer) -> Any:
        return torch.autograd.grad(run(x), x, gradient)

    peers, remarks = _lif_peers()
    times = interleaved(
        {name: partial(forward_backward, run) for name, run in {"lif_scan": ours, **peers}.items()}, repeats
    )
    found = times.ms()
    name = "lif/" + "x".join(map(str, shape))
    what = f"LIF forward + backward {shape} (T, B, N)"
    details = {**times.to_dict(), "peers": remarks, "implementation": chosen}
    if not peers:
        return Row(name, what, None, target=target, note="no peer is installed: pip install snntorch", details=details)
    best = min(peers, key=found.__getitem__)
    absent = [peer for peer, remark in remarks.items() if peer not in peers]
    note = f"against {best} ({found[best]:.1f} ms; ours, {chosen}, {found['lif_scan']:.1f} ms)"
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


def bench_wkv(shape: tuple[int, int, int], targets: Targets, repeats: int) -> Row:
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
    found, chosen = times.ms(), chosen_for("wkv", *inputs)
    loop, ours = found["unbind loop"], found["wkv"]
    return Row(
        "wkv/" + "x".join(map(str, shape)),
        f"WKV forward + backward {shape} (B, T, C)",
        loop / ours,
        target=targets.get(chosen),
        note=f"against an unbind loop under autograd ({loop:.1f} ms; ours, {chosen}, {ours:.1f} ms)",
        details={**times.to_dict(), "implementation": chosen},
    )


# -- SpikeGPT ----------------------------------------------------------------------------------------------------------


def bench_generation(
    repeats: int, *, n_layer: int = 4, n_embd: int = 128, vocab_size: int = 256, new_tokens: int = 512
) -> Row:
    """Generate greedily from a carried state, and again by recomputing the whole prefix for each token.

    One turn of each, whatever ``repeats``: they are long.
    """
    from spiking_lm.bench_training import spikegpt

    model = spikegpt(n_layer, n_embd, vocab_size).eval()
    prompt = torch.arange(32, 64)[None]
    written: dict[str, list[int]] = {}

    def cached() -> None:
        output = model(prompt)
        token, state = output.logits[:, -1].argmax(-1), output.state
        tokens = [int(token)]
        while len(tokens) < new_tokens:
            logits, state = model.step(token, state)
            token = logits.argmax(-1)
            tokens.append(int(token))
        written["cached"] = tokens

    def recomputed() -> None:
        text = prompt
        while text.shape[1] < prompt.shape[1] + new_tokens:
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        written["recomputed"] = text[0, prompt.shape[1] :].tolist()

    with torch.no_grad():
        times = interleaved({"cached": cached, "recomputed": recomputed}, 1)
    found = times.ms()
    rates = {name: 1e3 * new_tokens / ms for name, ms in found.items()}
    identical = written["cached"] == written["recomputed"]
    return Row(
        "spikegpt/generate",
        f"SpikeGPT {n_layer}x{n_embd}: {new_tokens} tokens from a carried state against recomputing the prefix",
        found["recomputed"] / found["cached"] if identical else None,
        note=f"tokens {'identical' if identical else 'DIFFER'}; {rates['cached']:.0f} tokens/s against "
        f"{rates['recomputed']:.0f}",
        details={**times.to_dict(), "identical": identical, "tokens": written, "tokens_per_s": rates},
    )


def bench_constant_time(
    repeats: int, *, n_layer: int = 12, n_embd: int = 512, vocab_size: int = 5458, near: int = 64, far: int = 8192
) -> Row:
    """Time single steps of SpikeGPT at position ``far`` against position ``near``, the state being truly that old."""
    steps, piece = 16, 512
    from spiking_lm.bench_training import spikegpt

    model = spikegpt(n_layer, n_embd, vocab_size).eval()
    text = torch.randint(vocab_size, (1, far), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = model(text[:, :near]).state
        states = {near: state}
        for start in range(near, far, piece):
            state = model(text[:, start : start + piece], state).state
        states[far] = state

        def walk(position: int) -> None:
            state = states[position]
            for token in text[0, :steps]:
                _, state = model.step(token[None], state)

        times = interleaved({f"position {at}": partial(walk, at) for at in (near, far)}, 2 * repeats)
    first, last = (ms / steps for ms in times.ms().values())
    return Row(
        "spikegpt/constant-time",
        f"SpikeGPT {n_layer}x{n_embd}: time per token at position {far} over position {near}",
        last / first,
        target=1.1,
        at_most=True,
        note=f"{last:.1f} ms against {first:.1f} ms per token",
        details={**times.to_dict(), "steps": steps},
    )


# -- all of them -------------------------------------------------------------------------------------------------------

lif_stream = partial(bench_lif, (1024, 1, 2048), {"torch": 5.0, "numba": 15.0})
lif_batch = partial(bench_lif, (128, 32, 512), {"torch": 1.8, "numba": 4.0})
wkv_stream = partial(bench_wkv, (1, 1024, 512), {"torch": 10.0, "numba": 20.0})


def available() -> list[str]:
    """Return every registered benchmark in the order of registration: the core's first, then plugin by plugin."""
    return [name for plugin in registry.plugins() for name in plugin.provides.get("benchmarks", ())]


def select(wanted: Sequence[str], device: str = "cpu") -> list[str]:
    """Return the benchmarks of a device whose name is, or begins with, one of ``wanted``; all but large ones for none.

    Raises: UnknownNameError for a name that fits none.
    """
    known = [row for row in available() if registry.get("benchmarks", row).spec.device == device]
    chosen: set[str] = set()
    for name in wanted:
        fitting = [row for row in known if row == name or row.startswith(f"{name.rstrip('/')}/")]
        if not fitting:
            raise UnknownNameError("benchmark", name, [*known, *{row.partition("/")[0] for row in known}])
        chosen.update(fitting)
    if not wanted:
        chosen.update(row for row in known if not registry.get("benchmarks", row).spec.on_request)
    return [row for row in known if row in chosen]


def run(names: Sequence[str], *, n_threads: int = 1, repeats: int = 5) -> Iterator[list[Row]]:
    """Run the benchmarks one after the other; the rows of each are yielded when it is done."""
    with threads(n_threads):
        for name in names:
            yield measure(name, repeats)


def measure(name: str, repeats: int = 5) -> list[Row]:
    """Run one benchmark; where it cannot run or fails, its only row says why, and the others are not disturbed."""
    registered = registry.get("benchmarks", name)
    try:
        result = registered.load("function")(repeats)
        rows = result if isinstance(result, list) else [result]
        if not rows or not all(isinstance(row, Row) for row in rows):
            raise PluginError(f"it returned {result!r:.80}, not a spiking_lm.bench.Row or a list of rows")
    except MissingExtraError as err:
        note = str(err).replace("\n", ";")
    except Exception as err:  # whoever wrote it, the rest is still to be measured
        plugin = registered.plugin
        note = f"failed: {describe(err)} (plugin {plugin.name!r}, {plugin.origin})"
    else:
        return rows
    return [Row(name, registered.spec.summary or name, None, note=note)]


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
