"""The simulation: integrate-and-fire populations over T steps, in pieces of many steps.

The definition is step by step: in each step every population adds its current to its membrane, fires where that reaches
the threshold, and is reset by subtraction. A population charges only later ones of the same step, so a piece of many
steps can be simulated population by population, products, norms and softmax over all of its steps at once; what a piece
takes over from the one before it are membranes and running sums. With feedback a piece is one step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from spiking_lm.weights import QuantizedLinear
from spiking_lm_bitspike.blocks import Batch, Chain, Reading
from spiking_lm_bitspike.config import BitspikeConfig

AT_ONCE = 2**22
"""Values of one kind that a simulation computes at a time."""

FIRST_CHECK = 4
"""Steps after which rates are looked at for the first time, with a tolerance; then after half as many more."""


class Spiking(Reading):
    """Reads populations as spikes ``(T, B, S, N)`` of the steps of a piece, and counts them over all pieces.

    In ``mode: rate-consistent`` what norms, softmax and GELU act on are means over the steps so far. A population that
    is charged with f of such means at step t has then been charged with t f(mean) in all: the difference to what it got
    before is its current, and so what early steps had wrong is made good. In ``mode: sequential`` they are means over
    all T steps, and the current is the same at every step.
    """

    def __init__(
        self, config: BitspikeConfig, neurons: Mapping[str, nn.Module], batch: Batch, keep: Collection[str]
    ) -> None:
        super().__init__(batch.masks, batch.earlier)
        self.config, self.neurons = config, neurons
        self.step = 0
        """Steps of all pieces before this one."""
        self.counts: dict[str, Tensor] = {}
        """Spikes so far, ``(B, S, N)``."""
        self.last: dict[str, Tensor] = {}
        """Spikes of the last step, ``(B, S, N)``."""
        self.spikes: dict[str, list[Tensor]] = {name: [] for name in keep}
        """All spikes of some populations, piece by piece."""
        self._membranes: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._charges: dict[str, Tensor] = {}

    def fire(self, name: str, current: Tensor, *, averaged: bool = False) -> Tensor:
        config = self.config
        if config.mode == "sequential":
            current = current[:1].expand(config.steps, *current.shape[1:])
        elif averaged and config.mode == "rate-consistent":
            current = current.to(torch.promote_types(current.dtype, torch.float32))
            charge = current * self._times(current)
            before = self._charges.get(name)
            current = charge.diff(dim=0, prepend=(torch.zeros_like(charge[0]) if before is None else before)[None])
            self._charges[name] = charge[-1]
        steps, *rest = current.shape
        membrane = self._membranes.get(name)
        if membrane is None:
            dtype = torch.promote_types(current.dtype, torch.float32)
            membrane = current.new_full(rest, config.charge * config.vth, dtype=dtype)
        fired, after = self.neurons[name](current.flatten(1, -2).transpose(0, 1), membrane.flatten(0, -2))
        self._membranes[name] = after.view(rest)
        spikes = cast(Tensor, fired).transpose(0, 1).view(steps, *rest)
        count = spikes.sum(0, dtype=membrane.dtype)
        self.counts[name] = self.counts[name] + count if name in self.counts else count
        self.last[name] = spikes[-1]
        if name in self.spikes:
            self.spikes[name].append(spikes)
        return spikes

    def average(self, name: str, x: Tensor) -> Tensor:
        if self.config.mode == "released":
            return x
        if self.config.mode == "sequential":
            return x.mean(0, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        total = x.cumsum(0, dtype=torch.promote_types(x.dtype, torch.float32))
        if name in self._sums:
            total += self._sums[name]
        self._sums[name] = total[-1]
        return total / self._times(total)

    def settle(self, name: str, x: Tensor) -> Tensor:
        return self.average(name, x) if self.config.mode == "sequential" else x

    def linear(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        return cast(Tensor, layer(x))

    def past(self, name: str, x: Tensor) -> Tensor:
        if name not in self.earlier:
            return x
        return torch.cat([self.earlier[name][self.step : self.step + len(x)].to(x.dtype), x], -2)

    def select(self, rows: Tensor) -> None:
        """Go on with some rows of the batch alone; an index tensor. What is kept of spikes is not selected."""
        for table in (self.counts, self.last, self._membranes, self._sums, self._charges):
            for name in table:
                table[name] = table[name][rows]
        self.masks = {name: mask[rows] for name, mask in self.masks.items()}

    def _times(self, like: Tensor) -> Tensor:
        """Return the number of every step of this piece, from 1, to go with ``(T, B, S, N)``."""
        first = self.step + 1
        times = torch.arange(first, first + len(like), device=like.device, dtype=like.dtype)
        return times.view(-1, *[1] * (like.ndim - 1))


class Simulated(NamedTuple):
    """What a simulation gives."""

    rates: dict[str, Tensor]
    """Of every population, ``(B, S, N)``."""
    steps: Tensor
    """(B,), the steps that each text took."""
    spikes: dict[str, Tensor]
    """Of the populations that were asked for, ``(T, B, S, N)``, zeros after a text's last step."""


@torch.no_grad()
def simulate(
    chain: Chain, config: BitspikeConfig, neurons: Mapping[str, nn.Module], batch: Batch, keep: Collection[str] = ()
) -> Simulated:
    """Simulate T steps, or fewer of texts whose rates settle; ``keep`` names populations whose spikes are wanted."""
    if config.mode != "sequential":
        return _simulate(chain, config, neurons, batch, keep)
    # All steps of a population at once: what has to fit into memory are fewer rows.
    every = torch.arange(len(batch.charge), device=batch.charge.device)
    at_once = max(1, AT_ONCE * len(every) // (config.steps * _values(batch, config)))
    parts = [_simulate(chain, config, neurons, batch.rows(rows), keep) for rows in torch.split(every, at_once)]
    return Simulated(
        {name: torch.cat([part.rates[name] for part in parts]) for name in chain.names()},
        torch.cat([part.steps for part in parts]),
        {name: torch.cat([part.spikes[name] for part in parts], 1) for name in keep},
    )


def _simulate(
    chain: Chain, config: BitspikeConfig, neurons: Mapping[str, nn.Module], batch: Batch, keep: Collection[str]
) -> Simulated:
    read = Spiking(config, neurons, batch, keep)
    last, names = chain.ends()[-1], chain.names()
    size, device = len(batch.charge), batch.charge.device
    rows, left = torch.arange(size, device=device), batch
    steps = torch.zeros(size, dtype=torch.int64, device=device)
    rates: dict[str, Tensor] = {}
    spikes: dict[str, list[Tensor]] = {name: [] for name in keep}
    due, before = config.steps if config.tolerance is None else min(FIRST_CHECK, config.steps), None

    def done(which: Tensor) -> None:
        """Note the rates of some of the rows that are left."""
        steps[rows[which]] = read.step
        for name in names:
            rate = read.counts[name][which] / read.step
            if name not in rates:
                rates[name] = rate.new_zeros(size, *rate.shape[1:])
            rates[name][rows[which]] = rate

    while len(rows):
        piece = min(_at_once(left, config), due - read.step)
        charge = left.charge.expand(piece, *left.charge.shape)
        fed_back = read.last[last][None] if chain.feedback is not None and read.last else None
        chain(charge, left.mask, read, fed_back)
        read.step += piece
        for name, pieces in read.spikes.items():
            whole = pieces[-1].new_zeros(piece, size, *pieces[-1].shape[2:])
            whole[:, rows] = pieces.pop()
            spikes[name].append(whole)
        if read.step == config.steps:
            done(torch.arange(len(rows), device=device))
            break
        if read.step < due:
            continue
        due = min(due + due // 2, config.steps)
        rate = read.counts[last] / read.step
        if before is not None and config.tolerance is not None:
            change = ((rate - before).abs().mean(2) * left.valid).sum(1) / left.valid.sum(1)
            settled = change <= config.tolerance
            done(settled.nonzero()[:, 0])
            going = (~settled).nonzero()[:, 0]
            read.select(going)
            rows, rate, left = rows[going], rate[going], left.rows(going)
        before = rate
    return Simulated(rates, steps, {name: torch.cat(pieces) for name, pieces in spikes.items()})


def _at_once(batch: Batch, config: BitspikeConfig) -> int:
    """Return how many steps are simulated at once: as many as memory should hold, and with feedback one."""
    if config.feedback:
        return 1
    return config.steps if config.mode == "sequential" else max(1, AT_ONCE // _values(batch, config))


def _values(batch: Batch, config: BitspikeConfig) -> int:
    """Return how many values of one kind a step of the simulation computes at most."""
    return batch.valid.numel() * max(4 * config.n_embd, config.n_hidden, config.n_head * batch.mask.shape[-1])


def pack_bits(spikes: Tensor) -> Tensor:
    """Return spikes ``(T, B, S, N)`` as bits ``(B, S, T, ceil(N / 8))`` of uint8, lowest bit first."""
    bits = spikes.permute(1, 2, 0, 3).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    bits = bits.view(*bits.shape[:-1], bits.shape[-1] // 8, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, size: int, dtype: Any) -> Tensor:
    """Return the spikes ``(T, B, S, size)`` that :func:`pack_bits` packed."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    spikes = (bits[..., None] >> places) & 1
    return spikes.flatten(-2)[..., :size].permute(2, 0, 1, 3).to(dtype)
