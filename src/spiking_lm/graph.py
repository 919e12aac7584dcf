"""A typed description of what a model computes for one token, for accounting and lowering.

The graph says what each operation reads and what it emits. It describes; it does not execute. Accounting checks it
against the tensors that really flow (:mod:`spiking_lm.accounting`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from spiking_lm.errors import ConfigError

OpKind = Literal["embedding", "linear", "norm", "token_shift", "wkv", "neuron", "elementwise", "residual", "pool"]
"""``linear`` has a weight matrix; ``residual`` adds its inputs; ``elementwise`` is everything pointwise."""

ValueKind = Literal["token", "binary", "ternary", "integer", "graded", "real"]
"""What flows along an edge. ``integer`` are small counts; ``graded`` are real-valued but mostly zero events."""


@dataclass(frozen=True)
class Op:
    """One operation: what it reads, what it emits, and what it costs per token when nothing is skipped."""

    name: str
    kind: OpKind
    inputs: tuple[str, ...]
    """Names of ops, or ``"tokens"`` for the token ids."""
    emits: ValueKind
    size: int
    """Elements emitted per token."""
    module: str | None = None
    """Qualified name of the ``nn.Module`` that computes it, when one does."""
    weight: tuple[int, int] | None = None
    """(out, in) of the weight matrix of a ``linear``."""
    recurrent: tuple[str, ...] = ()
    """Names of ops, earlier or later ones, whose output for the *previous* token it reads too."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Role -> name in the model's state dict. Of a ``linear`` that is no ``nn.Linear``: ``weight`` (out, in) or
    ``weight_t`` (in, out), and ``bias``; what it read is then in ``LMOutput.arrived``. Of others: what they need.
    A matrix that is stored packed is named as the attribute that gives it: ``module.weight``."""
    dynamics: object | None = None
    """What it computes, for backends: of a ``neuron`` e.g. :class:`~spiking_lm.interfaces.EGRUDynamics`, of a
    ``linear`` that reads counts of spikes :class:`~spiking_lm.integers.SpikeProduct`, of others a class of
    :mod:`spiking_lm.host`."""
    state: tuple[tuple[int | str, ...], ...] = ()
    """Where the model's state has what the op remembers: paths of indices, fields and keys, each to a tensor (B, n).
    Neurons with membranes have one; ``token_shift`` the last token's input, which several may share; ``wkv`` three."""
    other_ops: int = 0
    """Arithmetic per token that NeuroBench does not count (norms, WKV, mixes, gates), in elementary operations; of one
    spike step, where a token takes several."""
    steps: int = 1
    """Spike steps, at most, in which a token's op is computed anew; the dense twin computes it once."""


@dataclass(frozen=True)
class LMGraph:
    """The ops in execution order; every input names an earlier op or ``"tokens"``, a recurrent one any op."""

    ops: tuple[Op, ...]
    _by_name: dict[str, Op] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        seen: dict[str, Op] = {}
        for op in self.ops:
            for name in op.inputs:
                if name != "tokens" and name not in seen:
                    raise ConfigError(f"graph: op {op.name!r} reads {name!r}, which no earlier op emits")
            if op.name in seen or op.name == "tokens":
                raise ConfigError(f"graph: two ops are named {op.name!r}")
            seen[op.name] = op
        for op in self.ops:
            for name in op.recurrent:
                if name not in seen:
                    raise ConfigError(f"graph: op {op.name!r} reads the last {name!r}, which no op emits")
        object.__setattr__(self, "_by_name", seen)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __getitem__(self, name: str) -> Op:
        return self._by_name[name]

    def input_kinds(self, op: Op) -> tuple[ValueKind, ...]:
        """Return what each input of ``op`` carries, recurrent ones last."""
        names = (*op.inputs, *op.recurrent)
        return tuple("token" if name == "tokens" else self._by_name[name].emits for name in names)

    def readers(self, name: str) -> tuple[Op, ...]:
        """Return the ops that read what ``name`` emits."""
        return tuple(op for op in self.ops if name in op.inputs or name in op.recurrent)


def layer_pattern(name: str) -> str:
    """Replace the layer numbers of an op's name by a star: ``blocks.3.att.key`` -> ``blocks.*.att.key``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
