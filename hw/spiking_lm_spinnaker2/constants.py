"""What the model of the chip rests on: every number with its unit, its source and how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

from spiking_lm.hardware import Constant

CHIP = "arXiv 2607.24396 (second hand)"
"""The paper on the chip, whose powers are of the whole chip. Second hand: as others quote it, not read there."""
DATASHEET = "datasheet v0.03 (second hand)"
EGRU_PAPER = "arXiv 2312.09084 (second hand)"
"""The event-based GRU on the chip."""
UNPUBLISHED = "never published; set it with the option"

# -- places and memory -------------------------------------------------------------------------------------------------

PES_PER_CHIP = Constant("PEs per chip", 152, "PEs", DATASHEET, "measured")
USABLE_PES = Constant("PEs that a program may use", 150, "PEs", EGRU_PAPER, "measured")
NATIVE_PES = Constant("PEs that py-spinnaker2 leaves", 148, "PEs", "py-spinnaker2: four are reserved", "measured")
DATA_MEMORY = Constant("data memory of a PE", 96 * 1024, "bytes", f"{CHIP}; {EGRU_PAPER}", "measured")
HEAP_AND_STACK = Constant("heap and stack of a PE", 4 * 1024, "bytes", "py-spinnaker2's memory map", "measured")
INPUT_BUFFER = Constant(
    "input values kept outside the data memory",
    16 * 1024,
    "bytes",
    "half of the 32 KiB of code memory: the published 88.3 kB leave no room in the data memory",
    "assumed",
)
EVENT_FIFO = Constant("event FIFO of a PE", 256, "bytes", "32 packets of key and payload", "assumed")

# -- time --------------------------------------------------------------------------------------------------------------

K_NNZ = Constant(
    "cycles per stored weight (the one fitted constant)",
    32.4,
    "cycles",
    f"fitted to the 170.25 ms of {EGRU_PAPER}; unit updates and events are in it",
    "derived",
)
K_IN = Constant("cycles per event received (event kernel)", 100, "cycles", "no figure was published", "assumed")
MLA_COLUMNS = Constant("outputs that the MAC array computes at once", 16, "outputs", CHIP, "measured")
MLA_UTILISATION = Constant("utilisation of the MAC array, fully connected", 17, "%", CHIP, "measured")
MLA_ACCUMULATOR_BITS = Constant("accumulator of the MAC array", 24, "bits", CHIP, "measured")

# -- power -------------------------------------------------------------------------------------------------------------

POWER_OFF = Constant("chip with all PEs off", 75.2, "mW", CHIP, "measured")


@dataclass(frozen=True)
class OperatingPoint:
    """Clock and supply of all PEs, with what the whole chip was measured to draw there."""

    clock: Constant
    asleep: Constant
    coremark: Constant
    mla_power: Constant
    mla_rate: Constant

    @property
    def hertz(self) -> float:
        """Cycles per second."""
        return self.clock.value * 1e6

    @property
    def sleep(self) -> Constant:
        """What one sleeping PE draws."""
        value = (self.asleep.value - POWER_OFF.value) / PES_PER_CHIP.value
        return Constant("sleeping PE", value, "mW", "(all asleep - all off) / 152 PEs", "derived")

    @property
    def cycle(self) -> Constant:
        """What a cycle of a busy processor adds to a sleeping PE."""
        milliwatts = (self.coremark.value - self.asleep.value) / PES_PER_CHIP.value
        value = 1e9 * milliwatts / self.hertz
        return Constant("busy cycle", value, "pJ", "(CoreMark - all asleep) / 152 PEs / clock", "derived")

    @property
    def mac(self) -> Constant:
        """What a multiply-accumulate of the MAC array adds."""
        value = (self.mla_power.value - self.asleep.value) / (self.mla_rate.value / 2)
        return Constant("int8 MAC on the array", 1e-3 * value, "pJ", "(MAC load - all asleep) / MACs per s", "derived")

    def constants(self, *, mac_array: bool) -> tuple[Constant, ...]:
        """List all of them, those of the MAC arrays on request."""
        arrays = (self.mla_power, self.mla_rate, self.mac) if mac_array else ()
        return (self.clock, self.asleep, self.coremark, self.sleep, self.cycle, *arrays)


def _point(megahertz: float, volt: float, asleep: float, coremark: float, mla: float, tops: float) -> OperatingPoint:
    at = f"at {volt} V"
    return OperatingPoint(
        clock=Constant(f"clock {at}", megahertz, "MHz", CHIP, "measured"),
        asleep=Constant(f"chip with all PEs asleep {at}", asleep, "mW", CHIP, "measured"),
        coremark=Constant(f"chip with CoreMark on 152 PEs {at}", coremark, "mW", CHIP, "measured"),
        mla_power=Constant(f"chip with the MAC arrays at full load {at}", mla, "mW", CHIP, "measured"),
        mla_rate=Constant(f"MAC arrays at full load {at}", tops, "TOPS", CHIP, "measured"),
    )


OPERATING_POINTS = {
    "150MHz": _point(150, 0.5, 235.4, 424.6, 825.0, 2.28),
    "300MHz": _point(300, 0.8, 564.7, 1247.9, 2219.0, 4.56),
}

# -- the published point -----------------------------------------------------------------------------------------------

PAPER_MEMORY = Constant("published memory per PE", 88.3, "kB", EGRU_PAPER, "measured")
PAPER_LATENCY = Constant("published time of 70 tokens", 170.25, "ms", EGRU_PAPER, "measured")
PAPER_ENERGY = Constant("published energy of 70 tokens", 65.3, "mJ", EGRU_PAPER, "measured")
A100_LATENCY = Constant("time of an A100, batch 1", 19.9, "ms", EGRU_PAPER, "measured")
A100_ENERGY = Constant("energy of an A100, batch 1", 1193.5, "mJ", EGRU_PAPER, "measured")
