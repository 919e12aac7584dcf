"""A transformer whose matrices read counts of spikes: signed graded synapses on the cores, the rest on the host.

The host sends counts, a salient channel's once and every other's as often as it counts, as graded spikes; a synapse of
the model's own codes adds them up; the sums go back, where reals begin. A matrix goes in *parts*: of one scale each,
and of so few inputs that no sum can leave a message of 24 bits. So what the cores compute is exact, and with it every
count of the model in float64.

A text is taken piece by piece through one matrix after the other, as attention between them is the host's: of a piece
of S tokens each matrix makes S + 1 steps, those of the others resting. Lava, whose matrices all compute in every step
anyway, has the same weights as one matrix of all rows behind one source, so that one worker does for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from spiking_lm.config import parse_config
from spiking_lm.errors import DataError, LoweringError
from spiking_lm.graph import LMGraph
from spiking_lm.hardware import Figure, PlacedOp, Program, ProgramReport, ProgramResult
from spiking_lm.host import HostModel, HostOp, HostState, host_model
from spiking_lm.host import check as check_host
from spiking_lm.integers import GIFNeurons, IntegerProduct, SpikeProduct
from spiking_lm_lava.arithmetic import STATE_LIMIT
from spiking_lm_lava.config import LavaConfig
from spiking_lm_lava.constants import LOIHI2
from spiking_lm_lava.energy import Counter
from spiking_lm_lava.executor import LavaExecutor, LavaSession
from spiking_lm_lava.figures import report_of
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.partition import Partition, partition
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.simulator import Rows, Simulator

if TYPE_CHECKING:
    from spiking_lm.interfaces import SpikingLanguageModel

PIECE = 128
"""Tokens that go through a matrix before the next one: what the host computes at once."""

Compute = Callable[[str, Rows], Rows]
"""``f(op, charges (S, C))`` gives the sums of its parts, (S, parts, O)."""


@dataclass(frozen=True, eq=False)
class Part:
    """Inputs ``columns`` of a matrix, all of one scale, that one synapse adds up."""

    group: int
    columns: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of whole numbers as synapses."""

    op: str
    product: IntegerProduct
    parts: tuple[Part, ...]
    low: int
    """What may arrive."""
    high: int

    @property
    def bits(self) -> int:
        """The least that hold its weights, sign included."""
        least, most = int(self.product.weight.min()), int(self.product.weight.max())
        return max(most.bit_length(), (-least - 1).bit_length() if least < 0 else 0, 1) + 1

    def names(self, kind: str) -> list[str]:
        """Return the names of the nodes of each part: its ``source``, its ``synapse``, its ``sink``."""
        return [f"{self.op.replace('.', '/')}/{kind}/{number}" for number in range(len(self.parts))]

    def synapse(self, name: str, weight: NDArray[Any]) -> Synapse:
        """Return weights of the matrix in as few bits as they have."""
        shift = 9 - self.bits  # the lowest bit of mixed weights is never kept, nor those beyond num_weight_bits
        held = weight.astype(np.int64) << shift
        return Synapse(name, len(weight), weight=held, weight_exp=-shift, num_weight_bits=self.bits, graded=True)

    def nodes(self) -> Iterator[tuple[Source, Synapse, Sink]]:
        """Yield the processes of each part."""
        rows = len(self.product.weight)
        names = zip(self.parts, *(self.names(kind) for kind in ("source", "synapse", "sink")), strict=True)
        for part, source, synapse, sink in names:
            weight = self.product.weight[:, part.columns]
            yield (
                Source(source, len(part.columns), self.low, self.high),
                self.synapse(synapse, weight),
                Sink(sink, rows),
            )

    def network(self) -> Network:
        """Return the network of this matrix alone."""
        return _network([self])


@dataclass(frozen=True, eq=False)
class OnCores(IntegerProduct):
    """A product whose sums are computed elsewhere."""

    matrix: Matrix
    compute: Compute

    def add_up(self, counts: NDArray[Any]) -> NDArray[np.int64]:
        """Return the sums ``(S, O, G)`` of ``counts (S, C)``: those of the parts, and what the host adds to them."""
        charges = counts * self.gain
        found = self.compute(self.matrix.op, charges)
        sums = np.zeros((len(counts), *self.scale.shape), np.int64)
        for number, part in enumerate(self.matrix.parts):
            sums[:, :, part.group] += found[:, number]
        if self.shifts:
            for g in range(self.groups):
                sums[:, :, g] += charges[:, self.group == g].sum(1)[:, None] * self.shift[:, g]
        return sums + self.zero_bias


class ProductsProgram(Program):
    """A language model with its matrices of whole numbers on Loihi's cores, or in Lava. States are the host's."""

    backend: ClassVar[str] = "lava"
    reals: ClassVar[Literal["float32", "float64"]] = "float64"

    def __init__(self, host: HostModel, operations: Mapping[str, int], config: LavaConfig, *, model: str) -> None:
        """Place the products of ``host``; ``operations`` are those of each op per token.

        Raises: LoweringError for a matrix that no core or board holds.
        """
        self.host, self.operations, self.config, self.model = host, dict(operations), config, model
        self.vocab_size = host.vocab_size
        self.matrices = _matrices(host)
        if not self.matrices:
            raise LoweringError("the model has no matrix of whole numbers", hint="convert one to spikellm")
        self.partition: Partition = partition(_network(self.matrices.values()), LOIHI2, board=config.board)

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, tokens: NDArray[Any], state: Any = None) -> ProgramResult:
        """Feed one stream of ``tokens (S,)``, going on from ``state``, a :class:`~spiking_lm.host.HostState`.

        Raises: DataError for ids beyond the vocabulary or the state of another program; PluginError where Lava is to
        run it and is not set up, or fails.
        """
        ids = self.check_tokens(tokens)
        counter = Counter(self.partition)
        logits = np.empty((len(ids), self.vocab_size), np.float32)
        after: HostState | None = state
        if not len(ids):
            _, after = self.host.run(ids, state)
        for start in range(0, len(ids), PIECE):
            piece = slice(start, start + PIECE)
            with self._computing(len(ids[piece])) as compute:
                given, after = self._with(compute, counter).run(ids[piece], after)
            logits[piece] = given
        counters = {"tokens": len(ids), "executor": self.config.executor, "counts": counter.counts.to_dict()}
        return ProgramResult(logits, after, counters)

    def _with(self, compute: Compute, counter: Counter) -> HostModel:
        """Return the host whose products are computed by ``compute``, and counted."""

        def counted(op: str, charges: Rows) -> Rows:
            sums, matrix = compute(op, charges), self.matrices[op]
            sent: dict[str, Rows] = {}
            names = zip(matrix.parts, matrix.names("source"), matrix.names("synapse"), strict=True)
            for number, (part, source, synapse) in enumerate(names):
                sent[f"{source}.s_out"] = np.pad(charges[:, part.columns], ((0, 1), (0, 0)))
                sent[f"{synapse}.a_out"] = np.pad(sums[:, number], ((1, 0), (0, 0)))
            counter.add(sent)
            return sums

        ops = []
        for op in self.host.ops:
            dynamics = op.dynamics
            if isinstance(dynamics, IntegerProduct):
                held = {item.name: getattr(dynamics, item.name) for item in fields(dynamics)}
                dynamics = OnCores(**held, matrix=self.matrices[op.name], compute=counted)
            ops.append(HostOp(op.name, op.kind, op.inputs, op.size, dynamics, op.parameters))
        return HostModel(ops, self.host.parameters)

    @contextmanager
    def _computing(self, tokens: int) -> Iterator[Compute]:
        """Give what computes sums for one piece of a text; Lava's worker ends with it."""
        if self.config.executor == "simulator":
            yield self._simulated
            return
        joined = self.joined
        steps = (tokens + 1) * len(self.matrices)
        with LavaSession(LavaExecutor.find().lava, joined.network, steps) as session:

            def ask(op: str, charges: Rows) -> Rows:
                return joined.sums(op, charges, lambda x: session.advance({"x": x})["y"])

            yield ask

    def _simulated(self, op: str, charges: Rows) -> Rows:
        matrix, simulator = self.matrices[op], self._simulators[op]
        padded = np.pad(charges, ((0, 1), (0, 0)))  # a synapse sends one step later
        inputs = {
            name: padded[:, part.columns] for part, name in zip(matrix.parts, matrix.names("source"), strict=True)
        }
        sinks = simulator.run(inputs).sinks
        return np.stack([sinks[name][1:] for name in matrix.names("sink")], 1)

    @cached_property
    def _simulators(self) -> dict[str, Simulator]:
        return {op: Simulator(matrix.network()) for op, matrix in self.matrices.items()}

    @cached_property
    def joined(self) -> Joined:
        """All matrices as one, for Lava."""
        return Joined.of(list(self.matrices.values()))

    # -- report --------------------------------------------------------------------------------------------------------

    def report(self, result: ProgramResult | None = None) -> ProgramReport:
        """Say what is where, and, given what a run counted, how often what happened and what that takes."""
        counters = {} if result is None else result.counters
        parts = sum(len(matrix.parts) for matrix in self.matrices.values())
        schedule = f"matrices take turns, each with {PIECE} tokens at most; the others rest, and count as idle"
        split = f"of {len(self.matrices)} matrices: each of one scale, and of sums within 24 bits"
        return report_of(
            model=self.model,
            placement=[self._place(op) for op in self.host.ops],
            partition=self.partition,
            operations=self.operations,
            counts=counters.get("counts"),
            tokens=counters.get("tokens", 0),
            costs=self.config.costs,
            further=[Figure("synapses", parts, "", "derived", split)],
            warnings=[schedule],
        )

    def _place(self, op: HostOp) -> PlacedOp:
        if op.name in self.matrices:
            matrix = self.matrices[op.name]
            nodes = matrix.names("synapse")
            form = f"int{matrix.bits} dense, graded" + (f", {len(nodes)} parts" if len(nodes) > 1 else "")
            where, weights = self.partition.where(*nodes), matrix.product.weight.size
            return PlacedOp(op.name, op.kind, "neuromorphic", where, form, weights, self.partition.bytes(*nodes))
        held = [self.host.parameters[name] for role, name in op.parameters.items() if role in ("weight", "bias")]
        form = f"{held[0].dtype} dense" if held else ""
        weights, size = sum(array.size for array in held), sum(array.nbytes for array in held)
        return PlacedOp(op.name, op.kind, "host", "host", form, weights, size)

    # -- folder --------------------------------------------------------------------------------------------------------

    def to_folder(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return what ``program.json`` and ``weights.safetensors`` hold: the host's model; synapses follow from it."""
        ops, tensors = self.host.to_folder()
        options = self.config.model_dump(mode="json")
        return {"model": self.model, "options": options, "products": ops, "operations": self.operations}, tensors

    @classmethod
    def from_folder(cls, record: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> ProductsProgram:
        """Rebuild a program from a record with ``"products"``.

        Raises: DataError, LoweringError, KeyError, TypeError or ValueError for one that is damaged.
        """
        config = parse_config(LavaConfig, record["options"], where="program.json, options", error=DataError)
        host = HostModel.from_folder(record["products"], tensors)
        operations = {str(name): int(count) for name, count in record["operations"].items()}
        if operations.keys() != host.by_name.keys():
            raise ValueError("operations are not those of the ops")
        return cls(host, operations, config, model=str(record["model"]))


@dataclass(frozen=True, eq=False)
class Joined:
    """All parts of all matrices as rows of one, which reads one source as wide as the widest."""

    network: Network
    rows: dict[str, list[slice]]
    """By op, the rows of its parts."""
    width: int

    @classmethod
    def of(cls, matrices: list[Matrix]) -> Joined:
        """Join matrices."""
        width = max(matrix.product.weight.shape[1] for matrix in matrices)
        blocks: list[NDArray[np.int64]] = []
        rows: dict[str, list[slice]] = {}
        first = 0
        for matrix in matrices:
            for part in matrix.parts:
                block = np.zeros((len(matrix.product.weight), width), np.int64)
                block[:, part.columns] = matrix.product.weight[:, part.columns]
                blocks.append(block)
                rows.setdefault(matrix.op, []).append(slice(first, first + len(block)))
                first += len(block)
        nodes: tuple[Process, ...] = (
            Source("x", width, min(matrix.low for matrix in matrices), max(matrix.high for matrix in matrices)),
            Synapse.int8("w", np.concatenate(blocks), graded=True),
            Sink("y", first),
        )
        return cls(Network(nodes, (Edge("x", "w"), Edge("w", "y"))), rows, width)

    def sums(self, op: str, charges: Rows, advance: Callable[[Rows], Rows]) -> Rows:
        """Return the sums of an op's parts (S, parts, O); ``advance`` gives what arrives for the rows of the source."""
        given = np.pad(charges, ((0, 1), (0, self.width - charges.shape[1])))
        found = advance(given)[1:]
        return np.stack([found[:, rows] for rows in self.rows[op]], 1)


def lower_products(model: SpikingLanguageModel, config: LavaConfig) -> ProductsProgram:
    """Turn a model whose matrices read counts of spikes into a program, from its ``graph()`` and ``state_dict()``.

    Raises: LoweringError naming the op that has no such form, or that no core or board holds.
    """
    operations = {
        op.name: op.weight[0] * op.weight[1] if op.weight is not None else op.other_ops for op in model.graph()
    }
    return ProductsProgram(host_model(model), operations, config, model=model.config.model_type)


def check_products(graph: LMGraph, config: LavaConfig) -> None:
    """Raise LoweringError where a model of ``graph``, whatever its weights, cannot become such a program."""
    check_host(graph)


def reads_counts(graph: LMGraph) -> bool:
    """Whether the model has matrices that read counts of spikes, or could be converted to have them."""
    return any(isinstance(op.dynamics, SpikeProduct) for op in graph)


def _network(matrices: Any) -> Network:
    nodes: list[Process] = []
    edges = []
    for matrix in matrices:
        for source, synapse, sink in matrix.nodes():
            nodes += [source, synapse, sink]
            edges += [Edge(source.name, synapse.name), Edge(synapse.name, sink.name)]
    return Network(tuple(nodes), tuple(edges))


def _matrices(host: HostModel) -> dict[str, Matrix]:
    """Return the matrices of whole numbers, in parts. What arrives has the same bounds at all of them."""
    products = {op.name: op.dynamics for op in host.ops if isinstance(op.dynamics, IntegerProduct)}
    low = high = 0
    for op, product in products.items():
        neurons = cast(GIFNeurons, host.by_name[host.by_name[op].inputs[0]].dynamics)
        kind = neurons.salient.astype(np.intp)
        low = min(low, int((product.gain * (neurons.low - neurons.zero)[kind]).min()))
        high = max(high, int((product.gain * (neurons.high - neurons.zero)[kind]).max()))
    return {op: Matrix(op, product, _parts(op, product, low, high), low, high) for op, product in products.items()}


def _parts(op: str, product: IntegerProduct, low: int, high: int) -> tuple[Part, ...]:
    """Cut the inputs of each scale where a sum could leave 24 bits. Raises: LoweringError where one weight does."""
    parts = []
    for group in range(product.groups):
        columns = np.flatnonzero(product.group == group)
        weight = product.weight[:, columns].astype(np.int64)
        up, down = np.maximum(weight, 0), np.minimum(weight, 0)
        ends = np.concatenate([up * high + down * low, -(up * low + down * high)])  # the greatest, the least negated
        reach, first = np.pad(ends.cumsum(1), ((0, 0), (1, 0))), 0
        while first < len(columns):
            fits = (reach[:, first:] - reach[:, first, None]).max(0) < STATE_LIMIT
            last = first + int(np.argmin(fits) if not fits.all() else len(fits)) - 1
            if last == first:
                raise LoweringError(
                    f"op {op!r} (linear): a count of up to {max(high, -low):,} times a weight leaves 24 bits",
                    hint="convert the model with less convert.activations.bits",
                )
            parts.append(Part(group, columns[first:last]))
            first = last
    return tuple(parts)
