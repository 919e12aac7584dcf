"""Placing a model on PEs: contiguous slices of units under the memory budget, and clear words when they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import ConfigError, did_you_mean
from spiking_lm.hardware import LoweringError
from spiking_lm_spinnaker2.config import SpiNNaker2Config, Where
from spiking_lm_spinnaker2.constants import DATA_MEMORY, EVENT_FIFO, HEAP_AND_STACK, INPUT_BUFFER
from spiking_lm_spinnaker2.weights import EGRULayer

BUDGET = int(DATA_MEMORY.value - HEAP_AND_STACK.value)
"""Bytes that a PE has for weights, states and events."""


@dataclass(frozen=True)
class Demand:
    """What a stage asks of the PEs: bytes of each of its units, and bytes that every one of its PEs spends besides."""

    name: str
    unit_bytes: NDArray[np.int64]
    fixed_bytes: int

    @property
    def total(self) -> int:
        """Bytes of all units."""
        return int(self.unit_bytes.sum())


@dataclass(frozen=True)
class Placed:
    """A stage on PEs ``first`` to ``first + len(pe_bytes) - 1``: PE k of it holds units ``bounds[k]:bounds[k + 1]``."""

    name: str
    first: int
    bounds: tuple[int, ...]
    pe_bytes: tuple[int, ...]

    @property
    def n_pes(self) -> int:
        """PEs of the stage."""
        return len(self.pe_bytes)

    @property
    def pe_of_unit(self) -> NDArray[np.int64]:
        """The PE of each unit, counted from the first of the stage."""
        return np.repeat(np.arange(self.n_pes), np.diff(self.bounds))


@dataclass(frozen=True)
class PEMap:
    """All stages that are on PEs, in the order of computation; what is not here is on the host."""

    stages: tuple[Placed, ...]
    pes_per_chip: int

    def get(self, name: str) -> Placed | None:
        """Return a stage by the name of its op, or None if it is on the host."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def __getitem__(self, name: str) -> Placed:
        stage = self.get(name)
        if stage is None:
            raise KeyError(name)
        return stage

    @property
    def n_pes(self) -> int:
        """PEs in use."""
        return sum(stage.n_pes for stage in self.stages)

    @property
    def chips(self) -> int:
        """Chips in use."""
        return -(-self.n_pes // self.pes_per_chip)

    @property
    def max_bytes(self) -> int:
        """Memory of the fullest PE."""
        return max(max(stage.pe_bytes) for stage in self.stages)

    def where(self, stage: Placed) -> str:
        """Say in words where a stage is, e.g. ``"PEs 0-49"`` or ``"chip 0 PEs 140-149, chip 1 PEs 0-30"``."""
        parts = []
        for chip in range(self.chips):
            low = max(stage.first, chip * self.pes_per_chip) - chip * self.pes_per_chip
            high = min(stage.first + stage.n_pes, (chip + 1) * self.pes_per_chip) - 1 - chip * self.pes_per_chip
            if low <= high:
                span = f"PE {low}" if low == high else f"PEs {low}-{high}"
                parts.append(span if self.chips == 1 else f"chip {chip} {span}")
        return ", ".join(parts)

    def to_record(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        stages = [{"op": s.name, "first_pe": s.first, "bounds": s.bounds, "bytes": s.pe_bytes} for s in self.stages]
        return {"pes_per_chip": self.pes_per_chip, "stages": stages}

    @classmethod
    def from_record(cls, record: Any) -> PEMap:
        """Take back what :meth:`to_record` gave. Raises KeyError, TypeError or ValueError when it is something else."""
        stages = tuple(
            Placed(s["op"], int(s["first_pe"]), tuple(map(int, s["bounds"])), tuple(map(int, s["bytes"])))
            for s in record["stages"]
        )
        if any(len(stage.bounds) != stage.n_pes + 1 or not stage.n_pes for stage in stages) or not stages:
            raise ValueError("a stage has other bounds than PEs")
        return cls(stages, int(record["pes_per_chip"]))


# -- how many bytes ----------------------------------------------------------------------------------------------------


def egru_demand(name: str, n_inputs: int, unit_weights: NDArray[np.int64], config: SpiNNaker2Config) -> Demand:
    """Return the demand of an EGRU layer of ``len(unit_weights)`` units with so many stored weights each.

    Row kernel: per gate row of W and of R one pointer; the values that are read lie outside the data memory as far as
    :data:`INPUT_BUFFER` holds them. Event kernel: one pointer per source, and the sums of each unit between events.
    """
    n_units, int8, sparse = len(unit_weights), config.numerics == "int8", config.storage == "csr"
    event, value = config.kernel == "event", 1 if int8 else 4
    state = 4 if int8 else 8  # c and threshold
    sums = (24 if int8 else 16) if event else 0  # int8 keeps both matrices apart: their scales differ
    scales = 24 if int8 else 0
    pointers = 24 if sparse and not event else 0
    unit = unit_weights * (value + index_bytes(config)) + (state + sums + scales + pointers + 16)
    fixed = int(EVENT_FIFO.value)
    if sparse:
        fixed += 4 * (n_inputs + 1 + n_units + 1) if event else 8
    if not event:
        fixed += buffer_overflow((n_inputs + n_units) * value)
    return Demand(name, unit.astype(np.int64), fixed)


def linear_demand(name: str, shape: tuple[int, ...], config: SpiNNaker2Config) -> Demand:
    """Return the demand of a dense layer with a matrix of ``shape`` (out, in), cut by outputs."""
    n_out, n_in = shape
    int8, event = config.numerics == "int8", config.kernel == "event"
    value = 1 if int8 else 4
    unit = n_in * value + 4 + (4 if int8 else 0) + (4 if event else 0)  # weights, bias, scale, sum
    fixed = int(EVENT_FIFO.value) + (0 if event else buffer_overflow(n_in * value))
    return Demand(name, np.full(n_out, unit, np.int64), fixed)


def product_demand(
    name: str, shape: tuple[int, int], groups: int, config: SpiNNaker2Config, *, shifts: bool = False
) -> Demand:
    """Return the demand of a matrix of whole numbers of ``shape`` (out, in), with so many sums per output.

    Its rows are dense; every sum has a bias and, if weights are shifted, a shift. What is read is a byte per input.
    """
    n_out, n_in = shape
    unit = n_in + groups * (4 + 4 + 4 * shifts)
    fixed = int(EVENT_FIFO.value) + 4 * groups * shifts
    if config.kernel == "row":
        fixed += buffer_overflow(n_in)
    return Demand(name, np.full(n_out, unit, np.int64), fixed)


def table_demand(name: str, shape: tuple[int, ...], config: SpiNNaker2Config) -> Demand:
    """Return the demand of an embedding table of ``shape`` (rows, columns), cut by rows."""
    n_rows, n_columns = shape
    value = 1 if config.numerics == "int8" else 4
    return Demand(name, np.full(n_rows, n_columns * value, np.int64), int(EVENT_FIFO.value))


def index_bytes(config: SpiNNaker2Config) -> int:
    """Return the size of an index: 0 in dense storage."""
    if config.storage == "dense":
        return 0
    return config.index_bytes or (2 if config.numerics == "int8" else 4)


def buffer_overflow(needed: int) -> int:
    """Return how much of an input buffer of ``needed`` bytes must lie in the data memory."""
    return max(0, needed - int(INPUT_BUFFER.value))


# -- cutting -----------------------------------------------------------------------------------------------------------


def cut(demand: Demand, n_pes: int, limit: int) -> list[int] | None:
    """Return the bounds of exactly ``n_pes`` slices of at most ``limit`` bytes, filled in order; None without any.

    Filling each PE as far as it goes is optimal for contiguous slices; the last PEs are left one unit each.
    """
    ends = np.concatenate([[0], np.cumsum(demand.unit_bytes)])
    bounds = [0]
    for left in range(n_pes - 1, -1, -1):
        start = bounds[-1]
        stop = int(np.searchsorted(ends, ends[start] + limit - demand.fixed_bytes, side="right")) - 1
        stop = min(stop, len(demand.unit_bytes) - left)
        if stop <= start:
            return None
        bounds.append(stop)
    return bounds if bounds[-1] == len(demand.unit_bytes) else None


def fewest(demand: Demand) -> int | None:
    """Return the fewest PEs that hold a stage; None when one unit is too large for a PE."""
    if demand.fixed_bytes + int(demand.unit_bytes.max()) > BUDGET:
        return None
    ends = np.concatenate([[0], np.cumsum(demand.unit_bytes)])
    n_pes = start = 0
    while start < len(demand.unit_bytes):
        start = int(np.searchsorted(ends, ends[start] + BUDGET - demand.fixed_bytes, side="right")) - 1
        n_pes += 1
    return n_pes


def evenly(demand: Demand, n_pes: int) -> list[int]:
    """Return the bounds of ``n_pes`` slices of which the largest is as small as it can be."""
    low, high = 0, demand.fixed_bytes + demand.total
    best = cut(demand, n_pes, high)
    while low + 1 < high:
        middle = (low + high) // 2
        found = cut(demand, n_pes, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    if best is None:
        raise LoweringError(f"{demand.name}: {len(demand.unit_bytes)} units cannot be spread over {n_pes} PEs")
    return best


# -- placing -----------------------------------------------------------------------------------------------------------

Wanted = tuple[Sequence[Demand], Where]
"""Stages that go to the same place together, and where they are wanted."""


def place(wanted: Sequence[Wanted], layers: Sequence[EGRULayer], config: SpiNNaker2Config) -> PEMap:
    """Place stages on PEs in the order given; those wanted on the host, or ``auto`` and too large, are left out.

    Parameters: ``layers`` are the EGRU layers among them, for saying which sparsity would fit, and which a list of
    ``config.pes`` means; without any it means all stages.
    Raises: LoweringError naming the stage, its bytes and what would fit; ConfigError for PEs of an unknown layer.
    """
    names = [demand.name for demands, _ in wanted for demand in demands]
    chosen = _chosen(config, [layer.name for layer in layers] or names, names)
    room = config.chips * config.pes_per_chip
    counts: dict[str, int] = {}
    for demands, where in wanted:
        if where == "pe":
            counts |= {demand.name: _count(demand, chosen, layers, config) for demand in demands}
    if sum(counts.values()) > room:
        raise _too_large([d for demands, where in wanted if where == "pe" for d in demands], counts, layers, config)
    for demands, where in wanted:
        if where == "auto" and all(fewest(demand) is not None for demand in demands):
            more = {demand.name: _count(demand, chosen, layers, config) for demand in demands}
            if sum(counts.values()) + sum(more.values()) <= room:
                counts |= more
    for name in chosen:
        if name not in counts:
            raise ConfigError(f"pes: {name!r} is on the host", hint="set embedding or decoder to 'pe'")
    stages: list[Placed] = []
    for demand in (demand for demands, _ in wanted for demand in demands):
        if demand.name not in counts:
            continue
        bounds = evenly(demand, counts[demand.name])
        sizes = np.add.reduceat(demand.unit_bytes, bounds[:-1]) + demand.fixed_bytes
        first = sum(stage.n_pes for stage in stages)
        stages.append(Placed(demand.name, first, tuple(bounds), tuple(int(size) for size in sizes)))
    return PEMap(tuple(stages), config.pes_per_chip)


def _chosen(config: SpiNNaker2Config, layers: list[str], names: list[str]) -> dict[str, int]:
    """Return the PEs per op that the configuration fixes."""
    if isinstance(config.pes, list):
        if config.pes and len(config.pes) != len(layers):
            raise ConfigError(f"pes: {len(config.pes)} numbers for {len(layers)} layers", hint=f"layers: {layers}")
        return dict(zip(layers, config.pes, strict=False))
    for name in config.pes:
        if name not in names:
            hint = did_you_mean(name, names) or f"placed are {', '.join(names)}"
            raise ConfigError(f"pes: the model has no layer {name!r}", hint=hint)
    return config.pes


def _count(demand: Demand, chosen: dict[str, int], layers: Sequence[EGRULayer], config: SpiNNaker2Config) -> int:
    """Return the PEs of a stage: those that were chosen if they hold it, else the fewest."""
    least, units = fewest(demand), len(demand.unit_bytes)
    if least is None:
        largest = demand.fixed_bytes + int(demand.unit_bytes.max())
        raise LoweringError(
            f"{demand.name} does not fit: one of its {units} units takes {largest} bytes, a PE has {BUDGET}",
            hint=_mend(layers, config, lambda demands: fewest(demands[demand.name]) is not None, demand.name),
        )
    count = chosen.get(demand.name, least)
    if count > units:
        raise ConfigError(f"pes: {demand.name} has {units} units, which cannot be spread over {count} PEs")
    if count < least:
        raise LoweringError(
            f"{demand.name} does not fit on {count} PEs: its {demand.total} bytes take at least {least} PEs of "
            f"{BUDGET} bytes",
            hint=_mend(
                layers, config, lambda demands: (fewest(demands[demand.name]) or count + 1) <= count, demand.name
            ),
        )
    return count


def _too_large(
    demands: Sequence[Demand], counts: dict[str, int], layers: Sequence[EGRULayer], config: SpiNNaker2Config
) -> LoweringError:
    """Say which stage is the first that finds no PE, and how many chips or what sparsity would fit."""
    room, taken = config.chips * config.pes_per_chip, 0
    for demand in demands:
        if taken + counts[demand.name] > room:
            break
        taken += counts[demand.name]
    needed = sum(counts.values())
    own = {layer.name for layer in layers}
    others = sum(count for name, count in counts.items() if name not in own)

    def fits(demands: dict[str, Demand]) -> bool:
        least = [fewest(demand) for demand in demands.values()]
        return None not in least and others + sum(n for n in least if n is not None) <= room

    chips = "the chip has" if config.chips == 1 else f"{config.chips} chips have"
    return LoweringError(
        f"{demand.name} does not fit: its {demand.total} bytes take {counts[demand.name]} PEs, of {room} {chips} "
        f"{room - taken} left; the model takes {needed} in all",
        hint=_mend(layers, config, fits, demand.name, chips=-(-needed // config.pes_per_chip)),
    )


def _mend(
    layers: Sequence[EGRULayer],
    config: SpiNNaker2Config,
    fits: Callable[[dict[str, Demand]], bool],
    name: str,
    *,
    chips: int | None = None,
) -> str:
    """Return the hint: chips that would do, and the least sparsity of the EGRU layers at which ``fits`` is true."""
    ways = [] if chips is None else [f"chips={chips}"]

    def demands(permille: int) -> dict[str, Demand]:
        weights = {x.name: 3 * (x.n_inputs + x.n_units) * (1000 - permille) // 1000 for x in layers}
        return {x.name: egru_demand(x.name, x.n_inputs, np.full(x.n_units, weights[x.name]), config) for x in layers}

    if config.storage == "csr" and any(layer.name == name for layer in layers) and fits(demands(1000)):
        low, high = 0, 1000
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(demands(middle)) else (middle, high)
        ways.append(f"a sparsity of {high / 10:g} % in every layer")
    elif config.storage == "dense" and layers:
        ways.append("storage=csr with a pruned model")
    if layers and not any(layer.name == name for layer in layers):
        ways.append("leaving it on the host")
    less = ["numerics=int8 takes less memory"] if config.numerics == "fp32" else []
    return "; ".join([f"would fit: {', or '.join(ways)}", *less] if ways else less) or "use a smaller model"
