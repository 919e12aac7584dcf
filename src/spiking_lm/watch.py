"""Hooks that watch what really flows through a model: the measuring half of :mod:`spiking_lm.accounting`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spiking_lm.errors import DataError, PluginError, UsageError
from spiking_lm.graph import LMGraph, Op, ValueKind, layer_pattern
from spiking_lm.interfaces import Neuron, SpikingLanguageModel

_TOKENS_PER_CALL = 1024
"""Rows are run in groups of so many tokens, to bound the memory that logits and spikes take."""

LARGEST_INTEGER = 255
"""A count that is still an event with a small payload; whole numbers beyond it are real values."""

RANK: dict[ValueKind, int] = {"binary": 0, "ternary": 1, "integer": 2, "graded": 3, "real": 3}
"""Each kind contains those of lower rank. ``graded`` promises zeros, which are measured, not a set of values."""

CONNECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase)
"""The layers whose synaptic operations NeuroBench counts."""


class Stream:
    """Tensors seen at one place: how many zeros, and the narrowest kind that holds every value."""

    def __init__(self) -> None:
        self.elements = 0
        self.zeros = 0
        self._rank = 0

    def add(self, x: Tensor) -> int:
        """Take in one tensor and return its rank: 0 binary, 1 ternary, 2 integer, 3 beyond."""
        self.elements += x.numel()
        self.zeros += x.numel() - int(torch.count_nonzero(x))
        rank = _rank(x)
        self._rank = max(self._rank, rank)
        return rank

    @property
    def kind(self) -> ValueKind | None:
        if not self.elements:
            return None
        narrow: tuple[ValueKind, ...] = ("binary", "ternary", "integer")
        if self._rank < len(narrow):
            return narrow[self._rank]
        return "graded" if 2 * self.zeros >= self.elements else "real"

    @property
    def share_of_zeros(self) -> float | None:
        return self.zeros / self.elements if self.elements else None


def multiplied(module: nn.Module) -> Any:
    """Return the matrix that a layer multiplies with, which need not be the one that it trains (``weights.py``)."""
    effective = getattr(module, "effective_weight", None)
    return effective() if callable(effective) else getattr(module, "weight", None)


def _rank(x: Tensor) -> int:
    if x.dtype == torch.bool:
        return 0
    if bool(((x == 0) | (x == 1)).all()):
        return 0
    if bool(((x == 0) | (x.abs() == 1)).all()):
        return 1
    whole = not x.is_floating_point() or bool((x == x.round()).all())
    return 2 if whole and bool((x.abs() <= LARGEST_INTEGER).all()) else 3


class LinearTap:
    """Counts the synaptic operations of one weight matrix from the inputs that arrive at its module."""

    def __init__(self, op: Op, weight: Tensor, module: nn.Module | None) -> None:
        self.op = op
        self.module = module
        self.weight = weight
        self.fan_out = torch.count_nonzero(weight, dim=0)  # non-zero weights that an input element meets
        self.input = Stream()
        self.calls = 0
        self.dense = self.effective_acs = self.effective_macs = self.accumulations = 0

    def add(self, x: Tensor) -> None:
        n_out, n_in = self.weight.shape
        if x.shape[-1] != n_in:
            raise PluginError(f"graph: op {self.op.name!r} has {n_in} inputs, but a tensor {tuple(x.shape)} arrived")
        flat = x.reshape(-1, n_in)
        rank = self.input.add(flat)
        # Sum over tokens and outputs of [x != 0][W != 0], without the matrix product: exact in 64-bit integers.
        effective = int((torch.count_nonzero(flat, dim=0) * self.fan_out).sum())
        if rank <= RANK["ternary"]:
            self.effective_acs += effective
        else:
            self.effective_macs += effective
        if rank <= RANK["integer"]:
            self.accumulations += int((flat.abs().sum(0, dtype=torch.float64).long() * self.fan_out).sum())
        self.dense += len(flat) * n_in * n_out
        self.calls += 1


class Watch:
    """Hooks on the modules that the graph names, and on the layers that NeuroBench would count."""

    def __init__(self, model: SpikingLanguageModel, graph: LMGraph) -> None:
        self.model, self._graph = model, graph
        self.linears: dict[str, LinearTap] = {}
        self.outputs: dict[str, Stream] = defaultdict(Stream)
        self.activations = Stream()
        """nn.ReLU and nn.Sigmoid modules, which NeuroBench counts among the activations."""
        self.membrane_updates = 0
        self.membranes: set[str] = set()
        self.notes: list[str] = []
        self._undeclared: set[str] = set()
        self._by_module: dict[str, list[Op]] = defaultdict(list)
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        for op in graph:
            if op.module is not None:
                self._by_module[op.module].append(op)
            if op.kind == "linear":
                self.linears[op.name] = LinearTap(op, self._matrix(op), self._holder(op))
        self._neurons = [op.name for op in graph if op.kind == "neuron"]

    def _matrix(self, op: Op) -> Tensor:
        weight: Any = None
        if op.module is not None:
            name = f"{op.module}.weight"
            weight = multiplied(self._module(op.module, op))
        else:
            role = "weight" if "weight" in op.parameters else "weight_t"
            name = op.parameters.get(role, "")
            if not name:
                raise PluginError(
                    f"graph: op {op.name!r} is linear but names no module", hint="set Op.module, or Op.parameters"
                )
            holder = self._holder(op)
            weight = self._parameters.get(name) if holder is None else multiplied(holder)
            if weight is None:  # stored in another form: the module says what it stands for
                owner, _, leaf = name.rpartition(".")
                weight = getattr(self._module(owner, op), leaf, None)
            if isinstance(weight, Tensor) and role == "weight_t":
                weight = weight.T
        if not isinstance(weight, Tensor) or op.weight is None or tuple(weight.shape) != tuple(op.weight):
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else "missing"
            raise PluginError(f"graph: op {op.name!r} declares the weight {op.weight}, but {name} is {shape}")
        return weight.detach()

    def _holder(self, op: Op) -> nn.Module | None:
        """Return the layer that holds a matrix: the op's module, or one of few levels that is named by its weight."""
        if op.module is not None:
            return self._module(op.module, op)
        owner, _, leaf = op.parameters.get("weight", "").rpartition(".")
        layer = self._module(owner, op) if leaf == "weight" else None
        return layer if hasattr(layer, "effective_weight") else None

    def _module(self, name: str, op: Op) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise PluginError(f"graph: op {op.name!r} names the module {name!r}, which does not exist") from None

    def hooks(self) -> Iterator[Any]:
        """Register every hook and give its handle."""
        for name, ops in self._by_module.items():
            # Operations that share a module take its calls in turn, as the model makes them.
            turns = cycle(ops)
            module = self._module(name, ops[0])
            yield module.register_forward_hook(partial(self._on_call, turns), with_kwargs=True)
        declared = {name for op in self._graph for name in op.parameters.values()}
        for name, module in self.model.named_modules():
            own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}
            if isinstance(module, CONNECTIONS) and name not in self._by_module and not own & declared:
                yield module.register_forward_hook(partial(self._on_undeclared, name))
            if isinstance(module, (nn.ReLU, nn.Sigmoid)):
                yield module.register_forward_hook(self._on_activation)

    def _on_call(
        self, turns: Iterator[Op], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        op = next(turns)
        emitted = output[0] if isinstance(output, tuple) else output
        if isinstance(emitted, Tensor):
            self.outputs[op.name].add(emitted)
        if op.kind == "linear":
            self.linears[op.name].add(args[0] if args else next(iter(kwargs.values())))
        if op.kind == "neuron" and isinstance(module, Neuron):
            updates = _membrane_updates(module, *args, **kwargs)
            if updates is not None:
                self.membrane_updates += updates
                self.membranes.add(op.name)

    def add_arrived(self, arrived: Mapping[str, Tensor]) -> None:
        """Count the operations of weight matrices that no ``nn.Linear`` holds, from what the model says they read."""
        for name, x in arrived.items():
            tap = self.linears.get(name)
            if tap is None or tap.op.module is not None:
                raise PluginError(
                    f"LMOutput.arrived: {name!r} is no linear op of the graph that goes without a module",
                    hint="name ops whose weight is given by Op.parameters",
                )
            tap.add(x)

    def _on_undeclared(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._undeclared.add(name)

    def _on_activation(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.activations.add(output)

    def check(self) -> None:
        """Raise where the graph leaves out what ran, or lists what did not."""
        if self._undeclared:
            raise PluginError(
                f"graph: it leaves out {', '.join(sorted(self._undeclared))}, which ran",
                hint="add an op of kind 'linear' that names the module",
            )
        idle = [tap.op for tap in self.linears.values() if not tap.calls]
        if idle:
            op = idle[0]
            raise PluginError(
                f"graph: op {op.name!r} names the module {op.module!r}, which was not called"
                if op.module is not None
                else f"graph: op {op.name!r} has no module, and LMOutput.arrived lacks it",
                hint="call the module itself, or return what its matrix read, so that it can be counted",
            )
        without = [name for name in self._neurons if name not in self.membranes]
        if len(without) > 4:  # of many layers, each kind once
            without = list(dict.fromkeys(map(layer_pattern, without)))
        if without:
            self.notes.append(f"membrane updates leave out sites without a membrane to watch: {', '.join(without)}")


@torch.no_grad()
def _membrane_updates(neuron: Neuron, x: Tensor, state: Any = None) -> int | None:
    """Count NeuroBench's membrane updates over ``x (B, T, N)``: all at the first step, then those that changed.

    The membrane is what is kept between steps, after the reset. None if the neuron shows no membrane.
    """
    if x.shape[1] == 0:
        return 0
    if state is None:
        state = neuron.init_state((x.shape[0], *x.shape[2:]), device=x.device, dtype=x.dtype)
    if neuron.dynamics is not None:
        _, v = neuron.dynamics.run(x, state, final_only=False)
        return v[:, 0].numel() + int(torch.count_nonzero(v[:, 1:] != v[:, :-1]))
    updates = 0
    before: Tensor | None = None
    for x_t in x.unbind(1):
        _, state = neuron.step(x_t, state)
        membrane: Any = state if isinstance(state, Tensor) else getattr(state, "v", None)
        if not isinstance(membrane, Tensor):
            return None
        updates += membrane.numel() if before is None else int(torch.count_nonzero(membrane != before))
        before = membrane
    return updates


class SiteTaps:
    """Counts the spikes of every site, per channel."""

    def __init__(self, model: SpikingLanguageModel) -> None:
        self.sites = {site.name: site for site in model.spike_sites()}
        self.streams = {name: Stream() for name in self.sites}
        self.fired: dict[str, Tensor] = {}
        self.steps: Counter[str] = Counter()

    def add(self, spikes: Mapping[str, Tensor]) -> None:
        missing = set(self.sites) ^ set(spikes)
        if missing:
            raise PluginError(f"spike sites and returned spikes differ in {', '.join(sorted(missing))}")
        for name, s in spikes.items():
            self.streams[name].add(s)
            flat = s.reshape(-1, s.shape[-1])
            count = torch.count_nonzero(flat, dim=0)
            self.fired[name] = self.fired[name] + count if name in self.fired else count
            self.steps[name] += len(flat)
            agree(f"spike site {name!r} emits", self.sites[name].kind, self.streams[name])


@contextmanager
def watching(model: SpikingLanguageModel, watch: Watch | None = None) -> Iterator[None]:
    """Evaluation mode, no gradients, hooks in place; everything is as before afterwards."""
    training = {module: module.training for module in model.modules()}
    handles = []
    try:
        model.eval()
        if watch is not None:
            for handle in watch.hooks():
                handles.append(handle)  # noqa: PERF402  (one by one: an error half-way must still remove them)
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def agree(where: str, declared: ValueKind, seen: Stream) -> None:
    kind = seen.kind
    if kind is not None and declared in RANK and RANK[kind] > RANK[declared]:
        raise PluginError(
            f"{where} {declared} values by its declaration, but {kind} ones were seen", hint="correct graph()"
        )


def rows_of(model: SpikingLanguageModel, tokens: Any) -> Tensor:
    """Return ``tokens`` as ``(B, S)``; one long text becomes rows of the context length, a shorter rest is dropped."""
    ids = torch.as_tensor(tokens if isinstance(tokens, Tensor) else np.asarray(tokens).astype(np.int64)).long()
    if ids.numel() == 0:
        raise DataError("there are no tokens to look at", hint="give at least one token")
    if ids.ndim == 1:
        length = min(len(ids), int(getattr(model.config, "ctx_len", _TOKENS_PER_CALL)))
        ids = ids[: len(ids) // length * length].reshape(-1, length)
    if ids.ndim != 2:
        raise DataError(f"tokens are (B, S) or (N,), not {tuple(ids.shape)}")
    check_range(ids, vocab_size(model))
    return ids


def check_range(ids: Tensor, vocab_size: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise DataError(
            f"token ids run from {int(ids.min())} to {int(ids.max())}, the model knows 0 to {vocab_size - 1}",
            hint="encode the text with the tokenizer that the model was trained with",
        )


def groups(rows: Tensor) -> Iterator[Tensor]:
    size = max(1, _TOKENS_PER_CALL // rows.shape[1])
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def vocab_size(model: SpikingLanguageModel) -> int:
    size = getattr(model.config, "vocab_size", None)
    if size is None:
        name = type(model).__name__
        raise UsageError(f"{name} has no vocabulary: it reads no text (capabilities: {sorted(model.capabilities)})")
    return int(size)


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
