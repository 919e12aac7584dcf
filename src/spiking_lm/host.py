"""What a machine beside a chip computes of a language model, in numpy: every op of a graph that is not placed.

A backend that places the matrices of a transformer leaves norms, positions, attention and the gates between them to its
host. Ops of a graph say by their ``dynamics``, one of the classes here, what they compute; :class:`HostModel` runs them
token by token, matrices of whole numbers (:mod:`spiking_lm.integers`) among them, whose spikes a backend watches. Reals
are float64, so that spikes do not depend on the order in which a machine adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import DataError, LoweringError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.integers import GIFNeurons, IntegerProduct, SpikeProduct

if TYPE_CHECKING:
    from torch import Tensor

    from spiking_lm.interfaces import SpikingLanguageModel

Array = NDArray[Any]
Real = NDArray[np.float64]

_TOKENS_AT_ONCE = 128
"""Bounds the memory that activations take."""
_SCALE_FLOOR = 1e-5
"""Of counts with a scale per token, as in :mod:`spiking_lm.gif`."""


@dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square normalisation; parameter ``weight``."""

    eps: float

    def run(self, x: Real, weight: Array) -> Real:
        """Normalise ``x (S, C)``."""
        y: Real = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + self.eps) * weight
        return y


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: channel pairs (j, j + d/2) of a head turn by ``frequencies`` (d/2) per token."""

    frequencies: tuple[float, ...]

    def run(self, x: Real, positions: Array) -> Real:
        """Turn ``x (S, H d)`` by the angles of ``positions (S,)``."""
        angles = positions[:, None, None] * np.asarray(self.frequencies)
        first, second = np.split(x.reshape(len(x), -1, 2 * len(self.frequencies)), 2, -1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rows of values times the Kronecker product of two matrices, ``left (a, a)`` and ``right (b, b)``.

    Parameter ``signs`` (C,), if there is one, is multiplied in before, or behind when the rotation is a turn ``back``.
    """

    left: Array
    right: Array
    stride: int = 1
    """From one value of a row to the next."""
    back: bool = False

    def run(self, x: Real, signs: Array | None = None) -> Real:
        """Rotate ``x (S, C)``."""
        if signs is not None and not self.back:
            x = x * signs
        rows = x.reshape(len(x), -1, len(self.left), len(self.right), self.stride)
        y: Real = np.einsum("snijk,ia,jb->snabk", rows, self.left, self.right, optimize=True).reshape(x.shape)
        return y * signs if signs is not None and self.back else y


class TokenCounts(NamedTuple):
    """Counts on grids of tokens and heads of their own, as a cache keeps them."""

    codes: Array
    """``(S, H, d)``, from 0 upwards."""
    limits: Real
    """``(S, H, 2)``: the least and the greatest value."""


@dataclass(frozen=True)
class TokenNeurons:
    """Neurons with a threshold for each token and head; parameter ``salient`` (H, d), if there is one, marks fine ones.

    The grid is that of :func:`spiking_lm.gif.gif_encode_tokens`.
    """

    head_size: int
    top: int
    """The greatest count."""
    salient_top: int

    def run(self, x: Real, salient: Array | None = None) -> TokenCounts:
        """Count ``x (S, H d)``."""
        heads = x.reshape(len(x), -1, self.head_size)
        limits = np.stack([heads.min(-1), heads.max(-1)], -1)
        scale, low, top = self._grid(limits, salient)
        codes = np.minimum(np.rint(heads / scale), low + top) - low
        small = max(self.top, 0 if salient is None else self.salient_top) <= np.iinfo(np.uint8).max
        return TokenCounts(codes.astype(np.uint8 if small else np.int32), limits)

    def decode(self, counts: TokenCounts, salient: Array | None = None) -> Real:
        """Return the values ``(S, H, d)``."""
        scale, low, _ = self._grid(counts.limits, salient)
        values: Real = (counts.codes + low) * scale
        return values

    def _grid(self, limits: Real, salient: Array | None) -> tuple[Real, Real, Array | int]:
        top = self.top if salient is None else np.where(salient, self.salient_top, self.top)
        least, greatest = limits[..., :1], limits[..., 1:]
        span = greatest - least
        constant = np.maximum(np.abs(least), np.finfo(np.float64).tiny)
        scale = np.where(span > 0, np.maximum(span / top, _SCALE_FLOOR), constant)
        return scale, np.rint(least / scale), top


@dataclass(frozen=True)
class Attention:
    """Causal attention of ``heads`` queries over ``kv_heads`` keys and values, ``window`` tokens back."""

    heads: int
    kv_heads: int
    head_size: int
    window: int | None = None

    def run(self, q: Real, k: Real, v: Real, positions: Array) -> Real:
        """Mix ``v (L, kv_heads, d)`` by how queries ``(S, heads, d)`` of the last S of L tokens fit keys.

        ``positions (S,)`` are those of the queries.
        """
        queries = q.reshape(len(q), self.kv_heads, -1, self.head_size)
        scores = np.einsum("sgqd,lgd->gqsl", queries, k, optimize=True) / self.head_size**0.5
        distance = positions[:, None] - (positions[-1] + np.arange(1 - len(k), 1))
        unseen = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
        scores[..., unseen] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed: Real = np.einsum("gqsl,lgd->sgqd", weights, v, optimize=True).reshape(len(q), -1)
        return mixed


@dataclass(frozen=True)
class Gate:
    """The first input's SiLU times the second input."""

    def run(self, gate: Real, x: Real) -> Real:
        """Gate ``x (S, C)``."""
        half = np.exp(-np.abs(gate))  # no overflow on either side
        gated: Real = gate * np.where(gate >= 0, 1, half) / (1 + half) * x
        return gated


Dynamics = RMSNorm | Rotary | Rotation | TokenNeurons | Attention | Gate | GIFNeurons | IntegerProduct
_DYNAMICS: dict[str, type] = {cls.__name__: cls for cls in Dynamics.__args__}
_HOST_DYNAMICS = (RMSNorm, Rotary, Rotation, TokenNeurons, Attention, Gate)
"""What a graph may declare of an op that stays on the host."""
_HOST_KINDS = ("embedding", "linear", "residual")
"""Kinds of ops that need not declare anything."""


@dataclass(frozen=True, eq=False)
class HostOp:
    """One op as it is run."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    size: int
    """Values that it gives for a token."""
    dynamics: Dynamics | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Role -> name among the model's parameters."""


class HostState(NamedTuple):
    """What a model remembers of a text."""

    length: int
    """Tokens read."""
    caches: dict[str, tuple[Any, Any]]
    """Keys and values of each attention, as they arrive there: real ``(L, H d)``, or :class:`TokenCounts`."""


Watch = Callable[[str, NDArray[np.int64], NDArray[np.int64]], None]
"""``f(name, counts (S, C), sums (S, O, G))`` is called for each product of whole numbers."""


class HostModel:
    """A language model in numpy: its ops in order, and their parameters by name, each stored once."""

    def __init__(self, ops: Sequence[HostOp], parameters: Mapping[str, Array]) -> None:
        self.ops, self.parameters = tuple(ops), dict(parameters)
        self.by_name = {op.name: op for op in self.ops}
        readers = {name: op.name for op in self.ops for name in op.inputs}
        self._last = {name: [x for x, reader in readers.items() if reader == name] for name in self.by_name}
        self._check()

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""
        return self.ops[-1].size

    def _check(self) -> None:
        """Raise ValueError unless every op finds what it reads, in the size that it needs."""
        sizes = {"tokens": 1}
        for op in self.ops:
            given = [sizes[name] for name in op.inputs]
            weight = self._array(op, "weight") if op.kind in ("embedding", "linear") or _is(op, RMSNorm) else None
            expected = {"embedding": 1, "linear": given[0]}.get(op.kind, op.size)
            if isinstance(op.dynamics, IntegerProduct):
                fits = op.dynamics.weight.shape == (op.size, given[0])
            elif op.kind == "linear":
                fits = weight is not None and weight.shape == (op.size, given[0])
            elif op.kind == "embedding":
                fits = weight is not None and weight.shape == (self.vocab_size, op.size)
            elif isinstance(op.dynamics, Attention):
                heads = op.dynamics.head_size * np.array([op.dynamics.heads, *2 * [op.dynamics.kv_heads]])
                fits, expected = given == heads.tolist() and op.size == given[0], given[0]
            elif isinstance(op.dynamics, GIFNeurons):
                fits = op.dynamics.salient.shape == (op.size,)
            else:
                fits = weight is None or weight.shape == (op.size,)
            if not fits or given[0] != expected:
                raise ValueError(f"op {op.name!r} does not fit what it reads, {op.inputs}")
            sizes[op.name] = op.size

    def _checked(self, state: Any) -> HostState:
        """Return ``state`` if it is one of this model. Raises DataError."""
        mixing = {op.name: op.inputs[1:] for op in self.ops if isinstance(op.dynamics, Attention)}
        fits = isinstance(state, HostState) and state.caches.keys() == (mixing if state.length else {}).keys()
        for name, kept in state.caches.items() if fits else ():
            for x, source in zip(kept, mixing[name], strict=True):
                op, counted = self.by_name[source], isinstance(x, TokenCounts)
                values = x.codes if counted else x
                fits &= counted == isinstance(op.dynamics, TokenNeurons) and values[:1].size in (0, op.size)
        if not fits:
            raise DataError("the state is not one of this program", hint="pass the state of an earlier result, or None")
        return cast(HostState, state)

    def run(self, tokens: Array, state: HostState | None = None, watch: Watch | None = None) -> tuple[Real, HostState]:
        """Read ``tokens (S,)`` behind ``state``; return the logits ``(S, V)`` and the state after them.

        ``watch`` is called for each product of whole numbers. Raises: DataError for the state of another model.
        """
        state = HostState(0, {}) if state is None else self._checked(state)
        logits = np.empty((len(tokens), self.vocab_size))
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            logits[part], state = self._run(tokens[part], state, watch)
        return logits, state

    def _run(self, tokens: Array, state: HostState, watch: Watch | None) -> tuple[Real, HostState]:
        values: dict[str, Any] = {"tokens": tokens}
        positions, caches = state.length + np.arange(len(tokens)), {}
        for op in self.ops:
            given = [values[name] for name in op.inputs]
            dynamics = op.dynamics
            y: Any
            if isinstance(dynamics, Attention):
                q, k, v = given
                past = state.caches.get(op.name)
                kept = (k, v) if past is None else (_behind(past[0], k), _behind(past[1], v))
                real = [self._heads(name, x, dynamics) for name, x in zip(op.inputs, (q, *kept), strict=True)]
                y = dynamics.run(real[0], real[1], real[2], positions)
                back = None if dynamics.window is None else dynamics.window - 1
                caches[op.name] = (_latest(kept[0], back), _latest(kept[1], back))
            elif isinstance(dynamics, IntegerProduct):
                sums = dynamics.add_up(given[0])
                if watch is not None:
                    watch(op.name, given[0], sums)
                y = dynamics.real(sums)
            elif isinstance(dynamics, GIFNeurons):
                y = dynamics.encode(given[0])
            elif isinstance(dynamics, Rotary):
                y = dynamics.run(given[0], positions)
            elif dynamics is not None:
                arrays = {role: self.parameters[name] for role, name in op.parameters.items()}
                y = dynamics.run(*given, **arrays)
            elif op.kind == "embedding":
                y = self.parameters[op.parameters["weight"]][tokens].astype(np.float64)
            elif op.kind == "linear":
                y = given[0] @ self.parameters[op.parameters["weight"]].T.astype(np.float64)
                if "bias" in op.parameters:
                    y = y + self.parameters[op.parameters["bias"]]
            else:
                y = sum(given)
            values[op.name] = y
            for name in self._last[op.name]:
                del values[name]
        return values[self.ops[-1].name], HostState(state.length + len(tokens), caches)

    def _heads(self, name: str, x: Any, attention: Attention) -> Real:
        """Return queries, keys or values ``(L, H, d)``."""
        if isinstance(x, TokenCounts):
            op = self.by_name[name]
            return cast(TokenNeurons, op.dynamics).decode(x, self._array(op, "salient"))
        return cast(Real, x.reshape(len(x), -1, attention.head_size))

    def _array(self, op: HostOp, role: str) -> Array | None:
        name = op.parameters.get(role)
        return None if name is None else self.parameters[name]

    # -- folder --------------------------------------------------------------------------------------------------------

    def to_folder(self) -> tuple[list[dict[str, Any]], dict[str, Array]]:
        """Return a JSON-able record of the ops, and all arrays by name; :meth:`from_folder` takes them back."""
        records, tensors = [], dict(self.parameters)
        for op in self.ops:
            record: dict[str, Any] = {"op": op.name, "kind": op.kind, "inputs": list(op.inputs), "size": op.size}
            if op.parameters:
                record["parameters"] = dict(op.parameters)
            if op.dynamics is not None:
                held = {f.name: getattr(op.dynamics, f.name) for f in fields(op.dynamics)}
                arrays = {name: value for name, value in held.items() if isinstance(value, np.ndarray)}
                tensors |= {f"{op.name}:{name}": array for name, array in arrays.items()}
                rest = {name: value for name, value in held.items() if name not in arrays}
                record["dynamics"] = {"type": type(op.dynamics).__name__, **rest, "arrays": sorted(arrays)}
            records.append(record)
        return records, tensors

    @classmethod
    def from_folder(cls, records: Sequence[Mapping[str, Any]], tensors: Mapping[str, Array]) -> HostModel:
        """Rebuild a model. Raises DataError for an array that is missing; KeyError, TypeError, ValueError otherwise."""
        ops: list[HostOp] = []
        parameters: dict[str, Array] = {}
        for record in records:
            name, dynamics = record["op"], None
            if "dynamics" in record:
                held = dict(record["dynamics"])
                kind = _DYNAMICS[held.pop("type")]
                held |= {x: _stored(tensors, f"{name}:{x}") for x in held.pop("arrays")}
                dynamics = kind(**{x: tuple(value) if isinstance(value, list) else value for x, value in held.items()})
            named = dict(record.get("parameters", {}))
            parameters |= {x: _stored(tensors, x) for x in named.values()}
            ops.append(HostOp(name, record["kind"], tuple(record["inputs"]), int(record["size"]), dynamics, named))
        return cls(ops, parameters)


def check(graph: LMGraph) -> None:
    """Raise LoweringError, naming the op, unless a host can run ``graph``, its few-bit matrices as whole numbers."""
    refused: list[Op] = []
    for op in graph:
        if isinstance(op.dynamics, SpikeProduct):
            op.dynamics.check()
        elif not isinstance(op.dynamics, _HOST_DYNAMICS) and not (op.dynamics is None and op.kind in _HOST_KINDS):
            counted = op.kind == "neuron" and any(isinstance(x.dynamics, SpikeProduct) for x in graph.readers(op.name))
            if not counted:
                refused.append(op)
    if refused:
        more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise LoweringError(
            f"op {refused[0].name!r} ({refused[0].kind}){more} declares no dynamics that a host has",
            hint="a host computes token by token: nothing may depend on later ones, as cache.key_range=channel does",
        )


def host_model(model: SpikingLanguageModel) -> HostModel:
    """Return ``model`` in numpy, from its ``graph()`` and ``state_dict()``, every few-bit matrix as whole numbers.

    Raises: LoweringError naming the op that has no such form, or whose parameters are not finite.
    """
    graph, state = model.graph(), model.state_dict()
    check(graph)
    ops: dict[str, HostOp] = {}
    parameters: dict[str, Array] = {}
    for op in graph:
        if isinstance(op.dynamics, SpikeProduct):
            assert op.dynamics.export is not None
            layer = op.dynamics.export(double=True)
            source = graph[op.inputs[0]]
            ops[source.name] = HostOp(source.name, source.kind, source.inputs, source.size, layer.neurons)
            ops[op.name] = HostOp(op.name, op.kind, op.inputs, op.size, layer.product)
            continue
        roles = {role: f"{op.module}.{role}" for role in ("weight", "bias")} if op.module else {}
        held = {role: name for role, name in {**roles, **op.parameters}.items() if name in state}
        for role, name in held.items():
            parameters[name] = _parameter(op, role, state[name])
            same = (x for x in parameters if x != name and _is_stored_as(state[x], state[name]))
            held[role] = next(same, name)  # a tied table is stored once
        ops[op.name] = HostOp(op.name, op.kind, op.inputs, op.size, cast(Any, op.dynamics), held)
    used = {name for op in ops.values() for name in op.parameters.values()}
    return HostModel([ops[op.name] for op in graph], {name: parameters[name] for name in used})


def _parameter(op: Op, role: str, tensor: Tensor) -> Array:
    """Return a parameter in a type that numpy has."""
    array: Array = (tensor.detach().cpu().float() if str(tensor.dtype) == "torch.bfloat16" else tensor).cpu().numpy()
    if not np.isfinite(array).all():
        raise LoweringError(f"op {op.name!r} ({op.kind}): its {role} holds values that are not finite")
    return array


def _is_stored_as(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _is(op: HostOp, kind: type) -> bool:
    return isinstance(op.dynamics, kind)


def _behind(past: Any, new: Any) -> Any:
    """Return what is kept of the tokens before, and of the new ones."""
    if isinstance(new, TokenCounts):
        return TokenCounts(*(np.concatenate(parts) for parts in zip(past, new, strict=True)))
    return np.concatenate([past, new])


def _latest(kept: Any, tokens: int | None) -> Any:
    """Return what is kept of the last tokens."""
    if tokens is None:
        return kept
    if isinstance(kept, TokenCounts):
        return TokenCounts(*(part[max(len(part) - tokens, 0) :] for part in kept))
    return kept[max(len(kept) - tokens, 0) :]


def _stored(tensors: Mapping[str, Array], name: str) -> Array:
    if name not in tensors:
        raise DataError(f"the program's weights lack {name!r}", hint="lower the model again")
    return tensors[name]
