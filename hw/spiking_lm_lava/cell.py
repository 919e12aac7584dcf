"""Cells as processes of a network: neurons with a function of whole numbers of their own.

To add a cell: write its function in a module of ``worker/cells`` (see there), and a class here or beside, frozen and a
dataclass, that derives from :class:`Cell`, with

- ``kind``, and ``function``, ``"module:function"``;
- ``reads``, ``sends`` and ``states``; ``"valid"`` is the last of ``reads``. ``looped`` are the ports of ``reads`` that
  messages about the last token reach, over a synapse;
- integer parameters as fields, ``Int`` for a vector; :meth:`Process.port_size` and :meth:`Cell.length` say of ports and
  fields which have another size than ``size``;
- :meth:`Process.bounds`, from the ranges at the in-ports in the order of ``reads``, and ``limits``.

Nothing is to be done for Lava: one generic process of the worker runs the functions of all cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from spiking_lm_lava.arithmetic import STATE_LIMIT, WORD_LIMIT, Int
from spiking_lm_lava.process import HELD, Process, State
from spiking_lm_lava.values import Bounds, Range
from spiking_lm_lava.worker.cells import LATCH, advance, named
from spiking_lm_lava.worker.cells.egru import MEMBRANE
from spiking_lm_lava.worker.cells.fixed import MOST_SHIFT, ONE

VALID = "valid"
"""The in-port of one value: 1 while there is a token, else 0; then the cell holds its state and sends zeros."""

MANTISSA = (-ONE, ONE)


@dataclass(frozen=True, eq=False)
class Cell(Process):
    """A process that computes what a function of ``worker/cells`` says."""

    function: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("a_in", VALID)
    looped: ClassVar[tuple[str, ...]] = ()
    """In-ports at which messages about the last token arrive; a latch keeps those that come between two tokens."""
    _step: Callable[..., tuple[Any, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_step", named(self.function))

    def port_size(self, port: str) -> int:
        """Return how many values a port carries."""
        return 1 if port == VALID else self.size

    def length(self, name: str) -> int:
        """Return how many numbers a field has."""
        return self.size

    def _vector(self, name: str, value: Any) -> Int:
        array, length = np.asarray(value), self.length(name)
        if array.dtype.kind not in "iu" or array.shape not in ((), (1,), (length,)):
            raise self.error(f"{name} is {array.dtype} {array.shape}, not one whole number or {length}")
        array = np.array(np.broadcast_to(array.astype(np.int64), length))
        array.flags.writeable = False
        return array

    @property
    def gated(self) -> bool:
        """Whether it waits for tokens."""
        return VALID in self.reads

    @property
    def latched(self) -> tuple[int, ...]:
        """The places of ``looped`` among the in-ports."""
        return tuple(self.reads.index(port) for port in self.looped)

    @property
    def latches(self) -> dict[str, int]:
        """The states that keep what arrives at looped ports between two tokens, and their sizes."""
        return {f"{LATCH}{at}": self.port_size(self.reads[at]) for at in self.latched}

    @property
    def watchable(self) -> dict[str, int]:
        """The states that a run can give after each step, and their sizes; latches are among them."""
        return {**super().watchable, **self.latches}

    def initial(self) -> State:
        """Return the state before the first step."""
        return {**super().initial(), **{name: np.zeros(size, np.int64) for name, size in self.latches.items()}}

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return what is sent, and put the next state into ``state``."""
        if not self.gated:
            return self._step(self, state, *arrived)
        sizes = tuple(self.port_size(port) for port in self.sends)
        return advance(self._step, self, state, arrived, self.latched, sizes)

    def layout(self) -> dict[str, Any]:
        """Return what Lava's worker needs to build the cell, beside its fields and its state."""
        return {
            "function": self.function,
            "reads": {port: self.port_size(port) for port in self.reads},
            "sends": {port: self.port_size(port) for port in self.sends},
            "states": [*self.states, *self.latches],
            "gated": self.gated,
            "latched": list(self.latched),
        }


@dataclass(frozen=True, eq=False)
class Delay(Cell):
    """Sends what arrives ``steps`` steps later, with or without a token."""

    kind = "delay"
    function = "delay:step"
    reads = ("a_in",)
    limits = {"steps": (1, 1 << 16)}
    steps: int = 1

    @property
    def latency(self) -> int:
        """After how many steps it sends what arrives."""
        return self.steps

    def initial(self) -> State:
        """Return nothing on its way."""
        return {"held": np.zeros((self.steps, self.size), np.int64)}

    def bounds(self, *arrived: Range) -> Bounds:
        """Return what arrives, and 0."""
        return Bounds((self.within("what arrives", arrived[0], STATE_LIMIT, "a 24-bit state").or_zero(),))


@dataclass(frozen=True, eq=False)
class Affine(Cell):
    """Rescales the sums of a matrix, adds a bias, and holds the result in ``-limit .. limit``: messages to another."""

    kind = "affine"
    function = "affine:step"
    limits = {"mantissa": MANTISSA, "shift": (0, MOST_SHIFT), "bias": HELD, "limit": (1, STATE_LIMIT - 1)}
    mantissa: Int = field(default_factory=lambda: np.ones(1, np.int64))
    shift: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    bias: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    limit: int = STATE_LIMIT - 1

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound the sums and what is sent."""
        found = rescaled(self, "what arrives", arrived[0], self.mantissa, self.shift, self.bias).or_zero()
        return Bounds((Range(np.maximum(found.low, -self.limit), np.minimum(found.high, self.limit)),))


def rescaled(cell: Cell, what: str, sums: Range, mantissa: Int, shift: Int, bias: Int) -> Range:
    """Return the range of ``sums * mantissa / 2^shift + bias``. Raises: LoweringError where that may overflow."""
    cell.within(f"a sum of {what}", sums, WORD_LIMIT, "a word")
    scaled, half = sums * Range(mantissa, mantissa), (1 << shift) >> 1
    found = Range(((scaled.low + half) >> shift) + bias, ((scaled.high + half) >> shift) + bias)
    return cell.within(f"{what}, rescaled,", found, STATE_LIMIT, "a 24-bit state", "smaller weights")


@dataclass(frozen=True, eq=False)
class EGRU(Cell):
    """A layer of event-based gated units behind its two matrices; blocks z, r, g. Fields: ``cells.egru.step``."""

    kind = "egru"
    function = "egru:step"
    reads = ("x_in", "q_in", VALID)
    looped = ("q_in",)
    states = ("c",)
    limits = {
        "x_mantissa": MANTISSA,
        "q_mantissa": MANTISSA,
        "x_shift": (0, MOST_SHIFT),
        "q_shift": (0, MOST_SHIFT),
        "x_bias": HELD,
        "q_bias": HELD,
        "threshold": (0, 1 << MEMBRANE),
        "keep": (0, ONE),
        "event_bits": (1, MEMBRANE),
    }
    x_mantissa: Int = field(default_factory=lambda: np.ones(1, np.int64))
    x_shift: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    x_bias: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    q_mantissa: Int = field(default_factory=lambda: np.ones(1, np.int64))
    q_shift: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    q_bias: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    threshold: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    keep: int = ONE
    event_bits: int = 8

    def port_size(self, port: str) -> int:
        """Return how many values a port carries."""
        return 3 * self.size if port in ("x_in", "q_in") else super().port_size(port)

    def length(self, name: str) -> int:
        """Return how many numbers a field has."""
        return self.size if name == "threshold" else 3 * self.size

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound products and gates' arguments; membranes are between -1 and 1 by themselves."""
        x, q, _ = arrived
        a = rescaled(self, "x", x, self.x_mantissa, self.x_shift, self.x_bias)
        b = rescaled(self, "q", q.or_zero(), self.q_mantissa, self.q_shift, self.q_bias)
        self.within("a gate's argument", a + b, STATE_LIMIT, "a 24-bit state", "smaller weights")
        one = 1 << MEMBRANE
        events = Range.of(self.size, 0, 1 << self.event_bits)
        latch = dict.fromkeys(self.latches, q.or_zero())
        return Bounds((events,), {"c": Range.of(self.size, -one, one), **latch})
