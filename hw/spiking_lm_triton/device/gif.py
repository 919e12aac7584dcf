# mypy: ignore-errors
"""Generalized Integrate-and-Fire counts: quantisation of tokens, its gradient, and int8 products with tensor cores.

Divisions are rounded as IEEE has it and values half to even, so that codes are those of the reference to the bit.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(1e-5)
TINY = tl.constexpr(1.1754943508222875e-38)
WHOLE = tl.constexpr(8388608.0)
"""2^23: from there on every float32 is a whole number, and adding it to a smaller one rounds that half to even."""


@triton.jit
def rounded(x):
    size = tl.abs(x)
    whole = (size + WHOLE) - WHOLE
    return tl.where(size < WHOLE, tl.where(x < 0.0, -whole, whole), x)


@triton.jit
def grid(least, greatest, top):
    """Return scale, lowest and highest whole number of a token's values; ``top`` is the greatest code."""
    span = greatest - least
    constant = tl.maximum(tl.abs(least), TINY)  # where all is one value, the scale is its size
    # 0 span: what is broken stays broken, and an endless range has no grid
    scale = tl.where(span > 0.0, tl.maximum(tl.div_rn(span, top), FLOOR), constant) + 0.0 * span
    low = rounded(tl.div_rn(least, scale))
    return scale, low, low + top


@triton.jit
def ends(x, row, channels, fixed, STATIC: tl.constexpr, BLOCK: tl.constexpr):
    """Return the least and the greatest value of a token, NaN if anything in it is broken."""
    if STATIC:
        return tl.load(fixed), tl.load(fixed + 1)
    lows = tl.full((BLOCK,), float("inf"), tl.float32)
    highs = tl.full((BLOCK,), float("-inf"), tl.float32)
    broken = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * channels + c, mask=c < channels, other=0.0).to(tl.float32)
        broken += 0.0 * v
        lows = tl.minimum(lows, tl.where(c < channels, v, float("inf")))
        highs = tl.maximum(highs, tl.where(c < channels, v, float("-inf")))
    nan = tl.sum(broken, 0)
    return tl.min(lows, 0) + nan, tl.max(highs, 0) + nan


@triton.jit
def chosen(salient, c, there, ordinary, fine, SALIENT: tl.constexpr):
    """Return, per channel, the value for salient or for ordinary channels."""
    if SALIENT:
        ordinary = tl.where(tl.load(salient + c, mask=there, other=0) != 0, fine, ordinary)
    return ordinary


@triton.jit
def gif_quantize(
    x, fixed, salient, out, tokens, channels, top, fine_top,
    CODES: tl.constexpr, SIGNED: tl.constexpr, STATIC: tl.constexpr, SALIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put a token ``x (rows, channels)`` on its grids. Write the values, or with CODES int8 codes.

    ``tokens (rows, 4)`` then gets scale and zero of ordinary and of salient channels: value = (code + zero) scale.
    """
    row = tl.program_id(0).to(tl.int64)
    least, greatest = ends(x, row, channels, fixed, STATIC, BLOCK)
    scale, low, high = grid(least, greatest, top)
    fine_scale, fine_low, fine_high = grid(least, greatest, fine_top)
    zero = low
    fine_zero = fine_low
    if SIGNED:
        zero = tl.maximum(low, 0.0) + tl.minimum(high, 0.0)
        fine_zero = tl.maximum(fine_low, 0.0) + tl.minimum(fine_high, 0.0)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < channels
        v = tl.load(x + row * channels + c, mask=there, other=0.0).to(tl.float32)
        unit = chosen(salient, c, there, scale, fine_scale, SALIENT)
        n = rounded(tl.div_rn(v, unit))
        most = chosen(salient, c, there, high, fine_high, SALIENT)
        n = tl.where(n > most, most, n)  # what is broken stays broken
        if STATIC:
            fewest = chosen(salient, c, there, low, fine_low, SALIENT)
            n = tl.where(n < fewest, fewest, n)
        if CODES:
            n -= chosen(salient, c, there, zero, fine_zero, SALIENT)
            tl.store(out + row * channels + c, n.to(tl.int8), mask=there)
        else:
            tl.store(out + row * channels + c, n * unit, mask=there)
    if CODES:
        tl.store(tokens + row * 4, scale)
        tl.store(tokens + row * 4 + 1, zero)
        tl.store(tokens + row * 4 + 2, fine_scale)
        tl.store(tokens + row * 4 + 3, fine_zero)


@triton.jit
def gif_pull_back(
    x, fixed, salient, g_out, g_x, channels, top, fine_top,
    STATIC: tl.constexpr, SALIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Give a token ``x (rows, channels)`` the gradient of its values.

    Identity where a code is not clamped, and through the scale to the least and the greatest value.
    """
    row = tl.program_id(0).to(tl.int64)
    least, greatest = ends(x, row, channels, fixed, STATIC, BLOCK)
    scale, low, high = grid(least, greatest, top)
    fine_scale, fine_low, fine_high = grid(least, greatest, fine_top)
    factor = tl.where(scale > FLOOR, 1.0, 0.0) / top
    fine_factor = tl.where(fine_scale > FLOOR, 1.0, 0.0) / fine_top
    of_span = tl.zeros((BLOCK,), tl.float32)
    at_least = tl.zeros((BLOCK,), tl.float32)
    at_greatest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < channels
        v = tl.load(x + row * channels + c, mask=there, other=0.0).to(tl.float32)
        g = tl.load(g_out + row * channels + c, mask=there, other=0.0).to(tl.float32)
        charge = tl.div_rn(v, chosen(salient, c, there, scale, fine_scale, SALIENT))
        n = rounded(charge)
        fewest = chosen(salient, c, there, low, fine_low, SALIENT)
        most = chosen(salient, c, there, high, fine_high, SALIENT)
        inside = tl.where((n > fewest) & (n < most), 1.0, 0.0)
        tl.store(g_x + row * channels + c, g * inside, mask=there)
        if not STATIC:
            n = tl.where(n > most, most, n)
            share = (n - charge * inside) * g * chosen(salient, c, there, factor, fine_factor, SALIENT)
            of_span += tl.where(there, share, 0.0)
            at_least += tl.where(there & (v == least), 1.0, 0.0)
            at_greatest += tl.where(there & (v == greatest), 1.0, 0.0)
    if not STATIC:
        total = tl.sum(of_span, 0)
        up, down = total / tl.sum(at_greatest, 0), total / tl.sum(at_least, 0)
        for start in range(0, channels, BLOCK):
            c = start + tl.arange(0, BLOCK)
            there = c < channels
            v = tl.load(x + row * channels + c, mask=there, other=0.0).to(tl.float32)
            g = tl.load(g_out + row * channels + c, mask=there, other=0.0).to(tl.float32)
            charge = tl.div_rn(v, chosen(salient, c, there, scale, fine_scale, SALIENT))
            n = rounded(charge)
            fewest = chosen(salient, c, there, low, fine_low, SALIENT)
            most = chosen(salient, c, there, high, fine_high, SALIENT)
            pulled = g * tl.where((n > fewest) & (n < most), 1.0, 0.0)
            pulled += tl.where(v == greatest, up, 0.0) - tl.where(v == least, down, 0.0)
            tl.store(g_x + row * channels + c, tl.where(least == greatest, g, pulled), mask=there)


@triton.jit(do_not_specialize=["rows"])
def gif_product(
    codes, tokens, weight, weight_scale, salient, bias, out, rows, channels, targets,
    SALIENT: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply int8 codes ``(rows, channels)`` with int8 weights ``(targets, channels)``, exactly; then scale the sums.

    Salient channels are summed apart, as their grid is another one. The sums of weights, found as products with ones,
    are for what codes leave out.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_there, n_there = m < rows, n < targets
    from_m, from_n = m[:, None].to(tl.int64) * channels, n[None, :].to(tl.int64) * channels
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    weights = tl.zeros((16, BLOCK_N), tl.int32)
    kind = tl.arange(0, 16)[:, None]
    first, second = (kind == 0).to(tl.int8), (kind == 1).to(tl.int8)
    fine_sums = sums
    for start in range(0, channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_there = k < channels
        s = tl.load(codes + from_m + k[None, :], mask=m_there[:, None] & k_there[None, :], other=0)
        w = tl.load(weight + from_n + k[:, None], mask=k_there[:, None] & n_there[None, :], other=0)
        sums += tl.dot(s, w, out_dtype=tl.int32)
        counted = tl.broadcast_to(first, (16, BLOCK_K))
        if SALIENT:
            fine = tl.load(salient + k, mask=k_there, other=0)[None, :]
            fine_sums += tl.dot(s * fine, w, out_dtype=tl.int32)
            counted += second * fine
        weights += tl.dot(counted, w, out_dtype=tl.int32)
    all_weights = tl.sum(tl.where(kind == 0, weights, 0), 0)
    fine_weights = tl.sum(tl.where(kind == 1, weights, 0), 0)
    at = tokens + m * 4
    scale = tl.load(at, mask=m_there, other=0.0)
    zero = tl.load(at + 1, mask=m_there, other=0.0)
    if SALIENT:
        sums -= fine_sums
    y = scale[:, None] * (sums.to(tl.float32) + zero[:, None] * (all_weights - fine_weights).to(tl.float32)[None, :])
    if SALIENT:
        scale = tl.load(at + 2, mask=m_there, other=0.0)
        zero = tl.load(at + 3, mask=m_there, other=0.0)
        y += scale[:, None] * (fine_sums.to(tl.float32) + zero[:, None] * fine_weights.to(tl.float32)[None, :])
    y *= tl.load(weight_scale + n, mask=n_there, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        y += tl.load(bias + n, mask=n_there, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None].to(tl.int64) * targets + n[None, :], y, mask=m_there[:, None] & n_there[None, :])
