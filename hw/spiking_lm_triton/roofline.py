"""What kernels read, write and compute, and how long that takes at least: predictions, not measurements.

Bytes count each tensor once, as what is read again soon comes from the cache. A prediction is::

    launches * launch  +  max(bytes / bandwidth, operations / rate, steps * cycles / clock)

The last term is that of scans: one step cannot begin before the one before it has ended, however few neurons there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spiking_lm_triton.sizes import CHUNK, cut, parts

Kind = Literal["fp32", "half", "int8", "popc"]


@dataclass(frozen=True)
class Machine:
    """A GPU as its maker describes it: bytes and operations per second, and the clock."""

    name: str
    bandwidth: float
    rates: Mapping[Kind, float]
    """``fp32`` outside tensor cores, ``half`` and ``int8`` on them without sparsity, ``popc`` in words."""
    clock: float


MACHINES = (
    Machine("H100", 3.35e12, {"fp32": 66.9e12, "half": 989e12, "int8": 1979e12, "popc": 132 * 16 * 1.83e9}, 1.83e9),
    Machine("A100", 2.039e12, {"fp32": 19.5e12, "half": 312e12, "int8": 624e12, "popc": 108 * 16 * 1.41e9}, 1.41e9),
    Machine("MI300X", 5.3e12, {"fp32": 163.4e12, "half": 1307e12, "int8": 2615e12, "popc": 304 * 64 * 2.1e9}, 2.1e9),
)
"""H100 SXM, A100 SXM 80 GB and MI300X, from their data sheets. Bits of 16 words are counted per clock and processor on
NVIDIA's, of 64 on AMD's."""

LAUNCH = 4e-6
"""Seconds from one kernel to the next. Assumed."""
CYCLES = {"lif": 60, "lif backward": 160, "wkv": 100, "wkv backward": 300}
"""Clock cycles of a step that the next one has to wait for; on the way back, those of both passes. Assumed."""


@dataclass(frozen=True)
class Work:
    """What a call costs, whatever runs it."""

    bytes: int
    operations: int
    kind: Kind = "fp32"
    launches: int = 1
    cycles: int = 0
    """Clock cycles that nothing can be done about: steps times those of a step."""

    def __add__(self, other: Work) -> Work:
        """Return both, one after the other, of one kind."""
        launches, cycles = self.launches + other.launches, self.cycles + other.cycles
        return Work(self.bytes + other.bytes, self.operations + other.operations, self.kind, launches, cycles)

    def bounds(self, machine: Machine) -> dict[str, float]:
        """Return the seconds of each bound."""
        return {
            "memory": self.bytes / machine.bandwidth,
            "arithmetic": self.operations / machine.rates[self.kind],
            "steps": self.cycles / machine.clock,
        }

    def predicted(self, machine: Machine) -> float:
        """Return the predicted seconds."""
        return self.launches * LAUNCH + max(self.bounds(machine).values())

    def bound(self, machine: Machine) -> str:
        """Return what the prediction is made of for the most part."""
        bounds = {**self.bounds(machine), "launches": self.launches * LAUNCH}
        return max(bounds, key=bounds.__getitem__)


def lif(n_steps: int, neurons: int, itemsize: int, *, recorded: bool = False, packed_words: int | None = None) -> Work:
    """Return the work of ``lif_scan`` with the last membrane alone; ``packed_words`` of a step instead of spikes."""
    steps, marks = n_steps * neurons, 4 * neurons * cut(n_steps, CHUNK) if recorded else 0
    spikes = itemsize * steps if packed_words is None else 4 * n_steps * packed_words
    return Work(itemsize * steps + spikes + 4 * neurons + marks, 8 * steps, cycles=CYCLES["lif"] * n_steps)


def lif_backward(n_steps: int, neurons: int, itemsize: int) -> Work:
    """Return the work of the gradient of ``lif_scan``; the membranes of a chunk stay in the cache."""
    steps, marks = n_steps * neurons, 4 * neurons * cut(n_steps, CHUNK)
    return Work(3 * itemsize * steps + marks + 4 * neurons, 21 * steps, cycles=CYCLES["lif backward"] * n_steps)


def wkv(batch: int, n_steps: int, channels: int, itemsize: int, *, recorded: bool = False) -> Work:
    """Return the work of ``wkv`` from the beginning of a text; an exponential counts as one operation."""
    steps, states = batch * n_steps * channels, 4 * batch * channels
    marks = 3 * states * cut(n_steps, CHUNK) if recorded else 0
    return Work(3 * itemsize * steps + marks + 3 * states + 8 * channels, 20 * steps, cycles=CYCLES["wkv"] * n_steps)


def wkv_backward(batch: int, n_steps: int, channels: int, itemsize: int) -> Work:
    """Return the work of the gradient of ``wkv`` from that of its output; the sums of a chunk stay in the cache."""
    steps, states = batch * n_steps * channels, 4 * batch * channels
    marks = 3 * states * cut(n_steps, CHUNK)
    return Work(
        5 * itemsize * steps + marks + 4 * states + 8 * channels, 50 * steps,
        cycles=CYCLES["wkv backward"] * n_steps,
    )  # fmt: skip


def egru(n_steps: int, batch: int, hidden: int, itemsize: int, *, backward: bool = False) -> Work:
    """Return the work of ``egru_scan``: a step is a product and a kernel; its weights stay in the cache."""
    step, weights = batch * hidden, 12 * hidden * hidden
    around = egru_kernels(n_steps, batch, hidden, itemsize, backward=backward)
    if backward:  # and one product over all steps for the gradient of the weights
        again = 16 * step * n_steps + weights
        return Work(around + weights + again, 12 * step * hidden * n_steps, launches=2 * n_steps + 3)
    return Work(around + weights, 6 * step * hidden * n_steps, launches=2 * n_steps)


def egru_kernels(n_steps: int, batch: int, hidden: int, itemsize: int, *, backward: bool = False) -> int:
    """Return the bytes of :func:`egru` without those of its matrix products."""
    step = batch * hidden
    if backward:
        return (6 * itemsize + 36) * step * n_steps + 16 * step + 16 * hidden
    return (3 * itemsize + 24) * step * n_steps + 8 * step + 16 * hidden


def spike_linear(rows: int, sources: int, targets: int, active: int, itemsize: int) -> Work:
    """Return the work of ``spike_linear`` with ``active`` sources in all rows together, of which no two share any.

    Weights dominate; a matrix is read once at most.
    """
    shares = parts(rows, sources, targets)
    lists = itemsize * rows * sources + 8 * active + 4 * rows
    results = itemsize * rows * targets + (4 * shares * rows * targets if shares > 1 else 0)
    return Work(
        lists + itemsize * min(active, sources) * targets + results,
        2 * active * targets,
        launches=3 if shares > 1 else 2,
    )


def int8_linear(rows: int, sources: int, targets: int, itemsize: int) -> Work:
    """Return the work of ``int8_linear`` with scales in float32."""
    size = itemsize * rows * sources + sources * targets + 4 * targets + itemsize * rows * targets
    return Work(size, 2 * rows * sources * targets)


def packed_linear(rows: int, planes: int, sources: int, targets: int) -> Work:
    """Return the work of ``packed_linear`` in float32; an operation is the bits of a word, counted."""
    words = cut(sources, 32)
    size = 4 * rows * planes * words + 8 * targets * words + 4 * targets + 4 * rows * targets
    return Work(size, 2 * planes * rows * words * targets, "popc")


def ternary_linear(rows: int, sources: int, targets: int, itemsize: int) -> Work:
    """Return the work of ``ternary_linear`` with scales in float32; a weight takes about eight operations."""
    size = itemsize * rows * (sources + targets) + 8 * targets * cut(sources, 32) + 4 * targets
    return Work(size, 8 * rows * sources * targets)


def gif_quantize(rows: int, channels: int, itemsize: int, *, backward: bool = False) -> Work:
    """Return the work of putting tokens on their grids, or of its gradient."""
    values = rows * channels
    return Work((3 if backward else 2) * itemsize * values, (30 if backward else 20) * values)


def gif_int8_linear(rows: int, channels: int, targets: int, itemsize: int) -> Work:
    """Return the work of ``gif_int8_linear``: codes, then a product of whole numbers on tensor cores."""
    codes = (itemsize + 1) * rows * channels + 16 * rows
    size = codes + channels * targets + 4 * targets + itemsize * rows * targets
    return Work(size, 2 * rows * channels * targets, "int8", launches=2)


def dense(rows: int, sources: int, targets: int, itemsize: int = 2) -> Work:
    """Return the work of a dense product."""
    size = itemsize * (rows * sources + sources * targets + rows * targets)
    return Work(size, 2 * rows * sources * targets, "half")


@dataclass(frozen=True)
class Case:
    """One line of the table: an op at a size that models have."""

    op: str
    sizes: tuple[int, ...]
    what: str
    work: Work
    dense: Work | None = None
    """A dense product of the same matrix in bfloat16, where there is one."""

    @property
    def name(self) -> str:
        """The name of its row in a report."""
        return f"triton/{self.op}/{'x'.join(map(str, self.sizes))}"


def case(op: str, *sizes: int) -> Case:
    """Return what ``op`` costs at these sizes: in bfloat16, EGRU in float32; scans forward and backward.

    Sizes are (T, B, N) of ``lif_scan``, (B, T, C) of ``wkv``, (T, B, H) of ``egru_scan``, and rows, sources, targets of
    products; after those, ``spike_linear`` has the percentage of sources that are active, and ``packed_linear`` planes.
    """
    shape = " x ".join(map(str, sizes[:3]))
    if op == "gif_linear":
        return Case(op, sizes, f"quantising {shape}", gif_quantize(sizes[0], sizes[1], 2))
    a, b, c, *more = sizes
    trained = f"({a}, {b}, {c}), forward + backward"
    if op == "lif_scan":
        return Case(op, sizes, trained, lif(a, b * c, 2, recorded=True) + lif_backward(a, b * c, 2))
    if op == "wkv":
        return Case(op, sizes, trained, wkv(a, b, c, 2, recorded=True) + wkv_backward(a, b, c, 2))
    if op == "egru_scan":
        return Case(op, sizes, trained, egru(a, b, c, 4) + egru(a, b, c, 4, backward=True))
    rows, sources, targets = a, b, c
    if op == "spike_linear":
        work = spike_linear(rows, sources, targets, rows * sources * more[0] // 100, 2)
        return Case(op, sizes, f"{shape}, {more[0]} % active", work, dense(rows, sources, targets))
    if op == "packed_linear":
        kinds = "spikes 0 and 1" if more[0] == 1 else "spikes -1, 0 and 1"
        return Case(op, sizes, f"{shape}, {kinds}", packed_linear(rows, more[0], sources, targets),
                    dense(rows, sources, targets))  # fmt: skip
    work = {"ternary_linear": ternary_linear, "int8_linear": int8_linear, "gif_int8_linear": gif_int8_linear}[op](
        rows, sources, targets, 2
    )
    return Case(op, sizes, shape, work, dense(rows, sources, targets))


CASES = (
    case("lif_scan", 1024, 1, 2048),
    case("lif_scan", 128, 32, 512),
    case("wkv", 1, 1024, 512),
    case("wkv", 8, 1024, 512),
    case("egru_scan", 128, 32, 1024),
    case("spike_linear", 1, 4096, 4096, 10),
    case("spike_linear", 1, 8192, 8192, 10),
    case("packed_linear", 1, 4096, 4096, 1),
    case("ternary_linear", 1, 4096, 4096),
    case("int8_linear", 1, 4096, 4096),
    case("gif_linear", 4096, 4096),
    case("gif_int8_linear", 1, 4096, 4096),
    case("gif_int8_linear", 4096, 4096, 4096),
)
"""The table of the documentation, and what ``spiking-lm bench --device cuda`` measures."""


def table() -> str:
    """Return the predictions as Markdown: microseconds, and what bounds them on the first machine."""
    first = MACHINES[0]
    head = ["op", "sizes", "MB", *(f"{m.name}, predicted µs" for m in MACHINES), "bound by", f"dense, {first.name}"]
    lines = [head, ["---"] * len(head)]
    for line in CASES:
        work, other = line.work, line.dense
        lines.append(
            [
                f"`{line.op}`", line.what, f"{work.bytes / 1e6:.1f}",
                *(f"{1e6 * work.predicted(m):.0f}" for m in MACHINES), work.bound(first),
                "" if other is None else f"{1e6 * other.predicted(first):.0f}",
            ]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
