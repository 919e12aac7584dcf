# mypy: ignore-errors
"""One step of event-based gated recurrent units, forward and backward, around the matrix product of the step."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def charged(a, q, bias, c, keep, at_a, at_q, h, at, there, hidden, zoneout, KEEP: tl.constexpr):
    """Return gates z, r and g, the recurrent part of g, the membrane before, its share that is new, and after."""
    q_z = tl.load(q + at_q, mask=there, other=0.0) + tl.load(bias + h, mask=there, other=0.0)
    q_r = tl.load(q + at_q + hidden, mask=there, other=0.0) + tl.load(bias + hidden + h, mask=there, other=0.0)
    q_g = tl.load(q + at_q + 2 * hidden, mask=there, other=0.0) + tl.load(bias + 2 * hidden + h, mask=there, other=0.0)
    z = sigmoid(tl.load(a + at_a, mask=there, other=0.0).to(tl.float32) + q_z)
    r = sigmoid(tl.load(a + at_a + hidden, mask=there, other=0.0).to(tl.float32) + q_r)
    g = tanh(tl.load(a + at_a + 2 * hidden, mask=there, other=0.0).to(tl.float32) + r * q_g)
    before = tl.load(c + at, mask=there, other=0.0)
    share = 1.0 - zoneout
    if KEEP:
        share = tl.load(keep + at, mask=there, other=0.0).to(tl.float32)
    p = z * before + (1.0 - z) * g
    return z, r, g, q_g, before, share, before + share * (p - before)


@triton.jit(do_not_specialize=["t", "batch"])
def egru_forward(
    a, q, bias, theta, keep, y, c, o, t, batch, hidden, a_step, a_row, zoneout,
    KEEP: tl.constexpr, EVERY_Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do step t: read ``a (T, batch, 3 hidden)``, the product ``q``, and c[t]; write y[t + 1], c[t + 1] and o[t].

    ``y, c (T + 1, batch, hidden)`` begin with the state before the first step. ``q`` is (T, batch, 3 hidden) with
    EVERY_Q, else it holds this step alone.
    """
    row, t_far = tl.program_id(1).to(tl.int64), tl.cast(t, tl.int64)
    h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there, size = h < hidden, batch.to(tl.int64) * hidden
    at = t_far * size + row * hidden + h
    at_q = row * 3 * hidden + h
    if EVERY_Q:
        at_q += t_far * 3 * size
    at_a = t_far * a_step + row * a_row + h
    _, _, _, _, _, _, p = charged(a, q, bias, c, keep, at_a, at_q, h, at, there, hidden, zoneout, KEEP)
    level = tl.load(theta + h, mask=there, other=0.0)
    fired = tl.where(p > level, 1.0, 0.0)
    tl.store(o + at, fired, mask=there)
    tl.store(y + at + size, fired * p, mask=there)
    tl.store(c + at + size, p - fired * level, mask=there)


@triton.jit(do_not_specialize=["t", "batch"])
def egru_backward(
    a, q, bias, theta, keep, c, o, g_y, d_c, d_o, carry, g_a, g_q, g_theta,
    t, batch, hidden, a_step, a_row, zoneout, gamma, epsilon,
    KEEP: tl.constexpr, FROM_C: tl.constexpr, FROM_O: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Go back over step t: from the total gradient of y[t + 1] and what c[t + 1] hands on, to those of a, q and c[t].

    ``g_y, d_c (T + 1, batch, hidden)`` and ``d_o`` arrive; ``carry`` and ``g_theta (batch, hidden)`` are read and
    written; ``g_a, g_q (T, batch, 3 hidden)`` are written. All are contiguous but ``a``.
    """
    row, t_far = tl.program_id(1).to(tl.int64), tl.cast(t, tl.int64)
    h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there, size = h < hidden, batch.to(tl.int64) * hidden
    here = row * hidden + h
    at = t_far * size + here
    at_q = (t_far * batch + row) * 3 * hidden + h
    at_a = t_far * a_step + row * a_row + h
    z, r, g, q_g, before, share, p = charged(
        a, q, bias, c, keep, at_a, at_q, h, at, there, hidden, zoneout, KEEP
    )  # fmt: skip
    level = tl.load(theta + h, mask=there, other=0.0)
    fired = tl.load(o + at, mask=there, other=0.0)
    slope = gamma * tl.maximum(1.0 - epsilon * tl.abs(p - level), 0.0)
    gy = tl.load(g_y + at + size, mask=there, other=0.0)
    gc = tl.load(carry + here, mask=there, other=0.0)
    if FROM_C:
        gc += tl.load(d_c + at + size, mask=there, other=0.0)
    gp = (fired + slope * p) * gy + (1.0 - slope * level) * gc
    if FROM_O:
        gp += slope * tl.load(d_o + at, mask=there, other=0.0)
    of_level = tl.load(g_theta + here, mask=there, other=0.0) + tl.where(fired > 0.0, gy, gc) - gp
    tl.store(g_theta + here, of_level, mask=there)
    new = (1.0 - z) * share
    tl.store(carry + here, (1.0 - new) * gp, mask=there)
    into_z = gp * share * (before - g) * z * (1.0 - z)
    into_g = gp * new * (1.0 - g * g)
    into_r = into_g * q_g * r * (1.0 - r)
    tl.store(g_q + at_q, into_z, mask=there)
    tl.store(g_q + at_q + hidden, into_r, mask=there)
    tl.store(g_q + at_q + 2 * hidden, into_g * r, mask=there)
    tl.store(g_a + at_q, into_z, mask=there)
    tl.store(g_a + at_q + hidden, into_r, mask=there)
    tl.store(g_a + at_q + 2 * hidden, into_g, mask=there)
