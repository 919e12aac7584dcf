"""The program: a language model placed on SpiNNaker 2, run by the simulator, saved and loaded without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spiking_lm.config import parse_config
from spiking_lm.errors import DataError
from spiking_lm.hardware import Figure, PlacedOp, Program, ProgramReport, ProgramResult
from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.energy import constants_used, operating_point
from spiking_lm_spinnaker2.figures import memory_figures, run_figures, warnings
from spiking_lm_spinnaker2.integer_program import IntegerProgram
from spiking_lm_spinnaker2.mapping import PEMap, Wanted, egru_demand, index_bytes, linear_demand, place, table_demand
from spiking_lm_spinnaker2.simulator import LayerState, Simulator, summarise
from spiking_lm_spinnaker2.weights import Array, EGRULayer, Linear, Parts, SparseRows, Table, tensor


class SpiNNaker2Program(Program):
    """An event-based GRU language model on SpiNNaker 2."""

    backend: ClassVar[str] = "spinnaker2"

    def __init__(self, parts: Parts, pe_map: PEMap, config: SpiNNaker2Config, *, model: str) -> None:
        self.parts, self.pe_map, self.config, self.model = parts, pe_map, config, model
        self.vocab_size = parts.vocab_size
        self._simulator: Simulator | None = None

    @classmethod
    def of(
        cls,
        embedding: Table,
        layers: Sequence[EGRULayer],
        head: Sequence[Linear],
        config: SpiNNaker2Config,
        *,
        model: str,
    ) -> SpiNNaker2Program:
        """Place the parts of a model; with int8 numerics, matrices of the head are quantised if they come to PEs.

        Raises: LoweringError for what does not fit, ConfigError for PEs of an unknown layer.
        """
        wanted: list[Wanted] = [
            ([table_demand(embedding.name, embedding.rows.shape, config)], config.embedding),
            ([egru_demand(layer.name, layer.n_inputs, layer.unit_weights, config) for layer in layers], "pe"),
            ([linear_demand(part.name, part.weight.shape, config) for part in head], config.decoder),
        ]
        pe_map = place(wanted, layers, config)
        int8 = config.numerics == "int8"
        held = (
            Linear.build(part.name, part.weight, part.bias, int8=int8 and pe_map.get(part.name) is not None)
            for part in head
        )
        return cls(Parts(embedding, tuple(layers), tuple(held)), pe_map, config, model=model)

    @property
    def simulator(self) -> Simulator:
        """The simulator of this program, built when it is first needed."""
        if self._simulator is None:
            self._simulator = Simulator(self.parts, self.pe_map, self.config)
        return self._simulator

    def run(self, tokens: NDArray[Any], state: Any = None) -> ProgramResult:
        """Feed one stream of ``tokens (S,)``, going on from ``state``: (c, y) of every EGRU layer.

        Raises: DataError for ids beyond the vocabulary, or the state of another program.
        """
        ids = self.check_tokens(tokens)
        initial = self.simulator.initial()
        logits, after, trace = self.simulator.run(ids, initial if state is None else _checked(state, initial))
        counters = summarise(trace, len(ids), self.config, operating_point(self.config).hertz)
        return ProgramResult(logits, after, counters)

    # -- report --------------------------------------------------------------------------------------------------------

    def report(self, result: ProgramResult | None = None) -> ProgramReport:
        """Say what it occupies and, given what a run counted, how long that takes and what it costs."""
        counters = result.counters if result is not None and result.counters["tokens"] else None
        figures = memory_figures(self.pe_map) + ([] if counters is None else self._run_figures(counters))
        ops = [self.parts.embedding.name, *(head.name for head in self.parts.head)]
        host = [name for name in ops if self.pe_map.get(name) is None]
        return ProgramReport(
            self.backend,
            self.model,
            tuple(self._placement()),
            tuple(figures),
            constants_used(self.config, mac_array=self._uses_mac_array),
            tuple(warnings(counters, self.pe_map, self.config, host)),
        )

    @property
    def _uses_mac_array(self) -> bool:
        head = any(part.scales is not None for part in self.parts.head)
        return self.config.on_mac_array or (head and self.config.kernel == "row")

    def _placement(self) -> list[PlacedOp]:
        config, table = self.config, self.parts.embedding
        number = "int8" if config.numerics == "int8" else "fp32"
        placed = [self._place(table.name, "embedding", f"{number} table", table.rows.size, 0)]
        layout = "dense" if config.storage == "dense" else "CSR" if config.kernel == "row" else "CSC"
        for layer in self.parts.layers:
            stage = self.pe_map[layer.name]
            where, total, rest = self.pe_map.where(stage), sum(stage.pe_bytes), 0
            for name, matrix in ((layer.input_name, layer.input), (layer.recurrent_name, layer.recurrent)):
                stored = len(matrix.values) * ((1 if number == "int8" else 4) + index_bytes(config))
                rest += stored
                form = f"{number} {layout}"
                placed.append(PlacedOp(name, "linear", "embedded-core", where, form, len(matrix.values), stored))
            form = "s0.15 state, fp32 gates" if number == "int8" else "fp32"
            placed.append(PlacedOp(layer.name, "neuron", "embedded-core", where, form, 0, total - rest))
        for head in self.parts.head:
            form = f"{'fp32' if head.scales is None else 'int8'} dense"
            placed.append(self._place(head.name, "linear", form, head.weight.size, len(head.bias)))
        return placed

    def _place(self, name: str, kind: str, form: str, weights: int, others: int) -> PlacedOp:
        stage = self.pe_map.get(name)
        if stage is None:
            size = 1 if form.startswith("int8") else 4
            return PlacedOp(name, kind, "host", "host", form, weights, weights * size + 4 * others)
        return PlacedOp(name, kind, "embedded-core", self.pe_map.where(stage), form, weights, sum(stage.pe_bytes))

    def _run_figures(self, counters: dict[str, Any]) -> list[Figure]:
        tokens, layers = counters["tokens"], {layer.name: layer for layer in self.parts.layers}
        events = {stage["op"]: stage["packets"] for stage in counters["stages"] if stage["op"] in layers}
        shares = ", ".join(f"{x} {100 * n / tokens / layers[x].n_units:.1f} %" for x, n in events.items())
        return run_figures(counters, self.pe_map, self.config, sum(events.values()), f"active units: {shares}")

    # -- folder --------------------------------------------------------------------------------------------------------

    def to_folder(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return what ``program.json`` and ``weights.safetensors`` hold."""
        table, head = self.parts.embedding, self.parts.head
        tied = bool(head) and head[-1].weight.dtype == table.rows.dtype and np.array_equal(head[-1].weight, table.rows)
        tensors: dict[str, Array] = {f"{table.name}.rows": table.rows}
        for layer in self.parts.layers:
            tensors |= layer.input.to_tensors(layer.input_name) | layer.recurrent.to_tensors(layer.recurrent_name)
            tensors |= {f"{layer.name}.bias": layer.bias, f"{layer.name}.threshold": layer.threshold}
        for part in head:
            tensors |= {f"{part.name}.weight": part.weight, f"{part.name}.bias": part.bias}
            if part.scales is not None:
                tensors[f"{part.name}.scales"] = part.scales
        if tied:
            del tensors[f"{head[-1].name}.weight"]
        record = {
            "model": self.model,
            "vocab_size": self.vocab_size,
            "options": self.config.model_dump(mode="json"),
            "embedding": {"op": table.name, "scale": table.scale},
            "layers": [
                {
                    "op": layer.name,
                    "input": layer.input_name,
                    "recurrent": layer.recurrent_name,
                    "inputs": layer.n_inputs,
                    "units": layer.n_units,
                    "zoneout": layer.zoneout,
                    "input_scale": layer.input_scale,
                }
                for layer in self.parts.layers
            ],
            "head": [{"op": part.name, "int8": part.scales is not None} for part in head],
            "tied": tied,
            "map": self.pe_map.to_record(),
        }
        return record, tensors

    @classmethod
    def from_folder(cls, record: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Program:
        """Rebuild a program, of this class or an :class:`IntegerProgram`. Raises DataError naming what is wrong."""
        try:
            if "ops" in record:
                return IntegerProgram.from_folder(record, tensors)
            config = parse_config(SpiNNaker2Config, record["options"], where="program.json, options", error=DataError)
            int8 = config.numerics == "int8"
            name = record["embedding"]["op"]
            rows = tensor(tensors, f"{name}.rows", (record["vocab_size"], None), np.int8 if int8 else np.float32)
            parts = Parts(
                Table(name, rows, float(record["embedding"]["scale"])),
                tuple(_layer(layer, tensors, int8) for layer in record["layers"]),
                tuple(_linear(head, tensors, rows if record["tied"] else None) for head in record["head"]),
            )
            pe_map = PEMap.from_record(record["map"])
            _check_chain(parts, pe_map)
            return cls(parts, pe_map, config, model=str(record["model"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"program.json does not describe a SpiNNaker 2 program: {type(error).__name__} {error}",
                hint="lower the model again",
            ) from None


def _layer(record: dict[str, Any], tensors: dict[str, Array], int8: bool) -> EGRULayer:
    inputs, units = int(record["inputs"]), int(record["units"])
    name = record["op"]
    return EGRULayer(
        name,
        record["input"],
        record["recurrent"],
        SparseRows.from_tensors(tensors, record["input"], (3 * units, inputs), int8),
        SparseRows.from_tensors(tensors, record["recurrent"], (3 * units, units), int8),
        tensor(tensors, f"{name}.bias", (4, units), np.float32),
        tensor(tensors, f"{name}.threshold", (units,), np.int16 if int8 else np.float32),
        float(record["zoneout"]),
        float(record["input_scale"]),
    )


def _linear(record: dict[str, Any], tensors: dict[str, Array], tied: Array | None) -> Linear:
    name, int8 = record["op"], record["int8"]
    if tied is not None and f"{name}.weight" not in tensors:
        weight = tied
    else:
        weight = tensor(tensors, f"{name}.weight", (None, None), np.int8 if int8 else np.float32)
    bias = tensor(tensors, f"{name}.bias", weight.shape[:1], np.float32)
    scales = tensor(tensors, f"{name}.scales", weight.shape[:1], np.float32) if int8 else None
    return Linear(name, weight, bias, scales)


def _check_chain(parts: Parts, pe_map: PEMap) -> None:
    """Raise ValueError unless every part reads as many values as the one before gives, and stages fit their parts."""
    sizes = {parts.embedding.name: parts.vocab_size}
    given = parts.embedding.rows.shape[1]
    for layer in parts.layers:
        if layer.n_inputs != given:
            raise ValueError(f"{layer.name} reads {layer.n_inputs} values of {given}")
        given = sizes[layer.name] = layer.n_units
        pe_map[layer.name]
    for head in parts.head:
        if head.weight.shape[1] != given:
            raise ValueError(f"{head.name} reads {head.weight.shape[1]} values of {given}")
        given = sizes[head.name] = len(head.weight)
    if given != parts.vocab_size:
        raise ValueError(f"{given} logits for {parts.vocab_size} tokens")
    for stage in pe_map.stages:
        steps = np.diff(stage.bounds)
        if stage.bounds[0] != 0 or stage.bounds[-1] != sizes[stage.name] or np.any(steps < 1):
            raise ValueError(f"{stage.name}: the bounds of its PEs do not cover its units")


def _checked(state: Any, like: list[LayerState]) -> list[LayerState]:
    """Return ``state`` if it has the form of ``like``. Raises DataError."""
    fits = isinstance(state, (list, tuple)) and len(state) == len(like)
    for mine, other in zip(like, state if fits else (), strict=False):
        fits = fits and isinstance(other, (list, tuple)) and len(other) == 2
        for array, given in zip(mine, other if fits else (), strict=False):
            fits = fits and isinstance(given, np.ndarray) and (given.shape, given.dtype) == (array.shape, array.dtype)
    if not fits:
        raise DataError(
            "the state is not one of this program", hint="pass the state of an earlier result of it, or None"
        )
    return [(layer[0], layer[1]) for layer in state]
