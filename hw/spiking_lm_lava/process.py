"""Loihi-style processes in whole numbers: the reference that Lava's fixed-point models are equal to, bit for bit.

A process is data and two functions. ``step`` computes one time step: from what arrived at its ports in this step, and
its state, come what it sends in the same step, and the next state. ``bounds`` says what values that can give, or that
a register would overflow. All is vectorised over neurons; states are explicit and belong to the caller, and arrays in
them are never written to, so that a copied dict is a snapshot. Time steps count from 1.

A synapse is the exception that makes loops possible: it sends what arrived one step ago (:meth:`Delaying.emit`) before
it receives (:meth:`Delaying.receive`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import LoweringError
from spiking_lm_lava.arithmetic import STATE_LIMIT, WORD_LIMIT, Int, shift, wrap_word
from spiking_lm_lava.values import Bounds, Range

State = dict[str, Any]
"""Name of a state -> its array; of a process without state, nothing."""

Limits = dict[str, tuple[int, int]]

KINDS: dict[str, type[Process]] = {}
"""Every process by its kind; a class that sets ``kind`` is in it."""

EXPONENT = (0, 7)
HELD = (1 - STATE_LIMIT, STATE_LIMIT - 1)


@dataclass(frozen=True, eq=False)
class Process(ABC):
    """A node of a network. Raises LoweringError for a field that cannot be what it is said to be."""

    kind: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ("a_in",)
    """In-ports, in the order of ``step``'s arguments."""
    sends: ClassVar[tuple[str, ...]] = ("s_out",)
    states: ClassVar[tuple[str, ...]] = ()
    """Names of what can be watched; those of Lava's variables."""
    limits: ClassVar[Limits] = {}
    """What hardware can hold of each field."""

    name: str
    size: int
    """Neurons."""

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "." in self.name:
            raise LoweringError(f"{self.kind} {self.name!r}: a name is text without a dot")
        for item in (item for item in fields(self) if item.init):
            value = getattr(self, item.name)
            if item.type == "int" and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
                raise self.error(f"{item.name} is {value!r}, not a whole number")
            if item.type == "int":
                object.__setattr__(self, item.name, int(value))
            if item.type == "Int":
                object.__setattr__(self, item.name, self._vector(item.name, value))
        if self.size < 1:
            raise self.error(f"size is {self.size}")

    def _vector(self, name: str, value: Any) -> Int:
        array = np.asarray(value)
        if array.dtype.kind not in "iu" or array.shape not in ((), (1,), (self.size,)):
            raise self.error(f"{name} is {array.dtype} {array.shape}, not one whole number or {self.size}")
        array = np.array(np.broadcast_to(array.astype(np.int64), self.size))
        array.flags.writeable = False
        return array

    @property
    def watchable(self) -> dict[str, int]:
        """The states that a run can give after each step, and their sizes."""
        return dict.fromkeys(self.states, self.size)

    def error(self, what: str, hint: str | None = None) -> LoweringError:
        """Return an error that names this process."""
        return LoweringError(f"{self.kind} {self.name!r}: {what}", hint=hint)

    def port_size(self, port: str) -> int:
        """Return how many values a port carries."""
        return self.size

    @property
    def latency(self) -> int:
        """After how many steps, at the earliest, what it sends can depend on what arrives."""
        return 0

    def check(self) -> None:
        """Refuse a field that hardware cannot hold. Raises: LoweringError with the limits."""
        for name, (low, high) in self.limits.items():
            value = np.asarray(getattr(self, name))
            if value.size and (value.min() < low or value.max() > high):
                worst = int(value.min() if value.min() < low else value.max())
                raise self.error(f"{name} is {worst}, and hardware holds {low} to {high}")

    def initial(self) -> State:
        """Return the state before the first step."""
        return {name: np.zeros(self.size, np.int64) for name in self.states}

    @abstractmethod
    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Return what is sent at step ``t`` and put the next state into ``state``, in new arrays."""

    @abstractmethod
    def bounds(self, *arrived: Range) -> Bounds:
        """Return what can be sent and held. Raises: LoweringError with the bound that would be passed."""

    def within(self, what: str, found: Range, limit: int, holds: str, hint: str | None = None) -> Range:
        """Return ``found`` if no magnitude reaches ``limit``. Raises: LoweringError with both."""
        if found.most >= limit:
            raise self.error(f"{what} may reach {found.most:,}, and {holds} holds less than {limit:,}", hint)
        return found


# -- ends of a network -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source(Process):
    """Sends one row of given values per step, all within ``low .. high``."""

    kind = "source"
    reads = ()
    limits = {"low": HELD, "high": HELD}
    low: int = 0
    high: int = 1

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Never called: rows are given."""
        raise NotImplementedError

    def bounds(self, *arrived: Range) -> Bounds:
        """Return what is declared."""
        if self.low > self.high:
            raise self.error(f"values run from {self.low} to {self.high}")
        return Bounds((Range.of(self.size, self.low, self.high),))


@dataclass(frozen=True, eq=False)
class Sink(Process):
    """Keeps what arrives, one row per step."""

    kind = "sink"
    sends = ()

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Send nothing; the caller keeps ``arrived``."""
        return ()

    def bounds(self, *arrived: Range) -> Bounds:
        """Take anything."""
        return Bounds(())


# -- synapses ----------------------------------------------------------------------------------------------------------

SignMode = Literal["MIXED", "EXCITATORY", "INHIBITORY", "auto"]
MOST_DELAY = 63


@dataclass(frozen=True, eq=False)
class Delaying(Process):
    """A process that sends at the next step what it makes of this one: the only kind that may close a loop."""

    reads = ("s_in",)
    sends = ("a_out",)
    weight: NDArray[Any] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """(size, inputs)."""

    @property
    def inputs(self) -> int:
        """How many values arrive."""
        return int(self.weight.shape[1])

    def port_size(self, port: str) -> int:
        """Return how many values a port carries."""
        return self.inputs if port == "s_in" else self.size

    @property
    def latency(self) -> int:
        """One step."""
        return 1

    def initial(self) -> State:
        """Return nothing on its way: sums of this step, the next one, and so on."""
        return {"pending": np.zeros((1, self.size), self.weight.dtype)}

    def emit(self, state: State) -> Any:
        """Return what is sent in this step."""
        return state["pending"][0]

    @abstractmethod
    def receive(self, state: State, arrived: Any) -> None:
        """Put what arrived on its way."""

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Send what arrived one step ago, then receive."""
        sent = self.emit(state)
        self.receive(state, *arrived)
        return (sent,)


@dataclass(frozen=True, eq=False)
class Synapse(Delaying):
    """A matrix ``weight (size, inputs)`` of 8-bit weights, which adds exactly one step; a delay d adds d more.

    ``a = shift(W @ s, weight_exp)``, rounded down, arrives at the next step. Of spikes without payload (``graded`` is
    False) only whether they are there counts. Mixed weights keep 8 bits of which the lowest is 0: whole int8 weights q
    are written as 2q with weight_exp -1 (:meth:`int8`).
    """

    kind = "synapse"
    limits = {"weight_exp": (-8, 7), "num_weight_bits": (1, 8), "delay": (0, MOST_DELAY)}
    sign_mode: SignMode = "MIXED"
    """``auto``, Lava's default, takes what the weights happen to be; a checked network says it."""
    weight_exp: int = 0
    num_weight_bits: int = 8
    graded: bool = False
    form: Literal["dense", "sparse", "delay"] = "dense"
    delay: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """Further steps of each weight, 0 .. 63, of the shape of ``weight``; empty unless ``form`` is ``delay``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "delay") if self.form == "delay" else ("weight",):
            array = np.asarray(getattr(self, name))
            if array.dtype.kind not in "iu" or array.ndim != 2 or len(array) != self.size or not array.size:
                raise self.error(f"{name} is {array.dtype} {array.shape}, not whole numbers ({self.size}, inputs)")
            array = array.astype(np.int64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.form not in ("dense", "sparse", "delay"):
            raise self.error(f"form is {self.form!r}, not 'dense', 'sparse' or 'delay'")
        if self.sign_mode not in ("MIXED", "EXCITATORY", "INHIBITORY", "auto"):
            raise self.error(f"sign_mode is {self.sign_mode!r}")
        if not isinstance(self.graded, (bool, np.bool_)):
            raise self.error(f"graded is {self.graded!r}, not true or false")
        if self.form == "delay" and self.delay.shape != self.weight.shape:
            raise self.error(f"delay is {self.delay.shape}, the weights are {self.weight.shape}")
        object.__setattr__(self, "prepared", self._prepare())

    prepared: Int = field(init=False, repr=False)
    """What of ``weight`` is used: clipped, and without the bits that are not kept."""

    @classmethod
    def int8(cls, name: str, weight: Any, *, weight_exp: int = 0, **others: Any) -> Synapse:
        """Return a synapse whose sums are those of ``weight``, int8: -128 .. 127, odd or even."""
        weights = np.asarray(weight)
        if weights.dtype.kind not in "iu" or weights.ndim != 2 or weights.min() < -128 or weights.max() > 127:
            raise LoweringError(f"synapse {name!r}: the weights are not a matrix of whole numbers from -128 to 127")
        return cls(
            name,
            len(weights),
            weight=2 * weights.astype(np.int64),
            sign_mode="MIXED",
            weight_exp=weight_exp - 1,
            **others,
        )

    @property
    def mode(self) -> str:
        """The sign mode, of ``auto`` the one that Lava would take."""
        if self.sign_mode != "auto":
            return self.sign_mode
        return "EXCITATORY" if self.weight.min() >= 0 else "INHIBITORY" if self.weight.max() <= 0 else "MIXED"

    def _prepare(self) -> Int:
        mode, lost = self.mode, 8 - self.num_weight_bits
        sign = -1 if mode == "INHIBITORY" else 1
        mixed = mode == "MIXED"
        weights = np.clip(sign * self.weight, -256 if mixed else 0, 255)
        dropped = max(lost + mixed, 0)
        prepared: Int = sign * (weights >> dropped << dropped)
        prepared.flags.writeable = False
        return prepared

    def check(self) -> None:
        """Refuse weights that would not arrive as they are. Raises: LoweringError naming the first."""
        super().check()
        if self.sign_mode == "auto":
            raise self.error("sign_mode is 'auto': the range of weights would depend on their values", "say MIXED")
        changed = np.argwhere(self.prepared != self.weight)
        if len(changed):
            at = tuple(changed[0].tolist())
            hint = "write int8 weights q as 2q with weight_exp -1: Synapse.int8" if self.mode == "MIXED" else None
            raise self.error(
                f"weight {int(self.weight[at])} at {at} would become {int(self.prepared[at])}: {self.num_weight_bits} "
                f"bits, {self.sign_mode}",
                hint,
            )

    @property
    def latency(self) -> int:
        """One step, and the shortest delay."""
        return 1 + (int(self.delay.min()) if self.form == "delay" else 0)

    @property
    def longest_delay(self) -> int:
        """The greatest further delay."""
        return int(self.delay.max(initial=0)) if self.form == "delay" else 0

    def groups(self) -> list[tuple[int, Int]]:
        """Return the delays that there are, each with the matrix of its weights; all others are 0 in it."""
        if self.form != "delay":
            return [(0, self.prepared)]
        return [(int(d), np.where(self.delay == d, self.prepared, 0)) for d in np.unique(self.delay)]

    def initial(self) -> State:
        """Return nothing on its way, for all delays."""
        return {"pending": np.zeros((self.longest_delay + 1, self.size), np.int64)}

    def receive(self, state: State, arrived: Int) -> None:
        """Put what arrived on its way."""
        s = arrived if self.graded else (arrived != 0).astype(np.int64)
        pending = np.roll(state["pending"], -1, axis=0)
        pending[-1] = 0
        for delay, weights in self.groups():
            pending[delay] = wrap_word(pending[delay] + shift(wrap_word(weights @ s), self.weight_exp))
        state["pending"] = pending

    def bounds(self, *arrived: Range) -> Bounds:
        """Return the sums that weights and messages allow."""
        (s,) = arrived
        if not self.graded:
            s = Range(np.where(s.low > 0, 1, 0), np.where((s.low != 0) | (s.high != 0), 1, 0), None)
        lossless = self.weight_exp >= 0 or not (self.prepared % (1 << -self.weight_exp)).any()
        low, high = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)
        total: list[Int] | None = None
        if lossless and s.total is not None:
            total = [np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)]
        for _, weights in self.groups():
            least, most = _product(weights, s.low, s.high)
            self.within("a sum", Range(least, most), WORD_LIMIT, "an accumulator", "fewer inputs or smaller ones")
            low += np.minimum(shift(least, self.weight_exp), 0)  # 0: before the first message arrives
            high += np.maximum(shift(most, self.weight_exp), 0)
            if total is not None and s.total is not None:
                for kept, part in zip(total, _product(weights, *s.total), strict=True):
                    kept += shift(part, self.weight_exp)
        sums = Range(low, high, (total[0], total[1]) if total is not None else None)
        return Bounds((self.within("a sum", sums, STATE_LIMIT, "a 24-bit message", "a smaller weight_exp"),))


def _product(weights: Int, low: Int, high: Int) -> tuple[Int, Int]:
    """Return the least and the greatest of ``weights @ s``; float64 is exact for what 24-bit messages can add up to."""
    up, down = np.maximum(weights, 0).astype(np.float64), np.minimum(weights, 0).astype(np.float64)
    least, most = up @ low + down @ high, up @ high + down @ low
    return least.astype(np.int64), most.astype(np.int64)
