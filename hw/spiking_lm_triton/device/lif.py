# mypy: ignore-errors
"""Leaky integrate-and-fire neurons over time, forward and backward; a program owns ``BLOCK`` neurons."""

import triton
import triton.language as tl


@triton.jit
def place(inner, BLOCK: tl.constexpr):
    """Return row and block of this program. All are counted in one dimension: others end at 65535."""
    blocks = (inner + BLOCK - 1) // BLOCK
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks


@triton.jit
def membrane(v, x, beta, gain, drift):
    """Charge, in the order of the reference: without fused multiply-adds the result is the same to the bit."""
    return beta * v + gain * x + drift


@triton.jit
def fires(h, threshold, STRICT: tl.constexpr):
    return (h > threshold) if STRICT else (h >= threshold)


@triton.jit
def after(h, fired, threshold, reset, SOFT: tl.constexpr):
    """Return the membrane after the reset; a broken one stays broken."""
    if SOFT:
        return h - tl.where(fired, threshold, 0.0)
    return tl.where(fired, reset + 0.0 * h, h)


@triton.jit
def surrogate(u, alpha, KIND: tl.constexpr):
    """Return ds/dh: 0 atan, 1 fast_sigmoid, 2 sigmoid, 3 triangle."""
    if KIND == 0:
        z = 1.5707963267948966 * alpha * u
        return (alpha * 0.5) / (1.0 + z * z)
    elif KIND == 1:
        z = 1.0 + alpha * tl.abs(u)
        return 1.0 / (z * z)
    elif KIND == 2:
        e = tl.exp(-tl.abs(alpha * u))
        return alpha * e / ((1.0 + e) * (1.0 + e))
    else:
        return alpha * tl.maximum(1.0 - alpha * tl.abs(u), 0.0)


@triton.jit(do_not_specialize=["n_steps", "outer"])
def lif_forward(
    x, v0, spikes, v_out, marks,
    n_steps, outer, inner, words, x_step, x_outer, x_inner,
    beta, gain, drift, threshold, reset,
    STARTED: tl.constexpr, PACKED: tl.constexpr, EVERY_V: tl.constexpr, MARK: tl.constexpr,
    STRICT: tl.constexpr, SOFT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Read ``x`` once; write spikes (32 to a word when PACKED), membranes and, every CHUNK steps, a mark to go back to.

    ``v0 (outer, inner)``, ``spikes (T, outer, inner)`` or ``(T, outer, words)``, ``v_out`` like v0 or (EVERY_V) x,
    ``marks (ceil(T / CHUNK), outer, inner)``, all contiguous; ``x`` of any strides.
    """
    row, block = place(inner, BLOCK)
    n = block * BLOCK + tl.arange(0, BLOCK)
    word = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    there, size = n < inner, outer.to(tl.int64) * inner
    at = row * inner + n
    v = tl.zeros((BLOCK,), tl.float32)
    if STARTED:
        v = tl.load(v0 + at, mask=there, other=0.0).to(tl.float32)
    source = x + row * x_outer + n.to(tl.int64) * x_inner
    for t in tl.range(0, n_steps, num_stages=STAGES):
        x_t = tl.load(source, mask=there, other=0.0).to(tl.float32)
        if MARK:
            tl.store(marks + (t // CHUNK) * size + at, v, mask=there & (t % CHUNK == 0))
        h = membrane(v, x_t, beta, gain, drift)
        fired = fires(h, threshold, STRICT)
        v = after(h, fired, threshold, reset, SOFT)
        if PACKED:
            bits = tl.reshape((fired & there).to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
            tl.store(spikes + (t * outer.to(tl.int64) + row) * words + word, tl.sum(bits, 1), mask=word < words)
        else:
            # 0 h: a membrane that is not finite must not pass for a silent one
            tl.store(spikes + t * size + at, tl.where(fired, 1.0, 0.0) + 0.0 * h, mask=there)
        if EVERY_V:
            tl.store(v_out + t * size + at, v, mask=there)
        source += x_step
    if not EVERY_V:
        tl.store(v_out + at, v, mask=there)


@triton.jit(do_not_specialize=["n_steps", "outer"])
def lif_backward(
    x, marks, scratch, g_spikes, g_v, g_x, g_v0,
    n_steps, outer, inner, x_step, x_outer, x_inner,
    beta, gain, drift, threshold, reset, alpha,
    FROM_SPIKES: tl.constexpr, FROM_V: tl.constexpr, EVERY_V: tl.constexpr,
    STRICT: tl.constexpr, SOFT: tl.constexpr, DETACH: tl.constexpr, KIND: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go back through chunks of CHUNK steps: compute the membranes of one anew from its mark, then its gradients.

    ``scratch (CHUNK, outer, inner)`` holds the membranes of a chunk and stays in the cache. Gradients are contiguous.
    """
    row, block = place(inner, BLOCK)
    n = block * BLOCK + tl.arange(0, BLOCK)
    there, size = n < inner, outer.to(tl.int64) * inner
    at = row * inner + n
    g = tl.zeros((BLOCK,), tl.float32)  # of the membrane after the step
    if FROM_V and not EVERY_V:
        g = tl.load(g_v + at, mask=there, other=0.0).to(tl.float32)
    n_chunks = (n_steps + CHUNK - 1) // CHUNK
    for i in range(0, n_chunks):
        first = (n_chunks - 1 - i) * CHUNK
        length = tl.minimum(CHUNK, n_steps - first)
        v = tl.load(marks + (n_chunks - 1 - i) * size + at, mask=there, other=0.0)
        source = x + first.to(tl.int64) * x_step + row * x_outer + n.to(tl.int64) * x_inner
        for j in tl.range(0, length, num_stages=STAGES):
            x_t = tl.load(source, mask=there, other=0.0).to(tl.float32)
            h = membrane(v, x_t, beta, gain, drift)
            v = after(h, fires(h, threshold, STRICT), threshold, reset, SOFT)
            tl.store(scratch + j * size + at, h, mask=there)
            source += x_step
        tl.debug_barrier()
        for j in tl.range(0, length, num_stages=STAGES):
            back = length - 1 - j
            t = first + back
            h = tl.load(scratch + back * size + at, mask=there, other=0.0)
            slope = surrogate(h - threshold, alpha, KIND)
            fired = fires(h, threshold, STRICT)
            if FROM_V and EVERY_V:
                g += tl.load(g_v + t * size + at, mask=there, other=0.0).to(tl.float32)
            if SOFT:
                keep = 1.0 + 0.0 * h
                if not DETACH:
                    keep = 1.0 - threshold * slope
            else:
                keep = tl.where(fired, 0.0, 1.0) + 0.0 * h
                if not DETACH:
                    keep += (reset - h) * slope
            g = g * keep
            if FROM_SPIKES:
                g += slope * tl.load(g_spikes + t * size + at, mask=there, other=0.0).to(tl.float32)
            tl.store(g_x + t * size + at, gain * g, mask=there)
            g = beta * g
        tl.debug_barrier()
    tl.store(g_v0 + at, g, mask=there)
