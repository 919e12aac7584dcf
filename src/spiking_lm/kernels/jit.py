"""The loops of the compiled kernels, for numba; importing this module imports numba, so only :mod:`.compiled` does.

Every kernel works on ``start ... stop`` of its independent units, so that threads can share them, and lets go of the
interpreter's lock. Arrays come as their memory, one-dimensional, with distances between steps beside them: one compiled
form serves every layout.

Places in memory are unsigned, because of a signed one numba asks whether it counts from the end. Short rows are not
sliced: a slice counts references, which takes longer than sixteen numbers do.

Nothing is reordered or contracted but in sums over a row of attention, where order is nobody's business. So what the
scans compute is, operation by operation, what their definitions compute.
"""

from __future__ import annotations

import numpy as np

from spiking_lm.kernels.jit_core import (
    BLOCK,
    PAD,
    across,
    aligned,
    compiled,
    exp,
    fma,
    largest_of_sixteens,
    product,
    where,
    will_read,
    will_write,
)

# -- attention ---------------------------------------------------------------------------------------------------------


@compiled()
def _take(source, offset, row, rows, columns, out):
    for i in range(rows):
        at = np.uintp(offset + i * row)
        for j in range(np.uintp(columns)):
            out[i, j] = source[at + j]


@compiled()
def _take_or_fire(source, offset, row, rows, columns, fires, which, t, out):
    """Take spikes as they are, or what currents make fire, as :func:`elastic_forward` does; that forgets."""
    if not len(fires):
        _take(source, offset, row, rows, columns, out)
        return
    bound, amplitude, zero = fires[which, t, 0], fires[which, t, 1], source.dtype.type(0)
    for i in range(rows):
        at = np.uintp(offset + i * row)
        for j in range(np.uintp(columns)):
            m = source[at + j]
            rest = where(m == m, zero, m)
            out[i, j] = where(m > bound, amplitude, where(m < -bound, -amplitude, rest))


@compiled()
def _expect(source, offset, row, rows, columns):
    """Ask for what :func:`_take` will read; rows of a head lie apart, which the processor does not foresee."""
    for i in range(rows):
        at = source.ctypes.data + (offset + i * row) * source.itemsize
        for j in range(0, columns * source.itemsize, 64):
            will_read(at + j)


@compiled()
def _expect_to_put(target, offset, row, rows, columns):
    for i in range(rows):
        at = target.ctypes.data + (offset + i * row) * target.itemsize
        for j in range(0, columns * target.itemsize, 64):
            will_write(at + j)


@compiled()
def _put(x, rows, columns, target, offset, row):
    for i in range(rows):
        at = np.uintp(offset + i * row)
        for j in range(np.uintp(columns)):
            target[at + j] = x[i, j]


@compiled()
def _put_slopes(x, rows, columns, target, offset, row, source, source_offset, source_row, amplitude):
    """Go back to the currents that fired."""
    zero = source.dtype.type(0)
    for i in range(rows):
        at, there = np.uintp(source_offset + i * source_row), np.uintp(offset + i * row)
        for j in range(np.uintp(columns)):
            target[there + j] = where(abs(source[at + j]) <= amplitude, x[i, j], zero)


@compiled(fastmath={"reassoc", "contract"})
def _softmax(x, mask, mask_offset, mask_row, rows, columns):
    """Turn scores into weights, row by row; a number that is none makes all its row so.

    The largest of a row passes over what is no number.
    """
    one, whole, size = x.dtype.type(1), columns - columns % 16, x.shape[1] * x.itemsize
    for i in range(rows):
        if len(mask):
            at = np.uintp(mask_offset + i * mask_row)
            for j in range(np.uintp(columns)):
                x[i, j] += mask[at + j]
        top = largest_of_sixteens(x.ctypes.data + i * size, whole // 16, x[i, 0])
        for j in range(whole, columns):
            top = where(x[i, j] > top, x[i, j], top)
        total = x.dtype.type(0)
        for j in range(columns):
            x[i, j] = exp(x[i, j] - top)
            total += x[i, j]
        share = one / total
        for j in range(columns):
            x[i, j] *= share


@compiled(fastmath={"reassoc", "contract"})
def _softmax_backward(weights, keep, keep_offset, rows, columns, mixed, slopes):
    """Write weights with dropout, and turn the slopes of what they mixed into those of the scores, row by row."""
    for i in range(rows):
        along = weights.dtype.type(0)
        if len(keep):
            at = np.uintp(keep_offset + i * columns)
            for j in range(np.uintp(columns)):
                mixed[i, j] = weights[i, j] * keep[at + j]
                slopes[i, j] *= keep[at + j]
                along += slopes[i, j] * weights[i, j]
        else:
            for j in range(columns):
                mixed[i, j] = weights[i, j]
                along += slopes[i, j] * weights[i, j]
        for j in range(columns):
            slopes[i, j] = weights[i, j] * (slopes[i, j] - along)


@compiled()
def _padded(n):
    return (n + PAD - 1) // PAD * PAD


@compiled()
def _where(unit, heads, batch):
    """Step, row of the batch and head of a unit."""
    return unit // heads // batch, unit // heads % batch, unit % heads


@compiled()
def _offset(unit, heads, batch, at):
    """Where the first row of a unit is, given the distances of :func:`attention_forward`."""
    t, n, h = _where(unit, heads, batch)
    return t * at[0] + n * at[1] + h * at[2]


@compiled()
def attention_forward(start, stop, shape, q, k, v, q_at, k_at, v_at, fires, mask, mask_at, keep, scale, y):
    """Units are steps x rows of the batch x heads; ``*_at`` are distances between steps, rows, heads and places.

    ``fires`` has the factors of :func:`elastic_forward` for keys and for values, or nothing where they are spikes.
    """
    _, batch, heads, queries, length, size = shape
    rows, columns, width = _padded(queries), _padded(length), _padded(size)
    a, c, out = aligned(rows, width, q), aligned(rows, columns, q), aligned(rows, width, q)
    kt, b = aligned(width, columns, q), aligned(columns, width, q)
    one = q.dtype.type(1)
    for unit in range(start, stop):
        t, n, h = _where(unit, heads, batch)
        _take(q, _offset(unit, heads, batch, q_at), q_at[3], queries, size, a)
        _take_or_fire(k, _offset(unit, heads, batch, k_at), k_at[3], length, size, fires, 0, t, b)
        across(b, kt)
        _take_or_fire(v, _offset(unit, heads, batch, v_at), v_at[3], length, size, fires, 1, t, b)
        if unit + 1 < stop:
            _expect(q, _offset(unit + 1, heads, batch, q_at), q_at[3], queries, size)
            _expect(k, _offset(unit + 1, heads, batch, k_at), k_at[3], length, size)
            _expect(v, _offset(unit + 1, heads, batch, v_at), v_at[3], length, size)
        _expect_to_put(y, ((t * batch + n) * queries * heads + h) * size, heads * size, queries, size)
        product(c, a, False, kt, rows, columns, size, scale)
        _softmax(c, mask, n * mask_at[0], mask_at[1], queries, length)
        if len(keep):
            for i in range(queries):
                at = np.uintp(((n * heads + h) * queries + i) * length)
                for j in range(np.uintp(length)):
                    c[i, j] *= keep[at + j]
        product(out, c, False, b, rows, width, length, one)
        _put(out, queries, size, y, ((t * batch + n) * queries * heads + h) * size, heads * size)


@compiled()
def attention_backward(
    start, stop, shape, q, k, v, q_at, k_at, v_at, fires, mask, mask_at, keep, scale, g, g_at, gq, gk, gv
):
    """The weights are computed anew: that is quicker than reading them."""
    _, batch, heads, queries, length, size = shape
    rows, columns, width = _padded(queries), _padded(length), _padded(size)
    a, ga = aligned(rows, width, q), aligned(rows, width, q)
    w, gw = aligned(rows, columns, q), aligned(rows, columns, q)
    dropped = aligned(rows, columns, q)
    kt, vt = aligned(width, columns, q), aligned(width, columns, q)
    b, out = aligned(columns, width, q), aligned(max(rows, columns), width, q)
    one = q.dtype.type(1)
    for unit in range(start, stop):
        t, n, h = _where(unit, heads, batch)
        at_k, at_v = _offset(unit, heads, batch, k_at), _offset(unit, heads, batch, v_at)
        _take(q, _offset(unit, heads, batch, q_at), q_at[3], queries, size, a)
        _take_or_fire(v, at_v, v_at[3], length, size, fires, 1, t, b)
        across(b, vt)
        _take_or_fire(k, at_k, k_at[3], length, size, fires, 0, t, b)
        across(b, kt)
        _take(g, _offset(unit, heads, batch, g_at), g_at[3], queries, size, ga)
        to_k, to_q = ((t * batch + n) * length * heads + h) * size, ((t * batch + n) * queries * heads + h) * size
        if unit + 1 < stop:
            _expect(q, _offset(unit + 1, heads, batch, q_at), q_at[3], queries, size)
            _expect(k, _offset(unit + 1, heads, batch, k_at), k_at[3], length, size)
            _expect(v, _offset(unit + 1, heads, batch, v_at), v_at[3], length, size)
            _expect(g, _offset(unit + 1, heads, batch, g_at), g_at[3], queries, size)
        _expect_to_put(gv, to_k, heads * size, length, size)
        _expect_to_put(gk, to_k, heads * size, length, size)
        _expect_to_put(gq, to_q, heads * size, queries, size)
        product(w, a, False, kt, rows, columns, size, scale)
        _softmax(w, mask, n * mask_at[0], mask_at[1], queries, length)
        product(gw, ga, False, vt, rows, columns, size, one)
        _softmax_backward(w, keep, (n * heads + h) * queries * length, queries, length, dropped, gw)
        product(out, dropped, True, ga, columns, width, queries, one)
        if len(fires):
            _put_slopes(out, length, size, gv, to_k, heads * size, v, at_v, v_at[3], fires[1, t, 1])
        else:
            _put(out, length, size, gv, to_k, heads * size)
        product(out, gw, True, a, columns, width, queries, scale)
        if len(fires):
            _put_slopes(out, length, size, gk, to_k, heads * size, k, at_k, k_at[3], fires[0, t, 1])
        else:
            _put(out, length, size, gk, to_k, heads * size)
        product(out, gw, False, b, rows, width, length, scale)
        _put(out, queries, size, gq, to_q, heads * size)


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
def _lif_step(x, at, count, state, place, numbers, soft, spikes, kept):
    """One step of ``count`` neurons; the membranes before reset are kept unless there is no place."""
    beta, gain, drift, bound, threshold, reset = numbers
    zero, one, at, place = x.dtype.type(0), x.dtype.type(1), np.uintp(at), np.uintp(place)
    if len(kept):
        for j in range(np.uintp(count)):
            h = fma(beta, state[place + j], gain * x[at + j] + drift)
            fires = h >= bound
            spikes[at + j] = where(fires, one, zero) + zero * h
            state[place + j] = where(fires, where(soft, h - threshold, reset), h)
            kept[at + j] = h
    else:
        for j in range(np.uintp(count)):
            h = fma(beta, state[place + j], gain * x[at + j] + drift)
            fires = h >= bound
            spikes[at + j] = where(fires, one, zero) + zero * h
            state[place + j] = where(fires, where(soft, h - threshold, reset), h)


@compiled()
def lif_forward(start, stop, width, n_steps, x, step, row, v, numbers, soft, spikes, kept, membranes):
    """Elements are ``row x width``; ``numbers``: beta, gain, drift, bound, threshold, reset. ``v`` ends as it is last.

    Empty ``kept`` and ``membranes``: not wanted. All but v have the layout of x.
    """
    position = start
    while position < stop:
        r, column, count = _piece(position, stop, width)
        for t in range(n_steps):
            at = t * step + r * row + column
            _lif_step(x, at, count, v, position, numbers, soft, spikes, kept)
            if len(membranes):
                membranes[at : at + count] = v[position : position + count]
        position += count


@compiled()
def _slopes(h, at, count, threshold, surrogate, alpha, out):
    """Write the surrogate derivatives at ``count`` membranes: 0 atan, 1 fast_sigmoid, 2 sigmoid, 3 triangle."""
    one, zero, at, count = h.dtype.type(1), h.dtype.type(0), np.uintp(at), np.uintp(count)
    half, scale = alpha * h.dtype.type(0.5), alpha * h.dtype.type(np.pi / 2)
    if surrogate == 0:
        for j in range(count):
            z = scale * (h[at + j] - threshold)
            out[j] = half / (one + z * z)
    elif surrogate == 1:
        for j in range(count):
            z = one + alpha * abs(h[at + j] - threshold)
            out[j] = one / (z * z)
    elif surrogate == 2:
        for j in range(count):
            e = exp(-alpha * abs(h[at + j] - threshold))
            out[j] = alpha * e / ((one + e) * (one + e))
    else:
        for j in range(count):
            z = one - alpha * abs(h[at + j] - threshold)
            out[j] = alpha * where(z < zero, zero, z)


@compiled()
def _lif_step_back(h, at, count, carry, place, numbers, soft, weight, ds, gs, at_s, gv, at_v, gx):
    """Go back through one step; ``weight`` is what the reset sends back, ``at_s`` and ``at_v`` where gradients are."""
    beta, gain, _, bound, _, reset = numbers
    zero, one = h.dtype.type(0), h.dtype.type(1)
    at, at_s, at_v, place = np.uintp(at), np.uintp(at_s), np.uintp(at_v), np.uintp(place)
    if soft:
        for j in range(np.uintp(count)):
            g = gs[at_s + j] * ds[j] + (gv[at_v + j] + carry[place + j]) * (one - weight * ds[j])
            gx[at + j], carry[place + j] = gain * g, beta * g
    else:
        for j in range(np.uintp(count)):
            slope = where(h[at + j] >= bound, zero, one) + weight * (reset - h[at + j]) * ds[j]
            g = gs[at_s + j] * ds[j] + (gv[at_v + j] + carry[place + j]) * slope
            gx[at + j], carry[place + j] = gain * g, beta * g


@compiled()
def lif_backward(
    start, stop, width, n_steps, kept, step, row, numbers, soft, detach, surrogate, alpha, gs, gv, carry, gx
):
    """Go back in time; ``carry`` begins as the gradient of the last membrane, ends as that of the one before the first.

    Empty ``gs`` and ``gv``: none. All but carry have the layout of ``kept``.
    """
    threshold, zero, one = numbers[4], kept.dtype.type(0), kept.dtype.type(1)
    weight = zero if detach else threshold if soft else one
    slopes, none = np.zeros(BLOCK, kept.dtype), np.zeros(BLOCK, kept.dtype)
    of_spikes, of_states = gs if len(gs) else none, gv if len(gv) else none
    position = start
    while position < stop:
        r, column, count = _piece(position, stop, width)
        for t in range(n_steps - 1, -1, -1):
            at = t * step + r * row + column
            at_s, at_v = at if len(gs) else 0, at if len(gv) else 0
            _slopes(kept, at, count, threshold, surrogate, alpha, slopes)
            _lif_step_back(
                kept, at, count, carry, position, numbers, soft, weight, slopes, of_spikes, at_s, of_states, at_v, gx
            )
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
