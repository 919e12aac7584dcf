"""What values a wire or a state can take: intervals, which range analysis carries through a network."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spiking_lm_lava.arithmetic import Int

Interval = tuple[Int, Int]
"""Least and greatest value, one each per neuron."""


@dataclass(frozen=True, eq=False)
class Range:
    """All values are within ``low .. high``, one of each per neuron."""

    low: Int
    high: Int
    total: Interval | None = None
    """Bounds of the sum of all values sent up to any step, 0 included, where known: what a sigma neuron holds."""

    @classmethod
    def of(cls, size: int, low: int, high: int) -> Range:
        """Return the same bounds for ``size`` neurons."""
        return cls(np.full(size, low, np.int64), np.full(size, high, np.int64))

    @classmethod
    def nothing(cls, size: int) -> Range:
        """Return the range of ``size`` neurons that never send anything but 0."""
        zero = np.zeros(size, np.int64)
        return cls(zero, zero, (zero, zero))

    def __add__(self, other: Range) -> Range:
        total = None
        if self.total is not None and other.total is not None:
            total = (self.total[0] + other.total[0], self.total[1] + other.total[1])
        return Range(self.low + other.low, self.high + other.high, total)

    def __or__(self, other: Range) -> Range:
        total = None
        if self.total is not None and other.total is not None:
            total = (np.minimum(self.total[0], other.total[0]), np.maximum(self.total[1], other.total[1]))
        return Range(np.minimum(self.low, other.low), np.maximum(self.high, other.high), total)

    def or_zero(self) -> Range:
        """Return the range with 0 in it."""
        return Range(np.minimum(self.low, 0), np.maximum(self.high, 0), self.total)

    def __contains__(self, other: Range) -> bool:
        inside = bool((other.low >= self.low).all() and (other.high <= self.high).all())
        if self.total is None or not inside:
            return inside
        return other.total is not None and bool(
            (other.total[0] >= self.total[0]).all() and (other.total[1] <= self.total[1]).all()
        )

    def __mul__(self, other: Range) -> Range:
        corners = np.stack([a * b for a in (self.low, self.high) for b in (other.low, other.high)])
        return Range(corners.min(0), corners.max(0))

    @property
    def most(self) -> int:
        """The greatest magnitude."""
        return max(int(-self.low.min(initial=0)), int(self.high.max(initial=0)))


@dataclass(frozen=True)
class Bounds:
    """What a process sends, by its ports in order, and what its states hold."""

    sends: tuple[Range, ...]
    states: dict[str, Range] = field(default_factory=dict)
    saturates: tuple[str, ...] = ()
    """States that may stop at the end of 24 bits: well defined, the same everywhere, yet perhaps not what was meant."""
