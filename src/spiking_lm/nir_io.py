"""Networks of LIF neurons to and from NIR, the Neuromorphic Intermediate Representation (nir, extra ``nir``).

NIR describes neurons in continuous time; a :class:`~spiking_lm.lifnet.LIFNet` steps. Between the two stand a time step
``dt`` and an integrator, with a = dt / tau ("euler") or a = 1 - exp(-dt / tau) ("exponential")::

    LIF      tau v' = v_leak - v + r x     decay = 1 - a        gain = a r        drift = a v_leak
    IF       v' = r x                      decay = 1            gain = r          per step, whatever dt is
    CubaLIF  tau_syn i' = -i + w_in x      synapse_decay = 1 - a_syn              synapse_gain = a_syn w_in

What NIR has no word for travels as metadata, which other tools ignore: ``compare`` and ``reset`` of a neuron, its
``v_init``, its name, and the order of layers and edges. docs/nir.md says what that means for them.
"""

from __future__ import annotations

import io
import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import ConfigError, DataError, MissingExtraError, UsageError
from spiking_lm.files import atomic_write
from spiking_lm.hardware import LoweringError
from spiking_lm.lifnet import INPUT, LIFEdge, LIFLayer, LIFNet

if TYPE_CHECKING:
    import nir

    from spiking_lm.interfaces import LIFDynamics

Integrator = Literal["euler", "exponential"]

_Array = NDArray[np.float64]


class NIRUnsupportedError(LoweringError):
    """A neuron, edge or node that has no form on the other side; the message names it and the reason."""


def to_nir(
    net: LIFNet, path: str | os.PathLike[str] | None = None, *, dt: float = 1e-3, integrator: Integrator = "euler"
) -> nir.NIRGraph:
    """Return ``net`` as a NIR graph for time step ``dt`` in seconds, and write it to ``path`` when one is given.

    Reading it back gives the same network, bit for bit, or this raises.

    Raises: NIRUnsupportedError naming what NIR cannot express; MissingExtraError; OSError.
    """
    ir = _nir()
    _check(dt, integrator)
    names = node_names(net)
    nodes: dict[str, nir.NIRNode] = {"input": ir.Input(np.array([net.input_size]))}
    links: list[tuple[str, str]] = []
    for position, layer in enumerate(net.layers):
        node = nodes[names[layer.name]] = _neuron(ir, layer, dt, integrator)
        node.metadata |= {"name": layer.name, "order": position}
    for position, edge in enumerate(net.edges):
        weight = np.array(edge.weight)
        node = ir.Linear(weight) if edge.bias is None else ir.Affine(weight, np.array(edge.bias))
        node.metadata["order"] = position
        name = _unused(f"{names[edge.source]}_to_{names[edge.target]}", nodes)
        nodes[name] = node
        first = name
        waits = edge.delay - _implied_delay(net, edge)
        if waits:
            first = _unused(f"{name}_delay", nodes)
            nodes[first] = ir.Delay(np.full(net.size(edge.source), waits * dt))
            links.append((first, name))
        links += [(names[edge.source], first), (name, names[edge.target])]
    for name in net.outputs:
        output = "output" if len(net.outputs) == 1 else _unused(f"output_{names[name]}", nodes)
        nodes[output] = ir.Output(np.array([net.size(name)]))
        nodes[output].metadata = {"order": net.outputs.index(name)}
        links.append((names[name], output))
    graph = ir.NIRGraph(nodes, links, {"dt": dt, "integrator": integrator}, type_check=False)
    if from_nir(graph) != net:
        raise NIRUnsupportedError(
            "the network does not come back from NIR as it was: a decay is too close to 0 for its time constant",
            hint="round such decays to 0" if integrator == "euler" else "try integrator='euler'",
        )
    if path is not None:
        content = io.BytesIO()
        ir.write(content, graph)
        atomic_write(path, content.getvalue())
    return graph


def neuron_to_nir(
    dynamics: LIFDynamics, size: int, *, dt: float = 1e-3, integrator: Integrator = "euler"
) -> nir.LIF | nir.IF:
    """Return ``size`` neurons with the dynamics that a model declares as a NIR node. Raises as :func:`to_nir` does."""
    _check(dt, integrator)
    return _neuron(_nir(), LIFLayer.from_dynamics("neuron", size, dynamics), dt, integrator)


def from_nir(
    source: str | os.PathLike[str] | nir.NIRGraph, *, dt: float | None = None, integrator: Integrator | None = None
) -> LIFNet:
    """Read a NIR file or graph of Linear, Affine, LIF, IF, CubaLIF and Delay nodes with one input as a network.

    ``dt`` in seconds and ``integrator`` (default "euler") are needed for graphs that do not carry them, which only
    :func:`to_nir` writes. Edges that lead back, nearest to the input first, take one step.

    Raises: NIRUnsupportedError naming the first node that has no form here; UsageError without a ``dt``; DataError for
    a file that is not NIR; MissingExtraError.
    """
    ir = _nir()
    graph = source if isinstance(source, ir.NIRGraph) else _read(ir, Path(source))
    dt = dt if dt is not None else graph.metadata.get("dt")
    if dt is None:
        raise UsageError("this NIR graph does not say what its time step is", hint="give dt, in seconds")
    chosen: Any = integrator or graph.metadata.get("integrator", "euler")
    _check(float(dt), chosen)
    try:
        return _Reader(ir, graph, float(dt), chosen).read()
    except ConfigError as error:
        raise NIRUnsupportedError(f"this graph is no network of LIF neurons: {error.message}") from None


def _nir() -> Any:
    try:
        import nir
    except ImportError as error:
        raise MissingExtraError("reading and writing NIR", "nir", detail=str(error)) from None
    return nir


def _check(dt: float, integrator: str) -> None:
    if not (np.isfinite(dt) and dt > 0):
        raise UsageError(f"dt is {dt}", hint="a time step in seconds, above 0")
    if integrator not in ("euler", "exponential"):
        raise UsageError(f"there is no integrator {integrator!r}", hint="'euler' or 'exponential'")


def _neuron(ir: Any, layer: LIFLayer, dt: float, integrator: Integrator) -> Any:
    """Return the node for a layer: the inverse of :meth:`_Reader._layer`."""
    decay, gain, drift = (np.asarray(x, np.float64) for x in (layer.decay, layer.gain, layer.drift))
    about: dict[str, Any] = {"compare": layer.compare, "reset": "zero" if layer.v_reset is not None else "subtract"}
    leaks = (decay < 1).all()
    if not leaks and ((decay < 1).any() or drift.any() or layer.synapse_decay is not None):
        raise NIRUnsupportedError(
            f"layer {layer.name!r}: neurons that do not leak are NIR's IF, all of a layer, without drift or synapse",
            hint="split the layer, or move a drift into the bias of an edge",
        )
    rest = drift / (1 - decay) if leaks else np.zeros_like(drift)
    if not np.array_equal(layer.v_init, rest.astype(np.float32)):
        about["v_init"] = np.array(layer.v_init)
    common = {
        "v_threshold": np.asarray(layer.threshold, np.float64),
        "v_reset": np.asarray(np.zeros(layer.size) if layer.v_reset is None else layer.v_reset, np.float64),
        "metadata": about,
    }
    if not leaks:
        return ir.IF(r=gain, **common)
    tau, common["r"], common["v_leak"] = _time_constant(layer.name, decay, dt, integrator), gain / (1 - decay), rest
    if layer.synapse_decay is None:
        return ir.LIF(tau=tau, **common)
    synapse = np.asarray(layer.synapse_decay, np.float64)
    if (synapse == 1).any():
        raise NIRUnsupportedError(f"layer {layer.name!r}: a synapse whose current never decays")
    w_in = np.asarray(layer.synapse_gain, np.float64) / (1 - synapse)
    return ir.CubaLIF(tau_mem=tau, tau_syn=_time_constant(layer.name, synapse, dt, integrator), w_in=w_in, **common)


def _time_constant(name: str, decay: _Array, dt: float, integrator: Integrator) -> _Array:
    if integrator == "euler":
        return dt / (1 - decay)
    if (decay == 0).any():
        raise NIRUnsupportedError(
            f"layer {name!r}: a decay of 0 is a time constant of 0 under the exponential integrator",
            hint="integrator='euler'",
        )
    return -dt / np.log(decay)


def node_names(net: LIFNet) -> dict[str, str]:
    """Return a node name for every layer: without the dots of module names, which HDF5 or torch give a meaning."""
    names = {INPUT: "input"}
    for layer in net.layers:
        plain = "".join(letter if letter.isalnum() else "_" for letter in layer.name)
        names[layer.name] = _unused(plain, set(names.values()) | {"output"})
    return names


def _unused(name: str, taken: Any) -> str:
    count, candidate = 1, name
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _implied_delay(net: LIFNet, edge: LIFEdge) -> int:
    """Return the delay of an edge without a Delay node: one step for an edge that leads back."""
    order = [INPUT, *(layer.name for layer in net.layers)]
    return int(order.index(edge.source) >= order.index(edge.target))


def _read(ir: Any, path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        graph = ir.read(path, type_check=False)  # shapes are checked here, with names in the message
    except Exception as error:  # h5py and nir raise about anything for a file that is none
        raise DataError(f"{path}: not a NIR file: {type(error).__name__}: {error}") from None
    return graph


class _Reader:
    """One graph on its way to a network."""

    def __init__(self, ir: Any, graph: Any, dt: float, integrator: Integrator) -> None:
        self.ir, self.graph, self.dt, self.integrator = ir, graph, dt, integrator
        self.nodes: dict[str, Any] = graph.nodes
        self.neurons = (ir.LIF, ir.IF, ir.CubaLIF)
        self.weights = (ir.Linear, ir.Affine)

    def read(self) -> LIFNet:
        self._check_nodes()
        (source,) = [name for name, node in self.nodes.items() if isinstance(node, self.ir.Input)]
        order = self._order(source)
        self.labels = {source: INPUT, **{name: str(self.nodes[name].metadata.get("name", name)) for name in order}}
        sizes = {name: self._size(name) for name in order}
        edges = self._edges({source: -1, **{name: position for position, name in enumerate(order)}}, sizes)
        widths = {edge.weight.shape[1] for edge in edges if edge.source == INPUT}
        if len(widths) != 1:  # not taken from the node, whose shape some tools let count the batch
            raise NIRUnsupportedError(f"node {source!r}: the weights behind it take {sorted(widths)} inputs")
        layers = tuple(self._layer(name, sizes[name]) for name in order)
        return LIFNet(widths.pop(), layers, tuple(edges), self._outputs())

    def _check_nodes(self) -> None:
        known = (*self.neurons, *self.weights, self.ir.Input, self.ir.Output, self.ir.Delay)
        for name, node in self.nodes.items():
            if not isinstance(node, known):
                raise NIRUnsupportedError(
                    f"node {name!r} is a {type(node).__name__}: only Linear, Affine, Delay, LIF, IF and CubaLIF nodes "
                    "with binary spikes can be read"
                )
        inputs = [name for name, node in self.nodes.items() if isinstance(node, self.ir.Input)]
        if len(inputs) != 1:
            raise NIRUnsupportedError(f"the graph has {len(inputs)} inputs: {inputs}", hint="one is supported")
        for start, end in self.graph.edges:
            for name in (start, end):
                if name not in self.nodes:
                    raise NIRUnsupportedError(f"an edge of the graph names {name!r}, which is no node")
            self._check_link(start, end)
        if len(set(self.graph.edges)) != len(self.graph.edges):
            raise NIRUnsupportedError("an edge of the graph is there twice")

    def _check_link(self, start: str, end: str) -> None:
        a, b = self.nodes[start], self.nodes[end]
        if isinstance(a, self.neurons):
            fits = isinstance(b, (*self.weights, self.ir.Delay, self.ir.Output))
        elif isinstance(a, self.weights):
            fits = isinstance(b, self.neurons)
        else:
            fits = isinstance(a, (self.ir.Input, self.ir.Delay)) and isinstance(b, (*self.weights, self.ir.Delay))
        if not fits:
            raise NIRUnsupportedError(
                f"edge {start!r} -> {end!r}: {type(a).__name__} into {type(b).__name__}",
                hint="spikes pass through one Linear or Affine node to a neuron",
            )

    def _into(self, name: str) -> list[str]:
        return [start for start, end in self.graph.edges if end == name]

    def _order(self, source: str) -> list[str]:
        """Return the neurons in the order noted by :func:`to_nir`, else nearest to the input first."""
        near: dict[str, None] = {}
        queue = deque([source])
        seen = {source}
        while queue:
            name = queue.popleft()
            if isinstance(self.nodes[name], self.neurons):
                near[name] = None
            for end in sorted(end for start, end in self.graph.edges if start == name):
                if end not in seen:
                    seen.add(end)
                    queue.append(end)
        for name, node in self.nodes.items():
            if isinstance(node, self.neurons) and name not in near:
                raise NIRUnsupportedError(f"node {name!r} cannot be reached from the input {source!r}")
        return self._noted(list(near))

    def _noted(self, names: list[str]) -> list[str]:
        if all("order" in self.nodes[name].metadata for name in names):
            return sorted(names, key=lambda name: int(self.nodes[name].metadata["order"]))
        return names

    def _size(self, name: str) -> int:
        """Return the number of neurons, from the weights before them: some tools write one number for all neurons."""
        rows = {np.shape(self.nodes[before].weight)[0] for before in self._into(name)}
        shape = np.shape(self.nodes[name].v_threshold)
        if len(rows) != 1 or len(shape) > 1 or (shape and shape[0] not in rows):
            raise NIRUnsupportedError(f"node {name!r} has shape {shape}, the weights before it give {sorted(rows)}")
        return int(rows.pop())

    def _edges(self, order: dict[str, int], sizes: dict[str, int]) -> list[LIFEdge]:
        edges = []
        names = [name for name, node in self.nodes.items() if isinstance(node, self.weights)]
        names.sort(key=lambda name: min((order[end] for start, end in self.graph.edges if start == name), default=0))
        for name in self._noted(names):
            node = self.nodes[name]
            weight = np.asarray(node.weight)
            if weight.ndim != 2:
                raise NIRUnsupportedError(f"node {name!r}: its weight has shape {weight.shape}, not a matrix")
            for target in (end for start, end in self.graph.edges if start == name):
                bias = np.asarray(node.bias) if isinstance(node, self.ir.Affine) else None
                for start, waits in self._sources(name):
                    delay = waits + int(order[start] >= order[target])
                    if weight.shape[1] != sizes.get(start, weight.shape[1]):
                        raise NIRUnsupportedError(
                            f"node {name!r}: its weight has shape {weight.shape}, {start!r} has {sizes[start]} neurons"
                        )
                    edges.append(LIFEdge(self.labels[start], self.labels[target], weight, bias, delay))
                    bias = None
        return edges

    def _sources(self, name: str) -> list[tuple[str, int]]:
        """Return where the spikes of a weight node come from, and how many steps they wait in Delay nodes."""
        found = []
        for start in self._into(name):
            waits, passed = 0, set()
            while isinstance(self.nodes[start], self.ir.Delay):
                steps = np.unique(np.asarray(self.nodes[start].delay) / self.dt)
                before = self._into(start)
                if (
                    start in passed
                    or len(before) != 1
                    or steps.size != 1
                    or abs(steps[0] - round(steps[0])) > 1e-6
                    or steps[0] < 0
                ):
                    raise NIRUnsupportedError(
                        f"node {start!r}: delays of {steps} steps behind {before}",
                        hint="one delay for all, a whole number of steps of dt",
                    )
                passed.add(start)
                waits += round(float(steps[0]))
                (start,) = before
            found.append((start, waits))
        return found

    def _layer(self, name: str, size: int) -> LIFLayer:
        node = self.nodes[name]
        about = node.metadata
        values: dict[str, Any] = {"decay": 1.0, "gain": np.asarray(node.r, np.float64)}
        if not isinstance(node, self.ir.IF):
            tau, rest = node.tau_mem if isinstance(node, self.ir.CubaLIF) else node.tau, np.asarray(node.v_leak)
            values["decay"], taken = self._decay(name, tau)
            values |= {"gain": taken * values["gain"], "drift": taken * rest, "v_init": rest}
        if isinstance(node, self.ir.CubaLIF):
            values["synapse_decay"], taken = self._decay(name, node.tau_syn)
            values["synapse_gain"] = taken * np.asarray(node.w_in, np.float64)
        if "v_init" in about:
            values["v_init"] = about["v_init"]
        values["v_reset"] = None if about.get("reset") == "subtract" else node.v_reset
        compare: Literal[">", ">="] = ">=" if about.get("compare") == ">=" else ">"
        return LIFLayer(self.labels[name], size, threshold=np.asarray(node.v_threshold), compare=compare, **values)

    def _decay(self, name: str, tau: Any) -> tuple[_Array, _Array]:
        """Return what remains and what is taken in per step."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.dt / np.asarray(tau, np.float64)
            decay = 1 - ratio if self.integrator == "euler" else np.exp(-ratio)
        if not ((decay >= 0) & (decay <= 1)).all():
            raise NIRUnsupportedError(
                f"node {name!r}: with dt {self.dt} its time constants give decays from {decay.min()} to {decay.max()}",
                hint="a smaller dt, or integrator='exponential'",
            )
        return decay, 1 - decay

    def _outputs(self) -> tuple[str, ...]:
        ends = self._noted([name for name, node in self.nodes.items() if isinstance(node, self.ir.Output)])
        return tuple(self.labels[start] for end in ends for start in self._into(end))


__all__ = ["NIRUnsupportedError", "from_nir", "neuron_to_nir", "node_names", "to_nir"]
