"""From a trained model's graph and state dict to a :class:`~spiking_lm_lava.program.LavaProgram`.

Graphs of other forms than chains of event-based gated units have modules of their own: :func:`lower` and :func:`check`
say which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import LoweringError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.hardware import Program
from spiking_lm.interfaces import EGRUDynamics, SpikingLanguageModel
from spiking_lm.op_parameters import OpParameters
from spiking_lm_lava.cell import EGRU, Affine
from spiking_lm_lava.config import LavaConfig
from spiking_lm_lava.pipeline import TokenGraph, Wire
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.program import LOGITS, LavaProgram, LoweredOp, Parts
from spiking_lm_lava.quantise import (
    LIMIT,
    Array,
    Int8,
    Seen,
    most_of_messages,
    observe,
    quantise_rows,
    quantise_table,
)
from spiking_lm_lava.spikellm import check_products, lower_products, reads_counts
from spiking_lm_lava.worker.cells.egru import MEMBRANE
from spiking_lm_lava.worker.cells.fixed import GATE, ONE, multiplier

LOWERED = (
    "an embedding, layers of event-based gated units and matrices after them, one after another; SpikeGPT; models "
    "whose matrices read whole numbers"
)

REASONS = {
    "norm": "needs the mean of all units of a layer, for which a chain of these units has no process",
    "token_shift": "mixes with the token before, for which a chain of these units has no process",
    "elementwise": "computes with real numbers that are no events: GRU and LSTM send all values at every token",
    "residual": "adds what two paths give, and a chain has one",
    "pool": "works on whole texts, a program on single tokens",
    "neuron": "is another neuron than an event-based gated unit",
}

MOST_FRACTION = 12
"""Of events and of messages between matrices: finer than that, 8-bit weights would not tell the difference."""
HEADROOM = 1.5
"""Beyond what calibration saw, before a message between two matrices is clipped."""


def lower(model: SpikingLanguageModel, config: LavaConfig, text: NDArray[Any] | None = None) -> Program:
    """Turn ``model`` into a program, int8, from its ``graph()`` and ``state_dict()``; ``text`` (S,) calibrates it.

    Without text the formats follow from the weights alone. Raises: LoweringError naming the op, its kind and why it has
    no process, or what would overflow.
    """
    graph = model.graph()
    if any(op.kind == "wkv" for op in graph):
        from spiking_lm_lava.lower_spikegpt import lower_spikegpt

        program: Program = lower_spikegpt(model, config, text)
        return program
    check(graph, config)
    if reads_counts(graph):
        return lower_products(model, config)
    seen = {} if text is None or not len(text) else observe(model, text)
    chain = _Chain(model, graph, seen, text if seen else None)
    for op in graph:
        chain.add(op)
    return LavaProgram(chain.finished(), config, model=model.config.model_type)


def check(graph: LMGraph, config: LavaConfig) -> None:
    """Raise LoweringError where a model of ``graph``, whatever its weights, cannot be lowered."""
    if any(op.kind == "wkv" for op in graph):
        from spiking_lm_lava.lower_spikegpt import check_spikegpt

        check_spikegpt(graph, config)
        return
    if reads_counts(graph):
        check_products(graph, config)
        return
    foreign: dict[str, Op] = {}
    for op in graph:
        if op.kind not in ("embedding", "linear") and not isinstance(op.dynamics, EGRUDynamics):
            foreign.setdefault(op.kind, op)
    if foreign:
        reasons = "; ".join(
            f"op {op.name!r} ({kind}) {REASONS.get(kind, 'has no process')}" for kind, op in foreign.items()
        )
        raise LoweringError(f"the model cannot be lowered to Lava: {reasons}", hint=f"what can be: {LOWERED}")
    tables = [op for op in graph if op.kind == "embedding"]
    units = [op for op in graph if op.kind == "neuron"]
    last = graph.ops[-1]
    if len(tables) != 1 or tables[0].inputs != ("tokens",) or not units or last.kind != "linear":
        raise LoweringError(
            f"the model has {len(tables)} embeddings and {len(units)} layers of event-based gated units, and ends with "
            f"op {last.name!r} ({last.kind})",
            hint=f"what can be lowered: {LOWERED}",
        )
    for op in graph:
        _check_reads(op, graph)


def _check_reads(op: Op, graph: LMGraph) -> None:
    """Refuse an op that reads something else than one of its kind does in a chain."""
    if isinstance(op.dynamics, EGRUDynamics):
        matrices = [graph[name] for name in op.inputs if name != "tokens"]
        if (
            len(matrices) == 2
            and [m.kind for m in matrices] == ["linear", "linear"]
            and not matrices[0].recurrent
            and (matrices[1].inputs, matrices[1].recurrent) == ((), (op.name,))
        ):
            return
        raise LoweringError(f"op {op.name!r} (neuron) reads {op.inputs}, not an input and its own recurrent matrix")
    if op.kind == "linear" and len(op.inputs) + len(op.recurrent) != 1:
        raise LoweringError(f"op {op.name!r} (linear) reads {op.inputs} and the last {op.recurrent}, not one op")


@dataclass(frozen=True)
class _Messages:
    """What an op gives to matrices: whole numbers from a node."""

    node: str
    scale: float
    """What a one of them stands for."""


@dataclass(frozen=True)
class _Sums:
    """What a matrix gives: sums at a synapse, and a bias in real numbers."""

    node: str
    scale: Array
    """(out,): what a one of each stands for."""
    bias: Array


class _Chain:
    """Nodes, wires and ops of a chain, added in the order of the graph."""

    def __init__(
        self, model: SpikingLanguageModel, graph: LMGraph, seen: dict[str, Seen], text: NDArray[Any] | None
    ) -> None:
        self.graph, self.seen, self.text = graph, seen, text
        self.weights = OpParameters(model, np.float64)
        self.codes: dict[str, tuple[Int8, Array]] = {
            op.name: quantise_rows(self.weights.of(op, "weight"), seen.get(op.name))
            for op in graph
            if op.kind == "linear"
        }
        self.nodes: list[Process] = []
        self.wires: list[Wire] = []
        self.ops: list[LoweredOp] = []
        self.tables: dict[str, NDArray[Any]] = {}
        self.given: dict[str, _Messages | _Sums] = {}
        """By op, what its readers find."""

    def add(self, op: Op) -> None:
        """Add what becomes of an op whose inputs have been added."""
        if op.kind == "embedding":
            self._embedding(op)
        elif op.kind == "neuron":
            self._units(op)
        elif not op.recurrent:  # recurrent matrices come with their units, whose format they share
            self._matrix(op)

    def finished(self) -> Parts:
        """End the chain with the sink of logits."""
        last = self.graph.ops[-1]
        sums = self.given[last.name]
        assert isinstance(sums, _Sums)
        self.nodes.append(Sink(LOGITS, len(sums.bias)))
        self.wires.append(Wire(sums.node, LOGITS))
        order = {op.name: at for at, op in enumerate(self.graph)}
        ops = tuple(sorted(self.ops, key=lambda op: order[op.name]))
        return Parts(TokenGraph(tuple(self.nodes), tuple(self.wires)), self.tables, sums.scale, sums.bias, ops)

    def _embedding(self, op: Op) -> None:
        codes, scale = quantise_table(self.weights.of(op, "weight"), self.text)
        node = node_name(op.name)
        self.nodes.append(Source(node, codes.shape[1], -LIMIT, LIMIT))
        self.tables[node] = codes
        self.given[op.name] = _Messages(node, scale)
        self.ops.append(LoweredOp(op.name, op.kind, "host", (node,), "int8 rows, graded", codes.size, codes.nbytes))

    def _matrix(self, op: Op) -> None:
        given = self.given[op.inputs[0]]
        if isinstance(given, _Sums):
            given = self.given[op.inputs[0]] = self._message(self.graph[op.inputs[0]], given)
        self.given[op.name] = self._synapse(op, given)

    def _synapse(self, op: Op, given: _Messages) -> _Sums:
        codes, scales = self.codes[op.name]
        node = node_name(op.name)
        bias = self.weights.find(op, "bias")
        self.nodes.append(Synapse.int8(node, codes, graded=True))
        self.wires.append(Wire(given.node, node))
        self.ops.append(
            LoweredOp(op.name, op.kind, "neuromorphic", (node,), "int8 dense", codes.size, codes.nbytes, codes.size)
        )
        return _Sums(node, scales * given.scale, np.zeros(len(codes)) if bias is None else bias)

    def _most(self, op: Op) -> int:
        """Return the greatest magnitude that messages of ``op`` may have for the sums of its readers."""
        return most_of_messages(self.codes[reader.name][0] for reader in self.graph.readers(op.name))

    def _message(self, op: Op, sums: _Sums) -> _Messages:
        """Add the cell that makes messages of a matrix's sums for the matrix that reads them."""
        reader = self.graph.readers(op.name)[0]
        if reader.name in self.seen:
            reach = HEADROOM * float(self.seen[reader.name].most.max())
        else:
            reach = float(np.abs(self.weights.of(op, "weight")).sum(1).max() + np.abs(sums.bias).max())
        most = self._most(op)
        fraction = min(MOST_FRACTION, int(np.floor(np.log2(most / max(reach, 2.0**-8)))))
        limit = min(most, int(np.ceil(reach * 2.0**fraction)))
        mantissa, shift = self._multiplier(op, sums.scale * 2.0**fraction)
        node = node_name(op.name) + "/out"
        bias = np.rint(sums.bias * 2.0**fraction).astype(np.int64)
        self.nodes.append(Affine(node, len(bias), mantissa=mantissa, shift=shift, bias=bias, limit=limit))
        self.wires.append(Wire(sums.node, f"{node}.a_in"))
        self._extend(op, node)
        return _Messages(node, 2.0**-fraction)

    def _units(self, op: Op) -> None:
        assert isinstance(op.dynamics, EGRUDynamics)
        x, recurrent = (self.graph[name] for name in op.inputs)
        sums = self.given[x.name]
        assert isinstance(sums, _Sums)
        fraction = min(MOST_FRACTION, int(np.floor(np.log2(max(self._most(op), 1)))))
        if fraction < 1:
            raise LoweringError(
                f"op {op.name!r} (neuron): the weights that read its events leave these {fraction} bits in 24-bit sums",
                hint="fewer units",
            )
        node = node_name(op.name)
        again = self._synapse(recurrent, _Messages(node, 2.0**-fraction))
        gates = 2.0**GATE
        x_mantissa, x_shift = self._multiplier(x, sums.scale * gates)
        q_mantissa, q_shift = self._multiplier(recurrent, again.scale * gates)
        threshold = np.clip(self.weights.of(op, "threshold"), 0, 1)
        self.nodes.append(
            EGRU(
                node,
                op.dynamics.hidden_size,
                x_mantissa=x_mantissa,
                x_shift=x_shift,
                x_bias=np.rint(sums.bias * gates).astype(np.int64),
                q_mantissa=q_mantissa,
                q_shift=q_shift,
                q_bias=np.rint(again.bias * gates).astype(np.int64),
                threshold=np.rint(threshold * 2.0**MEMBRANE).astype(np.int64),
                keep=round((1 - op.dynamics.zoneout) * ONE),
                event_bits=fraction,
            )
        )
        self.wires += [Wire(sums.node, f"{node}.x_in"), Wire(again.node, f"{node}.q_in", looped=True)]
        self.given[op.name] = _Messages(node, 2.0**-fraction)
        form = f"Q{MEMBRANE} membrane, events of {fraction + 1} bits"
        # Of each gate and matrix a multiplier, a shift and a bias; membrane, threshold, what arrived.
        words = op.dynamics.hidden_size * (6 * 3 + 2 + 3)
        self.ops.append(LoweredOp(op.name, op.kind, "neuromorphic", (node,), form, 0, 4 * words, op.other_ops))

    def _multiplier(self, op: Op, factor: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        try:
            return multiplier(factor)
        except ValueError as error:
            raise LoweringError(f"op {op.name!r} ({op.kind}): {error}", hint="smaller weights") from None

    def _extend(self, op: Op, node: str) -> None:
        """Count a further node to an op."""
        at = next(i for i, lowered in enumerate(self.ops) if lowered.name == op.name)
        self.ops[at] = replace(self.ops[at], nodes=(*self.ops[at].nodes, node))


def node_name(op: str) -> str:
    """Return the name of an op's node; a dot in a network's names parts a node from its port."""
    return op.replace(".", "/")
