# mypy: ignore-errors
"""Compiled loops of event-based gated recurrent units, for numba: all steps of a row of the batch in one pass.

A step reads the rows of the recurrent kernel that belong to active units, and the way back those of units that an event
or the surrogate lets through. What is written down stands in :mod:`spiking_lm.kernels.torch_egru`.
"""

from __future__ import annotations

import numpy as np

from spiking_lm.kernels.jit_core import compiled, exp, where


@compiled()
def _sigmoid(x, zero, one):
    e = exp(-abs(x))
    return where(x < zero, e, one) / (one + e)


@compiled(fastmath={"contract"})
def _add_active(y, at, hidden, kernel, q, active):
    """Add to ``q`` the rows of the kernel of units that are not silent, four at a time."""
    width, count, at = np.uintp(3 * hidden), 0, np.uintp(at)
    for j in range(hidden):
        active[count] = j
        count += y[at + np.uintp(j)] != y.dtype.type(0)
    whole = count - count % 4
    for i in range(0, whole, 4):
        j0, j1, j2, j3 = (
            np.uintp(active[i]),
            np.uintp(active[i + 1]),
            np.uintp(active[i + 2]),
            np.uintp(active[i + 3]),
        )
        y0, y1, y2, y3 = y[at + j0], y[at + j1], y[at + j2], y[at + j3]
        k0, k1, k2, k3 = j0 * width, j1 * width, j2 * width, j3 * width
        for k in range(width):
            q[k] += (y0 * kernel[k0 + k] + y1 * kernel[k1 + k]) + (y2 * kernel[k2 + k] + y3 * kernel[k3 + k])
    for i in range(whole, count):
        j = np.uintp(active[i])
        value, row = y[at + j], j * width
        for k in range(width):
            q[k] += value * kernel[row + k]


@compiled(fastmath={"reassoc", "contract"})
def _read_back(kernel, hidden, g, wanted, out):
    """Write the products of the kernel's rows with ``g`` for units that are wanted, and 0 for the others."""
    width, zero = np.uintp(3 * hidden), g.dtype.type(0)
    j = 0
    while j < hidden:
        if wanted[j] and j + 1 < hidden and wanted[j + 1]:
            one, two, row, next_row = zero, zero, np.uintp(j) * width, np.uintp(j + 1) * width
            for k in range(width):
                one += kernel[row + k] * g[k]
                two += kernel[next_row + k] * g[k]
            out[j], out[j + 1] = one, two
            j += 2
        else:
            total, row = zero, np.uintp(j) * width
            if wanted[j]:
                for k in range(width):
                    total += kernel[row + k] * g[k]
            out[j] = total
            j += 1


@compiled()
def _units(a, at, hidden, theta, keep, here, zoneout, q, c, y, gates, g, p, out_y, out_c, out_o):
    """Compute one step of a row from the sums ``q``; ``c`` and ``y`` become the next state."""
    one, zero, n = q.dtype.type(1), q.dtype.type(0), np.uintp(hidden)
    at, here, gates_at = np.uintp(at), np.uintp(here), np.uintp(3 * here)
    for j in range(n):
        z, r = _sigmoid(a[at + j] + q[j], zero, one), _sigmoid(a[at + n + j] + q[n + j], zero, one)
        inner = a[at + n + n + j] + r * q[n + n + j]
        e = exp(-(abs(inner) + abs(inner)))
        size = (one - e) / (one + e)
        new = where(inner < zero, -size, size)
        past = c[j]
        mixed = new + z * (past - new)
        if len(keep):
            mixed = past + keep[here + j] * (mixed - past)
        else:
            mixed = mixed + zoneout * (past - mixed)
        event = where(mixed > theta[j], one, zero)
        y[j], c[j] = mixed * event, mixed - event * theta[j]
        out_y[here + j], out_c[here + j], out_o[here + j] = y[j], c[j], event
        if len(gates):
            gates[gates_at + j], gates[gates_at + n + j], gates[gates_at + n + n + j] = z, r, q[n + n + j]
            g[here + j], p[here + j] = new, mixed


@compiled()
def egru_forward(
    start, stop, n_steps, batch, hidden, a, a_at, kernel, bias, theta, keep, zoneout, c0, y0, gates, g, p, y, c, o
):
    """Units are rows of the batch. ``gates`` (z, r, q_g), ``g`` and ``p`` are kept for the way back unless empty."""
    q, active = np.zeros(3 * hidden, a.dtype), np.zeros(hidden + 1, np.int64)
    state, last = np.zeros(hidden, a.dtype), np.zeros(hidden, a.dtype)
    for b in range(start, stop):
        state[:], last[:] = c0[b * hidden : (b + 1) * hidden], y0[b * hidden : (b + 1) * hidden]
        for t in range(n_steps):
            q[:] = bias
            _add_active(last, 0, hidden, kernel, q, active)
            at, here = t * a_at[0] + b * a_at[1], (t * batch + b) * hidden
            _units(a, at, hidden, theta, keep, here, zoneout, q, state, last, gates, g, p, y, c, o)


@compiled()
def _units_back(
    hidden, here, before, c_before, theta, keep, zoneout, gamma, epsilon, gates, g, p, dy, dc, do,
    gy, gc, gq, ga, g_theta,
):  # fmt: skip
    """Go back through one step of a row; ``gy, gc`` are what comes from the next one, and ``gc`` goes on."""
    one, zero, n = p.dtype.type(1), p.dtype.type(0), np.uintp(hidden)
    here, before, at = np.uintp(here), np.uintp(before), np.uintp(3 * here)
    for j in range(n):
        mixed, v = p[here + j], p[here + j] - theta[j]
        slope = gamma - gamma * epsilon * abs(v)
        slope = where(slope > zero, slope, zero)
        fires = where(v > zero, one, zero)
        to_y, to_c = gy[j], gc[j]
        if len(dy):
            to_y += dy[here + j]
        if len(dc):
            to_c += dc[here + j]
        gp = (fires + slope * mixed) * to_y + (one - slope * theta[j]) * to_c
        if len(do):
            gp += slope * do[here + j]
        g_theta[j] += where(v > zero, to_y, to_c) - gp
        z, r, q_g, new = gates[at + j], gates[at + n + j], gates[at + n + n + j], g[here + j]
        share = keep[here + j] if len(keep) else one - zoneout
        update = (one - z) * share
        into = (one - new * new) * update * gp
        gz, gr = (c_before[before + j] - new) * z * update * gp, into * q_g * r * (one - r)
        gq[at + j], gq[at + n + j], gq[at + n + n + j] = gz, gr, into * r
        ga[at + j], ga[at + n + j], ga[at + n + n + j] = gz, gr, into
        gc[j] = (one - update) * gp


@compiled()
def egru_backward(
    start, stop, n_steps, batch, hidden, kernel, theta, keep, zoneout, gamma, epsilon, c0, gates, g, p, c,
    dy, dc, do, gq, ga, g_theta, g_c0, g_y0,
):  # fmt: skip
    """Units are rows of the batch; ``g_theta (B, H)`` begins as zero."""
    gy, gc, wanted = np.zeros(hidden, p.dtype), np.zeros(hidden, p.dtype), np.zeros(hidden, np.bool_)
    of_row = np.zeros(hidden, p.dtype)
    for b in range(start, stop):
        gy[:], gc[:], of_row[:] = 0, 0, 0
        for t in range(n_steps - 1, -1, -1):
            here = (t * batch + b) * hidden
            before, c_before = (here - batch * hidden, c) if t else (b * hidden, c0)
            _units_back(
                hidden, here, before, c_before, theta, keep, zoneout, gamma, epsilon, gates, g, p, dy, dc, do,
                gy, gc, gq, ga, of_row,
            )  # fmt: skip
            for j in range(hidden):
                v = p[before + j] - theta[j] if t else gamma
                wanted[j] = t == 0 or v > 0 or gamma * epsilon * v > -gamma
            _read_back(kernel, hidden, gq[3 * here : 3 * (here + hidden)], wanted, gy)
        g_theta[b * hidden : (b + 1) * hidden] = of_row
        g_c0[b * hidden : (b + 1) * hidden], g_y0[b * hidden : (b + 1) * hidden] = gc, gy
