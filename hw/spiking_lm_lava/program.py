"""The program: a language model as a network of processes, one token per step; run, saved and loaded without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spiking_lm.config import parse_config
from spiking_lm.errors import DataError, SpikingLMError
from spiking_lm.hardware import PlacedOp, Program, ProgramReport, ProgramResult, RunsOn
from spiking_lm_lava.cell import Cell
from spiking_lm_lava.config import LavaConfig
from spiking_lm_lava.constants import LOIHI2
from spiking_lm_lava.energy import Counter
from spiking_lm_lava.executor import LavaExecutor, LavaSession
from spiking_lm_lava.figures import report_of
from spiking_lm_lava.network import nodes_from_record, nodes_to_record
from spiking_lm_lava.partition import Partition, partition
from spiking_lm_lava.pipeline import VALID, Pipeline, TokenGraph, Wire, pipelined
from spiking_lm_lava.process import Sink, Source
from spiking_lm_lava.shares import fed_by
from spiking_lm_lava.simulator import NetworkState, Rows, Simulator
from spiking_lm_lava.spikellm import ProductsProgram

STEPS_AT_ONCE = 1024
"""Of a long text in the simulator, which keeps what every node sent in them."""

LOGITS = "logits"
"""The sink of the sums that become logits."""


@dataclass(frozen=True)
class LoweredOp:
    """What became of one op of the model."""

    name: str
    kind: str
    runs_on: RunsOn
    nodes: tuple[str, ...]
    """Of the graph of tokens; of an op of the host none, or the source that it feeds."""
    format: str
    weights: int = 0
    bytes: int = 0
    """Of its weights, and of its neurons' parameters and states."""
    operations: int = 0
    """Per token, if nothing is skipped."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything of a lowered language model."""

    graph: TokenGraph
    """Its sources are those of ``tables``; it has one sink, ``logits``."""
    tables: dict[str, NDArray[Any]]
    """By source, what it sends for each token, (V, size)."""
    scale: NDArray[np.float64]
    """(V,): what a one of each sum at the sink stands for."""
    bias: NDArray[np.float64]
    """(V,): added to the logits."""
    ops: tuple[LoweredOp, ...]

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        return len(next(iter(self.tables.values())))

    def logits(self, sums: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits of sums (.., V) from the sink: float64, then rounded to float32."""
        found: NDArray[np.float32] = (sums * self.scale + self.bias).astype(np.float32)
        return found


class LavaProgram(Program):
    """A language model on Loihi-style processes. States of a result are :class:`NetworkState`, whatever ran it."""

    backend: ClassVar[str] = "lava"

    def __init__(self, parts: Parts, config: LavaConfig, *, model: str) -> None:
        self.parts, self.config, self.model = parts, config, model
        self.vocab_size = parts.vocab_size
        _check(parts)

    @cached_property
    def pipeline(self) -> Pipeline:
        """The network, with delays and ``valid``; analysed when it is first asked for."""
        return pipelined(self.parts.graph)

    @cached_property
    def simulator(self) -> Simulator:
        """The simulator of the network."""
        return Simulator(self.pipeline.network)

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, tokens: NDArray[Any], state: Any = None) -> ProgramResult:
        """Feed one stream of ``tokens (S,)``, one per step, then steps without a token until all has come out.

        Goes on from ``state``, that of an earlier result, by either executor. Only the simulator counts operations.

        Raises: DataError for ids beyond the vocabulary or the state of another program; LoweringError where no board
        holds it; PluginError where Lava is to run it and is not set up, or fails.
        """
        ids = self.check_tokens(tokens)
        before = self.simulator.initial() if state is None else self._checked(state)
        inputs = self.inputs(ids)
        network, drain = self.pipeline.network, self.pipeline.steps
        counters: dict[str, Any] = {"tokens": len(ids), "executor": self.config.executor}
        if self.config.executor == "lava":
            cells = [f"{name}.{part}" for name, part in self._memory()]
            run = LavaExecutor.find().run(network, inputs, state=before, watch=cells)
            sums, after = run.sinks[LOGITS], NetworkState.of(network)
            for name, part in self._memory():
                after.nodes[name][part] = run.watched[f"{name}.{part}"][-1]
            after.t = before.t + len(sums)
            counters |= {"runner": "Lava, its start included", "seconds": run.timings}
        else:
            counter, parts, after = Counter(self.partition), [], before
            for start in range(0, len(ids) + drain + 1, STEPS_AT_ONCE):
                some = {name: rows[start : start + STEPS_AT_ONCE] for name, rows in inputs.items()}
                simulated = self.simulator.run(some, after, observe=counter.add)
                parts.append(simulated.sinks[LOGITS])
                after = simulated.state
            sums = np.concatenate(parts)
            counters["counts"] = counter.counts.to_dict()
        counters["steps"] = len(sums)
        return ProgramResult(self.parts.logits(sums[drain : drain + len(ids)]), after, counters)

    def inputs(self, ids: NDArray[np.int64]) -> dict[str, Rows]:
        """Return the rows of all sources for tokens and the steps without one that follow them.

        There is one more of those than a token takes, after which nothing is on its way in a synapse.
        """
        steps = self.pipeline.steps + 1
        empty = np.zeros(steps, np.int64)
        rows = {
            name: np.concatenate([table[ids].astype(np.int64), np.zeros((steps, table.shape[1]), np.int64)])
            for name, table in self.parts.tables.items()
        }
        if VALID in self.pipeline.network:
            rows[VALID] = np.concatenate([np.ones(len(ids), np.int64), empty])[:, None]
        return rows

    def generate(self, tokens: NDArray[Any], count: int, state: Any = None) -> NDArray[np.int64]:
        """Return the ``count`` tokens that follow ``tokens (S,)`` greedily; at a tie the least id.

        Each token is fed once the last one has come out, the cells holding their state meanwhile (``valid``).
        Raises: DataError without a token to begin with.
        """
        ids = self.check_tokens(tokens)
        if not len(ids):
            raise DataError("generation begins with a token", hint="give it a prompt")
        found: list[int] = []
        with self._feeding(len(ids), count, state) as feed:
            fed = ids
            for _ in range(count):
                found.append(int(feed(fed)[-1].argmax()))
                fed = np.array(found[-1:])
        return np.array(found, np.int64)

    @contextmanager
    def _feeding(
        self, prompt: int, count: int, state: Any
    ) -> Iterator[Callable[[NDArray[np.int64]], NDArray[np.float32]]]:
        """Give a function from tokens to their logits that goes on from call to call; Lava is started once for all."""
        before = self.simulator.initial() if state is None else self._checked(state)
        drain = self.pipeline.steps
        if self.config.executor == "simulator":

            def simulate(ids: NDArray[np.int64]) -> NDArray[np.float32]:
                nonlocal before
                run = self.simulator.run(self.inputs(ids), before)
                before = run.state
                return self.parts.logits(run.sinks[LOGITS][drain : drain + len(ids)])

            yield simulate
            return
        steps = prompt + count + count * (drain + 1)
        with LavaSession(LavaExecutor.find().lava, self.pipeline.network, steps, state=before) as session:

            def ask(ids: NDArray[np.int64]) -> NDArray[np.float32]:
                return self.parts.logits(session.advance(self.inputs(ids))[LOGITS][drain : drain + len(ids)])

            yield ask

    def reference_logits(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits of the int8 model in torch, which does not share the program's code: (S, V)."""
        from spiking_lm_lava.torch_model import Int8Model

        logits: NDArray[np.float32] = Int8Model(self.parts)(self.check_tokens(tokens)[None])[0]
        return logits

    def _memory(self) -> list[tuple[str, str]]:
        """Return every state of a cell that outlasts the steps without a token: node and name."""
        return [
            (cell.name, state)
            for cell in self.parts.graph.nodes
            if isinstance(cell, Cell)
            for state in (*cell.states, *cell.latches)
        ]

    def _checked(self, state: Any) -> NetworkState:
        """Return ``state`` if it is one of this network. Raises: DataError."""
        wanted = self.simulator.initial()

        def shapes(of: NetworkState) -> dict[str, dict[str, Any]]:
            return {name: {key: np.shape(held[key]) for key in held} for name, held in of.nodes.items()}

        if not isinstance(state, NetworkState) or shapes(state) != shapes(wanted):
            raise DataError(
                "the state is not one of this program", hint="pass the state of an earlier result of it, or None"
            )
        return state

    # -- report --------------------------------------------------------------------------------------------------------

    def report(self, result: ProgramResult | None = None) -> ProgramReport:
        """Say where every op runs, what the network is made of and, given a run, what was counted in it."""
        placed, counters = self.partition, {} if result is None else result.counters
        placement = [
            PlacedOp(
                op.name,
                op.kind,
                op.runs_on,
                placed.where(*op.nodes) or op.runs_on,
                op.format,
                op.weights,
                op.bytes,
            )
            for op in self.parts.ops
        ]
        steps = self.pipeline.steps
        report = report_of(
            model=self.model,
            placement=placement,
            partition=placed,
            operations={op.name: op.operations for op in self.parts.ops},
            counts=counters.get("counts"),
            tokens=counters.get("tokens", 0),
            costs=self.config.costs,
            warnings=(
                f"a text is read at one token a step; a token's logits come {steps} steps after it, so that generation "
                f"takes {steps + 2} steps a token",
            ),
        )
        return replace(report, figures=(*report.figures, *fed_by(self.parts.graph, self.parts.ops)))

    @cached_property
    def partition(self) -> Partition:
        """The network on the cores of Loihi 2."""
        return partition(self.pipeline.network, LOIHI2, board=self.config.board)

    # -- folder --------------------------------------------------------------------------------------------------------

    def to_folder(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return what ``program.json`` and ``weights.safetensors`` hold: the graph of tokens, not the pipeline."""
        nodes, arrays = nodes_to_record(self.parts.graph.nodes)
        record = {
            "model": self.model,
            "vocab_size": self.vocab_size,
            "options": self.config.model_dump(mode="json"),
            "nodes": nodes,
            "wires": [asdict(wire) for wire in self.parts.graph.wires],
            "tables": list(self.parts.tables),
            "ops": [asdict(op) for op in self.parts.ops],
            "latency": self.pipeline.latency,
        }
        tensors = {f"node {name}": array for name, array in arrays.items()}
        tensors |= {f"table {name}": table for name, table in self.parts.tables.items()}
        return record, {**tensors, "scale": self.parts.scale, "bias": self.parts.bias}

    @classmethod
    def from_folder(cls, record: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Program:
        """Rebuild a program, of this class or a :class:`ProductsProgram`; its network is checked again.

        Raises: DataError naming what is wrong.
        """
        if "products" in record:
            return ProductsProgram.from_folder(record, tensors)
        try:
            config = parse_config(LavaConfig, record["options"], where="program.json, options", error=DataError)
            arrays = {name[5:]: array for name, array in tensors.items() if name.startswith("node ")}
            ops = [LoweredOp(**{**op, "nodes": tuple(op["nodes"])}) for op in record["ops"]]
            parts = Parts(
                TokenGraph(
                    tuple(nodes_from_record(record["nodes"], arrays)), tuple(Wire(**wire) for wire in record["wires"])
                ),
                {name: tensors[f"table {name}"] for name in record["tables"]},
                tensors["scale"],
                tensors["bias"],
                tuple(ops),
            )
            program = cls(parts, config, model=str(record["model"]))
            if program.vocab_size != record["vocab_size"] or program.pipeline.latency != record["latency"]:
                raise ValueError("vocabulary or latency are not those that are written")
        except (KeyError, TypeError, ValueError, IndexError, SpikingLMError) as error:
            what = error.message if isinstance(error, SpikingLMError) else f"{type(error).__name__} {error}"
            raise DataError(f"program.json does not describe a Lava program: {what}", hint="lower again") from None
        return program


def _check(parts: Parts) -> None:
    """Raise DataError unless tables, sources, the sink, scales and biases fit each other."""
    sources = {node.name: node for node in parts.graph.nodes if isinstance(node, Source)}
    sinks = {node.name: node for node in parts.graph.nodes if isinstance(node, Sink)}
    if parts.tables.keys() != sources.keys() or not sources or list(sinks) != [LOGITS]:
        raise DataError(f"tables {sorted(parts.tables)} for sources {sorted(sources)}, and sinks {sorted(sinks)}")
    for name, table in parts.tables.items():
        source = sources[name]
        if table.dtype.kind not in "iu" or table.shape != (parts.vocab_size, source.size):
            raise DataError(f"table {name!r} is {table.dtype} {table.shape}")
        if table.size and (table.min() < source.low or table.max() > source.high):
            raise DataError(f"table {name!r} goes from {table.min()} to {table.max()}, beyond its source's range")
    for what in ("scale", "bias"):
        array = getattr(parts, what)
        if array.dtype != np.float64 or array.shape != (sinks[LOGITS].size,) or not np.isfinite(array).all():
            raise DataError(f"{what} is {array.dtype} {array.shape}, or not finite")
    if sinks[LOGITS].size != parts.vocab_size:
        raise DataError(f"{sinks[LOGITS].size} logits for {parts.vocab_size} tokens")
