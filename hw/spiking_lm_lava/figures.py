"""What the reports of all programs on Loihi have in common: what is where, what was counted, what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from spiking_lm.errors import MissingExtraError
from spiking_lm.hardware import Constant, CoreUse, Figure, Grade, PlacedOp, ProgramReport
from spiking_lm_lava.constants import (
    ENERGIES,
    LEAST_STEP,
    LOIHI2,
    TIMES,
    Costs,
    prices,
    static_power,
)
from spiking_lm_lava.energy import Counts, spent
from spiking_lm_lava.partition import Partition

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

NOT_A_MEASUREMENT = "placed and counted by a model of the chip; nothing was measured on a chip"

PLACES = {"neuromorphic": "on neuromorphic cores", "embedded-core": "on embedded cores", "host": "on the host"}


def report_of(
    *,
    model: str,
    placement: Sequence[PlacedOp],
    partition: Partition,
    operations: Mapping[str, int],
    counts: Counts | Mapping[str, int] | None = None,
    tokens: int = 0,
    costs: Costs | None = None,
    further: Sequence[Figure] = (),
    warnings: Sequence[str] = (),
) -> ProgramReport:
    """Return the report of a program, given where its ops are and, after a run of ``tokens``, what was counted.

    ``operations`` are those of an op per token if nothing is skipped, by name; ``where`` and ``bytes`` of an op are
    what :meth:`Partition.where` and :meth:`Partition.bytes` say of its nodes. ``further``: figures of its own.
    """
    costs = costs or Costs()
    found = Counts(**counts) if isinstance(counts, Mapping) else counts
    said = [NOT_A_MEASUREMENT, *warnings]
    figures = [*_placed(partition), *_shares(placement, operations), *further]
    if found is not None and tokens:
        figures += _counted(found, tokens)
        figures += _spent(found, tokens, partition, costs, said)
    beside = [op.name for op in placement if op.runs_on == "host"]
    if beside:
        named = ", ".join(beside[:6]) + (f", and {len(beside) - 6} more" if len(beside) > 6 else "")
        said.append(f"on the host, and outside the figures of time and energy: {named}")
    if partition.chips > 1:
        said.append("what messages between chips cost was never published and counts as 0")
    return ProgramReport(
        "lava",
        model,
        tuple(placement),
        tuple(figures),
        _constants(partition, costs),
        tuple(said),
        cores_in_use(partition),
        int(partition.target.cores_per_chip.value),
    )


def cores_in_use(partition: Partition) -> tuple[CoreUse, ...]:
    """Return what each population takes of the words of its cores."""
    per_chip, words = int(partition.target.cores_per_chip.value), partition.target.words_per_core.value
    return tuple(
        CoreUse(*divmod(piece.core, per_chip), piece.population.replace("/", "."), piece.words / words)
        for piece in partition.pieces
    )


def placement_figure(partition: Partition) -> Picture:
    """Draw the cores of the chips in use, each filled as far as its synapse memory is (extra ``report``)."""
    try:
        from spiking_lm.report import figures
    except ImportError as error:
        raise MissingExtraError("the picture", "report", detail=f"{error.name} is not installed") from None
    with figures.style():
        cores = [asdict(use) for use in cores_in_use(partition)]
        return figures.cores_figure(cores, int(partition.target.cores_per_chip.value))


def _constants(partition: Partition, costs: Costs) -> tuple[Constant, ...]:
    power = static_power(partition.target, costs)
    least = (LEAST_STEP,) if partition.target is LOIHI2 else ()
    found = (*partition.target.constants(), *prices(partition.target, costs).values(), *least)
    return found if power is None else (*found, power)


def _placed(found: Partition) -> list[Figure]:
    target = found.target
    budget, board = target.words_per_core.value, found.board.name if found.board is not None else "no board"
    words = int(found.words.sum())
    return [
        Figure(
            "cores", found.cores, "cores", "derived", f"of {target.cores_per_chip.value:.0f} per chip, {target.title}"
        ),
        Figure("chips", found.chips, "chips", "derived", f"on {board}"),
        Figure(
            "neurons",
            int(found.neurons.sum()),
            "neurons",
            "derived",
            f"at most {found.neurons.max(initial=0)} on a core",
        ),
        Figure("synapse words, fullest core", int(found.words.max(initial=0)), "words", "derived", f"of {budget:,.0f}"),
        Figure(
            "use of synapse memory",
            100 * words / (max(found.cores, 1) * budget),
            "%",
            "derived",
            f"{words:,} words in all",
        ),
    ]


def _shares(placement: Sequence[PlacedOp], operations: Mapping[str, int]) -> list[Figure]:
    figures = []
    for what, of in (
        ("weights", {op.name: op.weights for op in placement}),
        ("operations", {op.name: operations.get(op.name, 0) for op in placement}),
    ):
        every = sum(of.values())
        for place, words in PLACES.items():
            share = sum(of[op.name] for op in placement if op.runs_on == place)
            if every and (share or place != "embedded-core"):
                note = f"{share:,} of {every:,}" + (", per token, none skipped" if what == "operations" else "")
                figures.append(Figure(f"{what} {words}", 100 * share / every, "%", "derived", note))
    return figures


def _counted(counts: Counts, tokens: int) -> list[Figure]:
    updates = counts.active_updates + counts.idle_updates
    active = 100 * counts.active_updates / max(updates, 1)
    per_message = (counts.hops_x + counts.hops_y) / max(counts.messages, 1)
    rows: tuple[tuple[str, int, str, str], ...] = (
        ("synaptic operations per token", counts.synaptic_operations, "operations", "a message and a stored synapse"),
        ("neuron updates per token", updates, "updates", f"{active:.3g} % of them received or sent something"),
        (
            "messages per token",
            counts.messages,
            "messages",
            f"to a core each; {counts.from_host / tokens:,.0f} from the host",
        ),
        ("hops per token", counts.hops_x + counts.hops_y, "hops", f"between tiles, {per_message:.2g} a message"),
        ("values read by the host per token", counts.to_host, "messages", "other than 0"),
        (
            "barriers per token",
            counts.steps,
            "barriers",
            f"{counts.steps:,} steps in all, the pipeline's filling among them",
        ),
    )
    if counts.between_chips:
        rows += (("messages between chips per token", counts.between_chips, "messages", ""),)
    return [Figure(name, value / tokens, unit, "simulated", note) for name, value, unit, note in rows]


def _spent(counts: Counts, tokens: int, partition: Partition, costs: Costs, said: list[str]) -> list[Figure]:
    """Return time and energy where they have a price, and say in ``said`` what is left out and why."""
    result, target = spent(counts, partition, costs), partition.target
    known = prices(target, costs)
    figures = []
    if result.energy_nj is None:
        missing = ", ".join(name for name in ENERGIES if name not in known)
        said.append(f"no energy: what operations of {target.title} take was never published; set costs.{{{missing}}}")
    else:
        split = ", ".join(f"{name} {value / tokens:.3g}" for name, value in result.energy_nj.items())
        grade = _grade(known[name] for name in ENERGIES)
        total = sum(result.energy_nj.values()) / tokens
        figures.append(Figure("dynamic energy per token", total, "nJ", grade, split))
    if result.time_ns is None:
        missing = ", ".join(name for name in TIMES if name not in known)
        said.append(f"no time: what operations of {target.title} take was never published; set costs.{{{missing}}}")
        if target is LOIHI2:
            floor = counts.steps * LEAST_STEP.value / tokens
            note = "steps of the shortest length that is said of the chip; a program's steps are longer"
            figures.append(Figure("time per token, no less than", floor, "ns", LEAST_STEP.grade, note))
        return figures
    grade = _grade(known[name] for name in TIMES)
    note = "the core with most to do at one resource, then the barrier; no shorter than that"
    figures.append(Figure("time per token", result.time_ns / tokens, "ns", grade, note))
    figures.append(Figure("tokens per second", 1e9 * tokens / result.time_ns, "tokens/s", grade, "no more than that"))
    power = static_power(target, costs)
    if power is None or result.static_nj is None:
        said.append(f"no static energy: the static power of {target.title} is not known; set costs.static_w")
    else:
        note = f"{power.value:g} W times {partition.chips} chips times the time; not in the dynamic energy"
        figures.append(Figure("static energy per token", result.static_nj / tokens, "nJ", grade, note))
    return figures


def _grade(used: Iterable[Constant]) -> Grade:
    """Return the grade of what rests on constants: that of the least certain."""
    order: tuple[Grade, ...] = ("measured", "derived", "simulated", "assumed")
    return max((constant.grade for constant in used), key=order.index)
