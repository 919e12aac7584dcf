"""The loops of the compiled kernels, for numba; importing this module imports numba, so only :mod:`.compiled` does.

Every kernel works on ``start ... stop`` of its independent units, so that threads can share them, and lets go of the
interpreter's lock. Arrays come as their memory, one-dimensional, with distances between steps beside them: one compiled
form serves every layout.

Nothing is reordered or contracted but in sums over a row of attention, where order is nobody's business. So what the
scans compute is, operation by operation, what their definitions compute.
"""

from __future__ import annotations

import numpy as np

from spiking_lm.kernels.jit_core import BLOCK, PAD, aligned, compiled, exp, fma, largest_of_sixteens, product, where

# -- attention ---------------------------------------------------------------------------------------------------------


@compiled()
def _take(source, offset, row, rows, columns, out):
    for i in range(rows):
        line, to = source[offset + i * row : offset + i * row + columns], out[i]
        for j in range(columns):
            to[j] = line[j]


@compiled()
def _take_across(source, offset, row, rows, columns, out):
    for i in range(rows):
        line, to = source[offset + i * row : offset + i * row + columns], out[:, i]
        for j in range(columns):
            to[j] = line[j]


@compiled()
def _put(x, rows, columns, target, offset, row):
    for i in range(rows):
        line, to = x[i], target[offset + i * row : offset + i * row + columns]
        for j in range(columns):
            to[j] = line[j]


@compiled(fastmath={"reassoc", "contract"})
def _sum(x):
    total = x.dtype.type(0)
    for j in range(len(x)):
        total += x[j]
    return total


@compiled(fastmath={"reassoc", "contract"})
def _dot(x, y, n):
    total = x.dtype.type(0)
    for j in range(n):
        total += x[j] * y[j]
    return total


@compiled()
def _largest(x):
    """The largest of some numbers; what is no number is passed over."""
    whole = len(x) - len(x) % 16
    top = largest_of_sixteens(x.ctypes.data, whole // 16, x[0])
    for j in range(whole, len(x)):
        top = where(x[j] > top, x[j], top)
    return top


@compiled()
def _softmax(x, mask, mask_offset, mask_row, rows, columns):
    """Turn scores into weights, row by row; a number that is none makes all its row so."""
    for i in range(rows):
        line = x[i, :columns]
        if len(mask):
            added = mask[mask_offset + i * mask_row : mask_offset + i * mask_row + columns]
            for j in range(columns):
                line[j] += added[j]
        top = _largest(line)
        for j in range(columns):
            line[j] = exp(line[j] - top)
        share = x.dtype.type(1) / _sum(line)
        for j in range(columns):
            line[j] *= share


@compiled()
def _padded(n):
    return (n + PAD - 1) // PAD * PAD


@compiled()
def attention_forward(start, stop, shape, q, k, v, q_at, k_at, v_at, mask, mask_at, keep, scale, y):
    """Units are steps x rows of the batch x heads; ``*_at`` are distances between steps, rows, heads and places."""
    _, batch, heads, queries, length, size = shape
    rows, columns, width = _padded(queries), _padded(length), _padded(size)
    a, c, out = aligned(rows, width, q), aligned(rows, columns, q), aligned(rows, width, q)
    kt, b = aligned(width, columns, q), aligned(columns, width, q)
    one = q.dtype.type(1)
    for unit in range(start, stop):
        h, n, t = unit % heads, unit // heads % batch, unit // heads // batch
        _take(q, t * q_at[0] + n * q_at[1] + h * q_at[2], q_at[3], queries, size, a)
        _take_across(k, t * k_at[0] + n * k_at[1] + h * k_at[2], k_at[3], length, size, kt)
        _take(v, t * v_at[0] + n * v_at[1] + h * v_at[2], v_at[3], length, size, b)
        product(c, a, False, kt, rows, columns, size, scale)
        _softmax(c, mask, n * mask_at[0], mask_at[1], queries, length)
        if len(keep):
            for i in range(queries):
                at, line = ((n * heads + h) * queries + i) * length, c[i]
                left = keep[at : at + length]
                for j in range(length):
                    line[j] *= left[j]
        product(out, c, False, b, rows, width, length, one)
        _put(out, queries, size, y, ((t * batch + n) * queries * heads + h) * size, heads * size)


@compiled()
def attention_backward(start, stop, shape, q, k, v, q_at, k_at, v_at, mask, mask_at, keep, scale, g, g_at, gq, gk, gv):
    """The weights are computed anew: that is quicker than reading them."""
    _, batch, heads, queries, length, size = shape
    rows, columns, width = _padded(queries), _padded(length), _padded(size)
    a, ga = aligned(rows, width, q), aligned(rows, width, q)
    w, gw = aligned(rows, columns, q), aligned(rows, columns, q)
    dropped = aligned(rows, columns, q)
    kt, vt = aligned(width, columns, q), aligned(width, columns, q)
    b, out = aligned(columns, width, q), aligned(max(rows, columns), width, q)
    ones, one = np.ones(length, q.dtype), q.dtype.type(1)
    for unit in range(start, stop):
        h, n, t = unit % heads, unit // heads % batch, unit // heads // batch
        at_q, at_k = t * q_at[0] + n * q_at[1] + h * q_at[2], t * k_at[0] + n * k_at[1] + h * k_at[2]
        _take(q, at_q, q_at[3], queries, size, a)
        _take_across(k, at_k, k_at[3], length, size, kt)
        _take(k, at_k, k_at[3], length, size, b)
        _take_across(v, t * v_at[0] + n * v_at[1] + h * v_at[2], v_at[3], length, size, vt)
        _take(g, t * g_at[0] + n * g_at[1] + h * g_at[2], g_at[3], queries, size, ga)
        product(w, a, False, kt, rows, columns, size, scale)
        _softmax(w, mask, n * mask_at[0], mask_at[1], queries, length)
        product(gw, ga, False, vt, rows, columns, size, one)
        for i in range(queries):
            at, weights, mixed, slope = ((n * heads + h) * queries + i) * length, w[i], dropped[i], gw[i]
            left = keep[at : at + length] if len(keep) else ones
            for j in range(length):
                mixed[j] = weights[j] * left[j]
                slope[j] *= left[j]
            mean = _dot(slope, weights, length)
            for j in range(length):
                slope[j] = weights[j] * (slope[j] - mean)
        to_k = ((t * batch + n) * length * heads + h) * size
        product(out, dropped, True, ga, columns, width, queries, one)
        _put(out, length, size, gv, to_k, heads * size)
        product(out, gw, True, a, columns, width, queries, scale)
        _put(out, length, size, gk, to_k, heads * size)
        product(out, gw, False, b, rows, width, length, scale)
        _put(out, queries, size, gq, ((t * batch + n) * queries * heads + h) * size, heads * size)


# -- elastic neurons ---------------------------------------------------------------------------------------------------


@compiled()
def elastic_forward(start, stop, x, x_step, before, factors, spikes, after):
    """Fire; ``factors (T, 5)`` are, per step: bound, amplitude, and what the carried membrane is multiplied with
    behind a positive spike, a negative one, and silence. Empty ``before``: from rest; empty ``after``: not wanted."""
    n_steps, size = len(factors), len(spikes) // len(factors)
    carried, zero = np.zeros(BLOCK, x.dtype), x.dtype.type(0)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        if len(before):
            carried[:count] = before[first : first + count]
        else:
            carried[:count] = zero
        for t in range(n_steps):
            bound, amplitude, positive, negative, silent = factors[t]
            currents = x[t * x_step + first : t * x_step + first + count]
            out = spikes[t * size + first : t * size + first + count]
            for j in range(count):
                m = currents[j] + carried[j]
                up, down = m > bound, m < -bound
                rest = where(m == m, zero, m)  # a membrane that is no number must not pass for a silent one
                out[j] = where(up, amplitude, where(down, -amplitude, rest))
                carried[j] = where(up, positive, where(down, negative, silent)) * m
        if len(after):
            after[first : first + count] = carried[:count]


@compiled()
def elastic_backward(start, stop, x, x_step, before, factors, gs, g_after, gx):
    """Go back in time, with the membranes computed anew. Empty ``g_after``: no gradient from what was carried on."""
    n_steps, size = len(factors), len(gx) // len(factors)
    membranes, carried = np.zeros((n_steps, BLOCK), x.dtype), np.zeros(BLOCK, x.dtype)
    zero = x.dtype.type(0)
    for first in range(start, stop, BLOCK):
        count = min(BLOCK, stop - first)
        if len(before):
            carried[:count] = before[first : first + count]
        else:
            carried[:count] = zero
        for t in range(n_steps):
            bound, _, positive, negative, silent = factors[t]
            currents, line = x[t * x_step + first : t * x_step + first + count], membranes[t]
            for j in range(count):
                m = currents[j] + carried[j]
                line[j] = m
                carried[j] = where(m > bound, positive, where(m < -bound, negative, silent)) * m
        if len(g_after):
            carried[:count] = g_after[first : first + count]
        else:
            carried[:count] = zero
        for t in range(n_steps - 1, -1, -1):
            bound, amplitude, positive, negative, silent = factors[t]
            line = membranes[t]
            arriving = gs[t * size + first : t * size + first + count]
            out = gx[t * size + first : t * size + first + count]
            for j in range(count):
                m = line[j]
                inside = where(abs(m) <= amplitude, arriving[j], zero)
                g = inside + where(m > bound, positive, where(m < -bound, negative, silent)) * carried[j]
                out[j] = g
                carried[j] = g


# -- leaky neurons -----------------------------------------------------------------------------------------------------


@compiled()
def _piece(position, stop, width):
    """Return row, column and number of the elements from ``position`` on that are done together."""
    column = position % width
    return position // width, column, min(BLOCK, width - column, stop - position)


@compiled()
def lif_forward(start, stop, width, n_steps, x, step, row, v, numbers, soft, spikes, kept, membranes):
    """Elements are ``row x width``; ``numbers``: beta, gain, drift, bound, threshold, reset. ``v`` ends as it is last.

    Empty ``kept`` and ``membranes``: not wanted. All but v have the layout of x.
    """
    beta, gain, drift, bound, threshold, reset = numbers
    zero, one = x.dtype.type(0), x.dtype.type(1)
    h = np.zeros(BLOCK, x.dtype)
    position = start
    while position < stop:
        r, column, count = _piece(position, stop, width)
        state = v[position : position + count]
        for t in range(n_steps):
            at = t * step + r * row + column
            currents, out = x[at : at + count], spikes[at : at + count]
            for j in range(count):
                h[j] = fma(beta, state[j], gain * currents[j] + drift)
            for j in range(count):
                out[j] = where(h[j] >= bound, one, zero) + zero * h[j]
            if soft:
                for j in range(count):
                    state[j] = where(h[j] >= bound, h[j] - threshold, h[j])
            else:
                for j in range(count):
                    state[j] = where(h[j] >= bound, reset, h[j])
            if len(kept):
                kept[at : at + count] = h[:count]
            if len(membranes):
                membranes[at : at + count] = state
        position += count


@compiled()
def _slopes(h, threshold, surrogate, alpha, out):
    """Write the surrogate derivatives at membranes ``h``: 0 atan, 1 fast_sigmoid, 2 sigmoid, 3 triangle."""
    one, zero = h.dtype.type(1), h.dtype.type(0)
    half, scale = alpha * h.dtype.type(0.5), alpha * h.dtype.type(np.pi / 2)
    if surrogate == 0:
        for j in range(len(h)):
            z = scale * (h[j] - threshold)
            out[j] = half / (one + z * z)
    elif surrogate == 1:
        for j in range(len(h)):
            z = one + alpha * abs(h[j] - threshold)
            out[j] = one / (z * z)
    elif surrogate == 2:
        for j in range(len(h)):
            e = exp(-alpha * abs(h[j] - threshold))
            out[j] = alpha * e / ((one + e) * (one + e))
    else:
        for j in range(len(h)):
            z = one - alpha * abs(h[j] - threshold)
            out[j] = alpha * where(z < zero, zero, z)


@compiled()
def lif_backward(
    start, stop, width, n_steps, kept, step, row, numbers, soft, detach, surrogate, alpha, gs, gv, carry, gx
):
    """Go back in time; ``carry`` begins as the gradient of the last membrane, ends as that of the one before the first.

    Empty ``gs`` and ``gv``: none. All but carry have the layout of ``kept``.
    """
    beta, gain, _, bound, threshold, reset = numbers
    zero, one = kept.dtype.type(0), kept.dtype.type(1)
    ds, none = np.zeros(BLOCK, kept.dtype), np.zeros(BLOCK, kept.dtype)
    position = start
    while position < stop:
        r, column, count = _piece(position, stop, width)
        g_next, slopes = carry[position : position + count], ds[:count]
        for t in range(n_steps - 1, -1, -1):
            at = t * step + r * row + column
            h, out = kept[at : at + count], gx[at : at + count]
            g_spike = gs[at : at + count] if len(gs) else none[:count]
            g_state = gv[at : at + count] if len(gv) else none[:count]
            _slopes(h, threshold, surrogate, alpha, slopes)
            if soft:
                weight = zero if detach else threshold
                for j in range(count):
                    g = g_spike[j] * slopes[j] + (g_state[j] + g_next[j]) * (one - weight * slopes[j])
                    out[j], g_next[j] = gain * g, beta * g
            else:
                weight = zero if detach else one
                for j in range(count):
                    silent = where(h[j] >= bound, zero, one)
                    slope = silent + weight * (reset - h[j]) * slopes[j]
                    g = g_spike[j] * slopes[j] + (g_state[j] + g_next[j]) * slope
                    out[j], g_next[j] = gain * g, beta * g
        position += count


# -- wkv ---------------------------------------------------------------------------------------------------------------


@compiled()
def wkv_forward(start, stop, width, n_steps, w, u, k, k_at, v, v_at, far, p, q, o, kept, y, y_at):
    """Elements are rows of the batch x channels; ``*_at`` are distances between rows and steps.

    ``p, q, o`` begin and end as the state; ``kept (3, T, elements)`` holds them before each step, unless it is empty.
    """
    size = len(p)
    position = start
    while position < stop:
        r, column, count = _piece(position, stop, width)
        decay, first = w[column : column + count], u[column : column + count]
        ps, qs, os = p[position : position + count], q[position : position + count], o[position : position + count]
        for t in range(n_steps):
            if len(kept):
                for i, state in enumerate((ps, qs, os)):
                    to = (i * n_steps + t) * size + position
                    kept[to : to + count] = state
            at = r * k_at[0] + t * k_at[1] + column
            key = k[at : at + count]
            at = r * v_at[0] + t * v_at[1] + column
            value = v[at : at + count]
            at = r * y_at[0] + t * y_at[1] + column
            out = y[at : at + count]
            for j in range(count):
                excess = (key[j] + first[j]) - os[j]
                bonus = exp(where(excess > far, far, excess))
                out[j] = (ps[j] + bonus * value[j]) / (qs[j] + bonus)
                past = decay[j] + os[j]
                top = where(key[j] > past, key[j], past)
                shrink, gate = exp((os[j] - top) + decay[j]), exp(key[j] - top)
                ps[j] = shrink * ps[j] + gate * value[j]
                qs[j] = shrink * qs[j] + gate
                os[j] = top
        position += count


@compiled()
def wkv_backward(
    start, stop, width, n_steps, w, u, k, k_at, v, v_at, far, kept, gy, gy_at, gp, gq, gw, gu, gk, gv, out_at
):
    """Go back in time; ``gp, gq`` begin as gradients of the last sums and end as those of the first."""
    size = len(gp)
    position = start
    while position < stop:
        r, column, count = _piece(position, stop, width)
        decay, first = w[column : column + count], u[column : column + count]
        gps, gqs = gp[position : position + count], gq[position : position + count]
        gws, gus = gw[position : position + count], gu[position : position + count]
        for t in range(n_steps - 1, -1, -1):
            at = t * size + position
            ps, qs = kept[at : at + count], kept[n_steps * size + at : n_steps * size + at + count]
            os = kept[2 * n_steps * size + at : 2 * n_steps * size + at + count]
            at = r * k_at[0] + t * k_at[1] + column
            key = k[at : at + count]
            at = r * v_at[0] + t * v_at[1] + column
            value = v[at : at + count]
            at = r * gy_at[0] + t * gy_at[1] + column
            arriving = gy[at : at + count]
            at = r * out_at[0] + t * out_at[1] + column
            to_key, to_value = gk[at : at + count], gv[at : at + count]
            for j in range(count):
                excess = (key[j] + first[j]) - os[j]
                bonus = exp(where(excess > far, far, excess))
                past = decay[j] + os[j]
                top = where(key[j] > past, key[j], past)
                shrink, gate = exp((os[j] - top) + decay[j]), exp(key[j] - top)
                total = qs[j] + bonus
                g_sum = arriving[j] / total
                g_value = g_sum * bonus
                # v - y as (q v - p) / total: exactly 0 where there is no past yet
                g_bonus = (qs[j] * value[j] - ps[j]) / total * g_value
                to_key[j] = g_bonus + gate * (gps[j] * value[j] + gqs[j])
                to_value[j] = g_value + gate * gps[j]
                gus[j] += g_bonus
                gws[j] += shrink * (gps[j] * ps[j] + gqs[j] * qs[j])
                gps[j] = g_sum + shrink * gps[j]
                gqs[j] = shrink * gqs[j] - g_sum * ((ps[j] + bonus * value[j]) / total)
        position += count
