"""What decoding one token consists of: a list of instructions on one block of float32 numbers.

All vectors, of activations, states and small parameters, are places in that block; matrices lie where they are. So a
token needs no memory of its own, and whoever executes the list, compiled code or torch, does nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from spiking_lm.kernels import events

Form = Literal["rows", "sources", "int8 rows", "int8 sources"]
"""How a matrix lies: whole rows (N, K), or (K, N), of whose rows only those of active sources are read."""

Kind = Literal["embed", "norm", "shift", "copy", "linear", "wkv", "gate", "relu2", "lif", "gif", "egru", "add"]

PAD = 32
"""Vectors begin at multiples of this; what is behind their end is zero."""


@dataclass
class Matrix:
    """A matrix as it is multiplied with, and what else it might be."""

    weight: Tensor
    """(N, K), or (K, N) where it lies by source: the model's own."""
    by_source: bool
    """It is the model that keeps it one row per source."""
    int8: bool
    form: Form = "rows"
    data: Tensor = field(default_factory=lambda: torch.empty(0))
    """What is read: ``weight`` itself, a transposed copy, or codes."""
    scale: Tensor | None = None
    """(N,), of int8 codes."""

    def __post_init__(self) -> None:
        if self.int8:
            rows = self.weight.T if self.by_source else self.weight
            codes, self.scale = int8_rows(rows)
            self.form, self.data = "int8 rows", codes
        else:
            self.form, self.data = ("sources" if self.by_source else "rows"), self.weight

    @property
    def sizes(self) -> tuple[int, int]:
        """Return (N, K)."""
        n, k = self.weight.shape
        return (k, n) if self.by_source else (n, k)

    def choose(self, active: float, rates: events.Rates) -> bool:
        """Take the form that costs least with so many active sources per token; return whether it is another one."""
        n, k = self.sizes
        before = self.form
        if self.int8:
            wanted: Form = events.cheaper_form(k, n, active, ("int8 rows", "int8 sources"), rates)  # type: ignore[assignment]
        elif self.by_source:
            return False  # all forms but this one would be a copy, for at most a third
        else:
            wanted = events.cheaper_form(k, n, active, ("rows", "sources"), rates)  # type: ignore[assignment]
        if wanted == before:
            return False
        turned = self.data if self.int8 else self.weight
        self.data = self.weight if wanted == "rows" else turned.t().contiguous()
        self.form = wanted
        return True


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (N, K) of ``weight`` and a scale per row: the largest weight of each is 127 or -127."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
    return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8).contiguous(), scale


@dataclass
class Instruction:
    """One operation; all tensors are places in the block."""

    kind: Kind
    out: Tensor
    inputs: tuple[Tensor, ...] = ()
    parameters: tuple[Tensor, ...] = ()
    state: tuple[Tensor, ...] = ()
    numbers: tuple[float, ...] = ()
    matrix: Matrix | None = None
    """Of ``linear``; its bias is the only parameter there."""
    scale: Tensor | None = None
    """Of ``linear`` with int8 codes, (N,)."""
    table: Tensor | None = None
    """(V, N), of ``embed``."""
    name: str = ""
    """Of the graph's op."""
    watched: bool = False
    """Its input is mostly silent, perhaps: active sources are counted."""


@dataclass
class Plan:
    """The instructions of one token, and where their numbers are."""

    block: Tensor
    instructions: list[Instruction]
    logits: Tensor
    """(V,), a place in the block."""
    state: dict[tuple[int | str, ...], Tensor]
    """Path in the model's state -> place in the block, ``(n,)``; together they are the beginning of the block."""
    state_size: int

    def matrices(self) -> list[Instruction]:
        """Return the instructions that have a matrix."""
        return [i for i in self.instructions if i.matrix is not None]


class Places:
    """Hands out places in a block of numbers that is made when all of them are known."""

    def __init__(self) -> None:
        self.size = 0
        self._filled: list[tuple[slice, Tensor]] = []

    def new(self, size: int) -> slice:
        """Return a new place for ``size`` numbers."""
        place = slice(self.size, self.size + size)
        self.size += -(-size // PAD) * PAD
        return place

    def holding(self, values: Tensor) -> slice:
        """Return a new place that will hold ``values``."""
        flat = values.detach().float().reshape(-1)
        place = self.new(flat.numel())
        self._filled.append((place, flat))
        return place

    def block(self) -> Tensor:
        """Return the block, zero where nothing is held; it begins with a line of the cache."""
        memory = torch.zeros(self.size + PAD)
        first = -(memory.data_ptr() // 4) % 16
        block = memory[first : first + self.size]
        for place, values in self._filled:
            block[place] = values
        return block
