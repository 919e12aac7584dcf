"""What the reports of all programs on SpiNNaker 2 have in common: figures and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spiking_lm.hardware import Figure, Grade
from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.energy import calibrated, costs
from spiking_lm_spinnaker2.mapping import PEMap

NOT_A_MEASUREMENT = (
    "time and energy come from a model of the chip that is calibrated on one published point; nothing was measured on "
    "a chip"
)


def memory_figures(pe_map: PEMap) -> list[Figure]:
    """Return the PEs and chips of a program, and the memory of the fullest."""
    per_stage = ", ".join(f"{stage.name} {stage.n_pes}" for stage in pe_map.stages[:8])
    more = f", and {len(pe_map.stages) - 8} more" if len(pe_map.stages) > 8 else ""
    return [
        Figure("PEs", pe_map.n_pes, "PEs", "derived", per_stage + more),
        Figure("chips", pe_map.chips, "chips", "derived", f"of {pe_map.pes_per_chip} usable PEs"),
        Figure("memory per PE, max", pe_map.max_bytes / 1e3, "kB", "derived", "of 94.2 kB for data"),
    ]


def run_figures(
    counters: dict[str, Any], pe_map: PEMap, config: SpiNNaker2Config, events: float, active: str
) -> list[Figure]:
    """Return what a run of at least one token took; ``events`` per token, and what of the neurons was ``active``."""
    tokens, stages = counters["tokens"], counters["stages"]
    found = costs(counters, pe_map, config)
    grade: Grade = "derived" if calibrated(config) else "assumed"
    basis = "calibrated on one published point"
    if grade == "assumed":
        basis = "prediction: these options are not those of the published point"
    packets = counters["host_packets"] + sum(stage["packets"] for stage in stages)
    macs, useful = (sum(stage[key] for stage in stages) for key in ("macs", "useful_macs"))
    parts = (("base", found.base_mj), ("busy", found.busy_mj), ("packets", found.packets_mj), ("DRAM", found.dram_mj))
    split = ", ".join(f"{name} {value / tokens:.3g}" for name, value in parts)
    steps = stages[-1]["step"] + 1
    return [
        Figure("time per token", found.time_ms / tokens, "ms", grade, f"{config.schedule}; {basis}"),
        Figure("tokens per second", 1e3 * tokens / found.time_ms, "tokens/s", grade, basis),
        Figure("latency of one token", found.token_latency_ms, "ms", grade, f"{steps} stages"),
        Figure("time of the run", found.time_ms, "ms", grade, f"{tokens} tokens"),
        Figure("energy per token", found.energy_mj / tokens, "mJ", grade, f"{split}; {basis}"),
        Figure("energy of the run", found.energy_mj, "mJ", grade, f"{tokens} tokens"),
        Figure("mean power", found.power_mw, "mW", grade, f"unused PEs {config.unused_pes}"),
        Figure("events per token", events / tokens, "events", "simulated", active),
        Figure("packets per token", packets / tokens, "packets", "simulated", "those from the host included"),
        Figure("MACs per token", macs / tokens, "MACs", "simulated", f"{config.kernel} kernel"),
        Figure("MACs with a non-zero input", useful / tokens, "MACs", "simulated"),
        Figure("overruns", sum(stage["overruns"] for stage in stages), "stages", "simulated", "beyond the tick"),
    ]


def warnings(
    counters: dict[str, Any] | None, pe_map: PEMap, config: SpiNNaker2Config, host: Sequence[str]
) -> list[str]:
    """Return what a reader has to know; ``host`` names the operations that are not on the chip."""
    found = [NOT_A_MEASUREMENT]
    if host:
        found.append(f"on the host, and outside the figures of time and energy: {', '.join(host)}")
    if not config.e_packet:
        found.append("the energy of a packet was never published and counts as 0 (option e_packet, pJ)")
    if not config.e_dram:
        found.append("the energy of DRAM was never published and counts as 0 (option e_dram, pJ per byte)")
    if pe_map.chips > 1:
        found.append("the time that packets take between chips is not modelled")
    if config.schedule == "pipelined":
        found.append("pipelining needs the text in advance; to generate, a token takes the latency of one token")
    if counters is not None:
        overruns, overflows = (
            sum(stage[key] for stage in counters["stages"]) for key in ("overruns", "accumulator_overflows")
        )
        if overruns:
            found.append(f"{overruns} stages took longer than the tick: on the chip they fall out of step")
        if overflows:
            found.append(f"{overflows} sums exceed the 24-bit accumulator of the MAC array; 32 bits were kept")
    return found
