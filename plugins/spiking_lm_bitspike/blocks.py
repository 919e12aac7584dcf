"""The wiring of SpikingBERT's populations, written once for rates and for spikes (Bal & Sengupta, arXiv 2308.10873).

A block is six populations, each charged by what the ones before it send in the same step::

    keys, values     linear in the block's input
    context          softmax(q K^T / sqrt d) V, where q is linear in the block's input and fires nothing
    mixed            LN(linear in context + the block's input)
    inner            GELU(linear in mixed)
    output           LN(linear in inner + mixed), the next block's input

A :class:`Reading` says what flows: rates of the clamp network ``(B, S, N)``, or spikes of many steps at once
``(T, B, S, N)``. Populations charge only later ones, so all steps of one can be simulated before the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm.kernels.dense import linear
from spiking_lm.weights import QuantizedLinear
from spiking_lm_bitspike.config import BitspikeConfig

POPULATIONS = ("keys", "values", "context", "mixed", "inner", "output")

MASKED = -10_000.0
"""Added to the scores of tokens that are not to be seen."""


class Reading(ABC):
    """How populations are read, and what is noted of them."""

    def __init__(self, masks: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> None:
        self.masks = masks
        """Dropout masks by population, ``(B, S, N)``."""
        self.earlier = earlier
        """Keys and values ``(..., B, n, H)`` of earlier tokens, by population, if there are any."""
        self.scores: list[Tensor] | None = None
        """Where they are wanted: masked attention scores ``(..., heads, S, n)`` of every block."""

    @abstractmethod
    def fire(self, name: str, current: Tensor, *, averaged: bool = False) -> Tensor:
        """Return what the population ``name`` sends when it is charged with ``current``.

        ``averaged`` says that the current was computed from what :meth:`average` returned.
        """

    def average(self, name: str, x: Tensor) -> Tensor:
        """Return what norms, softmax and GELU act on, where ``x`` has arrived."""
        return x

    def settle(self, name: str, x: Tensor) -> Tensor:
        """Return what charges a population that nothing of the kind stands before, where ``x`` has arrived."""
        return x

    def linear(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Multiply ``x (..., I)`` with a matrix. Not by calling the layer: who watches that counts spikes."""
        return linear(x, layer.effective_weight(), layer.bias)

    def drop(self, name: str, x: Tensor) -> Tensor:
        """Drop what dropout drops of the charges of a population."""
        return x * self.masks[name] if name in self.masks else x

    def past(self, name: str, x: Tensor) -> Tensor:
        """Return keys or values ``x (..., S, H)`` with those of earlier tokens before them."""
        return torch.cat([self.earlier[name].to(x.dtype), x], -2) if name in self.earlier else x


class Block(nn.Module):
    """Six populations and the matrices between them."""

    def __init__(self, config: BitspikeConfig, index: int) -> None:
        super().__init__()
        self.name, self.n_head = f"blocks.{index}", config.n_head
        size, inner, bits = config.n_embd, config.n_hidden, config.weights
        self.key = QuantizedLinear(size, size, bits=bits)
        self.value = QuantizedLinear(size, size, bits=bits)
        self.query = QuantizedLinear(size, size, bits=bits)
        self.mix = QuantizedLinear(size, size, bits=bits)
        self.mix_norm = nn.LayerNorm(size, eps=1e-12)
        self.up = QuantizedLinear(size, inner, bits=bits)
        self.down = QuantizedLinear(inner, size, bits=bits)
        self.down_norm = nn.LayerNorm(size, eps=1e-12)
        for layer in (self.key, self.value, self.query, self.mix, self.up, self.down):
            # The released 0.02 would leave most populations silent in small models, and so untrained.
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor, read: Reading) -> Tensor:
        """Read the block's input ``x (..., B, S, H)``; return what its last population sends.

        ``mask (B, 1, S, n)`` is added to attention scores over n tokens, earlier ones included.
        """
        name = self.name
        keys = read.fire(f"{name}.keys", read.settle(f"{name}.key", read.linear(self.key, x)))
        values = read.fire(f"{name}.values", read.settle(f"{name}.value", read.linear(self.value, x)))
        keys, values = read.past(f"{name}.keys", keys), read.past(f"{name}.values", values)
        query = read.average(f"{name}.query", read.linear(self.query, x))
        keys, values = read.average(f"{name}.keys", keys), read.average(f"{name}.values", values)
        context = read.fire(f"{name}.context", self._attend(query, keys, values, mask, read), averaged=True)
        mixed = read.drop(f"{name}.mixed", read.linear(self.mix, context)) + x
        mixed = self.mix_norm(read.average(f"{name}.mixed", mixed))
        mixed = read.fire(f"{name}.mixed", mixed, averaged=True)
        inner = F.gelu(read.average(f"{name}.inner", read.linear(self.up, mixed)))
        inner = read.fire(f"{name}.inner", inner, averaged=True)
        output = read.drop(f"{name}.output", read.linear(self.down, inner)) + mixed
        output = self.down_norm(read.average(f"{name}.output", output))
        return read.fire(f"{name}.output", output, averaged=True)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, read: Reading) -> Tensor:
        """Return ``softmax(q K^T / sqrt d + mask) V``, ``(..., B, S, H)``."""
        query, keys, values = (x.view(*x.shape[:-1], self.n_head, -1).transpose(-3, -2) for x in (query, keys, values))
        scores = query @ keys.transpose(-2, -1) / keys.shape[-1] ** 0.5 + mask
        if read.scores is not None:
            read.scores.append(scores)
        context = scores.softmax(-1).to(values.dtype) @ values
        return cast(Tensor, context.transpose(-3, -2).flatten(-2))


class Batch(NamedTuple):
    """Texts as the populations see them."""

    charge: Tensor
    """(B, S, H), what charges the first population at every step."""
    mask: Tensor
    """(B, 1, S, n), added to attention scores over n tokens, earlier ones included."""
    valid: Tensor
    """(B, S), where there are tokens."""
    masks: dict[str, Tensor]
    """Of dropout, by population, ``(B, S, N)``."""
    earlier: dict[str, Tensor]
    """Spikes ``(T, B, n, H)`` of the keys and values of earlier tokens, by population."""

    def rows(self, chosen: Tensor) -> Batch:
        """Return some of the texts, by an index tensor."""
        masks = {name: mask[chosen] for name, mask in self.masks.items()}
        earlier = {name: spikes[:, chosen] for name, spikes in self.earlier.items()}
        return Batch(self.charge[chosen], self.mask[chosen], self.valid[chosen], masks, earlier)


class Chain(nn.Module):
    """All populations: the one that the embedding charges, and those of the blocks."""

    def __init__(self, config: BitspikeConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.feedback = None
        if config.feedback:
            self.feedback = QuantizedLinear(config.n_embd, config.n_embd, bias=False)
            nn.init.uniform_(self.feedback.weight, -1, 1)
            self.feedback.weight.data /= self.feedback.weight.data.norm(dim=1, keepdim=True)

    def names(self) -> list[str]:
        """Return the names of all populations, in the order in which they fire."""
        return ["input", *(f"blocks.{i}.{what}" for i in range(len(self.blocks)) for what in POPULATIONS)]

    def ends(self) -> list[str]:
        """Return the populations that losses and heads read: the first one, and the last one of every block."""
        return ["input", *(f"blocks.{i}.output" for i in range(len(self.blocks)))]

    def forward(self, charge: Tensor, mask: Tensor, read: Reading, last: Tensor | None = None) -> Tensor:
        """Charge the first population with ``charge (..., B, S, H)``; return what the last one sends.

        ``last`` is what the last population sent before, where it feeds back.
        """
        if self.feedback is not None and last is not None:
            charge = charge + read.linear(self.feedback, last)
        x = read.fire("input", charge)
        for block in self.blocks:
            x = block(x, mask, read)
        return x
