"""SpikeGPT as a graph of processes: a source of embedding rows, synapses of 8-bit weights, cells, a sink of logits.

The ops of a model's graph are read in order; each becomes processes. What an op gives is a :class:`Value`: a port whose
whole numbers times ``scale`` plus ``offset`` are what the float model has there, per channel. Scales and offsets cost
nothing until a cell needs its argument in a format: then they are in its multipliers. So are the gain and bias of a
layer norm, the gain and offset in front of a neuron, the shares of a token shift. What an elementwise op gives is made
in the format of its reader, by :meth:`_Lowering.made`. Formats are the finest that range analysis accepts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import LoweringError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.hardware import Program
from spiking_lm.interfaces import (
    GIFDynamics,
    LayerNormDynamics,
    LIFDynamics,
    SigmoidGateDynamics,
    SpikingLanguageModel,
    SquaredReLUDynamics,
    TokenShiftDynamics,
    WKVDynamics,
)
from spiking_lm.op_parameters import OpParameters
from spiking_lm_lava.arithmetic import DECAY_UNITY, STATE_LIMIT, WORD_LIMIT
from spiking_lm_lava.builder import Builder
from spiking_lm_lava.cell import Affine, Cell
from spiking_lm_lava.cells_spikegpt import (
    GIF,
    ROOT_LIMIT,
    WKV,
    Add,
    Centre,
    Gate,
    HoldingLIF,
    InverseRoot,
    Normalise,
    Pointwise,
    SquaredReLU,
    TokenShift,
)
from spiking_lm_lava.config import LavaConfig
from spiking_lm_lava.lower import node_name
from spiking_lm_lava.pipeline import TokenGraph
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.program import LOGITS, LavaProgram, LoweredOp, Parts
from spiking_lm_lava.quantise import Array, Int8, Seen, observe, quantise_rows
from spiking_lm_lava.values import Range
from spiking_lm_lava.worker.cells.fixed import GATE, UNIT, multiplier
from spiking_lm_lava.worker.cells.spiking import ALIGN

NORMAL = 15
"""Fraction bits, at most, of a layer norm's result, a message of 20 bits for 128 channels."""
CURRENT = 12
"""Fraction bits, at most, of a neuron's current."""
STREAM = 14
"""Fraction bits, at most, of the residual stream."""
EXPONENT = 16
"""Fraction bits, at most, of keys to base 2."""
ROW_LIMIT = 2**15 - 1
"""Rows of the embedding are no synapses: the host sends them, as messages of 16 bits."""
FINER = 8
"""Further fraction bits, at most, of the mean: of sums of so many values it is known as well."""
MESSAGE = 10
"""Fraction bits, at most, of real values that a matrix reads."""

FED_BY = ("graded values", "spikes", "counts of spikes")


@dataclass(frozen=True)
class Value:
    """What an op gives: the numbers of ``port`` times ``scale`` plus ``offset``."""

    port: str
    scale: Array | float = 1.0
    offset: Array | float = 0.0
    most: int = 0
    """Of spikes, how many there are at once; 0: these are no spikes."""


@dataclass(frozen=True)
class Table:
    """What an op gives that depends on the token alone: a row (V, C) for each."""

    rows: Array


def lower_spikegpt(model: SpikingLanguageModel, config: LavaConfig, text: NDArray[Any] | None = None) -> Program:
    """Turn SpikeGPT into a program, int8; ``text`` (S,) calibrates its matrices, formats follow from the weights alone.

    Raises: LoweringError naming the op that has no such form, or the process and the bound that it would pass.
    """
    graph = model.graph()
    check_spikegpt(graph, config)
    seen = {} if text is None or not len(text) else observe(model, text)
    return LavaProgram(
        _Lowering(OpParameters(model, np.float64), graph, seen).run(), config, model=model.config.model_type
    )


def check_spikegpt(graph: LMGraph, config: LavaConfig) -> None:
    """Raise LoweringError where a model of ``graph``, whatever its weights, cannot be lowered."""
    for op in graph:
        if op.kind == "neuron" and op.dynamics is None:
            raise LoweringError(
                f"op {op.name!r} (neuron) declares no dynamics: it may be anything",
                hint="neurons lif, gif and snntorch.leaky, reset to zero, declare theirs",
            )
        if type(op.dynamics) not in _LOWER and op.kind not in _BY_KIND:
            raise LoweringError(
                f"op {op.name!r} ({op.kind}) declares no dynamics that a process of Lava has",
                hint="SpikeGPT without rescale can be lowered",
            )
        if isinstance(op.dynamics, LIFDynamics) and (op.dynamics.v_reset != 0 or not 0 <= op.dynamics.beta < 1):
            raise LoweringError(
                f"op {op.name!r} (neuron): beta {op.dynamics.beta:g}, reset to {op.dynamics.v_reset}; a LIF of Lava "
                "decays, and resets to 0",
                hint="neuron: {type: lif} or {type: snntorch.leaky}, with beta below 1 and reset: zero",
            )
    if graph.ops[0].kind != "embedding" or graph.ops[-1].kind != "linear":
        raise LoweringError("the graph does not begin with an embedding and end with a matrix")


class _Lowering(Builder):
    def __init__(self, weights: OpParameters, graph: LMGraph, seen: dict[str, Seen]) -> None:
        super().__init__()
        self.weights, self.graph, self.seen = weights, graph, seen
        self.values: dict[str, Value | Table | Op] = {}
        self.codes: dict[str, tuple[Int8, Array]] = {}
        self.ops: list[LoweredOp] = []
        self.stream = self._stream_format()
        self.table: dict[str, NDArray[Any]] | None = None

    def run(self) -> Parts:
        """Lower op after op."""
        for op in self.graph:
            lower = _LOWER.get(type(op.dynamics)) or _BY_KIND[op.kind]
            before = len(self.nodes)
            self.values[op.name] = lower(self, op)
            self._note(op, {node.name for node in self.nodes[before:]})
        last = self.values[self.graph.ops[-1].name]
        assert isinstance(last, Value)
        vocab = self.ranges[last.port].low.size
        self.add(Sink(LOGITS, vocab), a_in=last.port)
        if self.table is None:
            raise LoweringError("nothing that depends on the token reaches a process")
        order = {op.name: at for at, op in enumerate(self.graph)}
        return Parts(
            TokenGraph(tuple(self.nodes), tuple(self.wires)),
            self.table,
            np.array(np.broadcast_to(last.scale, vocab), np.float64),
            np.array(np.broadcast_to(last.offset, vocab), np.float64),
            tuple(sorted(self.ops, key=lambda op: order[op.name])),
        )

    def _note(self, op: Op, made: set[str]) -> None:
        """Say what became of an op, and of the elementwise ones before it that were made for it."""
        value = self.values[op.name]
        if isinstance(value, Op):
            return
        for source in (self.graph[name] for name in op.inputs if isinstance(self.values.get(name), Op)):
            self._lowered(source, made & {node_name(source.name)}, "cells")
            made.discard(node_name(source.name))
        if isinstance(value, Table):
            first = op.kind == "embedding"
            nodes, form = (("emb",), "int16 rows, graded") if first else ((), "in the rows of the embedding")
            count = value.rows.size if first else 0
            self.ops.append(LoweredOp(op.name, op.kind, "host", nodes, form, count, 2 * count))
        elif op.kind == "linear":
            self._lowered(
                op, made, f"int8 dense, fed by {FED_BY[min(self._spikes(op), 2)]}", self.codes[op.name][0].size
            )
        else:
            self._lowered(op, made - {"emb"}, "neurons" if op.kind == "neuron" else "cells")

    def _lowered(self, op: Op, names: set[str], form: str, weights: int = 0) -> None:
        nodes = [node for node in self.nodes if node.name in names]
        # A word for each number of a cell; a byte for each weight, those of sums over all neurons included.
        cells = [node for node in nodes if isinstance(node, Cell)]
        words = sum(np.size(x) for cell in cells for x in (*_numbers(cell), *cell.initial().values()))
        stored = sum(node.weight.size for node in nodes if isinstance(node, Synapse))
        named = tuple(node.name for node in nodes)
        operations = stored + op.other_ops
        self.ops.append(
            LoweredOp(op.name, op.kind, "neuromorphic", named, form, weights, 4 * words + stored, operations)
        )

    def _spikes(self, op: Op) -> int:
        """Return how many spikes at once a matrix reads, 0 where it reads no spikes."""
        found = self.values[op.inputs[0]]
        return found.most if isinstance(found, Value) else 0

    def value(self, name: str) -> Value:
        """Return what an op gives, made as messages of the residual stream's format where it is a table."""
        found = self.values[name]
        if isinstance(found, Table):
            found = self.values[name] = self._sent_rows(found)
        if isinstance(found, Op):
            raise LoweringError(f"op {name!r} ({found.kind}) is read by an op that has no place for it")
        return found

    def _sent_rows(self, table: Table) -> Value:
        if self.table is not None:
            raise LoweringError("two embeddings: a token has one row")
        greatest = np.abs(table.rows).max(0)
        scale = np.where(greatest > 0, greatest / ROW_LIMIT, 1.0)
        codes = np.rint(table.rows / scale).astype(np.int16)
        size = len(scale)
        self.add(Source("emb", size, -ROW_LIMIT, ROW_LIMIT))
        mantissa, shift = multiplier(scale * 2.0**self.stream)
        self.add(Affine("stream", size, mantissa=mantissa, shift=shift), a_in="emb")
        self.table = {"emb": codes}
        return Value("stream", 2.0**-self.stream)

    # -- ops -----------------------------------------------------------------------------------------------------------

    def _stream_format(self) -> int:
        """Return the fraction bits with which everything that can be added up fits the stream less its mean."""
        reach = 0.0
        for op in self.graph:
            if op.kind == "embedding":
                rows, readers = self.weights.of(op, "weight"), self.graph.readers(op.name)
                if len(readers) == 1 and isinstance(readers[0].dynamics, LayerNormDynamics):
                    rows = self._normalised(rows, readers[0])
                reach += float(np.abs(rows).max())
            elif op.kind == "residual":
                reach += self._reach(self.graph[op.inputs[1]])
        return min(STREAM, math.floor(math.log2((STATE_LIMIT - 1) / (2.1 * max(reach, 1.0)))))

    def _reach(self, op: Op) -> float:
        """Return the greatest magnitude of what is added to the stream."""
        if op.kind == "neuron":
            return float(op.dynamics.levels) if isinstance(op.dynamics, GIFDynamics) else 1.0
        if isinstance(op.dynamics, SigmoidGateDynamics):
            return self._reach(self.graph[op.inputs[0]])
        source = self.graph[op.inputs[0]]
        if op.kind == "linear" and source.kind == "neuron":
            weight = self.weights.of(op, "weight")
            rows = np.maximum(np.maximum(weight, 0).sum(1), np.maximum(-weight, 0).sum(1))
            return self._reach(source) * float(rows.max())
        raise LoweringError(
            f"op {op.name!r} ({op.kind}) adds to the residual stream what has no bound: no spikes",
            hint="spiking: true",
        )

    def _normalised(self, rows: Array, op: Op) -> Array:
        """Return rows (V, C) behind a layer norm."""
        assert isinstance(op.dynamics, LayerNormDynamics)
        rows = rows - rows.mean(1, keepdims=True)
        rows = rows / np.sqrt((rows**2).mean(1, keepdims=True) + op.dynamics.eps)
        found: Array = rows * self.weights.of(op, "weight") + self.weights.of(op, "bias")
        return found

    def embedding(self, op: Op) -> Table:
        """Take the table."""
        return Table(self.weights.of(op, "weight"))

    def deferred(self, op: Op) -> Op:
        """Leave an elementwise op to its only reader. Raises: LoweringError if there are several."""
        readers = self.graph.readers(op.name)
        if len(readers) != 1:
            raise LoweringError(f"op {op.name!r} ({op.kind}) has {len(readers)} readers, and is made for one")
        return op

    def norm(self, op: Op) -> Value | Table:
        """Normalise by a chain of sums and cells; of a table's rows, once and for all."""
        assert isinstance(op.dynamics, LayerNormDynamics)
        gain, bias = self.weights.of(op, "weight"), self.weights.of(op, "bias")
        found = self.values[op.inputs[0]]
        if isinstance(found, Table) and len(self.graph.readers(op.inputs[0])) == 1:
            return Table(self._normalised(found.rows, op))
        x, name, size = self.value(op.inputs[0]).port, node_name(op.name), op.size

        lost = self.summed(f"{name} sum", x)
        mantissa, shift = multiplier(2.0**lost / size)
        self.add(Affine(f"{name} mean", 1, mantissa=mantissa, shift=shift), a_in=f"{name} sum")
        self.spread(f"{name} means", f"{name} mean", size)
        reads = {"x_in": x, "mean_in": f"{name} means"}

        def square(behind: int) -> Centre:
            return Centre(f"{name} centre", size, before=self._before(reads), behind=behind)

        # The sum of squares is a word: as many of them as there are channels, each of so many bits less.
        centre, behind = self.finest(range(31), square, **reads)
        room = math.ceil(math.log2(size * self.bounds(centre, reads)[1].most / (WORD_LIMIT - 1)))
        centre = replace(centre, behind=behind + max(room, 0))
        self.add(centre, **reads)
        squares = f"{name} centre.s2_out"
        lost = self.summed(f"{name} squares", squares)
        fraction = 2 * (self.stream - centre.before) - centre.behind - lost
        eps = op.dynamics.eps

        def root(bits: int) -> InverseRoot:
            factor, down = multiplier(2.0 ** (bits - fraction) / size)
            return InverseRoot(f"{name} root", 1, mantissa=factor, shift=down, eps=round(eps * 2.0**bits))

        inverse, bits = self.finest(range(22, -2, -2), root, a_in=f"{name} squares")
        self.add(inverse, a_in=f"{name} squares")
        self.spread(f"{name} roots", f"{name} root", size)
        normal = self._normal_format(op)
        self.add(
            Normalise(
                name,
                size,
                shift=UNIT + self.stream - bits // 2 - normal,
                most=math.ceil(math.sqrt(size) * 2.0**normal),
            ),
            x_in=f"{name} centre.s_out",
            root_in=f"{name} roots",
        )
        return Value(name, gain * 2.0**-normal, bias)

    def _before(self, reads: dict[str, str]) -> int:
        """Return how many bits a difference to the mean must lose to be squared."""
        x, mean = self.ranges[reads["x_in"]], self.ranges[reads["mean_in"]]
        most = max(int((x.high - mean.low).max()), int((mean.high - x.low).max()))
        return next(lost for lost in range(24) if (most + ((1 << lost) >> 1)) >> lost < ROOT_LIMIT)

    def _normal_format(self, op: Op) -> int:
        """Return the fraction bits of a norm whose values a matrix can add up in a word."""
        matrices = [reader for reader in self.graph.readers(op.name) if reader.kind == "linear"]
        norms = [np.abs(self.quantised(matrix)[0].astype(np.int64)).sum(1).max() for matrix in matrices]
        if not norms:
            return NORMAL
        most = 2 * int(max(norms)) * (math.sqrt(op.size) + 1)  # 2: int8 weights are written twice as great
        return min(NORMAL, math.floor(math.log2((WORD_LIMIT - 1) / most)))

    def quantised(self, op: Op) -> tuple[Int8, Array]:
        """Return int8 codes and scales of a matrix; of one behind a layer norm, with that one's gain in it."""
        if op.name not in self.codes:
            source, weight, seen = self.graph[op.inputs[0]], self.weights.of(op, "weight"), self.seen.get(op.name)
            if isinstance(source.dynamics, LayerNormDynamics):
                weight, seen = weight * self.weights.of(source, "weight"), None
            self.codes[op.name] = quantise_rows(weight, seen)
        return self.codes[op.name]

    def linear(self, op: Op) -> Value:
        """Add a synapse of 8-bit weights; what it reads is spikes, a layer norm, or made for it as real values."""
        codes, scale = self.quantised(op)
        found = self.values[op.inputs[0]]
        offset: Array | float = 0.0
        if isinstance(found, Op):
            port, bits = self._messages(op, codes)
            scale = scale * 2.0**-bits
            most = 0
        else:
            value = self.value(op.inputs[0])
            port, most = value.port, value.most
            if not most:
                source = self.graph[op.inputs[0]]
                if not isinstance(source.dynamics, LayerNormDynamics):
                    raise LoweringError(
                        f"op {op.name!r} (linear) reads {source.name!r}, which is neither spikes nor a norm"
                    )
                scale = scale * np.asarray(value.scale / self.weights.of(source, "weight")).flat[0]
                offset = self.weights.of(op, "weight") @ np.broadcast_to(value.offset, source.size)
        bias = self.weights.find(op, "bias")

        def make(lost: int) -> Synapse:
            return Synapse.int8(node_name(op.name), codes, weight_exp=-lost, graded=most != 1)

        node, lost = self.finest(range(8), make, s_in=port)
        self.add(node, s_in=port)
        return Value(node.name, scale * 2.0**lost, offset if bias is None else offset + bias)

    def _messages(self, op: Op, codes: Int8) -> tuple[str, int]:
        """Make what a matrix reads as real values, in the finest format in which it can add them up."""
        norm = 2 * int(np.abs(codes.astype(np.int64)).sum(1).max())
        source = op.inputs[0]

        def fits(node: Process, arriving: dict[str, str], bits: int) -> bool:
            return norm * self.bounds(node, arriving)[0].most < WORD_LIMIT

        return self.made(source, node_name(source), 1.0, 0.0, range(MESSAGE, -1, -1), fits)

    def neuron(self, op: Op) -> Value | Table:
        """Add the cell that makes the current, and the neurons."""
        found, kind = self.values[op.inputs[0]], op.dynamics
        assert isinstance(kind, LIFDynamics | GIFDynamics)
        if isinstance(found, Table):
            return self._fired(op, found)
        learned = self.weights.of(op, "gain") if "gain" in op.parameters else np.ones(op.size)
        gain = learned * (kind.gain if isinstance(kind, LIFDynamics) else 1.0)
        offset = gain * self.weights.of(op, "bias") if "bias" in op.parameters else np.zeros(op.size)

        def fits(node: Process, arriving: dict[str, str], bits: int) -> bool:
            cell = _neurons(op, bits)
            cell.check()
            cell.bounds(self.bounds(node, arriving)[0], Range.of(1, 0, 1))
            return True

        name = node_name(op.inputs[0]) if isinstance(found, Op) else f"{node_name(op.name)} in"
        held = partial(_held, op) if isinstance(kind, LIFDynamics) else None
        port, bits = self.made(op.inputs[0], name, gain, offset, range(CURRENT, -1, -1), fits, held)
        cell = self.add(_neurons(op, bits), a_in=port)
        return Value(cell.name, most=cell.levels if isinstance(cell, GIF) else 1)

    def _fired(self, op: Op, table: Table) -> Table:
        """Return the spikes of every row; there is no membrane between an embedding and its threshold."""
        lif = op.dynamics
        if not isinstance(lif, LIFDynamics) or lif.beta:
            raise LoweringError(f"op {op.name!r} (neuron): a membrane right behind an embedding")
        above = np.greater_equal if lif.compare == ">=" else np.greater
        return Table(above(lif.gain * table.rows, lif.threshold).astype(np.float64))

    def made(
        self,
        source: str,
        name: str,
        gain: Array | float,
        offset: Array | float,
        formats: Sequence[int],
        fits: Callable[[Process, dict[str, str], int], bool],
        held: Callable[[int, NDArray[np.int64]], dict[str, Any]] | None = None,
    ) -> tuple[str, int]:
        """Add the cell ``name`` that sends ``gain`` times what an op gives, plus ``offset``; return it and its format.

        ``fits`` of the cell decides among ``formats``; ``held`` says of a format and the least values what is cut off.
        """
        refused: LoweringError | ValueError | None = None
        for bits in formats:
            try:
                node, arriving = self._pointwise(source, name, gain * 2.0**bits, offset * 2.0**bits)
                if held is not None and isinstance(node, Pointwise):
                    node = replace(node, **held(bits, self.bounds(node, arriving)[0].low))
                if fits(node, arriving, bits):
                    self.add(node, **arriving)
                    return node.name, bits
            except (LoweringError, ValueError) as error:  # noqa: PERF203
                refused = error
        raise LoweringError(
            f"op {source!r}: no format of what it gives fits its reader",
            hint=getattr(refused, "message", None) or str(refused),
        )

    def _pointwise(self, source: str, name: str, gain: Any, offset: Any) -> tuple[Any, dict[str, str]]:
        """Return the cell that sends ``gain`` times what an op gives plus ``offset``, and what it reads."""
        found = self.values[source]
        if isinstance(found, Value):
            size = self.ranges[found.port].low.size
            return Affine(
                name, size, **_constants("", found.scale * gain, size), bias=_whole(found.offset * gain + offset, size)
            ), {"a_in": found.port}
        assert isinstance(found, Op)
        op = found
        size, x = op.size, self.value(op.inputs[0])
        if isinstance(op.dynamics, TokenShiftDynamics):
            mix = self.weights.of(op, "mix").reshape(-1)
            return TokenShift(
                name,
                size,
                **_constants("", gain * mix * x.scale, size),
                bias=_whole(gain * mix * x.offset + offset, size),
                **_constants("held_", gain * (1 - mix) * x.scale, size),
                held_bias=_whole(gain * (1 - mix) * x.offset, size),
            ), {"a_in": x.port}
        if isinstance(op.dynamics, SigmoidGateDynamics):
            r = self.value(op.inputs[1])
            return Gate(
                name,
                size,
                **_constants("", gain * self._exact(x), size),
                **_constants("r_", self._exact(r) * 2.0**GATE, size),
                bias=_whole(offset, size),
            ), {"x_in": x.port, "r_in": r.port}
        assert isinstance(op.dynamics, SquaredReLUDynamics)
        room = np.minimum((ROOT_LIMIT - 2) / np.maximum(self.ranges[x.port].high, 1), 1.0)
        root = _constants("root_", room, size)
        taken = root["root_mantissa"] / 2.0 ** root["root_shift"]
        square = (self._exact(x) / taken) ** 2
        return SquaredReLU(name, size, **root, **_constants("", gain * square, size), bias=_whole(offset, size)), {
            "a_in": x.port
        }

    def wkv(self, op: Op) -> Value:
        """Add the time mix: exponents, weights and values in the finest formats, the last two for each channel."""
        k, v = (self.value(name) for name in op.inputs)
        decay, first = np.exp(self.weights.of(op, "decay")), self.weights.of(op, "first")
        to_base_2 = 1 / math.log(2)
        reads = {"k_in": k.port, "v_in": v.port}
        values = self.ranges[v.port]
        greatest = np.maximum(np.maximum(-values.low, values.high), 1) * np.broadcast_to(self._exact(v), op.size)

        def make(bits: int) -> WKV:
            one = to_base_2 * 2.0**bits
            cell = WKV(
                node_name(op.name),
                op.size,
                **_constants("k_", self._exact(k) * one, op.size),
                decay=np.clip(np.rint(decay * one), 1, 1 << 22).astype(np.int64),
                first=_whole(first * one, op.size),
                fraction=bits,
            )
            room = (STATE_LIMIT - 1) / (cell.weights(self.ranges[k.port]) + 1)
            of_weights = np.clip(np.floor(np.log2(room)), 0, UNIT).astype(np.int64)
            fraction = np.minimum(np.floor(np.log2(room / (greatest + 1e-3))), UNIT - 1)
            most = np.maximum(np.floor(greatest * 2.0**fraction), 1).astype(np.int64)
            finer = np.clip(np.floor(np.log2((STATE_LIMIT - 1) / most)), 0, FINER).astype(np.int64)
            found["bits"] = fraction + finer
            return replace(
                cell,
                **_constants("v_", v.scale * 2.0**fraction, op.size),
                weight_bits=of_weights,
                most=most,
                finer=finer,
            )

        found: dict[str, Array] = {}
        node, _ = self.finest(range(EXPONENT, 7, -1), make, **reads)
        self.add(node, **reads)
        return Value(node.name, 2.0 ** -found["bits"])

    def residual(self, op: Op) -> Value:
        """Add to the stream, in its format."""
        x, y = self.value(op.inputs[0]), self.values[op.inputs[1]]
        if isinstance(y, Op):
            port, _ = self.made(
                op.inputs[1],
                node_name(op.inputs[1]),
                1.0,
                0.0,
                (self.stream,),
                lambda node, arriving, _: bool(self.bounds(node, arriving)),
            )
            y = Value(port, 2.0**-self.stream)
        assert isinstance(y, Value)
        added = Add(node_name(op.name), op.size, **_constants("", self._exact(y) * 2.0**self.stream, op.size))
        return Value(self.add(added, x_in=x.port, a_in=y.port).name, 2.0**-self.stream)

    def _exact(self, value: Value) -> Array | float:
        """Return the scale of a value. Raises: LoweringError if it has an offset, for which its reader has no place."""
        if np.any(value.offset):
            raise LoweringError(f"what {value.port!r} gives has an offset, and its reader has no place for it")
        return value.scale


def _neurons(op: Op, bits: int) -> HoldingLIF | GIF:
    """Return the neurons of an op for currents with so many fraction bits."""
    kind = op.dynamics
    if isinstance(kind, GIFDynamics):
        threshold = round(kind.threshold * 2.0**bits)
        return GIF(node_name(op.name), op.size, vth=threshold, levels=kind.levels, signed=kind.signed)
    assert isinstance(kind, LIFDynamics)
    return HoldingLIF(
        node_name(op.name),
        op.size,
        dv=round((1 - kind.beta) * DECAY_UNITY),
        vth=round(kind.threshold * 2.0**bits),
        bias=int(kind.compare == ">="),
    )


def _held(op: Op, bits: int, low: NDArray[np.int64]) -> dict[str, Any]:
    """Return the ends of currents that are ``low`` or more: from where neurons fire whatever they hold, and what fits.

    The upper one changes nothing. The lower one is 16 thresholds below 0 for a beta of 1/2, where a membrane would end.
    """
    cell = _neurons(op, bits)
    assert isinstance(cell, HoldingLIF)
    least = np.maximum(low, -((STATE_LIMIT - 1) * cell.dv // (DECAY_UNITY << ALIGN)))
    left = (DECAY_UNITY - cell.dv) / max(cell.dv, 1)
    most = np.ceil(cell.vth + 1 + left * np.maximum(-least, 0)).astype(np.int64)
    return {"least": least, "most": most}


def _numbers(cell: Cell) -> list[Any]:
    return [getattr(cell, item.name) for item in fields(cell) if item.init and item.name not in ("name", "size")]


def _constants(prefix: str, factor: Any, size: int) -> dict[str, Any]:
    mantissa, shift = multiplier(np.broadcast_to(factor, size))
    return {f"{prefix}mantissa": mantissa, f"{prefix}shift": shift}


def _whole(values: Any, size: int) -> NDArray[np.int64]:
    return np.rint(np.broadcast_to(np.asarray(values, np.float64), size)).astype(np.int64)


_LOWER: dict[type, Callable[[_Lowering, Op], Any]] = {
    LayerNormDynamics: _Lowering.norm,
    TokenShiftDynamics: _Lowering.deferred,
    SigmoidGateDynamics: _Lowering.deferred,
    SquaredReLUDynamics: _Lowering.deferred,
    WKVDynamics: _Lowering.wkv,
    LIFDynamics: _Lowering.neuron,
    GIFDynamics: _Lowering.neuron,
}
_BY_KIND: dict[str, Callable[[_Lowering, Op], Any]] = {
    "embedding": _Lowering.embedding,
    "linear": _Lowering.linear,
    "residual": _Lowering.residual,
}
