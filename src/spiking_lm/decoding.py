"""Decoding one token at a time on the processor, at the pace at which memory gives out the weights.

A model's graph says what it computes for a token (:mod:`spiking_lm.graph`): here it becomes a list of instructions on
one block of numbers, which compiled code goes through in a single call, or torch one by one. One stream, float32
states, no memory asked for per token. What a graph does not declare cannot be decoded so; :func:`refusal` names it, and
generation then goes by ``model.step``.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from spiking_lm.errors import UsageError
from spiking_lm.graph import Op
from spiking_lm.interfaces import (
    EGRUDynamics,
    GIFDynamics,
    LayerNormDynamics,
    LIFDynamics,
    SigmoidGateDynamics,
    SpikingLanguageModel,
    SquaredReLUDynamics,
    State,
    TokenShiftDynamics,
    WKVDynamics,
)
from spiking_lm.kernels import compiled, dense, events
from spiking_lm.kernels.decode_plan import Instruction, Matrix, Places, Plan
from spiking_lm.kernels.decode_run import Compiled, Eager, lif_numbers
from spiking_lm.records import Finding

Weights = Literal["float", "int8"]
EngineName = Literal["compiled", "torch"]

WATCHED = 16
"""Tokens after which it is known how active the sources of a matrix are, and its form is chosen."""


LARGE = 2**22
"""Weights from which it is worth it to import, and on the first day to compile, the compiled engine."""


class _Refused(Exception):
    """The graph holds something that is not decoded here."""


def refusal(model: SpikingLanguageModel, weights: Weights = "float") -> str | None:
    """Say why ``model`` cannot be prepared for decoding, or None when it can."""
    try:
        _Lowering(model, weights == "int8")
    except _Refused as err:
        return str(err)
    return None


def prepare(
    model: SpikingLanguageModel,
    *,
    weights: Weights = "float",
    engine: EngineName | None = None,
    rates: events.Rates | None = None,
) -> Decoder:
    """Prepare ``model`` for decoding one stream of tokens; its weights must not change while it is used.

    ``weights="float"`` computes what ``model.step`` does, up to the order of sums, and reads the model's own matrices.
    ``"int8"`` reads a quarter of the bytes: codes with a scale per row of each matrix. ``engine`` is ``"compiled"``
    (with the extra ``cpu``) or ``"torch"``; None: the first that can run and is worth loading: for int8, and for models
    of :data:`LARGE` weights. By ``rates`` the form of a matrix is chosen; None measures those of this machine, so that
    sums may be made in another order in another process. Raises: UsageError with the reason where the model cannot be
    prepared, or the engine cannot run.
    """
    if weights not in ("float", "int8") or engine not in ("compiled", "torch", None):
        raise UsageError(
            f"prepare: weights is 'float' or 'int8', engine 'compiled' or 'torch': {weights!r}, {engine!r}"
        )
    worth_it = engine is not None or weights == "int8" or model.num_parameters() >= LARGE
    missing = compiled.missing() if worth_it else "it is not worth loading"
    if engine == "compiled" and missing is not None:
        raise UsageError(f"compiled decoding cannot run here: {missing}")
    try:
        plan = _Lowering(model, weights == "int8").plan()
    except _Refused as err:
        raise UsageError(
            f"this {type(model).__name__} cannot be prepared for decoding: {err}",
            hint="model.step and plain generation work for all models",
        ) from None
    return Decoder(model, plan, weights, engine or ("torch" if missing else "compiled"), rates)


class Decoder:
    """A model that reads one stream, token after token.

    :meth:`feed` advances the state that the decoder holds; :meth:`load` and :meth:`state` exchange it with the model's
    own. :meth:`step` is ``model.step`` for one row.
    """

    def __init__(
        self,
        model: SpikingLanguageModel,
        plan: Plan,
        weights: Weights,
        engine: EngineName,
        rates: events.Rates | None,
    ) -> None:
        self.model, self.plan, self.weights, self.engine, self._rates = model, plan, weights, engine, rates
        self._vocab_size = next(i.table.shape[0] for i in plan.instructions if i.table is not None)
        self._run = Compiled(plan) if engine == "compiled" else Eager(plan)
        self._fed = 0
        self._carried: State = None
        with torch.no_grad():
            self.load(model.init_state(1))

    def load(self, state: State) -> None:
        """Go on from a state of the model, of one row."""
        for path, place in self.plan.state.items():
            leaf = cast(Tensor, _follow(state, path))
            if leaf.shape != (1, place.numel()):
                raise UsageError(
                    f"decoding reads one stream: the state's {path} is {tuple(leaf.shape)}, not (1, {place.numel()})"
                )
            place.copy_(leaf[0])
        self._carried = state

    def state(self) -> State:
        """Return the present state as the model's own, a copy."""
        block = self.plan.block[: self.plan.state_size].clone()
        first = self.plan.block.storage_offset()
        places = {
            path: block[place.storage_offset() - first :][: place.numel()][None]
            for path, place in self.plan.state.items()
        }
        return _replaced(self._carried, (), places)

    def feed(self, token: int) -> Tensor:
        """Read a token; return the logits ``(V,)`` of the next one, in a place that the next token overwrites.

        Raises: UsageError for a token that the model does not know.
        """
        if not 0 <= token < self._vocab_size:
            raise UsageError(f"token {token} is not one of this model's {self._vocab_size}")
        with torch.no_grad():
            self._run(token)
        self._fed += 1
        if self._fed == WATCHED and (self.engine == "compiled" or self.weights == "float"):
            self._choose_forms()
        return self.plan.logits

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Do what ``model.step`` does, for ``token (1,)``: return ``logits (1, V)`` and the next state."""
        if token.shape != (1,):
            raise UsageError(f"decoding reads one stream: token is {tuple(token.shape)}, not (1,)")
        self.load(state)
        logits = self.feed(int(token)).clone()
        return logits[None], self.state()

    def forms(self) -> dict[str, str]:
        """Return how each matrix is read, by the name of its op: whole rows, or those of active sources."""
        return {i.name: i.matrix.form for i in self.plan.matrices() if i.matrix is not None}

    def bytes_per_token(self) -> int:
        """Return how many bytes of matrices a token reads when no source is silent."""
        return sum(i.matrix.data.numel() * i.matrix.data.element_size() for i in self.plan.matrices() if i.matrix)

    def _choose_forms(self) -> None:
        """Give each matrix whose sources were counted the form that costs least for so many."""
        rates, changed = self._rates or events.rates(compiled=self.engine == "compiled"), False
        for at, step in enumerate(self.plan.instructions):
            if step.watched and step.matrix is not None:
                changed |= step.matrix.choose(float(self._run.counts[at]) / self._fed, rates)
                step.watched = False
        if changed:
            self._run.encode()


def _follow(state: State, path: tuple[int | str, ...]) -> Any:
    for key in path:
        state = getattr(state, key) if isinstance(key, str) and not isinstance(state, dict) else state[key]
    return state


def _replaced(state: State, path: tuple[int | str, ...], places: dict[tuple[int | str, ...], Tensor]) -> State:
    """Return ``state`` with the tensors at ``places`` put in."""
    if path in places:
        return places[path]
    if isinstance(state, dict):
        return {key: _replaced(value, (*path, key), places) for key, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        keys: Any = state._fields if any(p[len(path)] in state._fields for p in places if len(p) > len(path)) else ()
        keys = keys or range(len(state))
        return type(state)(*(_replaced(value, (*path, key), places) for key, value in zip(keys, state, strict=True)))
    if isinstance(state, (tuple, list)):
        return type(state)(_replaced(value, (*path, key), places) for key, value in enumerate(state))
    return state


class _Lowering:
    """Makes the plan of a model from its graph."""

    def __init__(self, model: SpikingLanguageModel, int8: bool) -> None:
        self.model, self.int8 = model, int8
        self.check()
        self.graph = model.graph()
        last = self.graph.ops[-1] if self.graph.ops else None
        if last is None or last.kind != "linear" or last.size != getattr(model.config, "vocab_size", None):
            raise _Refused("its graph does not end with the matrix of its logits")
        self.parameters = model.state_dict(keep_vars=True)
        self.places = Places()
        self.state: dict[tuple[int | str, ...], slice] = {}
        template = model.init_state(1)
        for op in self.graph:
            for path in op.state:
                if path not in self.state:
                    self.state[path] = self.places.new(self.leaf(op, template, path).numel())
        self.state_size = self.places.size
        self.out: dict[str, slice] = {}
        for op in self.graph:
            is_state = isinstance(op.dynamics, EGRUDynamics)
            self.out[op.name] = self.state[op.state[1]] if is_state else self.places.new(op.size)
        self.steps: list[dict[str, Any]] = []
        kept: dict[tuple[int | str, ...], slice] = {}
        for op in self.graph:
            self.lower(op)
            if op.kind == "token_shift":
                kept[op.state[0]] = self.read(op)
        for path, source in kept.items():
            self.steps.append({"kind": "copy", "out": self.state[path], "inputs": (source,), "name": str(path)})

    def plan(self) -> Plan:
        """Return the instructions with their places, filled."""
        block = self.places.block()

        def at(value: Any) -> Any:
            if isinstance(value, slice):
                return block[value]
            return tuple(at(one) for one in value) if isinstance(value, tuple) else value

        instructions = [Instruction(**{key: at(value) for key, value in step.items()}) for step in self.steps]
        logits = block[self.out[self.graph.ops[-1].name]]
        state = {path: block[place] for path, place in self.state.items()}
        return Plan(block, instructions, logits, state, self.state_size)

    def check(self) -> None:
        """Refuse what no graph tells of: other devices and types, hooks, methods that were replaced, other models."""
        model = self.model
        if "lm" not in model.capabilities:
            raise _Refused("it is no language model that reads one token after the other")
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if t.device.type != "cpu" or (t.is_floating_point() and t.dtype != torch.float32):
                raise _Refused(f"{name} is {t.dtype} on {t.device}, and decoding is for float32 on the processor")
        if {"forward", "step"} & set(vars(model)):
            raise _Refused("its forward or step has been replaced")
        if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
            raise _Refused("hooks on its modules want to see what passes through them")

    def leaf(self, op: Op, template: State, path: tuple[int | str, ...]) -> Tensor:
        """Return the state's tensor at a path of ``op``."""
        found = _follow(template, path)
        if not isinstance(found, Tensor) or found.dim() != 2 or found.dtype != torch.float32:
            raise _Refused(f"the state of op {op.name!r} is not one tensor (B, n) of float32")
        return found

    def read(self, op: Op, count: int = 1) -> Any:
        """Return the place that ``op`` reads, or with ``count`` 2 both of them."""
        if op.recurrent or len(op.inputs) != count:
            raise _Refused(f"op {op.name!r} ({op.kind}) reads {(*op.inputs, *op.recurrent)}")
        found = tuple(self.out[name] for name in op.inputs)
        return found[0] if count == 1 else found

    def parameter(self, op: Op, role: str) -> Tensor:
        """Return the parameter of ``op`` in a role."""
        name = op.parameters.get(role, f"{op.module}.{role}")
        if name not in self.parameters:
            raise _Refused(f"the model's state dict has no {role} for op {op.name!r}")
        return cast(Tensor, self.parameters[name]).detach()

    def add(self, op: Op, kind: str, inputs: Any, **more: Any) -> None:
        """Append the instruction of ``op``."""
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        more.setdefault("state", tuple(self.state[path] for path in op.state))
        self.steps.append({"kind": kind, "out": self.out[op.name], "inputs": inputs, "name": op.name, **more})

    def lower(self, op: Op) -> None:
        """Append what ``op`` is, or refuse."""
        dynamics, hold = op.dynamics, self.places.holding
        if op.kind == "embedding" and type(self.module(op)) is nn.Embedding and op.inputs == ("tokens",):
            table = self.parameter(op, "weight")
            if cast(nn.Embedding, self.module(op)).max_norm is not None or not table.is_contiguous():
                raise _Refused(f"op {op.name!r} is no plain table")
            self.add(op, "embed", (), table=table)
        elif op.kind == "linear":
            self.linear(op)
        elif op.kind == "norm" and isinstance(dynamics, LayerNormDynamics):
            held = hold(self.parameter(op, "weight")), hold(self.parameter(op, "bias"))
            self.add(op, "norm", self.read(op), parameters=held, numbers=(dynamics.eps,))
        elif op.kind == "token_shift" and isinstance(dynamics, TokenShiftDynamics) and len(op.state) == 1:
            self.add(op, "shift", self.read(op), parameters=(hold(self.parameter(op, "mix")),))
        elif isinstance(dynamics, WKVDynamics) and len(op.state) == 3:
            held = hold(-torch.exp(self.parameter(op, "decay"))), hold(self.parameter(op, "first"))
            self.add(op, "wkv", self.read(op, 2), parameters=held)
        elif isinstance(dynamics, SigmoidGateDynamics):
            self.add(op, "gate", self.read(op, 2))
        elif isinstance(dynamics, SquaredReLUDynamics):
            self.add(op, "relu2", self.read(op))
        elif op.kind == "residual":
            self.add(op, "add", self.read(op, 2))
        elif isinstance(dynamics, (LIFDynamics, GIFDynamics)):
            self.neuron(op, dynamics)
        elif isinstance(dynamics, EGRUDynamics) and len(op.state) == 4:
            threshold = hold(self.parameter(op, "threshold").clamp(0, 1))
            numbers = (dynamics.zoneout, dynamics.trace_decay)
            self.add(op, "egru", self.read(op, 2), parameters=(threshold,), numbers=numbers)
        else:
            raise _Refused(f"op {op.name!r} ({op.kind}) declares no dynamics that are known here")

    def module(self, op: Op) -> nn.Module | None:
        """Return the module that computes ``op``, if it names one."""
        return None if op.module is None else self.model.get_submodule(op.module)

    def neuron(self, op: Op, dynamics: LIFDynamics | GIFDynamics) -> None:
        """Append neurons; their gain and offset, where learned, come before the charge."""
        if "gain" in op.parameters:
            gain, bias = self.parameter(op, "gain"), self.parameter(op, "bias")
            learned: tuple[slice, ...] = (self.places.holding(gain), self.places.holding(gain * bias))
        else:
            learned = ()
        more: dict[str, Any] = {"parameters": learned}
        if not op.state:  # a membrane that forgets at once
            if not isinstance(dynamics, LIFDynamics) or dynamics.beta != 0:
                raise _Refused(f"op {op.name!r} does not say where its membranes are kept")
            more["state"] = (self.places.new(op.size),)
        if isinstance(dynamics, GIFDynamics):
            if dynamics.signed:
                raise _Refused(f"op {op.name!r} counts spikes of both signs")
            self.add(op, "gif", self.read(op), numbers=(dynamics.threshold, float(dynamics.levels)), **more)
        else:
            d = dynamics
            numbers = lif_numbers(d.beta, d.gain, d.threshold, d.v_reset, d.compare)
            self.add(op, "lif", self.read(op), numbers=numbers, **more)

    def linear(self, op: Op) -> None:
        """Append a product with a plain matrix, of what it reads now or of what units emitted for the last token."""
        by_source = "weight_t" in op.parameters
        if op.module is not None and type(self.module(op)) not in (nn.Linear, dense.Linear):
            raise _Refused(f"op {op.name!r} is computed by {type(self.module(op)).__name__}, which is no plain product")
        if op.dynamics is not None or op.steps != 1:
            raise _Refused(f"op {op.name!r} is no plain product of one step")
        if op.recurrent:
            emitters = [self.graph[name] for name in op.recurrent]
            if op.inputs or len(emitters) != 1 or not isinstance(emitters[0].dynamics, EGRUDynamics):
                raise _Refused(
                    f"op {op.name!r} reads what {op.recurrent} emitted last, and no state is declared to hold it"
                )
            source = self.out[emitters[0].name]
        else:
            source = self.read(op)
        weight = self.parameter(op, "weight_t" if by_source else "weight")
        matrix = Matrix(weight.contiguous(), by_source, self.int8)
        name = op.parameters.get("bias", f"{op.module}.bias")
        held = (self.places.holding(self.parameters[name]),) if self.parameters.get(name) is not None else ()
        scale = None if matrix.scale is None else self.places.holding(matrix.scale)
        watched = self.graph.input_kinds(op)[0] != "real"
        self.add(op, "linear", source, parameters=held, matrix=matrix, scale=scale, watched=watched, state=())


def check_decoding() -> list[Finding]:
    """Report what decodes on this machine, and the rates by which the forms of matrices are chosen."""
    missing = compiled.missing()
    rates = events.rates(compiled=missing is None)
    shown = ", ".join(
        f"{name} {getattr(rates, name) / 1e9:.0f} GB/s"
        for name in ("stream", "gather", *(() if missing else ("int8_stream", "int8_gather", "packed")))
    )
    by = f"torch ({missing})" if missing else "compiled code"
    return [Finding("decoding", "ok", f"by {by}; {shown}, {1e6 * rates.overhead:.1f} us per product of events")]
