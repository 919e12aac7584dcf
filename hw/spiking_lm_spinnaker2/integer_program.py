"""A transformer whose matrices read spikes, placed on SpiNNaker 2: whole numbers on the PEs, reals on the host.

A PE holds rows of a matrix in int8. The host sends spikes as packets with their count as payload, and for each that
arrives a PE adds count times weight to the sums of its outputs: one multiply-accumulate, however large the count (event
kernel). Or the MAC arrays go through all inputs, with counts from the least value upwards so that they are 8 bits, a
salient channel as many times as it has steps (row kernel). Sums go back to the host as they are, 32 bits; the host
scales them and computes everything that is not a matrix of whole numbers. So what the chip computes is exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from spiking_lm.config import parse_config
from spiking_lm.errors import DataError, LoweringError
from spiking_lm.graph import layer_pattern
from spiking_lm.hardware import PlacedOp, Program, ProgramReport, ProgramResult
from spiking_lm.host import HostModel, HostOp
from spiking_lm.integers import GIFNeurons, IntegerProduct
from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.constants import MLA_ACCUMULATOR_BITS
from spiking_lm_spinnaker2.energy import constants_used, operating_point
from spiking_lm_spinnaker2.figures import memory_figures, run_figures, warnings
from spiking_lm_spinnaker2.mapping import Demand, PEMap, place, product_demand
from spiking_lm_spinnaker2.simulator import StageCounts, Trace, mac_array_cycles, processor_cycles, summarise

MAC_ARRAY_BITS = 8
"""Of what the MAC arrays read."""


class IntegerProgram(Program):
    """A language model with its matrices on SpiNNaker 2."""

    backend: ClassVar[str] = "spinnaker2"
    reals: ClassVar[Literal["float32", "float64"]] = "float64"

    def __init__(self, host: HostModel, pe_map: PEMap, config: SpiNNaker2Config, *, model: str) -> None:
        self.host, self.pe_map, self.config, self.model = host, pe_map, config, model
        self.vocab_size = host.vocab_size
        self._offsets: dict[str, NDArray[np.int64]] = {}
        self.products = {op.name: op.dynamics for op in host.ops if isinstance(op.dynamics, IntegerProduct)}

    @classmethod
    def of(cls, host: HostModel, config: SpiNNaker2Config, *, model: str) -> IntegerProgram:
        """Place the matrices of whole numbers of a model. Raises: LoweringError for what does not fit."""
        demands = []
        for op in host.ops:
            if isinstance(op.dynamics, IntegerProduct):
                product = op.dynamics
                shape = (op.size, product.weight.shape[1])
                demands.append(product_demand(op.name, shape, product.groups, config, shifts=product.shifts))
        return cls(host, place_products(demands, config), config, model=model)

    def run(self, tokens: NDArray[Any], state: Any = None) -> ProgramResult:
        """Feed one stream of ``tokens (S,)``, going on from ``state``, a :class:`~spiking_lm.host.HostState`.

        Raises: DataError for ids beyond the vocabulary, or the state of another program.
        """
        ids = self.check_tokens(tokens)
        seen: dict[str, list[StageCounts]] = defaultdict(list)

        def watch(name: str, counts: NDArray[np.int64], sums: NDArray[np.int64]) -> None:
            seen[name].append(self._count(name, counts, sums))

        logits, after = self.host.run(ids, state, watch)
        trace = Trace([_joined(parts) for parts in seen.values()])
        trace.host_packets = sum(int(stage.events_in.sum()) for stage in trace.stages)
        trace.boundary_bytes = 8 * (trace.host_packets + sum(int(stage.packets.sum()) for stage in trace.stages))
        counters = summarise(trace, len(ids), self.config, operating_point(self.config).hertz)
        return ProgramResult(logits.astype(np.float32), after, counters)

    def _count(self, name: str, counts: NDArray[np.int64], sums: NDArray[np.int64]) -> StageCounts:
        """Count what the PEs of a matrix did for ``counts (S, C)``, which gave ``sums (S, O, G)``."""
        placed, neurons = self.pe_map[name], _neurons(self.host, self.host.by_name[name])
        outputs, inputs = np.diff(placed.bounds), _row_inputs(neurons)
        events_in = (counts != 0).sum(1)
        useful = events_in[:, None] * outputs
        on_array = _on_array(neurons, self.config)
        macs = useful if self.config.kernel == "event" else np.broadcast_to(outputs * inputs, useful.shape)
        if on_array:
            cycles = np.broadcast_to(mac_array_cycles(outputs, inputs), macs.shape)
        else:
            cycles = processor_cycles(macs, events_in, self.config)
        most = 1 << (int(MLA_ACCUMULATOR_BITS.value) - 1)
        return StageCounts(
            name,
            macs,
            int(useful.sum()),
            events_in,
            np.full(len(counts), sums[0].size),
            cycles,
            mla_macs=int(macs.sum()) if on_array else 0,
            overflows=int((np.abs(sums - self._offset(name)) >= most).sum()) if on_array else 0,
            beside=self._beside(name),
        )

    def _offset(self, name: str) -> NDArray[np.int64]:
        """Return by how much the sums (O, G) are off those of a MAC array, whose counts begin at the least value.

        There a spike of an ordinary channel counts once before it counts T times, so that this is on the safe side.
        """
        if name not in self._offsets:
            product, neurons = self.products[name], _neurons(self.host, self.host.by_name[name])
            least = product.gain * neurons.low[neurons.salient.astype(np.intp)]
            parts = [product.weight[:, mine].astype(np.int64) @ least[mine] for mine in _columns(product)]
            self._offsets[name] = np.stack(parts, 1)
        return self._offsets[name]

    def _beside(self, name: str) -> bool:
        """Whether a matrix reads what the one placed before it reads, so that both work at once."""
        names = list(self.products)
        before = names[names.index(name) - 1]
        sources = [self.host.by_name[self.host.by_name[x].inputs[0]].inputs for x in (before, name)]
        return before != name and sources[0] == sources[1]

    # -- report --------------------------------------------------------------------------------------------------------

    def report(self, result: ProgramResult | None = None) -> ProgramReport:
        """Say what it occupies and, given what a run counted, how long that takes and what it costs."""
        counters = result.counters if result is not None and result.counters["tokens"] else None
        figures = memory_figures(self.pe_map)
        if counters is not None:
            events = sum(stage["events_in"] for stage in counters["stages"])
            inputs = counters["tokens"] * sum(product.weight.shape[1] for product in self.products.values())
            active = f"spike counts other than 0, {100 * events / inputs:.1f} % of the inputs"
            figures += run_figures(counters, self.pe_map, self.config, events, active)
        host = dict.fromkeys(layer_pattern(op.name) for op in self.host.ops if op.name not in self.products)
        arrays = any(_on_array(_neurons(self.host, self.host.by_name[x]), self.config) for x in self.products)
        return ProgramReport(
            self.backend,
            self.model,
            tuple(self._place(op) for op in self.host.ops),
            tuple(figures),
            constants_used(self.config, mac_array=arrays),
            tuple(warnings(counters, self.pe_map, self.config, list(host))),
        )

    def _place(self, op: HostOp) -> PlacedOp:
        if isinstance(op.dynamics, IntegerProduct):
            stage, weights = self.pe_map[op.name], op.dynamics.weight.size
            where = self.pe_map.where(stage)
            return PlacedOp(op.name, op.kind, "embedded-core", where, "int8 dense", weights, sum(stage.pe_bytes))
        held = [self.host.parameters[name] for role, name in op.parameters.items() if role in ("weight", "bias")]
        form = f"{held[0].dtype} dense" if held else ""
        size = sum(array.size for array in held)
        return PlacedOp(op.name, op.kind, "host", "host", form, size, sum(array.nbytes for array in held))

    # -- folder --------------------------------------------------------------------------------------------------------

    def to_folder(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return what ``program.json`` and ``weights.safetensors`` hold."""
        ops, tensors = self.host.to_folder()
        options = self.config.model_dump(mode="json")
        return {"model": self.model, "options": options, "ops": ops, "map": self.pe_map.to_record()}, tensors

    @classmethod
    def from_folder(cls, record: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> IntegerProgram:
        """Rebuild a program. Raises DataError, KeyError, TypeError or ValueError for one that is damaged."""
        config = parse_config(SpiNNaker2Config, record["options"], where="program.json, options", error=DataError)
        host, pe_map = HostModel.from_folder(record["ops"], tensors), PEMap.from_record(record["map"])
        program = cls(host, pe_map, config, model=str(record["model"]))
        if program.products.keys() != {stage.name for stage in pe_map.stages}:
            raise ValueError("other matrices are on PEs than the program has")
        for stage in pe_map.stages:
            whole = stage.bounds[0] == 0 and stage.bounds[-1] == host.by_name[stage.name].size
            if not whole or np.any(np.diff(stage.bounds) < 1):
                raise ValueError(f"{stage.name}: the bounds of its PEs do not cover its outputs")
        return program


def place_products(demands: Sequence[Demand], config: SpiNNaker2Config) -> PEMap:
    """Place matrices of whole numbers on PEs. Raises: LoweringError for one that does not fit, or other options."""
    if config.numerics != "int8":
        raise LoweringError(
            "the matrices of this model are whole numbers, which numerics=fp32 does not compute with",
            hint="numerics=int8: the model's own codes, nothing is rounded again",
        )
    for option in ("embedding", "decoder"):
        if getattr(config, option) == "pe":
            raise LoweringError(
                f"{option}=pe: tables of real numbers stay on the host where the matrices are whole numbers",
                hint=f"leave {option} out",
            )
    return place([(demands, "pe")], (), config)


def _neurons(host: HostModel, op: HostOp) -> GIFNeurons:
    """Return the neurons that a product reads."""
    return cast(GIFNeurons, host.by_name[op.inputs[0]].dynamics)


def _columns(product: IntegerProduct) -> list[NDArray[np.bool_]]:
    """Return the inputs of each group."""
    return [product.group == g for g in range(product.groups)]


def _row_inputs(neurons: GIFNeurons) -> int:
    """Return the inputs that the row kernel goes through: a salient channel once per step."""
    return len(neurons.salient) + (neurons.steps - 1) * int(neurons.salient.sum())


def _on_array(neurons: GIFNeurons, config: SpiNNaker2Config) -> bool:
    return config.kernel == "row" and neurons.bits <= MAC_ARRAY_BITS


def _joined(parts: Sequence[StageCounts]) -> StageCounts:
    """Return the counts of a run that was computed in parts."""
    held: dict[str, Any] = {"name": parts[0].name, "beside": parts[0].beside}
    for name in ("macs", "events_in", "packets", "cycles"):
        held[name] = np.concatenate([getattr(part, name) for part in parts])
    for name in ("useful", "mla_macs", "overflows"):
        held[name] = sum(getattr(part, name) for part in parts)
    return StageCounts(**held)
