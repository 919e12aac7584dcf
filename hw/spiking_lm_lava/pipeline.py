"""From a graph without time to a network in which one step is one token, every path as long as every other.

A :class:`TokenGraph` says what reads what: of this token, or, along a *looped* wire, of the last one. Nothing in it
speaks of steps. :func:`pipelined` finds how many steps after its token a node works (its depth: each synapse on the way
adds one), sends what would come too early through :class:`~spiking_lm_lava.cell.Delay` cells, delivers ``valid`` to
every cell at its depth, and takes only loops of exactly one step, that of their synapse. So all nodes work on
successive tokens at once, and what meets is of one token. That is looked at again in the network that comes out
(:meth:`Network.uneven`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from spiking_lm.errors import LoweringError
from spiking_lm_lava.cell import VALID, Cell, Delay
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.process import Process, Sink, Source

__all__ = ["VALID", "Pipeline", "TokenGraph", "Wire", "pipelined"]


@dataclass(frozen=True)
class Wire:
    """A connection, ``"node"`` or ``"node.port"`` to the same."""

    source: str
    target: str
    looped: bool = False
    """Whether ``target`` reads what ``source`` made of the last token: of a loop, the wire from its synapse."""


@dataclass(frozen=True, eq=False)
class TokenGraph:
    """Sources, synapses, cells and sinks, and what reads what; without ``valid``, without delays."""

    nodes: tuple[Process, ...]
    wires: tuple[Wire, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "wires", tuple(self.wires))
        names = {node.name for node in self.nodes}
        for node in self.nodes:
            if node.name == VALID or isinstance(node, Delay):
                raise LoweringError(
                    f"{node.kind} {node.name!r}: a graph of tokens has no delays, and no node {VALID!r}"
                )
        for wire in self.wires:
            for end in (wire.source, wire.target):
                if end.partition(".")[0] not in names:
                    raise LoweringError(f"wire {wire.source} -> {wire.target}: there is no node {end!r}")

    def ordered(self) -> list[Process]:
        """Return the nodes so that each comes after what it reads of its token.

        Raises: LoweringError for a loop without a looped wire.
        """
        waits = {node.name: {_node(w.source) for w in self.wires_to(node.name) if not w.looped} for node in self.nodes}
        order: list[Process] = []
        left = list(self.nodes)
        while left:
            ready = [node for node in left if not waits[node.name] & {other.name for other in left}]
            if not ready:
                names = ", ".join(repr(node.name) for node in left[:6])
                raise LoweringError(f"a loop among {names} has no wire that carries the last token")
            order += ready
            left = [node for node in left if node not in ready]
        return order

    def wires_to(self, name: str) -> list[Wire]:
        """Return the wires that reach a node."""
        return [wire for wire in self.wires if _node(wire.target) == name]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A network that takes one token per step."""

    network: Network
    latency: dict[str, int]
    """By sink, the steps between a token's row at the sources and what comes of it."""
    depth: dict[str, int]
    """By node of the graph of tokens, how many steps after its token it works."""

    @property
    def steps(self) -> int:
        """Steps without a token after which all that the last token gave has arrived."""
        return max(self.latency.values())


def pipelined(graph: TokenGraph) -> Pipeline:
    """Return the network of ``graph``, with a source ``valid`` of 0 or 1 where there are cells that wait for tokens.

    Raises: LoweringError for a loop that takes more than one step, and what a network refuses.
    """
    depth: dict[str, int] = {}
    latency = {node.name: node.latency for node in graph.nodes}
    for node in graph.ordered():
        sources = [_node(wire.source) for wire in graph.wires_to(node.name) if not wire.looped]
        if not sources and not isinstance(node, Source):
            raise LoweringError(f"{node.kind} {node.name!r} reads nothing of its token")
        depth[node.name] = max((depth[source] + latency[source] for source in sources), default=0)
    wanted: list[tuple[str, int, str]] = []
    for wire in graph.wires:
        source, target = _node(wire.source), _node(wire.target)
        early = depth[target] + wire.looped - depth[source] - latency[source]
        if early < 0:
            raise LoweringError(
                f"the loop over {wire.source!r} to {wire.target!r} takes {1 - early} steps, and a token has one",
                hint="one synapse in a loop, and nothing else that adds a step",
            )
        wanted.append((wire.source, early, wire.target))
    nodes = list(graph.nodes)
    gated = [node for node in graph.nodes if isinstance(node, Cell) and node.gated]
    if gated:
        nodes.append(Source(VALID, 1, 0, 1))
        wanted += [(VALID, depth[cell.name], f"{cell.name}.{VALID}") for cell in gated]
    delays, edges = _delayed({node.name: node for node in nodes}, wanted)
    network = Network((*nodes, *delays), tuple(edges))
    uneven = network.uneven()
    if uneven:
        raise AssertionError(f"paths of different lengths meet: {uneven}")
    return Pipeline(network, {node.name: depth[node.name] for node in graph.nodes if isinstance(node, Sink)}, depth)


def _delayed(nodes: dict[str, Process], wanted: list[tuple[str, int, str]]) -> tuple[list[Delay], list[Edge]]:
    """Return delay cells and edges that bring each port to each target as many steps later as is wanted.

    From every port goes one chain, from which all its readers take what they need.
    """
    steps: dict[str, set[int]] = {}
    for port, early, _ in wanted:
        steps.setdefault(_full(nodes, port), {0}).add(early)
    made: list[Delay] = []
    edges: list[Edge] = []
    at: dict[tuple[str, int], str] = {}
    for port, found in steps.items():
        name, _, out = port.partition(".")
        before = at[port, 0] = port
        for earlier, later in pairwise(sorted(found)):
            label = f"{name if len(nodes[name].sends) == 1 else port.replace('.', ' ')} -{later}"
            made.append(Delay(label, nodes[name].port_size(out), steps=later - earlier))
            edges.append(Edge(before, label))
            before = at[port, later] = label
    return made, edges + [Edge(at[_full(nodes, port), early], target) for port, early, target in wanted]


def _full(nodes: dict[str, Process], port: str) -> str:
    """Return an out-port with its node's name, which may have been left out where there is one."""
    name, _, out = port.partition(".")
    return f"{name}.{out or nodes[name].sends[0]}"


def _node(end: str) -> str:
    return end.partition(".")[0]
