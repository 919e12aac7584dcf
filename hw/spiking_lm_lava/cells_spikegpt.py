"""The cells of SpikeGPT as processes: spiking neurons, layer norm, time mix, and what is pointwise between matrices.

Their functions, with what each field means, are in ``worker/cells``: spiking, norm, wkv, mix. Here is what they may be
given, and what can come out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from spiking_lm_lava.arithmetic import DECAY_UNITY, STATE_LIMIT, WORD_LIMIT, Int
from spiking_lm_lava.cell import MANTISSA, VALID, Cell, rescaled
from spiking_lm_lava.process import HELD, Limits, State
from spiking_lm_lava.values import Bounds, Range
from spiking_lm_lava.worker.cells.fixed import MOST_SHIFT, UNIT
from spiking_lm_lava.worker.cells.norm import EXPONENT_BITS
from spiking_lm_lava.worker.cells.powers import TABLE_BITS
from spiking_lm_lava.worker.cells.spiking import ALIGN, MEMBRANE
from spiking_lm_lava.worker.cells.wkv import NEVER

SHIFT = (0, MOST_SHIFT)
ROOT_LIMIT = 1 << 15
"""What is squared is below: the square is a word, and a product with a mantissa after it too."""
_SLACK = 1.25
"""On the bound of a running sum of weights, for what rounding may add to it; the state saturates all the same."""


def _of(value: int) -> Int:
    return field(default_factory=lambda: np.full(1, value, np.int64))  # type: ignore[return-value]


# -- spiking neurons ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HoldingLIF(Cell):
    """Lava's LIF without a synaptic current (du = 4095), which holds its membrane while there is no token."""

    kind = "holding_lif"
    function = "spiking:lif"
    states = ("v",)
    limits = {"dv": (0, DECAY_UNITY), "vth": (0, (1 << 17) - 1), "bias": (0, 1)}
    dv: int = 0
    vth: int = 1
    bias: int = 1
    """1: fires at the threshold; 0: strictly above it."""

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound the membrane, as a geometric sum, before it may saturate; what fires at once needs no room."""
        a = self.within("a current", arrived[0], STATE_LIMIT >> ALIGN, "a membrane in units of 2^6", "a coarser format")
        fires = self.vth << ALIGN
        low = (np.minimum(a.low, 0) << ALIGN) * DECAY_UNITY // max(self.dv, 1)
        if self.dv == 0 and low.min() < 0:
            raise self.error("without a decay nothing bounds the membrane from below", "dv of 1 or more")
        high = np.minimum(fires + (np.maximum(a.high, 0) << ALIGN) + self.bias, MEMBRANE)
        self.within("the membrane", Range(low, high), STATE_LIMIT, "a 24-bit state", "a coarser format")
        return Bounds((Range.of(self.size, 0, 1),), {"v": Range(low, np.minimum(high, fires))})


@dataclass(frozen=True, eq=False)
class GIF(Cell):
    """A Generalized Integrate-and-Fire neuron: a ladder of ``levels`` comparators counts spikes of one step."""

    kind = "gif"
    function = "spiking:gif"
    states = ("v",)
    limits = {"dv": (0, DECAY_UNITY), "vth": (1, STATE_LIMIT - 1), "levels": (1, 255)}
    dv: int = 0
    vth: int = 1
    levels: int = 1
    signed: bool = False

    def check(self) -> None:
        """Refuse a ladder whose last rung no membrane reaches."""
        super().check()
        if self.levels * self.vth > MEMBRANE:
            raise self.error(f"{self.levels} times the threshold {self.vth} is beyond a membrane", "a coarser format")

    def bounds(self, *arrived: Range) -> Bounds:
        """Return the counts; a membrane may stop at the end of its 24 bits."""
        self.within("a current", arrived[0], STATE_LIMIT, "a 24-bit state", "a coarser format")
        held = Range.of(self.size, -MEMBRANE, MEMBRANE)
        return Bounds((Range.of(self.size, -self.levels * self.signed, self.levels),), {"v": held}, ("v",))


# -- layer norm --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Centre(Cell):
    """What arrives less its mean, and the square of that."""

    kind = "centre"
    function = "norm:centre"
    reads = ("x_in", "mean_in", VALID)
    sends = ("s_out", "s2_out")
    limits = {"before": SHIFT, "behind": SHIFT}
    before: int = 0
    behind: int = 0

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound the difference and its square."""
        x, mean, _ = arrived
        found = Range(x.low - mean.high, x.high - mean.low).or_zero()
        self.within("a difference to the mean", found, STATE_LIMIT, "a 24-bit state", "a coarser format")
        rounded = Range(np.zeros_like(found.low), np.maximum(-found.low, found.high) + ((1 << self.before) >> 1))
        root = Range(rounded.low, rounded.high >> self.before)
        self.within("what is squared", root, ROOT_LIMIT, "a factor of 16 bits", "a greater 'before'")
        square = Range(root.low, (root.high**2 + ((1 << self.behind) >> 1)) >> self.behind)
        return Bounds((found, self.within("a square", square, STATE_LIMIT, "a 24-bit message", "a greater 'behind'")))


@dataclass(frozen=True, eq=False)
class InverseRoot(Cell):
    """One neuron: the inverse square root of a scaled sum, mantissa and shift in one message."""

    kind = "inverse_root"
    function = "norm:inverse_root"
    limits = {"size": (1, 1), "mantissa": (0, MANTISSA[1]), "shift": SHIFT, "eps": (0, STATE_LIMIT - 1)}
    mantissa: Int = _of(1)
    shift: Int = _of(0)
    eps: int = 0

    def bounds(self, *arrived: Range) -> Bounds:
        """Ask for a sum that is not negative and, scaled, a 24-bit word."""
        if int(arrived[0].low.min()) < 0:
            raise self.error(f"what arrives may be {int(arrived[0].low.min()):,}, which has no root")
        rescaled(self, "what arrives", arrived[0], self.mantissa, self.shift, np.full(1, self.eps))
        return Bounds((Range.of(1, 0, 2 << UNIT << EXPONENT_BITS),))


@dataclass(frozen=True, eq=False)
class Normalise(Cell):
    """What arrives times an inverse root, within ``-most .. most``."""

    kind = "normalise_rows"
    function = "norm:normalise"
    reads = ("x_in", "root_in", VALID)
    limits = {"shift": SHIFT, "most": (1, STATE_LIMIT - 1)}
    shift: int = 0
    most: int = STATE_LIMIT - 1

    def bounds(self, *arrived: Range) -> Bounds:
        """Return what ``most`` leaves."""
        self.within("what arrives", arrived[0], STATE_LIMIT, "a 24-bit state", "a coarser format")
        return Bounds((Range.of(self.size, -self.most, self.most),))


# -- time mix ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WKV(Cell):
    """The time mix of RWKV-4 behind the matrices of keys and values."""

    kind = "wkv"
    function = "wkv:step"
    reads = ("k_in", "v_in", VALID)
    states = ("num", "den", "top")
    limits: ClassVar[Limits] = {
        **dict.fromkeys(("k_mantissa", "v_mantissa"), MANTISSA),
        **dict.fromkeys(("k_shift", "v_shift"), SHIFT),
        "decay": (1, -NEVER),
        "first": HELD,
        "fraction": (TABLE_BITS, 20),
        "weight_bits": (0, UNIT),
        "most": (1, STATE_LIMIT - 1),
        "finer": (0, 8),
    }
    k_mantissa: Int = _of(1)
    k_shift: Int = _of(0)
    v_mantissa: Int = _of(1)
    v_shift: Int = _of(0)
    decay: Int = _of(1)
    first: Int = _of(0)
    weight_bits: Int = _of(0)
    most: Int = _of(1)
    finer: Int = _of(0)
    fraction: int = TABLE_BITS

    def initial(self) -> State:
        """Return the state before the first token."""
        return {**super().initial(), "top": np.full(self.size, NEVER, np.int64)}

    def weights(self, k: Range) -> Int:
        """Return a bound of the sum of weights, in units of the greatest one, for sums of keys within ``k``.

        A weight 2^(k_i - n decay - top) is at most 1; while top falls towards the least key, old weights stay as they
        are, (greatest - least key) / decay of them, and behind that they are a geometric sum.
        """
        keys = self.keys(k)
        natural = self.decay * np.log(2) / 2.0**self.fraction
        found = 1 + 1 / natural + (keys.high - keys.low) / self.decay
        bound: Int = np.ceil(_SLACK * found).astype(np.int64)
        return bound

    def keys(self, k: Range) -> Range:
        """Return the range of keys to base 2."""
        return rescaled(self, "a key", k, self.k_mantissa, self.k_shift, np.zeros(self.size, np.int64))

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound exponents and both sums, with the value of this token added."""
        k, v, _ = arrived
        keys = self.keys(k)
        now = Range(keys.low + self.first, keys.high + self.first)
        hint = "a coarser format"
        self.within("a key of this token", now, -NEVER - int(self.decay.max()), "an exponent", hint)
        self.within("a key", keys, -NEVER - int(self.decay.max()), "an exponent", hint)
        rescaled(self, "a value", v, self.v_mantissa, self.v_shift, np.zeros(self.size, np.int64))
        weights = self.weights(k)
        den, num = Range(weights * 0, (weights + 1) << self.weight_bits), Range(weights * 0, (weights + 1) * self.most)
        self.within("the sum of weights", den, STATE_LIMIT, "a 24-bit state", "fewer weight_bits")
        self.within("the weighted sum of values", num, STATE_LIMIT, "a 24-bit state", "values of fewer bits")
        states = {"num": Range(-num.high, num.high), "den": den, "top": Range(np.full_like(keys.low, NEVER), keys.high)}
        mean = Range(-self.most << self.finer, self.most << self.finer)
        self.within("the mean", mean, STATE_LIMIT, "a 24-bit message", "fewer bits in 'finer'")
        return Bounds((mean,), states)


# -- pointwise ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pointwise(Cell):
    """What sends a result times ``mantissa / 2^shift`` plus ``bias``, within ``least .. most``."""

    limits: ClassVar[Limits] = {"mantissa": MANTISSA, "shift": SHIFT, "bias": HELD, "least": HELD, "most": HELD}
    mantissa: Int = _of(1)
    shift: Int = _of(0)
    bias: Int = _of(0)
    least: Int = _of(1 - STATE_LIMIT)
    most: Int = _of(STATE_LIMIT - 1)

    def sent(self, what: str, result: Range, further: Range | None = None) -> Range:
        """Return the range of what is sent for a ``result``."""
        found = rescaled(self, what, result, self.mantissa, self.shift, self.bias)
        if further is not None:
            found = self.within(what, found + further, STATE_LIMIT, "a 24-bit state", "a coarser format")
        return Range(np.clip(found.low, self.least, self.most), np.clip(found.high, self.least, self.most)).or_zero()


@dataclass(frozen=True, eq=False)
class TokenShift(Pointwise):
    """A mix of what arrives and what arrived one token ago, which it keeps scaled as it is needed."""

    kind = "token_shift"
    function = "mix:token_shift"
    states = ("held",)
    limits = {**Pointwise.limits, "held_mantissa": MANTISSA, "held_shift": SHIFT, "held_bias": HELD}
    held_mantissa: Int = _of(1)
    held_shift: Int = _of(0)
    held_bias: Int = _of(0)

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound what is kept, and its sum with what arrives."""
        x = arrived[0]
        kept = rescaled(self, "what is kept", x, self.held_mantissa, self.held_shift, self.held_bias).or_zero()
        return Bounds((self.sent("a mix", x, kept),), {"held": kept})


@dataclass(frozen=True, eq=False)
class Gate(Pointwise):
    """What arrives times the sigmoid of another input."""

    kind = "gate"
    function = "mix:gate"
    reads = ("x_in", "r_in", VALID)
    limits = {**Pointwise.limits, "r_mantissa": MANTISSA, "r_shift": SHIFT}
    r_mantissa: Int = _of(1)
    r_shift: Int = _of(0)

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound the product, by the factor that is no sigmoid."""
        x, r, _ = arrived
        rescaled(self, "the argument of a gate", r, self.r_mantissa, self.r_shift, np.zeros(self.size, np.int64))
        self.within("what is gated", x, STATE_LIMIT, "a 24-bit state", "a coarser format")
        return Bounds((self.sent("a gated value", x.or_zero()),))


@dataclass(frozen=True, eq=False)
class SquaredReLU(Pointwise):
    """The square of what arrives where that is positive."""

    kind = "squared_relu"
    function = "mix:squared_relu"
    limits = {**Pointwise.limits, "root_mantissa": (0, MANTISSA[1]), "root_shift": SHIFT}
    root_mantissa: Int = _of(1)
    root_shift: Int = _of(0)

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound what is squared, and the square."""
        x = Range(np.maximum(arrived[0].low, 0), np.maximum(arrived[0].high, 0))
        root = rescaled(self, "what is squared", x, self.root_mantissa, self.root_shift, np.zeros(self.size, np.int64))
        self.within("what is squared", root, ROOT_LIMIT, "a factor of 16 bits", "a coarser format")
        square = self.within("a square", Range(root.low**2, root.high**2), WORD_LIMIT, "a word")
        return Bounds((self.sent("a square", square),))


@dataclass(frozen=True, eq=False)
class Add(Cell):
    """The residual stream plus what a sub-block adds, which it takes to the stream's format."""

    kind = "add"
    function = "mix:add"
    reads = ("x_in", "a_in", VALID)
    limits = {"mantissa": MANTISSA, "shift": SHIFT}
    mantissa: Int = _of(1)
    shift: Int = _of(0)

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound the sum."""
        x, y, _ = arrived
        added = rescaled(self, "what is added", y, self.mantissa, self.shift, np.zeros(self.size, np.int64))
        found = self.within("the residual stream", x + added, STATE_LIMIT, "a 24-bit state", "a coarser format")
        return Bounds((found.or_zero(),))
