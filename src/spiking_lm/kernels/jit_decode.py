# mypy: ignore-errors
"""A whole token in one call of compiled code, for numba: it goes through a list of instructions.

A row of ``program`` is one instruction, its columns are named below; places are offsets in the block ``f``.
"""

from __future__ import annotations

import numpy as np

from spiking_lm.kernels.jit_core import compiled, exp, fma, where
from spiking_lm.kernels.jit_linear import (
    _floats,
    carray,
    finish,
    list_active,
    rows_float,
    rows_int8,
    sources_float,
    sources_int8,
)

OP, SIZE, OUT, A, B, P, Q, STATE, STRIDE, AT, COUNT_OF_A, SCALE, BIAS, WATCHED = range(14)
"""Which operation; how many numbers come out, and where; two inputs, two parameters; the first of its states and how
far the next is; where a matrix is in memory, and of an input's numbers how many; -1 where there is none."""

EMBED, NORM, SHIFT, COPY, ROWS, SOURCES, INT8_ROWS, INT8_SOURCES, WKV, GATE, RELU2, LIF, GIF, EGRU, ADD = range(15)


@compiled()
def _sigmoid(x):
    one = np.float32(1)
    e = exp(-abs(x))
    return where(x < np.float32(0), e, one) / (one + e)


@compiled()
def _tanh(x):
    one = np.float32(1)
    e = exp(-(abs(x) + abs(x)))
    size = (one - e) / (one + e)
    return where(x < np.float32(0), -size, size)


@compiled(fastmath={"reassoc", "contract"})
def norm(x, weight, bias, eps, y):
    """Layer norm."""
    n = len(x)
    total, square = np.float32(0), np.float32(0)
    for j in range(n):
        total += x[j]
    mean = total / np.float32(n)
    for j in range(n):
        square += (x[j] - mean) * (x[j] - mean)
    scale = np.float32(1) / np.sqrt(square / np.float32(n) + eps)
    for j in range(n):
        y[j] = (x[j] - mean) * scale * weight[j] + bias[j]


@compiled()
def wkv(w, u, k, v, p, q, o, y):
    """One step of the time mix; w is the logarithm of what is left after a token."""
    one = np.float32(1)
    for j in range(len(y)):
        d = o[j] - (u[j] + k[j])
        e = exp(-abs(d))
        past, now = where(d > np.float32(0), one, e), where(d > np.float32(0), e, one)
        y[j] = (past * p[j] + now * v[j]) / (past * q[j] + now)
        left = w[j] + o[j]
        d = left - k[j]
        e = exp(-abs(d))
        past, now = where(d > np.float32(0), one, e), where(d > np.float32(0), e, one)
        p[j], q[j], o[j] = past * p[j] + now * v[j], past * q[j] + now, where(d > np.float32(0), left, k[j])


@compiled()
def _learned(x, gain, offset, y):
    """What comes before a neuron: a gain and an offset per channel, where they are learned."""
    for j in range(len(y)):
        y[j] = fma(x[j], gain[j], offset[j])


@compiled()
def lif(x, v, numbers, soft, y):
    """Leaky integrate-and-fire, rounded as the kernel over time does."""
    beta, gain, drift, bound, threshold, reset = numbers
    zero, one = np.float32(0), np.float32(1)
    for j in range(len(y)):
        h = fma(beta, v[j], gain * x[j] + drift)
        fires = h >= bound
        y[j] = where(fires, one, zero) + zero * h
        v[j] = where(fires, where(soft, h - threshold, reset), h)


@compiled()
def gif(x, v, threshold, levels, y):
    """Counts of spikes, up to ``levels``."""
    zero = np.float32(0)
    for j in range(len(y)):
        h = v[j] + x[j]
        fits = np.floor(h / threshold)
        fits = where(fits < zero, zero, where(fits > levels, levels, fits)) + zero * h
        y[j], v[j] = fits, h - threshold * fits


@compiled()
def egru(a, q, theta, zoneout, trace_decay, c, y, trace, o):
    """Event-based gated units; ``y`` is their output as well as state."""
    n, one, zero = len(c), np.float32(1), np.float32(0)
    for j in range(n):
        z, r = _sigmoid(a[j] + q[j]), _sigmoid(a[n + j] + q[n + j])
        new = _tanh(a[n + n + j] + r * q[n + n + j])
        past = c[j]
        mixed = new + z * (past - new)
        mixed = mixed + zoneout * (past - mixed)
        event = where(mixed > theta[j], one, zero) + zero * mixed
        y[j], c[j], o[j] = mixed * event, mixed - event * theta[j], event
        trace[j] = trace_decay * trace[j] + (one - trace_decay) * y[j]


@compiled()
def _elementwise(op, x, other, y):
    if op == ADD:
        for j in range(len(y)):
            y[j] = x[j] + other[j]
    elif op == GATE:
        for j in range(len(y)):
            y[j] = x[j] * _sigmoid(other[j])
    elif op == RELU2:
        for j in range(len(y)):
            positive = where(x[j] < np.float32(0), np.float32(0), x[j])
            y[j] = positive * positive
    else:
        for j in range(len(y)):
            y[j] = x[j]


@compiled()
def _shift(x, before, mix, y):
    for j in range(len(y)):
        y[j] = fma(x[j] - before[j], mix[j], before[j])


@compiled()
def run(program, numbers, f, active, counts, token):
    """Read one token; ``active`` is room to list active sources, ``counts`` adds them up for what is watched."""
    for i in range(len(program)):
        row = program[i]
        op, n, far = row[OP], row[SIZE], row[STRIDE]
        y, a, b = f[row[OUT] : row[OUT] + n], f[row[A] : row[A] + row[COUNT_OF_A]], f[row[B] : row[B] + n]
        p, q = f[row[P] : row[P] + n], f[row[Q] : row[Q] + n]
        s = row[STATE]
        if op >= ROWS and op <= INT8_SOURCES:
            if row[WATCHED]:
                counts[i] += list_active(a, active)
            if op == ROWS:
                rows_float(row[AT], a, y)
            elif op == SOURCES:
                sources_float(row[AT], a, y, active)
            elif op == INT8_ROWS:
                rows_int8(row[AT], a, y)
            else:
                sources_int8(row[AT], a, y, active)
            scale = f[row[SCALE] : row[SCALE] + n] if row[SCALE] >= 0 else f[:0]
            finish(y, scale, f[row[BIAS] : row[BIAS] + n] if row[BIAS] >= 0 else f[:0])
        elif op == EMBED:
            y[:] = carray(_floats(row[AT] + 4 * n * token), (n,))
        elif op == NORM:
            norm(a, p, q, numbers[i, 0], y)
        elif op == SHIFT:
            _shift(a, f[s : s + n], p, y)
        elif op == WKV:
            wkv(p, q, a, b, f[s : s + n], f[s + far : s + far + n], f[s + 2 * far : s + 2 * far + n], y)
        elif op in (LIF, GIF):
            if row[P] >= 0:
                _learned(a, p, q, y)
                a = y
            if op == LIF:
                lif(a, f[s : s + n], numbers[i, :6], numbers[i, 6] > 0, y)
            else:
                gif(a, f[s : s + n], numbers[i, 0], numbers[i, 1], y)
        elif op == EGRU:
            rates = numbers[i, 0], numbers[i, 1]
            gates = f[row[B] : row[B] + 3 * n]
            c, trace, o = f[s : s + n], f[s + 2 * far : s + 2 * far + n], f[s + 3 * far : s + 3 * far + n]
            egru(a, gates, p, rates[0], rates[1], c, y, trace, o)
        else:
            _elementwise(op, a, b, y)
