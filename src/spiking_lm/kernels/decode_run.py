"""Two ways to execute the instructions of a token: compiled, all in one call, or by one torch operation each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spiking_lm.kernels.decode_plan import Instruction, Plan

Engine = Callable[[int], None]
"""Reads a token: afterwards logits and states are in their places."""


class Compiled:
    """Executes a plan in one call of compiled code, and counts the active sources of what is watched."""

    def __init__(self, plan: Plan) -> None:
        from spiking_lm.kernels import jit_decode as jit

        self._jit: Any = jit
        self.plan = plan
        matrices = [i.matrix for i in plan.matrices() if i.matrix is not None]
        self._active = np.empty(max((m.sizes[1] for m in matrices), default=0) + 1, np.int64)
        self._block = plan.block.numpy()
        self.encode()

    def encode(self) -> None:
        """Write the instructions down as numbers, anew when a matrix has changed its form."""
        jit, steps = self._jit, self.plan.instructions
        self._program = np.full((len(steps), 14), -1, np.int64)
        self._numbers = np.zeros((len(steps), 7), np.float32)
        self.counts = np.zeros(len(steps), np.int64)
        for row, numbers, step in zip(self._program, self._numbers, steps, strict=True):
            row[jit.OP] = getattr(jit, (step.matrix.form.replace(" ", "_") if step.matrix else step.kind).upper())
            row[jit.SIZE], row[jit.OUT], row[jit.WATCHED] = step.out.numel(), self._place(step.out), step.watched
            for column, place in zip((jit.A, jit.B), step.inputs, strict=False):
                row[column] = self._place(place)
            row[jit.COUNT_OF_A] = step.inputs[0].numel() if step.inputs else 0
            for column, place in zip((jit.P, jit.Q), step.parameters, strict=False):
                row[column] = self._place(place)
            if step.state:
                row[jit.STATE] = self._place(step.state[0])
                row[jit.STRIDE] = self._place(step.state[1]) - row[jit.STATE] if len(step.state) > 1 else 0
            numbers[: len(step.numbers)] = step.numbers
            if step.matrix is not None:
                row[jit.AT], row[jit.P] = step.matrix.data.data_ptr(), -1
                row[jit.SCALE] = -1 if step.scale is None else self._place(step.scale)
                row[jit.BIAS] = self._place(step.parameters[0]) if step.parameters else -1
            elif step.table is not None:
                row[jit.AT] = step.table.data_ptr()

    def _place(self, t: Tensor) -> int:
        return int(t.storage_offset() - self.plan.block.storage_offset())

    def __call__(self, token: int) -> None:
        self._jit.run(self._program, self._numbers, self._block, self._active, self.counts, token)


class Eager:
    """Executes a plan by one torch operation after the other, into the places that are there."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.encode()

    def encode(self) -> None:
        """Prepare the operations, anew when a matrix has changed its form."""
        self.counts = np.zeros(len(self.plan.instructions), np.int64)
        self._token = 0
        self._jobs: list[Callable[[], Any]] = []
        for at, step in enumerate(self.plan.instructions):
            if step.watched:
                self._jobs.append(self._count(at, step.inputs[0]))
            self._jobs.append(_JOBS[step.kind](step) if step.kind != "embed" else self._embed(step))

    def _embed(self, step: Instruction) -> Callable[[], Any]:
        assert step.table is not None
        table, out = step.table, step.out
        return lambda: out.copy_(table[self._token])

    def _count(self, at: int, x: Tensor) -> Callable[[], Any]:
        def count() -> None:
            self.counts[at] += int(torch.count_nonzero(x))

        return count

    def __call__(self, token: int) -> None:
        self._token = token
        for job in self._jobs:
            job()


def _norm(step: Instruction) -> Callable[[], Any]:
    (x,), (weight, bias), out, eps, size = step.inputs, step.parameters, step.out, step.numbers[0], (step.out.numel(),)
    return lambda: out.copy_(torch.layer_norm(x, size, weight, bias, eps))


def _shift(step: Instruction) -> Callable[[], Any]:
    (x,), (mix,), (before,), out = step.inputs, step.parameters, step.state, step.out
    return lambda: torch.lerp(before, x, mix, out=out)


def _linear(step: Instruction) -> Callable[[], Any]:
    from spiking_lm.kernels import events, linear_ops_torch

    (x,), out, matrix = step.inputs, step.out, step.matrix
    assert matrix is not None
    bias, data, scale = (step.parameters[0] if step.parameters else None), matrix.data, step.scale
    if matrix.form == "rows":
        return lambda: torch.mv(data, x, out=out) if bias is None else torch.addmv(bias, data, x, out=out)
    if matrix.form == "sources":
        return lambda: out.copy_(events.event_linear(x[None], data, bias)[0])
    assert scale is not None
    if matrix.form == "int8 rows":
        return lambda: out.copy_(linear_ops_torch.int8_linear(x, data, scale, bias))
    raise AssertionError(f"{matrix.form} is for compiled code alone")


def _wkv(step: Instruction) -> Callable[[], Any]:
    from spiking_lm.kernels.reference import wkv_step

    (k, v), (w, u), (p, q, o), out = step.inputs, step.parameters, step.state, step.out

    def advance() -> None:
        y, p_, q_, o_ = wkv_step(w, u, k, v, p, q, o)
        for place, value in ((out, y), (p, p_), (q, q_), (o, o_)):
            place.copy_(value)

    return advance


def _relu2(step: Instruction) -> Callable[[], Any]:
    (x,), out = step.inputs, step.out
    return lambda: torch.clamp(x, min=0, out=out).square_()


def _charge(step: Instruction) -> Callable[[], Tensor]:
    """Return what gives the currents of neurons: their input, or with a learned gain and offset."""
    (x,) = step.inputs
    if not step.parameters:
        return lambda: x
    gain, offset = step.parameters
    return lambda: torch.addcmul(offset, x, gain)


def _lif(step: Instruction) -> Callable[[], Any]:
    beta, gain, drift, bound, threshold, reset, soft = step.numbers
    (v,), out, charge = step.state, step.out, _charge(step)
    at_reset = v.new_tensor(reset)

    def advance() -> None:
        h = charge().mul(gain)
        h = (h.add_(drift) if drift else h).add_(v, alpha=beta)
        fires = h >= bound
        out.copy_(fires).add_(h, alpha=0.0)
        v.copy_(torch.where(fires, h - threshold if soft else at_reset, h))

    return advance


def _gif(step: Instruction) -> Callable[[], Any]:
    threshold, levels = step.numbers
    (v,), out, charge = step.state, step.out, _charge(step)

    def advance() -> None:
        h = v + charge()
        torch.floor(h / threshold, out=out).clamp_(0, levels).add_(h, alpha=0.0)
        torch.sub(h, out, alpha=threshold, out=v)

    return advance


def _egru(step: Instruction) -> Callable[[], Any]:
    (a, q), (theta,), (c, y, trace, o), (zoneout, trace_decay) = step.inputs, step.parameters, step.state, step.numbers
    n = c.numel()

    def advance() -> None:
        z, r = torch.sigmoid(a[: 2 * n] + q[: 2 * n]).view(2, n)
        new = torch.tanh(torch.addcmul(a[2 * n :], r, q[2 * n :]))
        mixed = torch.lerp(torch.lerp(new, c, z), c, zoneout)
        o.copy_(mixed > theta).add_(mixed, alpha=0.0)
        torch.mul(mixed, o, out=y)
        torch.addcmul(mixed, o, theta, value=-1, out=c)
        trace.mul_(trace_decay).add_(y, alpha=1 - trace_decay)

    return advance


_JOBS: dict[str, Callable[[Instruction], Callable[[], Any]]] = {
    "norm": _norm,
    "shift": _shift,
    "copy": lambda step: lambda: step.out.copy_(step.inputs[0]),
    "linear": _linear,
    "wkv": _wkv,
    "gate": lambda step: lambda: torch.mul(step.inputs[0], torch.sigmoid(step.inputs[1]), out=step.out),
    "relu2": _relu2,
    "lif": _lif,
    "gif": _gif,
    "egru": _egru,
    "add": lambda step: lambda: torch.add(step.inputs[0], step.inputs[1], out=step.out),
}


def lif_numbers(beta: float, gain: float, threshold: float, v_reset: float | None, compare: str) -> tuple[float, ...]:
    """Return what a neuron computes as numbers: beta, gain, drift, bound, threshold, reset and whether it is soft."""
    at = np.float32(threshold)
    bound = at if compare == ">=" else np.nextafter(at, np.float32(math.inf))
    drift = 0.0 if v_reset is None else (1 - beta) * v_reset
    return beta, gain, drift, float(bound), threshold, v_reset or 0.0, float(v_reset is None)
