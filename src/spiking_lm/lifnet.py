"""Networks of leaky integrate-and-fire neurons as plain arrays: what a NIR file or a neuromorphic chip can hold.

At every step, layer by layer in their order, with s(t) the spikes of a source and d the delay of an edge::

    x = sum over the edges into the layer of  W s(t - d) + bias
    i = synapse_decay i + synapse_gain x            (layers with a synapse; for others i = x)
    h = decay v + drift + gain i
    s = [h > threshold], or [h >= threshold]
    v = v_reset where s, else h;  or  h - s threshold  when v_reset is None

All numbers are float32, which is what models, NIR's readers and chips compute with. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import ConfigError, DataError, UnknownNameError
from spiking_lm.hardware import LoweringError

if TYPE_CHECKING:
    from spiking_lm.graph import LMGraph, Op
    from spiking_lm.interfaces import LIFDynamics, SpikingLanguageModel

INPUT = "input"
"""The source of edges that read the spikes given to the network."""

Vector = NDArray[np.float32]
"""One number per neuron. Where a layer is made, a single number stands for all its neurons."""


def _zeros() -> Vector:
    return np.zeros(1, np.float32)


def _ones() -> Vector:
    return np.ones(1, np.float32)


class _ByValue:
    """Frozen dataclasses that are equal when all their fields are, arrays included."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, item.name), getattr(other, item.name)) for item in fields(self))  # type: ignore[arg-type]

    __hash__ = None  # type: ignore[assignment]


def _same(a: object, b: object) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else bool(a == b)


@dataclass(frozen=True, eq=False)
class LIFLayer(_ByValue):
    """A population of neurons. Raises ConfigError for a field that does not fit."""

    name: str
    size: int
    decay: Vector
    """Of the membrane per step, 0 to 1; 1 does not leak."""
    gain: Vector = field(default_factory=_ones)
    threshold: Vector = field(default_factory=_ones)
    drift: Vector = field(default_factory=_zeros)
    """Added to the membrane at every step: the pull of a leak potential, a constant current."""
    v_reset: Vector | None = field(default_factory=_zeros)
    """None subtracts the threshold at a spike."""
    v_init: Vector = field(default_factory=_zeros)
    compare: Literal[">", ">="] = ">="
    synapse_decay: Vector | None = None
    """None: input acts on the membrane at once. Otherwise it charges a current that decays by this per step."""
    synapse_gain: Vector = field(default_factory=_ones)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"layer {self.name!r}: size is {self.size}")
        if self.compare not in (">", ">="):
            raise ConfigError(f"layer {self.name!r}: compare is {self.compare!r}, not '>' or '>='")
        for name in ("decay", "gain", "threshold", "drift", "v_reset", "v_init", "synapse_decay", "synapse_gain"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, self._vector(name, value))
        for name in ("decay", "synapse_decay"):
            value = getattr(self, name)
            if value is not None and not (value.min() >= 0 and value.max() <= 1):
                raise ConfigError(
                    f"layer {self.name!r}: {name} runs from {value.min()} to {value.max()}, not in 0 to 1"
                )

    def _vector(self, name: str, value: Any) -> Vector:
        array = np.asarray(value, np.float32)
        if array.shape not in ((), (1,), (self.size,)):
            raise ConfigError(f"layer {self.name!r}: {name} has shape {array.shape}, not ({self.size},)")
        if not np.isfinite(array).all():
            raise ConfigError(f"layer {self.name!r}: {name} is not finite")
        array = np.array(np.broadcast_to(array, self.size))
        array.flags.writeable = False
        return array

    @classmethod
    def from_dynamics(cls, name: str, size: int, dynamics: LIFDynamics) -> LIFLayer:
        """Return ``size`` neurons with the dynamics that a model's neuron declares, starting at a membrane of zero."""
        v_reset = dynamics.v_reset
        return cls(
            name,
            size,
            decay=np.asarray(dynamics.beta),
            gain=np.asarray(dynamics.gain),
            threshold=np.asarray(dynamics.threshold),
            drift=np.asarray((1 - dynamics.beta) * (v_reset or 0.0)),
            v_reset=None if v_reset is None else np.asarray(v_reset),
            compare=">=" if dynamics.compare == ">=" else ">",
        )


@dataclass(frozen=True, eq=False)
class LIFEdge(_ByValue):
    """All synapses from one layer, or the input, to a layer: ``weight (target, source)``, ``bias (target,)``."""

    source: str
    target: str
    weight: NDArray[np.float32]
    bias: Vector | None = None
    delay: int = 0
    """Steps. 0 is the same step, which only an edge from the input or an earlier layer can have."""

    def __post_init__(self) -> None:
        for name in ("weight", "bias"):
            value = getattr(self, name)
            if value is not None:
                array = np.array(value, np.float32)
                if array.ndim != (2 if name == "weight" else 1) or not np.isfinite(array).all():
                    raise ConfigError(f"edge {self}: {name} has shape {array.shape}, or is not finite")
                array.flags.writeable = False
                object.__setattr__(self, name, array)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass
class LIFRun:
    """What a network did: by layer, spikes ``(T, ..., N)`` and membranes after every step, of the same shape."""

    spikes: dict[str, NDArray[np.bool_]]
    membranes: dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class LIFNet(_ByValue):
    """Layers in the order in which a step visits them, and the edges between them.

    Raises: ConfigError naming the layer or edge that does not fit the others.
    """

    input_size: int
    layers: tuple[LIFLayer, ...]
    edges: tuple[LIFEdge, ...]
    outputs: tuple[str, ...] = ()
    """Layers whose spikes are the result; the last layer when none is named."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "edges", tuple(self.edges))
        if not self.layers or self.input_size < 1:
            raise ConfigError("a network needs an input and at least one layer")
        object.__setattr__(self, "outputs", tuple(self.outputs) or (self.layers[-1].name,))
        order = {INPUT: -1, **{layer.name: position for position, layer in enumerate(self.layers)}}
        if len(order) != len(self.layers) + 1:
            raise ConfigError(f"two layers have one name, or one is called {INPUT!r}: {[x.name for x in self.layers]}")
        for name in self.outputs:
            if name not in order or name == INPUT:
                raise UnknownNameError("layer", name, set(order) - {INPUT})
        for edge in self.edges:
            for name in (edge.source, edge.target):
                if name not in order:
                    raise ConfigError(f"edge {edge}: there is no layer {name!r}")
            if edge.target == INPUT:
                raise ConfigError(f"edge {edge}: leads to the input")
            shape = (self.size(edge.target), self.size(edge.source))
            if edge.weight.shape != shape or (edge.bias is not None and edge.bias.shape != shape[:1]):
                raise ConfigError(f"edge {edge}: the weight is {edge.weight.shape}, the layers ask for {shape}")
            least = 0 if order[edge.source] < order[edge.target] else 1
            if edge.delay < least:
                why = "which reads a layer that comes no earlier" if least else "a number of steps"
                raise ConfigError(f"edge {edge}: delay {edge.delay}, {why}", hint=f"at least {least}")

    def __getitem__(self, name: str) -> LIFLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UnknownNameError("layer", name, [layer.name for layer in self.layers])

    def size(self, name: str) -> int:
        """Return the number of neurons of a layer, or of inputs."""
        return self.input_size if name == INPUT else self[name].size

    def into(self, name: str) -> tuple[LIFEdge, ...]:
        """Return the edges that lead into a layer."""
        return tuple(edge for edge in self.edges if edge.target == name)

    def check_spikes(self, spikes: NDArray[Any]) -> NDArray[np.bool_]:
        """Return input ``spikes (T, ..., input_size)`` as booleans. Raises DataError for other values or shapes."""
        array = np.asarray(spikes)
        if array.ndim < 2 or array.shape[-1] != self.input_size:
            raise DataError(f"input spikes have shape {array.shape}, not (T, ..., {self.input_size})")
        if not ((array == 0) | (array == 1)).all():
            raise DataError("input spikes are not all 0 or 1", hint="graded events cannot be sent as spikes")
        return array.astype(np.bool_)

    def run(self, spikes: NDArray[Any]) -> LIFRun:
        """Run the network on ``spikes (T, ..., input_size)`` of zeros and ones; this is its definition.

        Raises: DataError for spikes of another shape or with other values.
        """
        given = self.check_spikes(spikes)
        shape = given.shape[:-1]
        fired = {INPUT: given, **{layer.name: np.zeros((*shape, layer.size), np.bool_) for layer in self.layers}}
        membranes = {layer.name: np.zeros((*shape, layer.size), np.float32) for layer in self.layers}
        v = {layer.name: np.broadcast_to(layer.v_init, (*shape[1:], layer.size)) for layer in self.layers}
        current = {layer.name: np.zeros((*shape[1:], layer.size), np.float32) for layer in self.layers}
        for t in range(shape[0]):
            for layer in self.layers:
                name = layer.name
                x = np.zeros((*shape[1:], layer.size), np.float32)
                for edge in self.into(name):
                    if t >= edge.delay:
                        x += fired[edge.source][t - edge.delay].astype(np.float32) @ edge.weight.T
                    if edge.bias is not None:
                        x += edge.bias
                if layer.synapse_decay is not None:
                    x = current[name] = layer.synapse_decay * current[name] + layer.synapse_gain * x
                h = layer.decay * v[name] + layer.drift + layer.gain * x
                s = h > layer.threshold if layer.compare == ">" else h >= layer.threshold
                v[name] = np.where(s, h - layer.threshold if layer.v_reset is None else layer.v_reset, h)
                fired[name][t], membranes[name][t] = s, v[name]
        del fired[INPUT]
        return LIFRun(fired, membranes)


def from_model(model: SpikingLanguageModel, source: str, outputs: Sequence[str] | None = None) -> LIFNet:
    """Cut the part of ``model`` between ``source`` and ``outputs`` out as a network, where it is one.

    ``source`` names an op of the model's graph that emits binary spikes, or ``"tokens"``, whose ids the network then
    takes as one-hot rows; ``outputs`` name neuron ops (default: the last one). What lies before and behind stays with
    the model, and every matrix between must join neurons.

    Raises: LoweringError naming the first op that such a network cannot express, and why; UnknownNameError.
    """
    graph = model.graph()
    ops = {op.name: op for op in graph}
    neurons = [op.name for op in graph if op.kind == "neuron"]
    if source != "tokens" and source not in ops:
        raise UnknownNameError("op", source, ["tokens", *ops])
    if source in ops and ops[source].emits != "binary":
        raise _refusal(
            ops[source], f"it emits {ops[source].emits} values, not binary spikes, so it cannot be the source"
        )
    if outputs is None:
        outputs = neurons[-1:]
    for name in outputs:
        if name not in neurons:
            raise UnknownNameError("neuron op", name, neurons)
    needed = _needed(graph, source, outputs)
    weights = {name: tensor.detach().cpu().float().numpy() for name, tensor in model.state_dict().items()}
    layers: list[LIFLayer] = []
    edges: list[LIFEdge] = []
    for op in needed:
        if op.kind == "neuron":
            layers.append(LIFLayer.from_dynamics(op.name, op.size, _lif_dynamics(model, op)))
            for linear in _drives(op, ops):
                edges += _edges(linear, op.name, source, ops, weights)
        elif op.kind not in ("linear", "embedding", "residual"):
            raise _refusal(op, f"the operation {op.kind!r} is not a matrix between neurons")
    size = weights[_parameter(needed[0], "weight")].shape[0] if source == "tokens" else ops[source].size
    return LIFNet(size, tuple(layers), tuple(edges), tuple(outputs))


def _refusal(op: Op, why: str) -> LoweringError:
    return LoweringError(
        f"op {op.name!r} has no form in a network of LIF neurons: {why}",
        hint="choose source and outputs around it, or lower the whole model to a backend",
    )


def _needed(graph: LMGraph, source: str, outputs: Sequence[str]) -> list[Op]:
    """Return, in execution order, the ops that ``outputs`` depend on, back to ``source``."""
    found: set[str] = set()
    open_ends = list(outputs)
    while open_ends:
        name = open_ends.pop()
        if name in found or name == source:
            continue
        if name == "tokens":
            raise LoweringError(
                f"the tokens reach {outputs[0]!r} without passing {source!r}", hint="choose 'tokens' as the source"
            )
        found.add(name)
        open_ends += (*graph[name].inputs, *graph[name].recurrent)
    return [op for op in graph if op.name in found]


def _drives(op: Op, ops: dict[str, Op]) -> Iterator[Op]:
    """Yield the matrices whose results a neuron, or a sum, adds up."""
    if op.recurrent:
        raise _refusal(op, "it reads the previous step without a matrix between")
    for name in op.inputs:
        if name in ops and ops[name].kind in ("linear", "embedding"):
            yield ops[name]
        elif name in ops and ops[name].kind == "residual":
            yield from _drives(ops[name], ops)
        else:
            raise _refusal(op, f"it reads {name!r}, which is not a matrix")


def _edges(linear: Op, target: str, source: str, ops: dict[str, Op], weights: dict[str, Any]) -> Iterator[LIFEdge]:
    if linear.kind == "embedding" or "weight_t" in linear.parameters:
        weight = weights[_parameter(linear, "weight_t" if "weight_t" in linear.parameters else "weight")].T
    else:
        weight = weights[_parameter(linear, "weight")]
    bias = weights.get(_parameter(linear, "bias"))
    for delay, names in ((0, linear.inputs), (1, linear.recurrent)):
        for name in names:
            if name != source and ops[name].kind != "neuron":
                raise _refusal(linear, f"it reads {name!r}, which is not a neuron")
            yield LIFEdge(INPUT if name == source else name, target, weight, bias, delay)
            bias = None


def _parameter(op: Op, role: str) -> str:
    return op.parameters.get(role) or f"{op.module}.{role}"


def _lif_dynamics(model: SpikingLanguageModel, op: Op) -> LIFDynamics:
    from spiking_lm.interfaces import LIFDynamics

    dynamics = op.dynamics
    if dynamics is None and op.module is not None:
        dynamics = getattr(model.get_submodule(op.module), "dynamics", None)
    if not isinstance(dynamics, LIFDynamics):
        what = type(dynamics).__name__ if dynamics is not None else "no dynamics"
        raise _refusal(op, f"it declares {what}, not LIFDynamics")
    if op.emits != "binary":
        raise _refusal(op, f"it emits {op.emits} values, not binary spikes")
    return dynamics
