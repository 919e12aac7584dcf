# mypy: ignore-errors
"""Products of a few rows with large matrices, where reading the weights is all that costs: a program owns outputs."""

import triton
import triton.language as tl


@triton.jit
def ones(words):
    """Count the bits of int32 words; compilers know this arithmetic for the one instruction that it is."""
    words = words.to(tl.uint32, bitcast=True)
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def compact(x, index, value, count, sources, BLOCK: tl.constexpr):
    """List what is not zero in a row of ``x (rows, sources)``: sources in ascending order, values, and how many."""
    row, total = tl.program_id(0).to(tl.int64), 0
    for start in range(0, sources, BLOCK):
        j = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * sources + j, mask=j < sources, other=0.0).to(tl.float32)
        active = v != 0.0
        flags = active.to(tl.int32)
        place = row * sources + total + tl.cumsum(flags, 0) - 1
        tl.store(index + place, j, mask=active)
        tl.store(value + place, v, mask=active)
        total += tl.sum(flags, 0)
    tl.store(count + row, total)


@triton.jit(do_not_specialize=["rows"])
def gather(
    index, value, count, weight, bias, out, rows, sources, targets,
    BIASED: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum the rows of ``weight (sources, targets)`` that are listed, in PARTS shares: ``out (PARTS, rows, targets)``.

    Shares are cut by position in the list, so that sums are the same in every run. One share is the result itself.
    """
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < targets
    total = tl.load(count + row)
    each = (total + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
    begin = part * each
    end = tl.minimum(begin + each, total)
    sums = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        listed = i < end
        j = tl.load(index + row * sources + i, mask=listed, other=0).to(tl.int64)
        v = tl.load(value + row * sources + i, mask=listed, other=0.0)
        at = j[:, None] * targets + n[None, :]
        w = tl.load(weight + at, mask=listed[:, None] & there[None, :], other=0.0).to(tl.float32)
        sums += v[:, None] * w
    y = tl.sum(sums, 0)
    if BIASED and PARTS == 1:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + (part * rows.to(tl.int64) + row) * targets + n, y, mask=there)


@triton.jit(do_not_specialize=["rows"])
def combine(shares, bias, out, rows, targets, BIASED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up ``shares (PARTS, rows, targets)`` in their order."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < targets
    y = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(shares + (part * rows.to(tl.int64) + row) * targets + n, mask=there, other=0.0)
    if BIASED:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * targets + n, y, mask=there)


@triton.jit
def pack(s, words, sources, n_words, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """Put the signs of ``s (rows, sources)`` into ``words (rows, PLANES, n_words)``, 32 to each."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 32)
    j = word[:, None] * 32 + bit[None, :]
    v = tl.load(s + row * sources + j, mask=j < sources, other=0.0).to(tl.float32)
    at = words + row * PLANES * n_words + word
    tl.store(at, tl.sum((v > 0.0).to(tl.int32) << bit[None, :], 1), mask=word < n_words)
    if PLANES == 2:
        tl.store(at + n_words, tl.sum((v < 0.0).to(tl.int32) << bit[None, :], 1), mask=word < n_words)


@triton.jit
def packed_product(
    words, planes, scale, bias, out, n_words, targets,
    BIASED: tl.constexpr, PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Count the bits that ``words (rows, PLANES, n_words)`` and ``planes (2, targets, n_words)`` have in common."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < targets
    counts = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for start in range(0, n_words, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < n_words
        at = n[:, None].to(tl.int64) * n_words + k[None, :]
        both = there[:, None] & known[None, :]
        plus = tl.load(planes + at, mask=both, other=0)
        minus = tl.load(planes + tl.cast(targets, tl.int64) * n_words + at, mask=both, other=0)
        up = tl.load(words + row * PLANES * n_words + k, mask=known, other=0)[None, :]
        counts += ones(plus & up) - ones(minus & up)
        if PLANES == 2:
            down = tl.load(words + (row * PLANES + 1) * n_words + k, mask=known, other=0)[None, :]
            counts += ones(minus & down) - ones(plus & down)
    y = tl.sum(counts, 1).to(tl.float32) * tl.load(scale + n, mask=there, other=0.0).to(tl.float32)
    if BIASED:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * targets + n, y, mask=there)


@triton.jit
def ternary_product(
    x, planes, scale, bias, out, sources, n_words, targets,
    BIASED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply ``x (rows, sources)`` with ternary weights ``planes (2, targets, n_words)``, a bit of each at a time."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < targets
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, n_words, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = n[:, None].to(tl.int64) * n_words + k[None, :]
        both = there[:, None] & (k < n_words)[None, :]
        plus = tl.load(planes + at, mask=both, other=0)
        minus = tl.load(planes + tl.cast(targets, tl.int64) * n_words + at, mask=both, other=0)
        for bit in tl.static_range(32):
            j = k * 32 + bit
            v = tl.load(x + row * sources + j, mask=j < sources, other=0.0).to(tl.float32)
            sums += (((plus >> bit) & 1) - ((minus >> bit) & 1)).to(tl.float32) * v[None, :]
    y = tl.sum(sums, 1) * tl.load(scale + n, mask=there, other=0.0).to(tl.float32)
    if BIASED:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * targets + n, y, mask=there)


@triton.jit
def int8_product(
    x, codes, scale, bias, out, sources, targets,
    BIASED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply ``x (rows, sources)`` with ``codes (targets, sources)`` int8, which have a scale per output."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < targets
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, sources, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < sources
        at = n[:, None].to(tl.int64) * sources + k[None, :]
        w = tl.load(codes + at, mask=there[:, None] & known[None, :], other=0).to(tl.float32)
        v = tl.load(x + row * sources + k, mask=known, other=0.0).to(tl.float32)
        sums += w * v[None, :]
    y = tl.sum(sums, 1) * tl.load(scale + n, mask=there, other=0.0).to(tl.float32)
    if BIASED:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * targets + n, y, mask=there)
