"""Building a graph of tokens node by node, with the ranges of all values at hand: so formats can be chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from spiking_lm.errors import LoweringError
from spiking_lm_lava.cell import VALID
from spiking_lm_lava.pipeline import Wire
from spiking_lm_lava.process import Process, Synapse
from spiking_lm_lava.values import Range

_Made = TypeVar("_Made", bound=Process)


class Builder:
    """Nodes and wires of a graph without loops, in the order of data flow."""

    def __init__(self) -> None:
        self.nodes: list[Process] = []
        self.wires: list[Wire] = []
        self.ranges: dict[str, Range] = {}
        """By port, and by node where it has one: what is sent."""

    def add(self, node: _Made, **arriving: str) -> _Made:
        """Add a process whose in-ports are reached from the given ports."""
        self.nodes.append(node)
        self.wires += [Wire(source, f"{node.name}.{port}") for port, source in arriving.items()]
        sends = self.bounds(node, arriving)
        self.ranges |= {f"{node.name}.{port}": sent for port, sent in zip(node.sends, sends, strict=True)}
        if len(node.sends) == 1:
            self.ranges[node.name] = sends[0]
        return node

    def bounds(self, node: Process, arriving: dict[str, str]) -> tuple[Range, ...]:
        """Return what a process would send. Raises: LoweringError with the bound that it would pass."""
        node.check()
        valid = Range.of(1, 0, 1)
        return node.bounds(*(valid if port == VALID else self.ranges[arriving[port]] for port in node.reads)).sends

    def finest(self, formats: Sequence[int], make: Callable[[int], _Made], **arriving: str) -> tuple[_Made, int]:
        """Return the first of ``make(format)`` that range analysis accepts, and its format.

        Raises: LoweringError of the last one.
        """
        refused: Exception | None = None
        for bits in formats:
            try:
                node = make(bits)
                self.bounds(node, arriving)
            except (LoweringError, ValueError) as error:  # noqa: PERF203  (ValueError: a factor that no multiplier has)
                refused = error
            else:
                return node, bits
        if isinstance(refused, LoweringError):
            raise refused
        raise LoweringError(f"no format fits what arrives from {', '.join(arriving.values())}: {refused}")

    def summed(self, name: str, source: str) -> int:
        """Add a synapse that sums all neurons and the fewest bits that its sum must lose; return those."""
        ones = np.ones((1, self.ranges[source].low.size), np.int64)

        def make(lost: int) -> Synapse:
            return Synapse(name, 1, weight=ones, sign_mode="EXCITATORY", weight_exp=-lost, graded=True)

        node, lost = self.finest(range(9), make, s_in=source)
        self.add(node, s_in=source)
        return lost

    def spread(self, name: str, source: str, size: int) -> None:
        """Add a synapse that brings one neuron's messages to ``size`` others."""
        ones = np.ones((size, 1), np.int64)
        self.add(Synapse(name, size, weight=ones, sign_mode="EXCITATORY", graded=True), s_in=source)
