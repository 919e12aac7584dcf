"""Neurons that send whole numbers: graded, products, norms, sigma-delta."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from spiking_lm_lava.arithmetic import STATE_LIMIT, WORD_LIMIT, Int, inv_sqrt, wrap_word
from spiking_lm_lava.process import EXPONENT, HELD, Process, State
from spiking_lm_lava.values import Bounds, Range

INV_SQRT_MOST = 264045
"""The greatest inverse square root, that of 1."""

# -- graded neurons ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GradedVec(Process):
    """Passes what arrives where its magnitude, or with ``relu`` it itself, is above ``vth``; else 0."""

    kind = "graded"
    limits = {"vth": HELD}
    vth: int = 1
    relu: bool = False

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return graded spikes."""
        (a,) = arrived
        return (np.where((a if self.relu else np.abs(a)) > self.vth, a, 0),)

    def bounds(self, *arrived: Range) -> Bounds:
        """Return what arrives, and 0."""
        a = self.within(
            "what arrives", arrived[0], STATE_LIMIT, "a 24-bit state", "smaller inputs, weights or weight_exp"
        ).or_zero()
        low = np.zeros_like(a.low) if self.relu and self.vth >= 0 else a.low
        return Bounds((Range(low, a.high),))


@dataclass(frozen=True, eq=False)
class ProdNeuron(Process):
    """The product of two inputs of the same step, divided by 2^exp and rounded down, where it is above ``vth``."""

    kind = "product"
    reads = ("a_in1", "a_in2")
    limits = {"vth": HELD, "exp": (0, 31)}
    vth: int = 1
    exp: int = 0

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return graded spikes."""
        a, b = arrived
        p = wrap_word(a * b) >> self.exp
        return (np.where(np.abs(p) > self.vth, p, 0),)

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound the product before and after it is shifted."""
        a, b = arrived
        p = self.within("a product", a * b, WORD_LIMIT, "a word", "smaller inputs")
        s = Range(p.low >> self.exp, p.high >> self.exp).or_zero()
        return Bounds((self.within("a product", s, STATE_LIMIT, "a 24-bit message", "a greater exp"),))


@dataclass(frozen=True, eq=False)
class NormVecDelay(Process):
    """Sends the square of what arrives, and the product of what arrived one step ago with the second input.

    With an :class:`InvSqrt` between two synapses of ones it divides a vector by the root of its squares' sum.
    """

    kind = "normalise"
    reads = ("a_in1", "a_in2")
    sends = ("s_out", "s2_out")
    states = ("v",)
    limits = {"vth": HELD}
    vth: int = 1

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return graded spikes and squares."""
        a, b = arrived
        p = wrap_word(state["v"] * b)
        state["v"] = a
        return np.where(np.abs(p) > self.vth, p, 0), wrap_word(a * a)

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound both products."""
        a, b = arrived
        held = self.within(
            "what arrives", a, STATE_LIMIT, "a 24-bit state", "smaller inputs, weights or weight_exp"
        ).or_zero()
        least = np.where((a.low <= 0) & (a.high >= 0), 0, np.minimum(a.low**2, a.high**2))
        square = Range(least, np.maximum(a.low**2, a.high**2))
        self.within("a square", square, STATE_LIMIT, "a 24-bit message", "smaller inputs")
        p = self.within("a product", (held * b).or_zero(), STATE_LIMIT, "a 24-bit message", "smaller inputs")
        return Bounds((p, square), {"v": held})


@dataclass(frozen=True, eq=False)
class InvSqrt(Process):
    """One neuron: the inverse square root of a 24-bit word, both with 12 fractional bits; 0 of 0."""

    kind = "inv_sqrt"
    limits = {"size": (1, 1)}

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return the root."""
        return (inv_sqrt(arrived[0]),)

    def bounds(self, *arrived: Range) -> Bounds:
        """Ask for an input that has a root."""
        (x,) = arrived
        if int(x.low.min()) < 0:
            raise self.error(f"what arrives may be {int(x.low.min()):,}, which has no root")
        self.within("what arrives", x, 2 * STATE_LIMIT, "a 24-bit word", "a smaller weight_exp")
        return Bounds((Range.of(self.size, 0, INV_SQRT_MOST),))


# -- sigma-delta neurons -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sigma(Process):
    """Adds up what arrives, and sends the sum."""

    kind = "sigma"
    states = ("sigma",)

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return the sums."""
        state["sigma"] = wrap_word(state["sigma"] + arrived[0])
        return (state["sigma"],)

    def bounds(self, *arrived: Range) -> Bounds:
        """Take over the bound of the running sum."""
        sigma = _running_sum(self, arrived[0])
        return Bounds((sigma,), {"sigma": sigma})


@dataclass(frozen=True, eq=False)
class Delta(Process):
    """Sends by how much its input changed, where that is ``vth`` or more; the rest is kept for later.

    ``vth`` counts in units of the scaled state, 2^-(spike_exp + state_exp) of the input. With ``cum_error`` the
    threshold acts on the sum of changes since the last message.
    """

    kind = "delta"
    states: ClassVar[tuple[str, ...]] = ("act", "residue", "error")
    limits = {"vth": HELD, "spike_exp": EXPONENT, "state_exp": EXPONENT}
    vth: int = 1
    spike_exp: int = 0
    state_exp: int = 0
    cum_error: bool = False

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return the changes."""
        return (self.change(state, wrap_word(arrived[0] << (self.spike_exp + self.state_exp))),)

    def change(self, state: State, act: Int) -> Int:
        """Return what is sent of the change to ``act``."""
        delta = wrap_word(act - state["act"] + state["residue"])
        if self.cum_error:
            error = wrap_word(state["error"] + delta)
            sent = np.where(np.abs(error) >= self.vth, delta, 0)
            state["error"] = np.where(sent != 0, 0, error)
        else:
            sent = np.where(np.abs(delta) >= self.vth, delta, 0)
        state["act"], state["residue"] = act, wrap_word(delta - sent)
        return sent >> self.state_exp

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound activation and change."""
        e = self.spike_exp + self.state_exp
        return self.change_bounds(Range(arrived[0].low << e, arrived[0].high << e), {})

    def change_bounds(self, act: Range, states: dict[str, Range]) -> Bounds:
        """Bound the change of an activation; messages add up to it, but for the residue, if no bits are cut off."""
        hint = "smaller inputs, spike_exp or state_exp"
        held = self.within("the activation", act, STATE_LIMIT, "a 24-bit state", hint).or_zero()
        # With cum_error two sums of changes are below the threshold, so one change is below twice the threshold.
        kept = max(self.vth, 1) * (2 if self.cum_error else 1)
        residue = Range.of(self.size, 1 - kept, kept - 1)
        change = Range(held.low - held.high - kept, held.high - held.low + kept)
        self.within("a change", change, STATE_LIMIT, "a 24-bit state", hint)
        total = None if self.state_exp else (held.low - kept, held.high + kept)
        sent = Range(change.low >> self.state_exp, change.high >> self.state_exp, total)
        error = residue if self.cum_error else Range.of(self.size, 0, 0)
        return Bounds((sent,), {**states, "act": held, "residue": residue, "error": error})


@dataclass(frozen=True, eq=False)
class SigmaDelta(Delta):
    """A sigma neuron, a bias, an activation function (``relu`` or none) and a delta neuron in one."""

    kind = "sigma_delta"
    states = ("sigma", "act", "residue", "error")
    limits = {**Delta.limits, "bias": HELD}
    bias: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    """In units of the scaled state."""
    relu: bool = True

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return the changes."""
        state["sigma"] = wrap_word(state["sigma"] + arrived[0])
        act = wrap_word(state["sigma"] + self.bias)
        return (self.change(state, np.maximum(act, 0) if self.relu else act),)

    def bounds(self, *arrived: Range) -> Bounds:
        """Take over the bound of the running sum."""
        sigma = _running_sum(self, arrived[0])
        act = Range(sigma.low + self.bias, sigma.high + self.bias)
        if self.relu:
            act = Range(np.maximum(act.low, 0), np.maximum(act.high, 0))
        return self.change_bounds(act, {"sigma": sigma})


def _running_sum(process: Process, arrived: Range) -> Range:
    if arrived.total is None:
        raise process.error(
            "the sum of all that arrives has no bound",
            "feed it from delta neurons with state_exp 0, through weights that lose no bits to weight_exp",
        )
    return process.within(
        "the sum sigma", Range(*arrived.total), STATE_LIMIT, "a 24-bit state", "smaller inputs, weights or weight_exp"
    )
