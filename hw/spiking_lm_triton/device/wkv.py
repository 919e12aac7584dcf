# mypy: ignore-errors
"""The recurrence of RWKV-4, forward and backward; a program owns ``BLOCK`` channels of one row of the batch.

The sums (p, q) are kept against the exponent o, the greatest there was. Of the orders in which the factors of a step
can be computed, ``(o - o_new) + w`` is the one that rounds least: the difference of neighbouring exponents is exact.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(40.0)
"""A bonus of exp(40) outweighs any past by 1e17 over its length: larger exponents alter no digit."""


@triton.jit
def factors(k, o, w):
    """Return what the past and the token are multiplied with, and the exponent after the step."""
    o_new = tl.maximum(w + o, k)
    return tl.exp((o - o_new) + w), tl.exp(k - o_new), o_new


@triton.jit
def bonus(k, o, u):
    """Return the weight of the token itself, in units of exp(o)."""
    return tl.exp(tl.minimum((k + u) - o, FAR))


@triton.jit(do_not_specialize=["n_steps", "batch"])
def wkv_forward(
    w, u, k, v, p0, q0, o0, y, p_out, q_out, o_out, marks,
    n_steps, batch, channels, k_row, k_step, k_channel, v_row, v_step, v_channel, y_row, y_step, y_channel,
    STARTED: tl.constexpr, MARK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Read ``k`` and ``v (batch, T, channels)`` once and write ``y``, all of any strides, and the last state.

    States are (batch, channels); every CHUNK steps one goes into ``marks (3, ceil(T / CHUNK), batch, channels)``.
    """
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there, size, c_far = c < channels, batch.to(tl.int64) * channels, c.to(tl.int64)
    at = row * channels + c
    p = tl.zeros((BLOCK,), tl.float32)
    q = tl.zeros((BLOCK,), tl.float32)
    o = tl.full((BLOCK,), -1e38, tl.float32)
    if STARTED:
        p = tl.load(p0 + at, mask=there, other=0.0)
        q = tl.load(q0 + at, mask=there, other=0.0)
        o = tl.load(o0 + at, mask=there, other=0.0)
    decay = tl.load(w + c, mask=there, other=0.0)
    first = tl.load(u + c, mask=there, other=0.0)
    k += row * k_row + c_far * k_channel
    v += row * v_row + c_far * v_channel
    y += row * y_row + c_far * y_channel
    of_one = ((n_steps + CHUNK - 1) // CHUNK) * size
    for t in tl.range(0, n_steps, num_stages=STAGES):
        k_t = tl.load(k, mask=there, other=0.0).to(tl.float32)
        v_t = tl.load(v, mask=there, other=0.0).to(tl.float32)
        if MARK:
            mark, due = marks + (t // CHUNK) * size + at, there & (t % CHUNK == 0)
            tl.store(mark, p, mask=due)
            tl.store(mark + of_one, q, mask=due)
            tl.store(mark + 2 * of_one, o, mask=due)
        r = bonus(k_t, o, first)
        tl.store(y, (p + r * v_t) / (q + r), mask=there)
        past, now, o = factors(k_t, o, decay)
        p = past * p + now * v_t
        q = past * q + now
        k += k_step
        v += v_step
        y += y_step
    tl.store(p_out + at, p, mask=there)
    tl.store(q_out + at, q, mask=there)
    tl.store(o_out + at, o, mask=there)


@triton.jit(do_not_specialize=["n_steps", "batch"])
def wkv_backward(
    w, u, k, v, marks, scratch, g_y, g_p, g_q, g_k, g_v, g_w, g_u, g_p0, g_q0,
    n_steps, batch, channels, k_row, k_step, k_channel, v_row, v_step, v_channel,
    gy_row, gy_step, gy_channel, gk_row, gk_step, gk_channel, gv_row, gv_step, gv_channel,
    FROM_Y: tl.constexpr, FROM_STATE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go back through chunks of CHUNK steps: compute the sums of one anew from its mark, then its gradients.

    ``scratch (3, CHUNK, batch, channels)`` holds the sums before each step of a chunk and stays in the cache. ``g_w``
    and ``g_u (batch, channels)`` are for whoever launches to add up, so that the order of no sum is left to chance.
    """
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there, size, c_far = c < channels, batch.to(tl.int64) * channels, c.to(tl.int64)
    at = row * channels + c
    decay = tl.load(w + c, mask=there, other=0.0)
    first = tl.load(u + c, mask=there, other=0.0)
    zeros = tl.zeros((BLOCK,), tl.float32)
    gp, gq, gw, gu = zeros, zeros, zeros, zeros  # gp, gq: of the sums after the step
    if FROM_STATE:
        gp = tl.load(g_p + at, mask=there, other=0.0)
        gq = tl.load(g_q + at, mask=there, other=0.0)
    k += row * k_row + c_far * k_channel
    v += row * v_row + c_far * v_channel
    g_y += row * gy_row + c_far * gy_channel
    g_k += row * gk_row + c_far * gk_channel
    g_v += row * gv_row + c_far * gv_channel
    scratch += at
    n_chunks = (n_steps + CHUNK - 1) // CHUNK
    for i in range(0, n_chunks):
        begin = (n_chunks - 1 - i) * CHUNK
        length = tl.minimum(CHUNK, n_steps - begin)
        mark = marks + (n_chunks - 1 - i) * size + at
        p = tl.load(mark, mask=there, other=0.0)
        q = tl.load(mark + n_chunks * size, mask=there, other=0.0)
        o = tl.load(mark + 2 * n_chunks * size, mask=there, other=0.0)
        for j in tl.range(0, length, num_stages=STAGES):
            t = (begin + j).to(tl.int64)
            k_t = tl.load(k + t * k_step, mask=there, other=0.0).to(tl.float32)
            v_t = tl.load(v + t * v_step, mask=there, other=0.0).to(tl.float32)
            tl.store(scratch + j * size, p, mask=there)
            tl.store(scratch + (CHUNK + j) * size, q, mask=there)
            tl.store(scratch + (2 * CHUNK + j) * size, o, mask=there)
            past, now, o = factors(k_t, o, decay)
            p = past * p + now * v_t
            q = past * q + now
        tl.debug_barrier()
        for j in tl.range(0, length, num_stages=STAGES):
            back = length - 1 - j
            t = (begin + back).to(tl.int64)
            p_t = tl.load(scratch + back * size, mask=there, other=0.0)
            q_t = tl.load(scratch + (CHUNK + back) * size, mask=there, other=1.0)
            o_t = tl.load(scratch + (2 * CHUNK + back) * size, mask=there, other=0.0)
            k_t = tl.load(k + t * k_step, mask=there, other=0.0).to(tl.float32)
            v_t = tl.load(v + t * v_step, mask=there, other=0.0).to(tl.float32)
            past, now, _ = factors(k_t, o_t, decay)
            gk = now * (gq + gp * v_t)
            gv = now * gp
            gw += past * (gp * p_t + gq * q_t)
            gp *= past
            gq *= past
            if FROM_Y:
                r = bonus(k_t, o_t, first)
                total = q_t + r
                gn = tl.load(g_y + t * gy_step, mask=there, other=0.0).to(tl.float32) / total
                value = gn * r
                # v - y as (q v - p) / total: exactly 0 where there is no past yet
                own = value * ((q_t * v_t - p_t) / total)
                gk += own
                gv += value
                gu += own
                gp += gn
                gq -= gn * ((p_t + r * v_t) / total)
            tl.store(g_k + t * gk_step, gk, mask=there)
            tl.store(g_v + t * gv_step, gv, mask=there)
        tl.debug_barrier()
    tl.store(g_w + at, gw, mask=there)
    tl.store(g_u + at, gu, mask=there)
    tl.store(g_p0 + at, gp, mask=there)
    tl.store(g_q0 + at, gq, mask=there)
