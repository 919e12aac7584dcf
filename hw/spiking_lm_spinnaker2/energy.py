"""From what was counted to time and energy: a model calibrated on one published point, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spiking_lm.hardware import Constant
from spiking_lm_spinnaker2 import constants
from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.constants import OPERATING_POINTS, OperatingPoint
from spiking_lm_spinnaker2.mapping import PEMap


@dataclass(frozen=True)
class Costs:
    """Time and energy of a run on the chips alone; the host's are not in it."""

    time_ms: float
    """Of the whole run."""
    token_latency_ms: float
    """From a token's entry to its last stage."""
    energy_mj: float
    """Of the whole run."""
    base_mj: float
    """Of it, what the chips draw with all PEs asleep or off."""
    busy_mj: float
    """Of it, what computing adds."""
    packets_mj: float
    dram_mj: float

    @property
    def power_mw(self) -> float:
        """Mean power."""
        return 1e3 * self.energy_mj / self.time_ms


def operating_point(config: SpiNNaker2Config) -> OperatingPoint:
    """Return clock and powers of the configured operating point."""
    return OPERATING_POINTS[config.operating_point]


def costs(counters: dict[str, Any], pe_map: PEMap, config: SpiNNaker2Config) -> Costs:
    """Return time and energy of a run of at least one token.

    Pipelined: every stage lasts one tick, T = (tokens + stages - 1) ticks. Sequential: the stages of a token follow one
    another, each as long as its slowest PE, or one tick where one is set. E = T (chips' base power) + busy cycles
    + MACs of the arrays + packets + bytes between host and chip, which are taken to pass through DRAM once.
    """
    point, stages, tokens = operating_point(config), counters["stages"], counters["tokens"]
    steps = stages[-1]["step"] + 1
    slowest = max(stage["slowest_cycles"] for stage in stages)
    tick = 1e-3 * config.tick_us if config.tick_us is not None else 1e3 * slowest / point.hertz
    if config.schedule == "pipelined":
        time, latency = (tokens + steps - 1) * tick, steps * tick
    elif config.tick_us is not None:
        time, latency = tokens * steps * tick, steps * tick
    else:
        time = 1e3 * sum(stage["stage_cycles"] for stage in stages) / point.hertz
        latency = time / tokens
    awake = pe_map.n_pes if config.unused_pes == "off" else pe_map.chips * int(constants.PES_PER_CHIP.value)
    base = 1e-3 * time * (pe_map.chips * constants.POWER_OFF.value + awake * point.sleep.value)
    busy = sum(stage["busy_cycles"] * point.cycle.value + stage["mla_macs"] * point.mac.value for stage in stages)
    packets = (counters["host_packets"] + sum(stage["packets"] for stage in stages)) * config.e_packet
    dram = counters["boundary_bytes"] * config.e_dram
    parts = (base, 1e-9 * busy, 1e-9 * packets, 1e-9 * dram)
    return Costs(time, latency, sum(parts), *parts)


def calibrated(config: SpiNNaker2Config) -> bool:
    """Whether the options are those that the one fitted constant was fitted to; anything else is a prediction."""
    published = SpiNNaker2Config()
    same = ("numerics", "kernel", "storage", "schedule", "operating_point", "tick_us")
    return all(getattr(config, name) == getattr(published, name) for name in same) and config.index_bytes in (None, 4)


def constants_used(config: SpiNNaker2Config, *, mac_array: bool) -> tuple[Constant, ...]:
    """List every constant that the figures of a program rest on; ``mac_array``: whether any stage runs on it."""
    memory = [constants.DATA_MEMORY, constants.HEAP_AND_STACK, constants.EVENT_FIFO]
    time = [constants.K_NNZ]
    if config.kernel == "event":
        time.append(constants.K_IN)
    else:
        memory.append(constants.INPUT_BUFFER)
    if mac_array:
        time += [constants.MLA_COLUMNS, constants.MLA_UTILISATION, constants.MLA_ACCUMULATOR_BITS]
    own = "set by option"
    return (
        constants.PES_PER_CHIP,
        Constant("PEs used per chip, at most", config.pes_per_chip, "PEs", own, "assumed")
        if config.pes_per_chip != constants.USABLE_PES.value
        else constants.USABLE_PES,
        *memory,
        *time,
        constants.POWER_OFF,
        *operating_point(config).constants(mac_array=mac_array),
        Constant("packet", config.e_packet, "pJ", own if config.e_packet else constants.UNPUBLISHED, "assumed"),
        Constant("byte of DRAM", config.e_dram, "pJ", own if config.e_dram else constants.UNPUBLISHED, "assumed"),
    )
