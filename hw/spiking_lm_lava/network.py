"""A network of processes as plain data: what is lowered, simulated, run in Lava, placed on cores.

Nodes are processes (:mod:`spiking_lm_lava.process`); an edge joins an out-port to an in-port, and says how wide its
messages are. An in-port that several edges reach receives their sum. One time step is one token, or one column of
input; a synapse adds a step, everything else answers in the same step. A network is checked when it is made: names,
shapes, loops, and that no weight, state, sum or message can leave the bits that hardware has for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from spiking_lm import __version__
from spiking_lm.errors import CheckpointError, LoweringError, SpikingLMError, did_you_mean
from spiking_lm.sealed import COMPLETE, SUMS, new_folder, verify_folder
from spiking_lm_lava import cell, cells_spikegpt, floating, graded, neurons  # noqa: F401  (kinds known from here on)
from spiking_lm_lava.arithmetic import STATE_BITS
from spiking_lm_lava.process import KINDS, Delaying, Process, Source, Synapse
from spiking_lm_lava.values import Bounds, Range

NETWORK_FORMAT = 1
"""Version of ``network.json``; a newer one is refused."""

MANIFEST, ARRAYS = "network.json", "arrays.npz"

_ROUNDS = 1000
"""Of range analysis, after which values that still grow are taken to grow for ever."""

_AGAIN = "restore what is named from a copy, or write the network again"


@dataclass(frozen=True)
class Edge:
    """A connection, ``"node"`` or ``"node.port"`` to the same; a port is only named where a node has several."""

    source: str
    target: str
    bits: int | None = None
    """Of a message, sign included; 0: a spike without payload. None: as few as its values need."""

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True, eq=False)
class Network:
    """Processes and the edges between them. Raises: LoweringError naming the node or edge that is wrong, and why."""

    nodes: tuple[Process, ...]
    edges: tuple[Edge, ...]
    checked: bool = True
    """False leaves out what hardware could hold: for conformance with Lava where that overflows on purpose."""
    bounds: dict[str, Bounds] = field(init=False, repr=False)
    """What each node can send and hold; empty unless checked."""
    order: tuple[str, ...] = field(init=False, repr=False)
    """Nodes in an order in which a step can compute them; those that delay come where they receive."""

    _by_name: dict[str, Process] = field(init=False, repr=False)
    _arriving: dict[str, list[Edge]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "_by_name", {node.name: node for node in self.nodes})
        if len(self._by_name) != len(self.nodes):
            names = [node.name for node in self.nodes]
            raise LoweringError(f"two nodes are named {next(n for n in names if names.count(n) > 1)!r}")
        object.__setattr__(self, "edges", tuple(self._resolved(edge) for edge in self.edges))
        arriving: dict[str, list[Edge]] = {f"{node.name}.{port}": [] for node in self.nodes for port in node.reads}
        for edge in self.edges:
            arriving[edge.target].append(edge)
        object.__setattr__(self, "_arriving", arriving)
        for port, edges in arriving.items():
            if not edges:
                raise LoweringError(f"nothing arrives at {port!r}", hint="every in-port needs an edge")
        object.__setattr__(self, "order", self._ordered())
        object.__setattr__(self, "bounds", {})
        if self.checked:
            for node in self.nodes:
                node.check()
            object.__setattr__(self, "bounds", self._analysed())
        object.__setattr__(self, "edges", tuple(self._measured(edge) for edge in self.edges))
        for port in arriving:
            arriving[port] = [edge for edge in self.edges if edge.target == port]

    def __getitem__(self, name: str) -> Process:
        node = self._by_name.get(name)
        if node is None:
            raise LoweringError(f"there is no node {name!r}", hint=did_you_mean(name, self._by_name))
        return node

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def of_kind(self, kind: type[Process]) -> list[Process]:
        """Return the nodes of a class."""
        return [node for node in self.nodes if isinstance(node, kind)]

    def arriving(self, name: str, port: str) -> list[Edge]:
        """Return the edges that reach an in-port."""
        return self._arriving[f"{name}.{port}"]

    # -- structure -----------------------------------------------------------------------------------------------------

    def _resolved(self, edge: Edge) -> Edge:
        """Write out the ports of an edge, and check that both exist and are of one size."""
        source, out = self._port(edge, edge.source, "sends")
        target, into = self._port(edge, edge.target, "reads")
        sends, reads = source.port_size(out), target.port_size(into)
        if sends != reads:
            raise LoweringError(f"edge {edge}: {source.name!r} sends {sends} values, {target.name!r} reads {reads}")
        if edge.bits is not None and not 0 <= edge.bits <= STATE_BITS:
            raise LoweringError(f"edge {edge}: messages of {edge.bits} bits, hardware has 0 to {STATE_BITS}")
        return replace(edge, source=f"{source.name}.{out}", target=f"{target.name}.{into}")

    def _port(self, edge: Edge, end: str, ports: str) -> tuple[Process, str]:
        name, _, port = end.partition(".")
        if name not in self._by_name:
            raise LoweringError(f"edge {edge}: there is no node {name!r}", hint=did_you_mean(name, self._by_name))
        node = self._by_name[name]
        known: tuple[str, ...] = getattr(node, ports)
        if not known:
            raise LoweringError(f"edge {edge}: a {node.kind} {ports} nothing")
        if not port and len(known) > 1:
            raise LoweringError(f"edge {edge}: {node.kind} {name!r} has the ports {', '.join(known)}: name one")
        if port and port not in known:
            raise LoweringError(f"edge {edge}: {node.kind} {name!r} has no port {port!r}", hint=f"{', '.join(known)}")
        return node, port or known[0]

    def successors(self, name: str, *, same_step: bool = False) -> Iterator[str]:
        """Yield the nodes that read what a node sends; with ``same_step`` only those that read it before it ends."""
        if same_step and isinstance(self[name], Delaying):
            return
        for edge in self.edges:
            if edge.source.partition(".")[0] == name:
                yield edge.target.partition(".")[0]

    def _ordered(self) -> tuple[str, ...]:
        following = {node.name: list(self.successors(node.name, same_step=True)) for node in self.nodes}
        waits = dict.fromkeys(following, 0)
        for targets in following.values():
            for target in targets:
                waits[target] += 1
        ready, order = [name for name, count in waits.items() if not count], []
        while ready:
            order.append(ready.pop(0))
            for target in following[order[-1]]:
                waits[target] -= 1
                if not waits[target]:
                    ready.append(target)
        if len(order) < len(following):
            loop = _a_loop(following, {name for name in following if name not in order})
            raise LoweringError(
                f"the loop {' -> '.join(loop)} has no synapse, so that all wait for each other: it would deadlock",
                hint="a synapse in the loop adds the step that it needs",
            )
        return tuple(order)

    # -- values --------------------------------------------------------------------------------------------------------

    def _analysed(self) -> dict[str, Bounds]:
        """Carry ranges from sources through all nodes until nothing grows any more."""
        found: dict[str, Bounds] = {}
        sent = {
            f"{node.name}.{port}": Range.nothing(node.port_size(port)) for node in self.nodes for port in node.sends
        }
        for group in self.groups():
            for _ in range(_ROUNDS):
                grows = ""
                for name in group:
                    node = self[name]
                    found[name] = node.bounds(*(self._sum(name, port, sent) for port in node.reads))
                    for port, now in zip(node.sends, found[name].sends, strict=True):
                        if now not in sent[f"{name}.{port}"]:
                            sent[f"{name}.{port}"] = now
                            grows = name
                if not grows or (len(group) == 1 and group[0] not in self.successors(group[0])):
                    break
            else:
                raise LoweringError(
                    f"what {grows!r} sends grows from step to step without end, along a loop",
                    hint="smaller weights in the loop, or a neuron in it whose output is bounded",
                )
        return found

    def _sum(self, name: str, port: str, sent: dict[str, Range]) -> Range:
        first, *others = (sent[edge.source] for edge in self.arriving(name, port))
        for other in others:
            first = first + other
        return first

    def _measured(self, edge: Edge) -> Edge:
        """Check an edge's width against its values, or find it."""
        name, _, into = edge.target.partition(".")
        target = self[name]
        spikes = isinstance(target, Synapse) and not target.graded
        if not self.checked:
            return replace(edge, bits=0 if spikes else STATE_BITS if edge.bits is None else edge.bits)
        source, _, out = edge.source.partition(".")
        found = self.bounds[source].sends[self[source].sends.index(out)]
        low, high = int(found.low.min()), int(found.high.max())
        needed = (
            0 if low >= 0 and high <= 1 else max(int(-low - 1).bit_length() if low < 0 else 0, high.bit_length()) + 1
        )
        if spikes:
            most = sum(self._most(other) for other in self.arriving(name, into))
            if needed or most > 1:
                what = f"values from {low} to {high}" if needed else f"{most} spikes at once"
                raise LoweringError(
                    f"edge {edge}: {what} may arrive at {name!r}, which only sees whether there is a spike",
                    hint="Synapse(graded=True)",
                )
            if edge.bits:
                raise LoweringError(f"edge {edge}: messages of {edge.bits} bits to {name!r}, which reads no payload")
            return replace(edge, bits=0)
        bits = needed if edge.bits is None else edge.bits
        if needed > bits or needed > STATE_BITS:
            raise LoweringError(
                f"edge {edge}: values from {low:,} to {high:,} do not fit messages of {min(bits, STATE_BITS)} bits"
            )
        return replace(edge, bits=bits)

    def _most(self, edge: Edge) -> int:
        source, _, out = edge.source.partition(".")
        return int(self.bounds[source].sends[self[source].sends.index(out)].high.max())

    # -- time ----------------------------------------------------------------------------------------------------------

    def latency(self, edge: Edge) -> int:
        """Return after how many steps, at the earliest, a message on ``edge`` can depend on a node's input."""
        return self[edge.source.partition(".")[0]].latency

    def arrival(self) -> dict[str, int]:
        """Return for each node the first step, from 0, in which what reaches it depends on the sources' first row."""
        first = {node.name: 0 for node in self.of_kind(Source)}
        waiting = sorted(first)
        while waiting:
            name = waiting.pop(0)
            for edge in self.edges:
                if edge.source.partition(".")[0] == name:
                    target, when = edge.target.partition(".")[0], first[name] + self.latency(edge)
                    if when < first.get(target, when + 1):
                        first[target] = when
                        waiting.append(target)
        return first

    def uneven(self) -> dict[str, dict[str, int]]:
        """Return the nodes at which paths of different lengths meet: by edge, the step in which it first brings news.

        Edges that close a loop are left out. Without any, everything that meets is of one and the same token.
        """
        first, found = self.arrival(), {}
        part_of = {name: i for i, group in enumerate(self.groups()) for name in group}
        for node in self.nodes:
            meets = {}
            for port in node.reads:
                for edge in self.arriving(node.name, port):
                    source = edge.source.partition(".")[0]
                    if source in first and part_of[source] != part_of[node.name]:
                        meets[str(edge)] = first[source] + self.latency(edge)
            if len(set(meets.values())) > 1:
                found[node.name] = meets
        return found

    def groups(self) -> list[tuple[str, ...]]:
        """Return the nodes in the order of data flow; those of one loop stand together, in the order of a step."""
        place = {name: i for i, name in enumerate(self.order)}
        following = {name: sorted(set(self.successors(name)), key=place.__getitem__) for name in self.order}
        return [tuple(sorted(group, key=place.__getitem__)) for group in _components(following)]

    # -- disk ----------------------------------------------------------------------------------------------------------

    def to_record(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return the network as JSON-able data and arrays; :meth:`from_record` takes them back."""
        nodes, arrays = nodes_to_record(self.nodes)
        edges = [
            {"source": edge.source, "target": edge.target, "bits": edge.bits, "latency": self.latency(edge)}
            for edge in self.edges
        ]
        return {"format": NETWORK_FORMAT, "checked": self.checked, "nodes": nodes, "edges": edges}, arrays

    @classmethod
    def from_record(cls, record: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Network:
        """Rebuild a network. Raises: LoweringError, KeyError, TypeError, ValueError for one that is damaged."""
        nodes = nodes_from_record(record["nodes"], arrays)
        edges = [Edge(given["source"], given["target"], given["bits"]) for given in record["edges"]]
        network = cls(tuple(nodes), tuple(edges), checked=bool(record["checked"]))
        for edge, given in zip(network.edges, record["edges"], strict=True):
            if network.latency(edge) != given["latency"]:
                raise ValueError(f"edge {edge}: a latency of {given['latency']} is written, the nodes say otherwise")
        return network

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network's folder atomically: ``network.json``, ``arrays.npz``, hashes.

        Raises: UsageError when ``path`` holds other things than a network, CheckpointError when the disk refuses.
        """
        record, arrays = self.to_record()
        with new_folder(Path(path), ours={MANIFEST, ARRAYS, SUMS, COMPLETE}, what="network") as folder:
            text = json.dumps({"spiking_lm": __version__, **record}, indent=1, allow_nan=False)
            (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
            np.savez(folder / ARRAYS, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Network:
        """Load what :meth:`save` wrote. Raises: CheckpointError naming the file that is missing, altered or too new."""
        folder = Path(path)
        verify_folder(folder, what="network", hint=_AGAIN)
        try:
            record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if record["format"] != NETWORK_FORMAT:
                raise CheckpointError(
                    f"{folder / MANIFEST}: format {record['format']}, of spiking-lm {record.get('spiking_lm')}; "
                    f"this is {__version__}, which reads format {NETWORK_FORMAT}",
                    hint="pip install --upgrade spiking-lm",
                )
            with open(folder / ARRAYS, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                return cls.from_record(record, dict(arrays))
        except CheckpointError:
            raise
        except (
            SpikingLMError,
            OSError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            EOFError,
            RecursionError,
            BadZipFile,
        ) as error:
            what = error.message if isinstance(error, SpikingLMError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{folder}: not a network ({what})", hint=_AGAIN) from error


def nodes_to_record(nodes: Sequence[Process]) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """Return processes as JSON-able data and arrays, ``"node.field"``; :func:`nodes_from_record` takes them back."""
    records, arrays = [], {}
    for node in nodes:
        values: dict[str, Any] = {"kind": node.kind}
        for item in fields(node):
            value = getattr(node, item.name)
            if isinstance(value, np.ndarray):
                if item.init and value.size:
                    arrays[f"{node.name}.{item.name}"] = _smallest(value)
            elif item.init:
                values[item.name] = value.item() if isinstance(value, np.generic) else value
        records.append(values)
    return records, arrays


def nodes_from_record(records: list[dict[str, Any]], arrays: Mapping[str, NDArray[Any]]) -> list[Process]:
    """Rebuild processes. Raises: LoweringError, KeyError, TypeError, ValueError for what is damaged."""
    nodes, left = [], dict(arrays)
    for given in records:
        values = dict(given)
        kind = KINDS.get(values.pop("kind"))
        if kind is None:
            raise ValueError(f"there is no process of the kind {given['kind']!r}")
        of_node = {name for name in left if name.partition(".")[0] == values["name"]}
        values |= {name.partition(".")[2]: left.pop(name) for name in of_node}
        nodes.append(kind(**values))
    if left:
        raise ValueError(f"the array {next(iter(left))!r} belongs to no node")
    return nodes


def _smallest(array: NDArray[Any]) -> NDArray[Any]:
    """Return whole numbers in the least signed type that holds them."""
    if array.dtype.kind not in "iu" or not array.size:
        return array
    needed = np.promote_types(np.min_scalar_type(int(array.min())), np.min_scalar_type(int(array.max())))
    return array.astype(np.promote_types(needed, np.int8))


def _a_loop(following: dict[str, list[str]], among: set[str]) -> list[str]:
    """Return a loop among nodes that all wait for another one, its first node again at the end."""
    preceding = {name: next(other for other in sorted(among) if name in following[other]) for name in sorted(among)}
    name, seen = next(iter(preceding)), []
    while name not in seen:
        seen.append(name)
        name = preceding[name]
    loop = [*seen[seen.index(name) :], name]
    return loop[::-1]


def _components(following: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return the strongly connected components in topological order (Tarjan's algorithm, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []
    for root in following:
        if root in index:
            continue
        work = [(root, iter(following[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            name, targets = work[-1]
            for target in targets:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    work.append((target, iter(following[target])))
                    break
                if target in stack:
                    low[name] = min(low[name], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == index[name]:
                    at = stack.index(name)
                    found.append(stack[at:])
                    del stack[at:]
    return found[::-1]
