# mypy: ignore-errors
"""Compiled loops of whole layers, for numba: elastic neurons and the matrices that read them, in one pass.

Rows of a few tokens go through all steps while what they need stays in the second-level cache: spikes are never written
to memory, and on the way back they are computed anew from the currents. The same loops, without neurons, give the
gradients of plain matrices.
"""

from __future__ import annotations

import numpy as np

from spiking_lm.kernels.jit_core import COLUMNS, ROWS, aligned, compiled, exp, tile_onto, where

CHUNK = 128
"""Rows, over all steps, that are in the cache together."""
PIECE = 2048
"""Currents that are in the first-level cache together, as GELU makes them."""


@compiled()
def _aligned(size):
    return aligned(1, size, np.zeros(0, np.float32)).reshape(size)


@compiled()
def _address(x):
    """Where an array begins, as a number that stays whole when others are added."""
    return np.intp(x.ctypes.data)


@compiled()
def _multiply(c, c_row, origin, origin_row, a, a_row, panels, rows, columns, n):
    """c = origin + a b for panels of b; addresses and distances in bytes, rows a multiple of ROWS."""
    for j in range(0, columns, COLUMNS):
        for i in range(0, rows, ROWS):
            tile_onto(
                c + i * c_row + 4 * j, c_row, origin + i * origin_row + 4 * j, origin_row,
                a + i * a_row, a_row, 4, panels + 4 * j * n, 4 * COLUMNS, n, np.float32(0),
            )  # fmt: skip


_TAIL = tuple(
    np.float32(c)
    for c in (
        0.04026777669787407, -0.13547243177890778, 0.07384487241506577, 0.09972649812698364, 0.07151040434837341,
        0.1969621479511261, 0.20095880329608917, 0.22657567262649536, 0.22562630474567413,
    )
)  # fmt: skip
"""exp(z^2) erfc(z) / t as a polynomial in t = 1 / (1 + 0.4 z), fitted for z up to 9.5: relative error 6e-8."""
_T, _HALF, _ONE = np.float32(0.4 * 0.5**0.5), np.float32(0.5), np.float32(1)
_DENSITY = np.float32((2 * np.pi) ** -0.5)


@compiled(fastmath={"contract"}, inline="always")
def _normal(x):
    """Phi(x), and exp(-x^2 / 2)."""
    t, e = _ONE / (_ONE + _T * abs(x)), exp(-_HALF * x * x)
    tail = _TAIL[0]
    for i in range(1, 9):
        tail = tail * t + _TAIL[i]
    tail *= _HALF * t * e
    return where(x < np.float32(0), tail, _ONE - tail), e


@compiled(fastmath={"contract"})
def _gelu(x, at, size, out, slopes, to):
    """Write x Phi(x), Phi being the normal distribution, of ``size`` numbers, and the slopes where there is a place."""
    at, to = np.uintp(at), np.uintp(to)
    if len(slopes):
        for j in range(np.uintp(size)):
            below, e = _normal(x[at + j])
            out[j] = x[at + j] * below
            slopes[to + j] = below + x[at + j] * (e * _DENSITY)
    else:
        for j in range(np.uintp(size)):
            below, _ = _normal(x[at + j])
            out[j] = x[at + j] * below


@compiled()
def _fire(currents, at, count, factors, carried, rest, membranes, kept, spikes, out):
    """Fire for ``count`` currents, exactly as ``elastic_forward``; membranes are kept unless there is no place."""
    bound, amplitude, positive, negative, silent = factors
    zero, at, rest, kept, out = np.float32(0), np.uintp(at), np.uintp(rest), np.uintp(kept), np.uintp(out)
    if len(membranes):
        for j in range(np.uintp(count)):
            membranes[kept + j] = currents[at + j] + carried[rest + j]
    for j in range(np.uintp(count)):
        m = currents[at + j] + carried[rest + j]
        up, down = m > bound, m < -bound
        none = where(m == m, zero, m)
        spikes[out + j] = where(up, amplitude, where(down, -amplitude, none))
        carried[rest + j] = where(up, positive, where(down, negative, silent)) * m


@compiled()
def _fire_chunk(x, at, count, gelu, factors, carried, membranes, spikes, out, curved, slopes):
    """Fire in one step for ``count`` currents; membranes, spikes, slopes of GELU go to the same place, ``out``."""
    if not gelu:
        _fire(x, at, count, factors, carried, 0, membranes, out, spikes, out)
        return
    for i in range(0, count, len(curved)):
        some = min(len(curved), count - i)
        _gelu(x, at + i, some, curved, slopes, out + i)
        _fire(curved, 0, some, factors, carried, i, membranes, out + i, spikes, out + i)


@compiled()
def _add_rows(source, at, count, n, target, to, total, column):
    """Copy rows, and add them to a total."""
    column = np.uintp(column)
    for i in range(count):
        here, there = np.uintp(at + i * n), np.uintp(to + i * n)
        for j in range(np.uintp(n)):
            target[there + j] = source[here + j]
            total[column + j] += source[here + j]


@compiled()
def _slopes(membranes, arriving, at, count, factors, carried, of_gelu, out, to):
    """Go back through one step of neurons, and through GELU if there was one."""
    bound, amplitude, positive, negative, silent = factors
    zero, at, to = np.float32(0), np.uintp(at), np.uintp(to)
    for j in range(np.uintp(count)):
        m = membranes[at + j]
        inside = where(abs(m) <= amplitude, arriving[at + j], zero)
        slope = inside + where(m > bound, positive, where(m < -bound, negative, silent)) * carried[j]
        out[to + j] = slope
        carried[j] = slope
    if len(of_gelu):
        for j in range(np.uintp(count)):
            out[to + j] *= of_gelu[at + j]


@compiled()
def layer_forward(start, stop, n_rows, size, x, x_step, gelu, factors, packed, biases, widths, ys):
    """y = s(x) W + b, or s(gelu(x)) W + b, for matrices that read the same spikes.

    Units are rows; ``packed`` are the panels of one matrix after the other, ``widths`` their columns, and ``ys``
    are the outputs, each (steps, rows, columns).
    """
    n_steps, chunk, row = len(factors), CHUNK // ROWS * ROWS, 4 * size
    carried, spikes, nothing = _aligned(chunk * size), _aligned(chunk * size), np.zeros(0, np.float32)
    last, curved = _aligned(ROWS * COLUMNS), _aligned(PIECE)
    for first in range(start, stop, chunk):
        count = min(chunk, stop - first)
        whole = count - count % ROWS
        carried[:] = np.float32(0)
        for t in range(n_steps):
            at = t * x_step + first * size
            _fire_chunk(x, at, count * size, gelu, factors[t], carried, nothing, spikes, 0, curved, nothing)
            column = 0
            for i in range(len(ys)):
                n = widths[i]
                to, bias = _address(ys[i]) + 4 * (t * n_rows + first) * n, _address(biases) + 4 * column
                panels = _address(packed) + 4 * column * size
                _multiply(to, 4 * n, bias, 0, _address(spikes), row, panels, whole, n, size)
                if whole < count:
                    for j in range(0, n, COLUMNS):
                        a = _address(spikes) + whole * row
                        _multiply(
                            _address(last), 4 * COLUMNS, bias + 4 * j, 0, a, row,
                            panels + 4 * j * size, ROWS, COLUMNS, size,
                        )  # fmt: skip
                        for r in range(count - whole):
                            place = (t * n_rows + first + whole + r) * n + j
                            ys[i][place : place + COLUMNS] = last[r * COLUMNS : (r + 1) * COLUMNS]
                column += n


@compiled()
def layer_backward(start, stop, share, n_rows, size, x, x_step, gelu, factors, packed, widths, gys, gx, gw, gb):
    """Go back through matrices and neurons; without ``factors`` there are none, and spikes are x, of one step.

    Units are shares of the rows: each has sums of its own in ``gw (shares, all columns, size)`` and ``gb (shares, all
    columns)``, which begin as zero. ``packed`` are panels of the matrices (columns, size); ``gx`` may be empty, where
    nobody asks for it.
    """
    neurons, n_steps = len(factors) > 0, max(1, len(factors))
    each = max(ROWS, CHUNK // n_steps // ROWS * ROWS)
    rows, row, widest = each * n_steps, 4 * size, 0
    for i in range(len(gys)):
        widest = max(widest, widths[i])
    carried, spikes = _aligned(each * size), _aligned(rows * size)
    membranes = _aligned(rows * size if neurons else 0)
    gs, g, zeros = _aligned(rows * size), _aligned(rows * widest), _aligned(COLUMNS)
    curved, of_gelu = _aligned(PIECE), _aligned(rows * size if gelu else 0)
    shares, zero = -(-n_rows // share), np.float32(0)
    all_columns = len(gb) // shares
    for unit in range(start, stop):
        end = min((unit + 1) * share, n_rows)
        for first in range(unit * share, end, each):
            count = min(each, end - first)
            if neurons:
                carried[:] = zero
                for t in range(n_steps):
                    at, to = t * x_step + first * size, t * each * size
                    _fire_chunk(x, at, count * size, gelu, factors[t], carried, membranes, spikes, to, curved, of_gelu)
            else:
                at = np.uintp(first * size)
                for j in range(np.uintp(count * size)):
                    spikes[j] = x[at + j]
            column = 0
            for i in range(len(gys)):
                n = widths[i]
                for t in range(n_steps):
                    at, to = (t * n_rows + first) * n, t * each * n
                    _add_rows(gys[i], at, count, n, g, to, gb, unit * all_columns + column)
                    for j in range(to + count * n, to + each * n):  # rows that are not there add nothing
                        g[j] = zero
                if len(gx):
                    origin, origin_row = (_address(zeros), 0) if column == 0 else (_address(gs), 4 * size)
                    panels = _address(packed) + 4 * column * size
                    for j in range(0, size, COLUMNS):
                        shift = 4 * j if column else 0
                        for r in range(0, rows, ROWS):
                            tile_onto(
                                _address(gs) + 4 * (r * size + j), 4 * size,
                                origin + r * origin_row + shift, origin_row,
                                _address(g) + 4 * r * n, 4 * n, 4, panels + 4 * j * n, 4 * COLUMNS, n, zero,
                            )  # fmt: skip
                to = _address(gw) + 4 * (unit * all_columns + column) * size
                for j in range(0, size, COLUMNS):
                    for r in range(0, n, ROWS):
                        at = to + 4 * (r * size + j)
                        tile_onto(
                            at, 4 * size, at, 4 * size, _address(g) + 4 * r, 4, 4 * n,
                            _address(spikes) + 4 * j, row, rows, zero,
                        )  # fmt: skip
                column += n
            if len(gx) and not neurons:
                for j in range(np.uintp(count * size)):
                    gx[np.uintp(first * size) + j] = gs[j]
            elif len(gx):
                carried[:] = zero
                for t in range(n_steps - 1, -1, -1):
                    at, to = t * each * size, (t * n_rows + first) * size
                    _slopes(membranes, gs, at, count * size, factors[t], carried, of_gelu, gx, to)
