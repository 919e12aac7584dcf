"""Networks of LIF processes to NIR, the Neuromorphic Intermediate Representation, and back (nir, extra ``nir``).

NIR's neurons are differential equations and its edges take no time. For a time step ``dt`` (Euler), in units in which a
threshold is ``vth``, and with B the bias of a membrane::

    LIF, du = 4095      LIF       tau = dt 4096/dv       r = 4096/dv       v_leak = B/64 4096/dv
    LIF                 CubaLIF   the same as tau_mem    tau_syn = dt 4096/(du + 1)     w_in = 4096/(du + 1)
    LIF, dv = 0         IF        r = 1                  only with du = 4095, without bias
    Synapse             Linear    the matrix that it multiplies with; before it a Delay, where one is needed

Time counts from when the input's first row arrives at a node, so that the steps of synapses along a path cancel, and an
edge that leads back takes one; whatever is left is a Delay. So :func:`spiking_lm.nir_io.from_nir` reads a graph too.
(What biases alone do before the first row arrives has no place in it: processes run from step 1, all neurons of NIR
start with the first row.)
Rounding, 24 bits, sign modes and widths are Lava's alone: they are metadata, from which :func:`from_nir` makes the same
network again, integer for integer.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import DataError, MissingExtraError, SpikingLMError, UsageError
from spiking_lm.files import atomic_write
from spiking_lm.nir_io import NIRUnsupportedError
from spiking_lm_lava.arithmetic import ALIGN_SHIFT, DECAY_UNITY
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.process import Process, Sink, Source, Synapse

if TYPE_CHECKING:
    import nir

RECORD = "spiking_lm_lava"
"""Of a graph's metadata: the network without its weights, as JSON. A node has its arrays in its own metadata."""

_HINT = "a network of one source, synapses, LIF neurons and sinks can be written"


def to_nir(network: Network, path: str | os.PathLike[str] | None = None, *, dt: float = 1e-3) -> nir.NIRGraph:
    """Return ``network`` as a NIR graph for time step ``dt`` in seconds, and write it to ``path`` when one is given.

    :func:`from_nir` makes the same network of it. Raises: NIRUnsupportedError (a LoweringError) naming the node that
    NIR has no word for, and why; MissingExtraError; OSError.
    """
    ir = _nir()
    if not (np.isfinite(dt) and dt > 0):
        raise UsageError(f"dt is {dt}", hint="a time step in seconds, above 0")
    if len(network.of_kind(Source)) != 1:
        raise NIRUnsupportedError(f"the network has {len(network.of_kind(Source))} sources", hint=_HINT)
    first, keys = network.arrival(), _keys(network)
    for node in network.nodes:
        if node.name not in first:
            raise NIRUnsupportedError(f"{node.kind} {node.name!r}: nothing of the source reaches it", hint=_HINT)
    place = {name: i for i, name in enumerate(sorted(first, key=lambda name: (first[name], network.order.index(name))))}
    nodes: dict[str, Any] = {keys[node.name]: _node(ir, node, place[node.name], dt) for node in network.nodes}
    links: list[tuple[str, str]] = []
    for edge in network.edges:
        source, target = (network[end.partition(".")[0]] for end in (edge.source, edge.target))
        if isinstance(source, Synapse) and isinstance(target, Synapse):
            raise NIRUnsupportedError(
                f"synapse {source.name!r} feeds synapse {target.name!r}: NIR's time has no step between two matrices",
                hint="neurons between them",
            )
        if (
            not isinstance(source, Synapse)
            and not isinstance(target, Synapse)
            and first[source.name] != first[target.name]
        ):
            raise NIRUnsupportedError(f"edge {edge}: another path there is shorter, and it has no synapse to wait at")
        links.append((keys[source.name], keys[target.name]))
    for synapse in network.of_kind(Synapse):
        assert isinstance(synapse, Synapse)
        wait = _wait(network, synapse, first, place)
        if wait.any():
            key = _unused(f"{keys[synapse.name]}_delay", set(nodes))
            nodes[key] = ir.Delay(wait * dt)
            links = [(a, key) if b == keys[synapse.name] else (a, b) for a, b in links] + [(key, keys[synapse.name])]
    record = {
        "checked": network.checked,
        "nodes": [[node.name, keys[node.name]] for node in network.nodes],
        "edges": [[edge.source, edge.target, edge.bits] for edge in network.edges],
    }
    about = {"dt": dt, "integrator": "euler", RECORD: json.dumps(record)}
    graph = ir.NIRGraph(nodes, links, about, type_check=False)
    if path is not None:
        content = io.BytesIO()
        ir.write(content, graph)
        atomic_write(path, content.getvalue())
    return graph


def from_nir(source: str | os.PathLike[str] | nir.NIRGraph) -> Network:
    """Return the network that :func:`to_nir` wrote to a file or graph, with the same integers everywhere.

    Raises: NIRUnsupportedError for a graph of another origin, or one that was changed so that its metadata no longer
    says what it is; DataError for a file that is not NIR; MissingExtraError.
    """
    ir = _nir()
    graph = source if isinstance(source, ir.NIRGraph) else _read(ir, Path(source))
    if RECORD not in graph.metadata:
        raise NIRUnsupportedError(
            "this NIR graph was not written from a network of processes, so that its integers are not known",
            hint="spiking_lm.nir_io.from_nir reads it as a network of real numbers",
        )
    try:
        network = _rebuilt(graph)
        again = to_nir(network, dt=float(graph.metadata["dt"]))
    except SpikingLMError as error:
        raise NIRUnsupportedError(f"this graph is no longer the network that it was: {error.message}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise NIRUnsupportedError(f"this graph is no longer the network that it was: {what}") from None
    changed = _difference(again, graph)
    if changed:
        raise NIRUnsupportedError(
            f"this graph was changed since it was written: {changed} is not what its metadata says",
            hint="spiking_lm.nir_io.from_nir reads it as a network of real numbers",
        )
    return network


def _nir() -> Any:
    try:
        import nir
    except ImportError as error:
        raise MissingExtraError("reading and writing NIR", "nir", detail=str(error)) from None
    return nir


def _read(ir: Any, path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return ir.read(path, type_check=False)
    except Exception as error:  # h5py and nir raise about anything for a file that is none
        raise DataError(f"{path}: not a NIR file: {type(error).__name__}: {error}") from None


def _keys(network: Network) -> dict[str, str]:
    """Return a name in the graph for every node: letters and digits, as HDF5 and torch give others a meaning."""
    keys: dict[str, str] = {}
    for node in network.nodes:
        plain = "".join(letter if letter.isalnum() else "_" for letter in node.name)
        keys[node.name] = _unused(plain, set(keys.values()))
    return keys


def _unused(name: str, taken: set[str]) -> str:
    count, candidate = 1, name
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _wait(network: Network, synapse: Synapse, first: dict[str, int], place: dict[str, int]) -> NDArray[np.int64]:
    """Return the steps that each input has to wait in NIR's time, where only an edge that leads back takes one."""
    starts = {edge.source.partition(".")[0] for edge in network.arriving(synapse.name, "s_in")}
    ends = set(network.successors(synapse.name))
    if not ends:
        raise NIRUnsupportedError(f"synapse {synapse.name!r} feeds nothing")
    steps = _steps(synapse)
    waits = [steps + first[a] - first[b] - (place[a] >= place[b]) for a in sorted(starts) for b in sorted(ends)]
    if any((wait != waits[0]).any() for wait in waits):
        raise NIRUnsupportedError(
            f"synapse {synapse.name!r} is part of paths of different lengths, and NIR has one Delay before it",
            hint="one synapse per path",
        )
    return waits[0]


def _steps(synapse: Synapse) -> NDArray[np.int64]:
    """Return the steps of each input's way through a synapse. Raises: NIRUnsupportedError for several of one input."""
    if synapse.form != "delay":
        return np.ones(synapse.inputs, np.int64)
    if (synapse.delay != synapse.delay[:1]).any():
        raise NIRUnsupportedError(
            f"synapse {synapse.name!r}: the weights of one input have several delays, and NIR's Delay has one per input"
        )
    steps: NDArray[np.int64] = 1 + synapse.delay[0]
    return steps


def _node(ir: Any, node: Process, place: int, dt: float) -> Any:
    """Return the NIR node of a process, with what only Lava needs in its metadata."""
    if isinstance(node, Source):
        made = ir.Input(np.array([node.size]))
        made.metadata = {"low": node.low, "high": node.high}
    elif isinstance(node, Sink):
        made = ir.Output(np.array([node.size]))
        made.metadata = {}
    elif isinstance(node, Synapse):
        if (node.prepared != node.weight).any():
            raise NIRUnsupportedError(f"synapse {node.name!r}: it has weights that would not arrive as they are")
        made = ir.Linear(node.weight * 2.0**node.weight_exp)
        made.metadata = {
            name: getattr(node, name) for name in ("sign_mode", "weight_exp", "num_weight_bits", "graded", "form")
        }
        made.metadata["graded"] = int(node.graded)
        if node.form == "delay":
            made.metadata["delay"] = _steps(node) - 1
    elif isinstance(node, LIF):
        made = _neuron(ir, node, dt)
        fields = ("du", "dv", "vth", "bias_exp")
        made.metadata = {**{name: getattr(node, name) for name in fields}, "bias_mant": np.array(node.bias_mant)}
        made.metadata |= {"compare": ">", "reset": "zero", "name": node.name, "order": place}
    else:
        raise NIRUnsupportedError(f"{node.kind} {node.name!r}: NIR has no such node", hint=_HINT)
    return made


def _neuron(ir: Any, node: LIF, dt: float) -> Any:
    """Return a LIF process as the differential equation that Euler's method steps as it does, but for rounding."""
    refused = (
        (node.vth_lo is not None, "it is ternary, and NIR's spikes are binary"),
        (bool(node.reset_interval), "it resets by the clock, which no equation of NIR does"),
        (bool(node.u.any() or node.v.any()), "it starts elsewhere than at 0, and NIR has no initial states"),
        (node.du == -1, "its current never decays, which is no time constant"),
        (node.dv == 0 and node.du != DECAY_UNITY - 1, "its membrane never decays: NIR's IF has no current that does"),
        (node.dv == 0 and bool(node.bias.any()), "its membrane never decays: NIR's IF has no bias"),
    )
    for applies, why in refused:
        if applies:
            raise NIRUnsupportedError(f"lif {node.name!r}: {why}", hint=_HINT)
    zeros, threshold = np.zeros(node.size), np.full(node.size, float(node.vth))
    if not node.dv:
        return ir.IF(r=np.ones(node.size), v_threshold=threshold, v_reset=zeros)
    slow = DECAY_UNITY / node.dv
    common = {
        "r": np.full(node.size, slow),
        "v_leak": node.bias / (1 << ALIGN_SHIFT) * slow,
        "v_threshold": threshold,
        "v_reset": zeros,
    }
    tau = np.full(node.size, dt * slow)
    if node.du == DECAY_UNITY - 1:
        return ir.LIF(tau=tau, **common)
    slow = DECAY_UNITY / (node.du + 1)
    return ir.CubaLIF(tau_mem=tau, tau_syn=np.full(node.size, dt * slow), w_in=np.full(node.size, slow), **common)


def _rebuilt(graph: Any) -> Network:
    """Make a network of a graph's metadata and of its weights."""
    record = json.loads(graph.metadata[RECORD])
    nodes = [_process(name, graph.nodes[key]) for name, key in record["nodes"]]
    return Network(tuple(nodes), tuple(Edge(*edge) for edge in record["edges"]), checked=bool(record["checked"]))


def _process(name: str, made: Any) -> Process:
    about, kind = made.metadata, type(made).__name__
    if kind in ("Input", "Output"):
        size = int(np.prod(next(iter(made.input_type.values()))))
        return Source(name, size, int(about["low"]), int(about["high"])) if kind == "Input" else Sink(name, size)
    if kind != "Linear":
        bias = np.asarray(about["bias_mant"], np.int64)
        values: dict[str, Any] = {item: int(about[item]) for item in ("du", "dv", "vth", "bias_exp")}
        return LIF(name, len(bias), bias_mant=bias, **values)
    values = {item: int(about[item]) for item in ("weight_exp", "num_weight_bits")}
    values |= {"sign_mode": str(about["sign_mode"]), "form": str(about["form"]), "graded": bool(about["graded"])}
    weight = np.asarray(made.weight, np.float64) * 2.0 ** -values["weight_exp"]
    whole = weight.astype(np.int64)
    if (whole != weight).any():
        raise ValueError("weights that are no whole numbers")
    if values["form"] == "delay":
        values["delay"] = np.broadcast_to(about["delay"], whole.shape)
    return Synapse(name, len(whole), whole, **values)


def _difference(a: Any, b: Any) -> str:
    """Return what differs between two graphs, in words, or nothing."""
    if set(a.nodes) != set(b.nodes):
        return f"node {sorted(set(a.nodes) ^ set(b.nodes))[0]!r}"
    if sorted(a.edges) != sorted(b.edges):
        start, end = sorted(set(a.edges) ^ set(b.edges))[0]
        return f"edge {start!r} -> {end!r}"
    for name in sorted(a.nodes):
        mine, theirs = (
            {key: value for key, value in vars(graph.nodes[name]).items() if isinstance(value, np.ndarray)}
            for graph in (a, b)
        )
        if type(a.nodes[name]) is not type(b.nodes[name]) or mine.keys() != theirs.keys():
            return f"node {name!r}"
        for key in mine:
            if not np.array_equal(mine[key], theirs[key]):
                return f"{key!r} of node {name!r}"
    return ""


__all__ = ["from_nir", "to_nir"]
