"""What a run makes a chip do, counted from the values themselves; and what that takes, where prices are published.

Counts are exact: of each value that a node sent in each step it is known whether it was 0, and from the partition, on
which cores it had in-axons and how many synapses there. Time follows a max-affine model: a step ends no sooner than the
most loaded core is done with any one of its resources, and then comes the barrier. Of a run it is the largest of the
resources' sums, which is no more than the sum of the steps' largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spiking_lm_lava.arithmetic import Int
from spiking_lm_lava.constants import CORES_PER_TILE, ENERGIES, TIMES, Costs, prices, static_power
from spiking_lm_lava.partition import Partition, tile
from spiking_lm_lava.simulator import Rows


@dataclass
class Counts:
    """What happened in a run; whole numbers."""

    steps: int = 0
    """As many barriers."""
    synaptic_operations: int = 0
    """Synapses that a message reached; a dense matrix stores its zeros, and they count."""
    active_updates: int = 0
    """Neurons times steps in which one received or sent something other than 0."""
    idle_updates: int = 0
    messages: int = 0
    """Spikes times the in-axons that they reach, those of the host included."""
    from_host: int = 0
    """Of them, those that the host sent."""
    to_host: int = 0
    """Spikes that the host reads; in none of the others."""
    between_chips: int = 0
    """Of them, those that left a chip."""
    hops_x: int = 0
    """Messages times tiles, of those that stay on a chip."""
    hops_y: int = 0
    core_operations: int = 0
    """Sum over the steps of the synaptic operations of the core that has most in that step."""
    core_active: int = 0
    """Sum over the steps of the active neurons of the core that has most; the other sums likewise."""
    core_idle: int = 0
    """Idle neurons on the cores of :attr:`core_active`."""
    core_messages: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the JSON-able form."""
        return asdict(self)

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})


class _Port(NamedTuple):
    """What a message from each value of a port causes, and on which cores."""

    each: dict[str, Int]
    """By the names of :class:`Counts`."""
    cores: Int
    """Those with in-axons of the port."""
    operations_on: NDArray[np.float64]
    """(values, cores)"""
    messages_on: NDArray[np.float64]


class Counter:
    """Counts runs of a network, or of its parts, on a partition: :meth:`add` after each."""

    def __init__(self, partition: Partition) -> None:
        self.partition, self.counts = partition, Counts()
        wires = {wire.port: wire.sources for pop in partition.populations.values() for wire in pop.wires}
        self._ports = {port: _port(partition, port, size) for port, size in wires.items()}
        self._arriving: dict[str, list[str]] = {}
        for name, population in partition.populations.items():
            # The host's messages reach accumulators over their synapse, whose sums are what is sent.
            synapses = [f"{synapse}.a_out" for synapse, owner in partition.owner.items() if owner == name]
            self._arriving[name] = synapses + [wire.port for wire in population.wires if wire.direct]

    def add(self, sent: Mapping[str, Rows]) -> None:
        """Count what was ``sent``: by ``"node.port"`` the rows (T, values) of one and the same T steps.

        Ports that are missing were silent: parts of a network may be run one after the other. What
        :meth:`Simulator.run` gives to ``observe`` is of that form.
        """
        steps, cores = len(next(iter(sent.values()))), self.partition.cores
        found = Counts(steps=steps)
        operations, messages = np.zeros((steps, cores)), np.zeros((steps, cores))
        for name, port in self._ports.items():
            if name not in sent:
                continue
            fired = sent[name] != 0
            times = fired.sum(0)
            for what, each in port.each.items():
                setattr(found, what, getattr(found, what) + int(times @ each))
            real = fired.astype(np.float64)
            operations[:, port.cores] += real @ port.operations_on
            messages[:, port.cores] += real @ port.messages_on
        found.to_host = sum(int(np.count_nonzero(sent[port])) for port in self.partition.ends.values() if port in sent)
        active, neurons = self._active(sent, steps), self.partition.neurons
        found.active_updates = int(active.sum())
        found.idle_updates = steps * int(neurons.sum()) - found.active_updates
        if steps and cores:
            found.core_operations = int(operations.max(1).sum())
            found.core_messages = int(messages.max(1).sum())
            busiest = active.argmax(1)
            found.core_active = int(active[np.arange(steps), busiest].sum())
            found.core_idle = int(neurons[busiest].sum()) - found.core_active
        self.counts = self.counts + found

    def _active(self, sent: Mapping[str, Rows], steps: int) -> Int:
        """Return the neurons (T, cores) that received or sent something."""
        active = np.zeros((steps, self.partition.cores), np.int64)
        for name, population in self.partition.populations.items():
            own = [port for port in sent if port.partition(".")[0] == name]
            ports = [port for port in {*own, *self._arriving[name]} if port in sent]
            if not ports:
                continue
            busy = np.zeros((steps, population.size), np.bool_)
            for port in ports:
                values = sent[port] != 0
                if values.shape[1] < population.size:  # one value to many neurons
                    values = values[:, np.arange(population.size) % values.shape[1]]
                for block in range(0, values.shape[1], population.size):
                    busy |= values[:, block : block + population.size]
            for piece in self.partition.of(name):
                active[:, piece.core] += busy[:, piece.first : piece.last].sum(1)
        return active


def _port(partition: Partition, name: str, size: int) -> _Port:
    """Return what messages of a port cause."""
    per_chip = int(partition.target.cores_per_chip.value)
    each = {
        what: np.zeros(size, np.int64)
        for what in ("synaptic_operations", "messages", "from_host", "between_chips", "hops_x", "hops_y")
    }
    leaves = partition.cores_of(name)
    on: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for piece in partition.pieces:
        for axons in piece.axons:
            if axons.port != name:
                continue
            there = axons.fan > 0
            each["synaptic_operations"] += axons.fan
            each["messages"] += there
            if leaves is None:
                each["from_host"] += there
            else:
                same = leaves // per_chip == piece.core // per_chip
                each["between_chips"] += there & ~same
                for axis, a, b in zip("xy", tile(leaves, per_chip), tile(piece.core, per_chip), strict=True):
                    each[f"hops_{axis}"] += np.where(there & same, np.abs(a - b), 0)
            operations, messages = on.setdefault(piece.core, (np.zeros(size), np.zeros(size)))
            operations += axons.fan
            messages += there
    cores = sorted(on)
    return _Port(
        each,
        np.array(cores, np.int64),
        np.stack([on[core][0] for core in cores], 1) if cores else np.zeros((size, 0)),
        np.stack([on[core][1] for core in cores], 1) if cores else np.zeros((size, 0)),
    )


@dataclass(frozen=True)
class Spent:
    """What a run takes as far as prices are known; None where one is missing that would be needed."""

    energy_nj: dict[str, float] | None
    """Dynamic, by what it is spent on."""
    time_ns: float | None
    """No shorter than this."""
    static_nj: float | None
    """Static power of the chips in use times that time; in none of the others."""


def spent(counts: Counts, partition: Partition, costs: Costs) -> Spent:
    """Price ``counts``. Messages between chips, and what the host does, have no price."""
    known = {name: constant.value for name, constant in prices(partition.target, costs).items()}
    energy = None
    if all(name in known for name in ENERGIES):
        here = counts.messages - counts.between_chips
        energy = {
            "synaptic operations": 1e-3 * known["synaptic_operation_pj"] * counts.synaptic_operations,
            "active updates": 1e-3 * known["active_update_pj"] * counts.active_updates,
            "idle updates": 1e-3 * known["idle_update_pj"] * counts.idle_updates,
            "messages": 1e-3
            * (known["message_pj"] * here + known["hop_x_pj"] * counts.hops_x + known["hop_y_pj"] * counts.hops_y),
        }
    time = None
    if all(name in known for name in TIMES):
        resources = (
            known["synaptic_operation_ns"] * counts.core_operations,
            known["active_update_ns"] * counts.core_active + known["idle_update_ns"] * counts.core_idle,
            known["message_ns"] * counts.core_messages,
        )
        used = min(partition.cores, int(partition.target.cores_per_chip.value))
        tiles = max(-(-used // CORES_PER_TILE), 1)
        time = max(resources) + counts.steps * (known["barrier_ns"] + known["barrier_tile_ns"] * (tiles - 1))
    power = static_power(partition.target, costs)
    static = None if time is None or power is None else power.value * partition.chips * time
    return Spent(energy, time, static)
