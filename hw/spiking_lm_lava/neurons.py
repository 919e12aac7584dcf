"""Spiking neurons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spiking_lm_lava.arithmetic import (
    ALIGN_SHIFT,
    DECAY_UNITY,
    STATE_LIMIT,
    WORD_LIMIT,
    Int,
    decayed,
    saturate,
    shift,
    shift_toward_zero,
    wrap_state,
    wrap_word,
)
from spiking_lm_lava.process import EXPONENT, HELD, Process, State
from spiking_lm_lava.values import Bounds, Range

_LEAST_THRESHOLD = -(2**17)


@dataclass(frozen=True, eq=False)
class LIF(Process):
    """Leaky integrate-and-fire: a current, a membrane, spikes of 0 or 1, hard reset.

    ``u' = wrap(tz(u (4096 - (du + 1)) / 4096) + a 2^6)``, ``v' = sat(tz(v (4096 - dv) / 4096) + u' + bias)``, a spike
    where ``v' > vth 2^6``, which sets v to 0. du = 4095 keeps no current, du = -1 all of it. With ``vth_lo`` the
    neuron is ternary: it also sends -1 where ``v' < vth_lo 2^6``. With ``reset_interval`` u and v are set to 0 before
    the steps t with ``t % reset_interval == reset_offset % reset_interval``.
    """

    kind = "lif"
    states = ("u", "v")
    limits = {
        "du": (-1, DECAY_UNITY - 1),
        "dv": (0, DECAY_UNITY),
        "vth": (0, 2**17 - 1),
        "bias_mant": (-4096, 4095),
        "bias_exp": EXPONENT,
        "u": HELD,
        "v": HELD,
    }
    du: int = 4095
    dv: int = 0
    vth: int = 10
    bias_mant: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    bias_exp: int = 0
    u: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    """Before the first step."""
    v: Int = field(default_factory=lambda: np.zeros(1, np.int64))
    vth_lo: int | None = None
    reset_interval: int = 0
    """0: never."""
    reset_offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vth_lo is not None and (
            isinstance(self.vth_lo, bool) or not isinstance(self.vth_lo, (int, np.integer))
        ):
            raise self.error(f"vth_lo is {self.vth_lo!r}, not a whole number")
        if self.reset_interval < 0 or (self.reset_interval and self.vth_lo is not None):
            raise self.error("a reset_interval is 0 or more steps, and ternary neurons have none")
        object.__setattr__(self, "bias", wrap_word(shift(self.bias_mant, self.bias_exp)))

    bias: Int = field(init=False, repr=False)

    def check(self) -> None:
        """Refuse a field that hardware cannot hold."""
        super().check()
        if self.vth_lo is not None and not _LEAST_THRESHOLD <= self.vth_lo <= 0:
            raise self.error(f"vth_lo is {self.vth_lo}, and hardware holds {_LEAST_THRESHOLD} to 0")

    def initial(self) -> State:
        """Return the state before the first step."""
        return {"u": self.u, "v": self.v}

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return spikes."""
        (a,) = arrived
        u, v = state["u"], state["v"]
        if self.reset_interval and t % self.reset_interval == self.reset_offset % self.reset_interval:
            u, v = np.zeros_like(u), np.zeros_like(v)
        u = wrap_state(wrap_word(decayed(u, self.du + 1) + (a << ALIGN_SHIFT)))
        v = saturate(decayed(v, self.dv) + u + self.bias)
        fires = v > self.vth << ALIGN_SHIFT
        spikes = fires.astype(np.int64)
        if self.vth_lo is not None:
            falls = v < self.vth_lo << ALIGN_SHIFT
            spikes = spikes - falls
            fires |= falls
        state["u"], state["v"] = u, np.where(fires, 0, v)
        return (spikes,)

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound the current by its geometric sum; it may not wrap. The membrane saturates, which is said."""
        (a,) = arrived
        current = self._settled(Range(a.low << ALIGN_SHIFT, a.high << ALIGN_SHIFT), self.du + 1, self.u)
        if current is None:
            raise self.error("du = -1 adds up currents without end", "du 0 or more, or a reset_interval")
        hint = "smaller weights or weight_exp, or a greater du"
        u = self.within("the current u", current, STATE_LIMIT, "a 24-bit state", hint)
        membrane = self._settled(Range(u.low + self.bias, u.high + self.bias), self.dv, self.v)
        least, most = 1 - STATE_LIMIT, self.vth << ALIGN_SHIFT
        if self.vth_lo is not None:
            least = self.vth_lo << ALIGN_SHIFT
        high = np.maximum(self.v, most)
        if membrane is None:
            v = Range(np.minimum(self.v, least), high)
        else:
            v = Range(np.maximum(membrane.low, np.minimum(self.v, least)), np.minimum(membrane.high, high))
        stops = self.vth_lo is None and (membrane is None or int(membrane.low.min()) < least)
        spikes = Range.of(self.size, 0 if self.vth_lo is None else -1, 1)
        return Bounds((spikes,), {"u": u, "v": v}, ("v",) if stops else ())

    def _settled(self, added: Range, decay: int, start: Int) -> Range | None:
        """Return the range of x = tz(x (4096 - decay) / 4096) + added from ``start``; None if it has no end."""
        low, high = np.minimum(added.low, 0), np.maximum(added.high, 0)
        if self.reset_interval:
            ends = Range(
                np.minimum(start, 0) + self.reset_interval * low, np.maximum(start, 0) + self.reset_interval * high
            )
            if decay == 0:
                return ends
        elif decay == 0:
            return None if low.any() or high.any() else Range(start, start).or_zero()
        settled = Range(
            np.minimum(start, -(-low * DECAY_UNITY // decay)), np.maximum(start, high * DECAY_UNITY // decay)
        )
        if not self.reset_interval:
            return settled
        return Range(np.maximum(settled.low, ends.low), np.minimum(settled.high, ends.high))


@dataclass(frozen=True, eq=False)
class ResonateAndFire(Process):
    """A damped rotation of two states; a spike where the imaginary part crosses 0 upwards and the real one is large.

    ``sin_decay``, ``cos_decay`` are in units of 2^-decay_bits and ``vth`` is scaled: :meth:`of` computes them as Lava.
    """

    kind = "rf"
    reads = ("a_real_in", "a_imag_in")
    states = ("real", "imag")
    limits = {
        "sin_decay": (-DECAY_UNITY, DECAY_UNITY),
        "cos_decay": (-DECAY_UNITY, DECAY_UNITY),
        "vth": HELD,
        "state_exp": EXPONENT,
        "decay_bits": (1, 12),
    }
    sin_decay: int = 0
    cos_decay: int = 0
    vth: int = 1
    state_exp: int = 0
    decay_bits: int = 12

    @classmethod
    def of(
        cls, name: str, size: int, *, period: float, alpha: float, vth: float, state_exp: int, decay_bits: int = 12
    ) -> ResonateAndFire:
        """Return neurons that resonate every ``period`` steps and lose the share ``alpha`` per step."""
        turn, left = 2 * np.pi / period, (1 - alpha) * (1 << decay_bits)
        return cls(
            name,
            size,
            sin_decay=int(left * np.sin(turn)),
            cos_decay=int(left * np.cos(turn)),
            vth=int(vth * (1 << state_exp)),
            state_exp=state_exp,
            decay_bits=decay_bits,
        )

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return spikes."""
        a, b = (wrap_word(x << self.state_exp) for x in arrived)
        real, imag, bits = state["real"], state["imag"], self.decay_bits
        turned = shift_toward_zero(self.cos_decay * real, bits) - shift_toward_zero(self.sin_decay * imag, bits)
        raised = shift_toward_zero(self.sin_decay * real, bits) + shift_toward_zero(self.cos_decay * imag, bits)
        state["real"], state["imag"] = saturate(turned + a), saturate(raised + b)
        fires = (state["real"] >= self.vth) & (state["imag"] >= 0) & (imag < 0)
        return (fires.astype(np.int64),)

    def bounds(self, *arrived: Range) -> Bounds:
        """Bound the length of the state by what a contraction leaves of all inputs."""
        a, b = ((max(-int(x.low.min()), int(x.high.max())) << self.state_exp) for x in arrived)
        left = np.hypot(self.sin_decay, self.cos_decay) / (1 << self.decay_bits)
        if left >= 1:
            raise self.error(f"the rotation loses nothing ({left:.4f} is left per step), so that states have no bound")
        # Four products are rounded, each by less than 1.
        length = int(np.ceil((np.hypot(a, b) + 2 * np.sqrt(2)) / (1 - left) * (1 + 1e-9)))
        reach = Range.of(self.size, -length, length)
        self.within(
            "the state", reach, STATE_LIMIT, "a 24-bit state", "smaller inputs or state_exp, or a greater alpha"
        )
        self.within("a product of the state", Range.of(1, 0, length << self.decay_bits), WORD_LIMIT, "a word")
        return Bounds((Range.of(self.size, 0, 1),), {"real": reach, "imag": reach})
