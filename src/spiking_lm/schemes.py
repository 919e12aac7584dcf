"""How weights, activations and caches are written in few bits: schemes as data (torch-free).

A recipe's ``weights: {bits: 4, group_size: 64}`` is a :class:`WeightScheme`. :mod:`spiking_lm.quantization` and
:mod:`spiking_lm.gif` compute with them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spiking_lm.config import StrictModel

OFF = 16
"""Bits at and above which values stay as they are."""


class SalientChannels(StrictModel):
    """The share of input channels that is given more spike steps than the others (Xing et al., arXiv 2407.04752)."""

    rate: float = Field(gt=0, lt=1)
    """Share of the channels; leave ``salient`` out for none."""
    steps: Literal[2, 4, 8] = 2
    """Spike steps T of a salient channel; ordinary ones have one."""
    choice: Literal["obs", "random"] = "obs"
    """obs: Optimal Brain Spiking, the channels whose rounding costs most. random: a baseline, to see what obs buys."""


class ActivationScheme(StrictModel):
    """Activations as counts of Generalized Integrate-and-Fire spikes: at most 2^bits - 1 per step."""

    bits: int = Field(default=OFF, ge=2, le=OFF)
    """16 leaves them real."""
    salient: SalientChannels | None = None
    grid: Literal["exact", "reference"] = "exact"
    """The finest count of a salient channel. exact: T (2^bits - 1), what T steps can emit. reference: T 2^bits - 1, as
    published, of which T steps cannot emit the highest."""
    spikes: Literal["signed", "unsigned"] = "signed"
    """signed: counts from the zero point, so that zero is silent and spikes have a sign. unsigned: counts from the
    least value upwards, and a constant per output for the zero point. The products are the same."""
    scale: Literal["dynamic", "static"] = "dynamic"
    """dynamic: from each token's own range. static: from the calibration text, for hardware without a divider."""


class CacheScheme(StrictModel):
    """Queries, and the keys and values that a language model keeps of every token, per token and head."""

    bits: int = Field(default=OFF, ge=2, le=OFF)
    """Of keys and values; 16 keeps them real."""
    query_bits: int = Field(default=OFF, ge=2, le=OFF)
    salient: SalientChannels | None = None
    grid: Literal["exact", "reference"] = "exact"
    """As for activations."""
    key_range: Literal["token", "channel"] = "token"
    """What shares a scale. token: each key its own. channel: each channel over all tokens, as the released SpikeLLM has
    it, which lets later tokens change earlier ones; for parity only, without a cache."""


class WeightScheme(StrictModel):
    """A weight matrix in few bits: a grid per output row, or per group of consecutive inputs of a row."""

    type: Literal["uniform", "ternary"] = "uniform"
    """uniform: 2^bits levels. ternary: spikes of -1, 0 and 1 over one or more steps, so that products only add."""
    bits: int = Field(default=OFF, ge=2, le=OFF)
    """uniform only; 16 leaves the matrix as it is."""
    group_size: int | None = Field(default=None, gt=0)
    """Inputs that share a scale; None: all of a row. The last group of a row may be shorter."""
    symmetric: bool = False
    """uniform only: the grid is centred on zero."""
    salient: SalientChannels | None = None
    """ternary only: the columns that have ``steps`` ternary spikes per weight; the others have one."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> WeightScheme:
        if self.type == "ternary" and (self.bits != OFF or self.symmetric):
            raise ValueError("ternary weights have no bits and are symmetric: leave both out")
        if self.type == "uniform" and self.salient is not None:
            raise ValueError("salient is for type: ternary")
        return self

    @property
    def off(self) -> bool:
        """Whether the matrix stays as it is."""
        return self.type == "uniform" and self.bits >= OFF
