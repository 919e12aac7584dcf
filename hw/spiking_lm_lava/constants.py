"""What placement, time and energy rest on: every number with its unit, its source and how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from spiking_lm.config import StrictModel
from spiking_lm.errors import LoweringError, did_you_mean
from spiking_lm.hardware import Constant

DAVIES = "Davies et al. 2018, IEEE Micro, table 2: before silicon, at 0.75 V"
DAVIES_SECOND_HAND = f"{DAVIES} (second hand)"
NENGO = "the constants of nengo-loihi"
NOTEBOOKS = "logs of Intel's compiler and profiler in the notebooks of lava-dl, January 2023"
PRESS = "Intel's announcement of Hala Point, 2024"
BRIEF = "Intel's technology brief on Loihi 2 (second hand)"

UNPUBLISHED = "never published; set it with the option"
OPTION = "set by option"

AXON_WORDS = Constant("words of an in-axon beside its synapses", 1, "words", NOTEBOOKS, "derived")
INDEX_BITS = Constant(
    "bits of a synapse's index or delay", 6, "bits", "2 to 6 of them fit the logs of Intel's compiler", "assumed"
)
WORD_BITS = 32

CORES_PER_TILE = 4
TILE_COLUMNS = 8
MESH = Constant(
    "columns of tiles on a chip, of 4 cores each",
    TILE_COLUMNS,
    "tiles",
    "32 tiles on 128 cores are published, their arrangement is not",
    "assumed",
)


@dataclass(frozen=True)
class Board:
    """Chips that are sold, or lent, together."""

    name: str
    chips: Constant


@dataclass(frozen=True)
class Target:
    """What a chip holds."""

    name: str
    title: str
    words_per_core: Constant
    """Of 32 bits, for in-axons and synapses."""
    neurons_per_core: Constant
    cores_per_chip: Constant
    boards: tuple[Board, ...]
    """By size."""
    payload: bool
    """Whether spikes carry numbers, and neurons are programmable."""
    axons_per_core: Constant | None = None
    """In-axons, and as many out-axons; None where only memory bounds them."""
    static_power: Constant | None = None
    """Of a chip."""

    def board(self, name: str | None) -> Board | None:
        """Return a board by its name. Raises: LoweringError for one that the target does not have."""
        if name is None:
            return None
        found = {board.name: board for board in self.boards}
        if name not in found:
            raise LoweringError(f"{self.title} has no board {name!r}", hint=did_you_mean(name, found))
        return found[name]

    def constants(self) -> tuple[Constant, ...]:
        """List the limits."""
        axons = () if self.axons_per_core is None else (self.axons_per_core,)
        limits = (self.words_per_core, self.neurons_per_core, self.cores_per_chip, *axons)
        return (*limits, *(board.chips for board in self.boards), AXON_WORDS, INDEX_BITS, MESH)


def _board(name: str, title: str, chips: int, source: str) -> Board:
    return Board(name, Constant(f"chips of {title}", chips, "chips", source, "measured"))


LOIHI1 = Target(
    "loihi1",
    "Loihi 1",
    Constant("synapse words per core", 128 * 1024 * 8 // WORD_BITS, "words", f"{NENGO}: 128 KiB", "derived"),
    Constant("neurons per core", 1024, "neurons", NENGO, "measured"),
    Constant("cores per chip", 128, "cores", NENGO, "measured"),
    (_board("pohoiki-springs", "Pohoiki Springs", 768, "Intel's announcement of Pohoiki Springs, 2020"),),
    payload=False,
    axons_per_core=Constant("in-axons per core, and out-axons", 4096, "axons", NENGO, "measured"),
)

LOIHI2 = Target(
    "loihi2",
    "Loihi 2",
    Constant(
        "synapse words per core",
        12_000,
        "words",
        f"{NOTEBOOKS}: what it budgets, a quarter of the 192 KB that a core has",
        "measured",
    ),
    Constant("neurons per core", 8192, "neurons", BRIEF, "assumed"),
    Constant(
        "cores per chip that a program may use", 120, "cores", f"{PRESS}: 140,544 cores on 1,152 chips", "derived"
    ),
    (
        _board("oheo-gulch", "Oheo Gulch", 1, "names of partitions in lava-nc"),
        _board("kapoho-point", "Kapoho Point", 8, "names of partitions in lava-nc"),
        _board("hala-point", "Hala Point", 1152, PRESS),
    ),
    payload=True,
    static_power=Constant("static power of a chip (Oheo Gulch, a LIF network)", 0.232, "W", NOTEBOOKS, "measured"),
)

TARGETS = {target.name: target for target in (LOIHI1, LOIHI2)}


class Costs(StrictModel):
    """What things cost on a chip; what is given here replaces what is published, of which Loihi 2 has nothing."""

    synaptic_operation_pj: float | None = Field(default=None, ge=0)
    active_update_pj: float | None = Field(default=None, ge=0)
    """Of a neuron that received or sent something."""
    idle_update_pj: float | None = Field(default=None, ge=0)
    message_pj: float | None = Field(default=None, ge=0)
    """A spike to a core, in its own tile."""
    hop_x_pj: float | None = Field(default=None, ge=0)
    """A tile further, east or west."""
    hop_y_pj: float | None = Field(default=None, ge=0)
    """A tile further, north or south."""
    synaptic_operation_ns: float | None = Field(default=None, ge=0)
    active_update_ns: float | None = Field(default=None, ge=0)
    idle_update_ns: float | None = Field(default=None, ge=0)
    message_ns: float | None = Field(default=None, ge=0)
    """A spike that arrives at a core."""
    barrier_ns: float | None = Field(default=None, ge=0)
    """What ends each step, on one tile."""
    barrier_tile_ns: float | None = Field(default=None, ge=0)
    """What each further tile of a chip adds to it."""
    static_w: float | None = Field(default=None, ge=0)
    """Of a chip."""


ENERGIES = ("synaptic_operation_pj", "active_update_pj", "idle_update_pj", "message_pj", "hop_x_pj", "hop_y_pj")
TIMES = ("synaptic_operation_ns", "active_update_ns", "idle_update_ns", "message_ns", "barrier_ns", "barrier_tile_ns")

_NAMES = {
    "synaptic_operation": "synaptic operation",
    "active_update": "update of an active neuron",
    "idle_update": "update of an idle neuron",
    "message": "spike to a core in its tile",
    "hop_x": "hop east or west",
    "hop_y": "hop north or south",
    "barrier": "barrier at the end of a step, one tile",
    "barrier_tile": "a further tile of the barrier",
}

_LOIHI1 = {
    "synaptic_operation_pj": (23.6, DAVIES),
    "active_update_pj": (81.0, DAVIES),
    "idle_update_pj": (52.0, DAVIES),
    "message_pj": (1.7, DAVIES),
    "hop_x_pj": (3.0, DAVIES),
    "hop_y_pj": (4.0, DAVIES),
    "synaptic_operation_ns": (3.5, DAVIES_SECOND_HAND),
    "active_update_ns": (8.4, DAVIES_SECOND_HAND),
    "idle_update_ns": (5.3, DAVIES_SECOND_HAND),
    "message_ns": (2.1, DAVIES_SECOND_HAND),
    "barrier_ns": (113.0, DAVIES_SECOND_HAND),
    "barrier_tile_ns": ((465.0 - 113.0) / 31, f"{DAVIES_SECOND_HAND}: 465 ns for 32 tiles"),
}

LEAST_STEP = Constant("shortest step of a chip", 200.0, "ns", BRIEF, "assumed")
"""Of Loihi 2, published as an upper bound of it."""


def prices(target: Target, costs: Costs) -> dict[str, Constant]:
    """Return what is known of energies and times on ``target``, by the fields of :class:`Costs`."""
    found = {}
    for field in (*ENERGIES, *TIMES):
        what, _, unit = field.rpartition("_")
        own = getattr(costs, field)
        if own is not None:
            unit = "pJ" if unit == "pj" else unit
            found[field] = Constant(_NAMES[what], own, unit, OPTION, "assumed")
        elif target is LOIHI1 and field in _LOIHI1:
            value, source = _LOIHI1[field]
            found[field] = Constant(_NAMES[what], value, "pJ" if unit == "pj" else unit, source, "simulated")
    return found


def static_power(target: Target, costs: Costs) -> Constant | None:
    """Return the static power of a chip, where it is known."""
    if costs.static_w is not None:
        return Constant("static power of a chip", costs.static_w, "W", OPTION, "assumed")
    return target.static_power
