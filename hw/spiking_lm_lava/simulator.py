"""Running a network: step by step as the processes say, or fast.

:func:`reference` calls every process once per step; it is the definition. :class:`Simulator` gives the same integers
sooner: a matrix product in floating point wherever the sums are exact in it, of spikes only the rows of active
inputs, and, outside of loops, all steps of a layer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import DataError
from spiking_lm_lava.arithmetic import ALIGN_SHIFT, DECAY_UNITY, STATE_LIMIT, decayed, shift
from spiking_lm_lava.network import Network
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.process import Delaying, Process, Sink, Source, State, Synapse
from spiking_lm_lava.values import Range

Rows = NDArray[Any]
"""(T, size): one row per step."""

_EXACT_FLOAT32, _EXACT_FLOAT64 = 2**24, 2**53
_FEW = 0.25
"""Share of active inputs up to which their rows are gathered rather than the whole matrix multiplied."""
_ROWS_AT_ONCE = 1024
"""Steps of a matrix product at once, which bounds the memory for copies."""


@dataclass
class NetworkState:
    """Where a run stands: how many steps were made, and the state of every process."""

    t: int
    nodes: dict[str, State]

    @classmethod
    def of(cls, network: Network) -> NetworkState:
        """Return the state before the first step."""
        return cls(0, {node.name: node.initial() for node in network.nodes})

    def copy(self) -> NetworkState:
        """Return a snapshot: processes replace their arrays and never write to them."""
        return NetworkState(self.t, {name: dict(state) for name, state in self.nodes.items()})


@dataclass
class Run:
    """What a run gave."""

    sinks: dict[str, Rows]
    """By sink, what arrived."""
    state: NetworkState
    """After the last step: hand it to the next run."""
    watched: dict[str, Rows] = field(default_factory=dict)
    """By ``"node.state"``, after each step."""


def reference(
    network: Network, inputs: Mapping[str, Rows], state: NetworkState | None = None, watch: Iterable[str] = ()
) -> Run:
    """Run ``inputs`` (source -> rows) step by step. Raises: DataError for inputs that do not fit the sources."""
    rows, steps = checked_inputs(network, inputs)
    now = NetworkState.of(network) if state is None else state.copy()
    names = watched_states(network, watch)
    sinks: dict[str, list[Any]] = {node.name: [] for node in network.of_kind(Sink)}
    watched: dict[str, list[Any]] = {name: [] for name in names}
    for column in range(steps):
        now.t += 1
        sent: dict[str, Any] = {}
        for node in network.nodes:
            if isinstance(node, Delaying):
                sent[f"{node.name}.{node.sends[0]}"] = node.emit(now.nodes[node.name])
        for name in network.order:
            node = network[name]
            if isinstance(node, Source):
                sent[f"{name}.{node.sends[0]}"] = rows[name][column]
                continue
            arrived = [sum(sent[edge.source] for edge in network.arriving(name, port)) for port in node.reads]
            if isinstance(node, Sink):
                sinks[name].append(arrived[0])
            elif isinstance(node, Delaying):
                node.receive(now.nodes[name], *arrived)
            else:
                results = node.step(now.nodes[name], now.t, *arrived)
                sent.update({f"{name}.{port}": value for port, value in zip(node.sends, results, strict=True)})
        for name, (node_name, of_node) in names.items():
            watched[name].append(now.nodes[node_name][of_node])
    return Run(
        {name: _stacked(values, network[name].size) for name, values in sinks.items()},
        now,
        {name: _stacked(values, network[node].size) for name, (node, _) in names.items() for values in [watched[name]]},
    )


class Simulator:
    """A network made ready to run fast; it keeps nothing of a run."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._slot = {f"{node.name}.{port}": 0 for node in network.nodes for port in node.sends}
        self._slot = {name: slot for slot, name in enumerate(self._slot)}
        self._products = {
            node.name: _Product(node, _most(network, node))
            for node in network.nodes
            if isinstance(node, Synapse) and network.checked
        }
        self._nodes = {node.name: self._prepared(node) for node in network.nodes}
        self._all = [self._nodes[name] for name in network.order]
        self._delaying = [part for part in self._all if isinstance(part.node, Delaying)]
        self._groups = [[self._nodes[name] for name in group] for group in network.groups()]

    def _prepared(self, node: Process) -> _Prepared:
        reads = [[self._slot[edge.source] for edge in self.network.arriving(node.name, port)] for port in node.reads]
        sends = [self._slot[f"{node.name}.{port}"] for port in node.sends]
        lif = None
        if self.network.checked and isinstance(node, LIF) and node.vth_lo is None and not node.reset_interval:
            lif = _BinaryLIF(node, saturates="v" in self.network.bounds[node.name].saturates)
        return _Prepared(node, reads, sends, self._products.get(node.name), lif)

    def initial(self) -> NetworkState:
        """Return the state before the first step."""
        return NetworkState.of(self.network)

    def step(self, inputs: Mapping[str, Rows], state: NetworkState) -> dict[str, Rows]:
        """Make one step with ``inputs`` (source -> one row), which are not checked, and change ``state``.

        Returns by sink what arrived.
        """
        state.t += 1
        values: list[Any] = [None] * len(self._slot)
        nodes = state.nodes
        for part in self._delaying:
            values[part.sends[0]] = nodes[part.node.name]["pending"][0]
        sinks = {}
        for part in self._all:
            name = part.node.name
            if not part.reads:
                values[part.sends[0]] = inputs[name]
                continue
            arrived = [_gather(values, slots) for slots in part.reads]
            if not part.sends:
                sinks[name] = arrived[0]
            elif part.delays:
                part.receive(nodes[name], arrived[0])
            else:
                for slot, value in zip(part.sends, part.step(nodes[name], state.t, *arrived), strict=True):
                    values[slot] = value
        return sinks

    def run(
        self,
        inputs: Mapping[str, Rows],
        state: NetworkState | None = None,
        watch: Iterable[str] = (),
        observe: Callable[[dict[str, Rows]], None] | None = None,
    ) -> Run:
        """Run ``inputs`` (source -> rows), going on from ``state``, and keep the states named in ``watch``.

        ``observe`` is given what every node sent: ``"node.port"`` -> (T, values).

        Raises: DataError for inputs that do not fit the sources, or a state that is not there.
        """
        rows, steps = checked_inputs(self.network, inputs)
        now = self.initial() if state is None else state.copy()
        names = watched_states(self.network, watch)
        wanted: dict[str, dict[str, list[Any]]] = {}
        for node, of_node in names.values():
            wanted.setdefault(node, {})[of_node] = []
        values: list[Any] = [None] * len(self._slot)
        sinks: dict[str, Rows] = {}
        for group in self._groups:
            first = group[0]
            if len(group) == 1 and not first.loops:
                name = first.node.name
                if isinstance(first.node, Source):
                    values[first.sends[0]] = rows[name]
                elif isinstance(first.node, Sink):
                    sinks[name] = _gather(values, first.reads[0])
                else:
                    arrived = [_gather(values, slots) for slots in first.reads]
                    sent = first.run(now.nodes[name], now.t, arrived, wanted.get(name, {}), steps)
                    for slot, value in zip(first.sends, sent, strict=True):
                        values[slot] = value
            else:
                self._run_loop(group, values, now, wanted, steps)
        now.t += steps
        if observe is not None:
            observe({port: values[slot] for port, slot in self._slot.items()})
        watched = {
            name: _stacked(wanted[node][of_node], self.network[node].size) for name, (node, of_node) in names.items()
        }
        return Run(sinks, now, watched)

    def _run_loop(
        self,
        group: list[_Prepared],
        values: list[Any],
        now: NetworkState,
        wanted: dict[str, dict[str, list[Any]]],
        steps: int,
    ) -> None:
        """Run the nodes of a loop step by step; what reaches them from outside is there for all steps."""
        own = {slot for part in group for slot in part.sends}
        column: list[Any] = [None] * len(values)
        outside = sorted({slot for part in group for slots in part.reads for slot in slots} - own)
        sent: dict[int, list[Any]] = {slot: [] for slot in own}
        for i in range(steps):
            for slot in outside:
                column[slot] = values[slot][i]
            for part in group:
                if part.delays:
                    column[part.sends[0]] = now.nodes[part.node.name]["pending"][0]
            for part in group:
                name = part.node.name
                arrived = [_gather(column, slots) for slots in part.reads]
                if part.delays:
                    part.receive(now.nodes[name], arrived[0])
                else:
                    for slot, value in zip(
                        part.sends, part.step(now.nodes[name], now.t + i + 1, *arrived), strict=True
                    ):
                        column[slot] = value
                for of_node, kept in wanted.get(name, {}).items():
                    kept.append(now.nodes[name][of_node])
            for slot in own:
                sent[slot].append(column[slot])
        for part in group:
            for slot, port in zip(part.sends, part.node.sends, strict=True):
                values[slot] = _stacked(sent[slot], part.node.port_size(port))


class _Prepared:
    """A node with the slots that it reads and writes."""

    def __init__(
        self,
        node: Process,
        reads: list[list[int]],
        sends: list[int],
        product: _Product | None,
        lif: _BinaryLIF | None,
    ) -> None:
        self.node, self.reads, self.sends, self.product = node, reads, sends, product
        self.delays = isinstance(node, Delaying)
        self.loops = bool({slot for slots in reads for slot in slots} & set(sends))
        self.step: Callable[..., tuple[Any, ...]] = node.step if lif is None else lif

    def receive(self, state: State, arrived: Any) -> None:
        """Let a process that delays take one row."""
        if self.product is None:
            assert isinstance(self.node, Delaying)
            self.node.receive(state, arrived)
            return
        pending = state["pending"]
        sums = self.product.row(arrived)
        if len(pending) == 1:
            state["pending"] = sums[0][1][None]
            return
        ahead = np.concatenate([pending[1:], np.zeros_like(pending[:1])])
        for delay, part in sums:
            ahead[delay] += part
        state["pending"] = ahead

    def run(
        self, state: State, t: int, arrived: list[Rows], wanted: dict[str, list[Any]], steps: int
    ) -> tuple[Rows, ...]:
        """Run all steps after step ``t`` of a node that is in no loop."""
        if self.product is not None:
            pending = state["pending"]
            ahead = np.zeros((steps + len(pending), self.node.size), np.int64)
            ahead[: len(pending)] = pending
            for delay, part in self.product.rows(arrived[0]):
                ahead[1 + delay : 1 + delay + steps] += part
            state["pending"] = ahead[steps:].copy()
            return (ahead[:steps],)
        if not state and steps:
            return self.step(state, t, *arrived)
        sent: list[list[Any]] = [[] for _ in self.sends]
        for i in range(steps):
            results = self.step(state, t + i + 1, *(rows[i] for rows in arrived))
            for kept, value in zip(sent, results, strict=True):
                kept.append(value)
            for name, values in wanted.items():
                values.append(state[name])
        sizes = [self.node.port_size(port) for port in self.node.sends]
        return tuple(_stacked(kept, size) for kept, size in zip(sent, sizes, strict=True))


class _BinaryLIF:
    """The step of a LIF without what range analysis says is never needed: a current never wraps, and what a membrane
    loses at the upper end of its bits is lost to the spike in any case."""

    def __init__(self, node: LIF, *, saturates: bool) -> None:
        self.du, self.dv, self.threshold = node.du + 1, node.dv, node.vth << ALIGN_SHIFT
        self.bias = node.bias if node.bias.any() else None
        self.least = 1 - STATE_LIMIT if saturates else None

    def __call__(self, state: State, t: int, a: Any) -> tuple[Any, ...]:
        """Return spikes, and put the next state into ``state``."""
        u = a << ALIGN_SHIFT
        if self.du < DECAY_UNITY:
            u += decayed(state["u"], self.du)
        v = u.copy() if self.dv == DECAY_UNITY else decayed(state["v"], self.dv) + u
        if self.bias is not None:
            v += self.bias
        if self.least is not None:
            np.maximum(v, self.least, out=v)
        spikes = (v > self.threshold).astype(np.int64)
        v *= 1 - spikes
        state["u"], state["v"] = u, v
        return (spikes,)


class _Product:
    """The matrix of a synapse for sums that are known to be exact in floating point."""

    def __init__(self, synapse: Synapse, most: int) -> None:
        self.synapse = synapse
        bound = most * int(np.abs(synapse.prepared).sum(1).max())
        self.real: Any = np.float32 if bound < _EXACT_FLOAT32 else np.float64
        # (inputs, outputs), so that what an active input adds is one row.
        self.groups = [(d, np.ascontiguousarray(w.T.astype(self.real))) for d, w in synapse.groups()]
        self.few = int(_FEW * synapse.inputs)

    def _whole(self, sums: Any) -> Rows:
        return shift(sums.astype(np.int64), self.synapse.weight_exp)

    def row(self, s: Rows) -> list[tuple[int, Rows]]:
        """Return what one row of input adds, by delay."""
        active = np.flatnonzero(s)
        if len(active) <= self.few:
            if not self.synapse.graded:
                return [(d, self._whole(w[active].sum(0))) for d, w in self.groups]
            given = s[active].astype(self.real)
            return [(d, self._whole(given @ w[active])) for d, w in self.groups]
        given = (s if self.synapse.graded else s != 0).astype(self.real)
        return [(d, self._whole(given @ w)) for d, w in self.groups]

    def rows(self, s: Rows) -> list[tuple[int, Rows]]:
        """Return what each row of input adds, by delay."""
        parts: list[tuple[int, Rows]] = []
        for d, w in self.groups:
            sums = np.empty((len(s), w.shape[1]), np.int64)
            for start in range(0, len(s), _ROWS_AT_ONCE):
                given = s[start : start + _ROWS_AT_ONCE]
                given = (given if self.synapse.graded else given != 0).astype(self.real)
                sums[start : start + _ROWS_AT_ONCE] = self._whole(given @ w)
            parts.append((d, sums))
        return parts


def _most(network: Network, node: Synapse) -> int:
    """Return the greatest magnitude that arrives at a synapse."""
    if not node.graded:
        return 1
    total = Range.nothing(node.inputs)
    for edge in network.arriving(node.name, node.reads[0]):
        source, _, port = edge.source.partition(".")
        total = total + network.bounds[source].sends[network[source].sends.index(port)]
    return total.most


def _gather(values: list[Any], slots: list[int]) -> Any:
    total = values[slots[0]]
    for slot in slots[1:]:
        total = total + values[slot]
    return total


def _stacked(rows: list[Any], size: int) -> Rows:
    return np.stack(rows) if rows else np.zeros((0, size), np.int64)


def checked_inputs(network: Network, inputs: Mapping[str, Rows]) -> tuple[dict[str, Rows], int]:
    """Return the rows of every source, int64, and how many steps they are. Raises: DataError for what does not fit."""
    sources = {node.name: node for node in network.nodes if isinstance(node, Source)}
    if inputs.keys() != sources.keys():
        raise DataError(f"inputs are given for {sorted(inputs)}, the network's sources are {sorted(sources)}")
    rows: dict[str, Rows] = {}
    for name, source in sources.items():
        given = np.asarray(inputs[name])
        if given.ndim != 2 or given.shape[1] != source.size or given.dtype.kind not in "iub":
            raise DataError(f"source {name!r} takes whole numbers (T, {source.size}), not {given.dtype} {given.shape}")
        if network.checked and given.size and (given.min() < source.low or given.max() > source.high):
            raise DataError(
                f"source {name!r}: from {given.min()} to {given.max()}, declared are {source.low} to {source.high}"
            )
        rows[name] = given.astype(np.int64)
    lengths = {len(given) for given in rows.values()}
    if len(lengths) > 1:
        raise DataError(f"inputs of {sorted(lengths)} steps: all sources take the same number")
    return rows, lengths.pop() if lengths else 0


def watched_states(network: Network, watch: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return node and state of every ``"node.state"``. Raises: DataError for one that is not there."""
    found = {}
    for name in watch:
        node, _, state = name.partition(".")
        if node not in network or state not in network[node].watchable:
            raise DataError(f"there is no state {name!r} to watch")
        found[name] = (node, state)
    return found
