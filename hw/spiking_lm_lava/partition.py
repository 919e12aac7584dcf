"""Neurons and synapses of a network on the cores of a chip, within what a core, a chip and a board hold.

What is placed are *populations*: every process that computes, with the synapses that bring it what it reads. A synapse
that several processes read, or none, has accumulators of its own. Sources and sinks are the host's. A core that holds
neurons ``first .. last`` of a population has an in-axon for each value that reaches one of them, which takes
``1 + ceil(fan_out_on_core * bits / 32)`` words, and the sum of those is what its memory bounds.

The partition is greedy and has no choice in it: populations in the network's order, each on the open core where it
fits there whole, else from a new core on as many neurons per core as fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import LoweringError
from spiking_lm_lava.arithmetic import Int
from spiking_lm_lava.constants import AXON_WORDS, CORES_PER_TILE, INDEX_BITS, TILE_COLUMNS, WORD_BITS, Board, Target
from spiking_lm_lava.network import Network
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.process import Process, Sink, Source, Synapse

DIRECT_BITS = 8
"""Of the weight, 1, with which a neuron reads another one without a synapse between them."""

_ROUNDS = 16
"""Of halving populations until no core has too many out-axons."""


@dataclass(frozen=True)
class Wire:
    """Values that reach a population: from which port, and over which weights."""

    port: str
    """``"node.port"`` of what sends."""
    sources: int
    rows: int
    """Values that the in-port has; value i belongs to neuron i mod size."""
    bits: int
    """Of a stored synapse, index included."""
    stored: NDArray[np.bool_] | None
    """(rows, sources): which synapses there are, if not all. None: all of them, or with ``direct`` one each."""
    direct: bool = False

    def fan(self, first: int, last: int, size: int) -> Int:
        """Return for each source its synapses on neurons ``first .. last - 1`` of a population of ``size``."""
        mine = np.arange(first, last)
        if self.direct:
            fan = np.zeros(self.sources, np.int64)
            if self.rows < size:  # one value to many neurons
                np.add.at(fan, mine % self.rows, 1)
            else:
                for block in range(0, self.rows, size):
                    within = mine + block
                    fan[within[within < self.rows]] += 1
            return fan
        rows = np.concatenate([mine + block for block in range(0, self.rows, size)])
        if self.stored is None:
            return np.full(self.sources, len(rows), np.int64)
        found: Int = self.stored[rows].sum(0, dtype=np.int64)
        return found

    def words(self, fan: Int) -> int:
        """Return the words of in-axons with ``fan`` synapses each."""
        used = fan[fan > 0]
        return int((int(AXON_WORDS.value) + -(-used * self.bits // WORD_BITS)).sum())


@dataclass(frozen=True)
class Population:
    """Neurons that a process has, and what reaches them."""

    name: str
    size: int
    wires: tuple[Wire, ...]


class Axons(NamedTuple):
    """In-axons on a core: of each value of a port, how many synapses it has there (0: no in-axon)."""

    port: str
    fan: Int


@dataclass(frozen=True, eq=False)
class Piece:
    """Neurons ``first .. last - 1`` of a population, on one core."""

    population: str
    core: int
    first: int
    last: int
    words: int
    axons: tuple[Axons, ...]

    @property
    def neurons(self) -> int:
        """How many they are."""
        return self.last - self.first

    @property
    def in_axons(self) -> int:
        """In-axons that they need."""
        return sum(int((axons.fan > 0).sum()) for axons in self.axons)


@dataclass(frozen=True, eq=False)
class Partition:
    """Which neurons are on which core."""

    target: Target
    pieces: tuple[Piece, ...]
    populations: dict[str, Population] = field(repr=False)
    owner: dict[str, str] = field(repr=False)
    """Synapse -> the population that it belongs to."""
    ends: dict[str, str] = field(repr=False)
    """Sink -> the port that it reads, by in-edge ``"port -> sink"``."""
    board: Board | None = None

    @property
    def cores(self) -> int:
        """Cores in use."""
        return 1 + max((piece.core for piece in self.pieces), default=-1)

    @property
    def chips(self) -> int:
        """Chips in use."""
        return -(-self.cores // int(self.target.cores_per_chip.value))

    @cached_property
    def words(self) -> Int:
        """Words in use on each core."""
        return self._by_core(lambda piece: piece.words)

    @cached_property
    def neurons(self) -> Int:
        """Neurons on each core."""
        return self._by_core(lambda piece: piece.neurons)

    @cached_property
    def in_axons(self) -> Int:
        """In-axons of each core."""
        return self._by_core(lambda piece: piece.in_axons)

    @cached_property
    def out_axons(self) -> Int:
        """Out-axons of each core: for each of its neurons, the cores' in-axons that it reaches."""
        found = np.zeros(self.cores, np.int64)
        for piece in self.pieces:
            for axons in piece.axons:
                cores = self.cores_of(axons.port)
                if cores is not None:
                    np.add.at(found, cores[axons.fan > 0], 1)
        return found

    def _by_core(self, count: Callable[[Piece], int]) -> Int:
        found = np.zeros(self.cores, np.int64)
        for piece in self.pieces:
            found[piece.core] += count(piece)
        return found

    def cores_of(self, port: str) -> Int | None:
        """Return the core that each value of ``"node.port"`` leaves; None for what the host sends."""
        name = port.partition(".")[0]
        if name not in self._core_of:
            return None
        cores = self._core_of[name]
        return cores[np.arange(self._values[port]) % len(cores)]

    @cached_property
    def _values(self) -> dict[str, int]:
        return {wire.port: wire.sources for population in self.populations.values() for wire in population.wires}

    @cached_property
    def _core_of(self) -> dict[str, Int]:
        found = {name: np.zeros(population.size, np.int64) for name, population in self.populations.items()}
        for piece in self.pieces:
            found[piece.population][piece.first : piece.last] = piece.core
        return found

    def of(self, *nodes: str) -> list[Piece]:
        """Return the pieces of processes or synapses."""
        names = {self.owner.get(node, node) for node in nodes}
        return [piece for piece in self.pieces if piece.population in names]

    def where(self, *nodes: str) -> str:
        """Say where processes or synapses are, e.g. ``"cores 0-3"``; empty for what is on none."""
        cores = sorted({piece.core for piece in self.of(*nodes)})
        if not cores:
            return ""
        runs = [[cores[0], cores[0]]]
        for core in cores[1:]:
            if core == runs[-1][1] + 1:
                runs[-1][1] = core
            else:
                runs.append([core, core])
        text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        return f"core {text}" if len(cores) == 1 else f"cores {text}"

    def bytes(self, *nodes: str) -> int:
        """Return the memory that in-axons and synapses of processes take."""
        return sum(piece.words for piece in self.of(*nodes)) * WORD_BITS // 8


def partition(network: Network, target: Target, *, board: str | None = None) -> Partition:
    """Place ``network`` on the cores of ``target``; without ``board`` on the smallest that holds it.

    Raises: LoweringError for what the target has no neurons for, for a neuron that no core holds, and, with the cores
    that it takes and those that there are, for a network that no board holds.
    """
    chosen = target.board(board)
    if not target.payload:
        _refuse_payload(network, target)
    populations, owner = _populations(network)
    limits = {population.name: int(target.neurons_per_core.value) for population in populations}
    ends = {str(edge): edge.source for node in network.of_kind(Sink) for edge in network.arriving(node.name, "a_in")}
    for _ in range(_ROUNDS):
        pieces = _placed(populations, target, limits)
        found = Partition(target, pieces, {x.name: x for x in populations}, owner, ends)
        crowded = _crowded(found)
        if not crowded:
            return _on_board(found, chosen)
        for name in crowded:
            limits[name] = max(1, max(piece.neurons for piece in found.of(name)) // 2)
    axons = target.axons_per_core
    assert axons is not None
    raise LoweringError(
        f"a core would have {int(found.out_axons.max()):,} out-axons; one of {target.title} has {axons.value:,.0f}",
        hint="loihi2, which has no such limit, or fewer neurons that read the same",
    )


def _refuse_payload(network: Network, target: Target) -> None:
    for node in network.nodes:
        reason = ""
        if isinstance(node, Synapse):
            readers = [network[name] for name in network.successors(node.name)]
            if node.graded:
                reason = "reads spikes with a payload"
            elif len(readers) != 1 or not isinstance(readers[0], LIF):
                reason = "sends sums to something else than one LIF"
        elif isinstance(node, LIF) and node.vth_lo is not None:
            reason = "sends spikes of both signs"
        elif not isinstance(node, (LIF, Source, Sink)):
            reason = "is a neuron of a program of its own"
        if reason:
            raise LoweringError(
                f"{node.kind} {node.name!r} {reason}, which {target.title} does not have", hint="loihi2 has it"
            )


def _populations(network: Network) -> tuple[list[Population], dict[str, str]]:
    """Return what is placed, in the network's order, and the population of each synapse."""
    owner = {}
    for node in network.nodes:
        if isinstance(node, Synapse):
            readers = list(network.successors(node.name))
            alone = len(readers) == 1 and not isinstance(network[readers[0]], (Synapse, Sink))
            owner[node.name] = readers[0] if alone else node.name
    found = []
    for node in network.nodes:
        if isinstance(node, (Source, Sink)) or owner.get(node.name, node.name) != node.name:
            continue
        if isinstance(node, Synapse):
            wires = _into_synapse(network, node)
        else:
            wires = [wire for port in node.reads for wire in _into_port(network, node, port, owner)]
        found.append(Population(node.name, node.size, tuple(wires)))
    return found, owner


def _into_port(network: Network, node: Process, port: str, owner: dict[str, str]) -> list[Wire]:
    wires = []
    for edge in network.arriving(node.name, port):
        source = network[edge.source.partition(".")[0]]
        if isinstance(source, Synapse) and owner[source.name] == node.name:
            wires += _into_synapse(network, source)
        else:
            rows = node.port_size(port)
            wires.append(Wire(edge.source, rows, rows, DIRECT_BITS, None, direct=True))
    return wires


def _into_synapse(network: Network, synapse: Synapse) -> list[Wire]:
    bits = synapse.num_weight_bits + (0 if synapse.form == "dense" else int(INDEX_BITS.value))
    stored = synapse.weight != 0 if synapse.form == "sparse" else None
    return [
        Wire(edge.source, synapse.inputs, synapse.size, bits, stored) for edge in network.arriving(synapse.name, "s_in")
    ]


def _placed(populations: Iterable[Population], target: Target, limits: dict[str, int]) -> tuple[Piece, ...]:
    words, axons = int(target.words_per_core.value), target.axons_per_core
    most_axons = int(axons.value) if axons is not None else None
    pieces: list[Piece] = []
    core, free = -1, np.zeros(3, np.int64)  # of the open core: neurons, words, in-axons
    whole = np.array([target.neurons_per_core.value, words, most_axons or 0], np.int64)

    def takes(piece: Piece) -> Int:
        return np.array([piece.neurons, piece.words, piece.in_axons if most_axons else 0], np.int64)

    for population in populations:
        first, limit = 0, limits[population.name]
        if core >= 0 and population.size <= limit:
            piece = _piece(population, core, 0, population.size)
            if (takes(piece) <= free).all():
                pieces.append(piece)
                free = free - takes(piece)
                continue
        while first < population.size:
            core += 1
            fits = None
            low, high = 1, min(limit, population.size - first)
            while low <= high:  # the most neurons from the first on that a core holds
                middle = (low + high) // 2
                piece = _piece(population, core, first, first + middle)
                if (takes(piece) <= whole).all():
                    fits, low = piece, middle + 1
                else:
                    high = middle - 1
            if fits is None:
                alone = _piece(population, core, first, first + 1)
                raise LoweringError(
                    f"neuron {first} of {population.name!r} alone takes {alone.words:,} words and {alone.in_axons:,} "
                    f"in-axons; a core of {target.title} holds {words:,} words"
                    + (f" and {most_axons:,} in-axons" if most_axons else ""),
                    hint="fewer inputs of a neuron, or sparse weights",
                )
            pieces.append(fits)
            free, first = whole - takes(fits), fits.last
    return tuple(pieces)


def _piece(population: Population, core: int, first: int, last: int) -> Piece:
    axons = tuple(Axons(wire.port, wire.fan(first, last, population.size)) for wire in population.wires)
    words = sum(wire.words(axon.fan) for wire, axon in zip(population.wires, axons, strict=True))
    return Piece(population.name, core, first, last, words, axons)


def _crowded(found: Partition) -> list[str]:
    """Return the populations on cores that have more out-axons than there are, where they can be halved."""
    limit = found.target.axons_per_core
    if limit is None:
        return []
    cores = np.flatnonzero(found.out_axons > limit.value)
    return sorted({piece.population for piece in found.pieces if piece.core in cores})


def _on_board(found: Partition, chosen: Board | None) -> Partition:
    target = found.target
    boards = [chosen] if chosen is not None else list(target.boards)
    for board in boards:
        if found.chips <= board.chips.value:
            return Partition(target, found.pieces, found.populations, found.owner, found.ends, board)
    there = int(boards[-1].chips.value)
    larger = next((board.name for board in target.boards if board.chips.value >= found.chips), None)
    raise LoweringError(
        f"the network takes {found.cores:,} cores, {found.chips:,} chips; {boards[-1].name} has {there:,} chips of "
        f"{target.cores_per_chip.value:.0f} cores: {int(found.words.sum()):,} words of synapses, "
        f"{int(found.neurons.sum()):,} neurons",
        hint="a smaller model" if larger is None else f"board {larger}",
    )


def tile(core: Any, cores_per_chip: int) -> tuple[Any, Any]:
    """Return column and row of the tile of a core, on its chip."""
    number = core % cores_per_chip // CORES_PER_TILE
    return number % TILE_COLUMNS, number // TILE_COLUMNS
