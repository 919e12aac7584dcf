# mypy: ignore-errors
"""Compiled products of one token, for numba: a matrix, given by its address, times one row of numbers or of bits.

Weights are read once, so that memory sets the pace. Rows of a matrix ``(N, K)`` are read from end to end; a matrix
``(K, N)`` with a row per source is read where sources are not silent. ``scale`` and ``bias`` are per target; an empty
one is none.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from spiking_lm.kernels.jit_core import compiled, will_read

AHEAD = 8192
"""Bytes of int8 weights, from the one in hand, to ask memory for: numbers as short come slower than they are used."""


def _pointing(element, kind):
    @intrinsic
    def point(typing, address):
        def emit(context, builder, signature, args):
            return builder.inttoptr(args[0], element.as_pointer())

        return types.CPointer(kind)(types.intp), emit

    return point


_floats = _pointing(ir.FloatType(), types.float32)
_bytes = _pointing(ir.IntType(8), types.int8)
_words = _pointing(ir.IntType(32), types.int32)


@intrinsic
def count_bits(typing, word):
    """How many of the lowest 32 bits are set: numba widens what it computes from words to 64."""

    def emit(context, builder, signature, args):
        return builder.ctpop(builder.trunc(args[0], ir.IntType(32)))

    return types.int32(types.int64), emit


@compiled()
def finish(y, scale, bias):
    """Multiply with scales and add biases."""
    if len(scale):
        for i in range(len(y)):
            y[i] *= scale[i]
    if len(bias):
        for i in range(len(y)):
            y[i] += bias[i]


@compiled(fastmath={"reassoc", "contract"})
def rows_float(at, x, y):
    """y = W x for W (N, K) of float32."""
    size = np.uintp(len(x))
    w = carray(_floats(at), (len(y) * len(x),))
    for i in range(len(y)):
        total, row = np.float32(0), np.uintp(i) * size
        for k in range(size):
            total += w[row + k] * x[k]
        y[i] = total


@compiled(fastmath={"reassoc", "contract"})
def four_rows_float(at, x, y):
    """y = x W^T for W (N, K) of float32, four rows of x (4, K) and y (4, N): a weight is read once for all of them."""
    size = np.uintp(x.shape[1])
    w = carray(_floats(at), (y.shape[1] * x.shape[1],))
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    for i in range(y.shape[1]):
        t0, t1, t2, t3, row = np.float32(0), np.float32(0), np.float32(0), np.float32(0), np.uintp(i) * size
        for k in range(size):
            value = w[row + k]
            t0 += value * x0[k]
            t1 += value * x1[k]
            t2 += value * x2[k]
            t3 += value * x3[k]
        y[0, i], y[1, i], y[2, i], y[3, i] = t0, t1, t2, t3


@compiled(fastmath={"reassoc", "contract"})
def rows_int8(at, x, y):
    """y = W x for W (N, K) of int8."""
    size = np.uintp(len(x))
    w = carray(_bytes(at), (len(y) * len(x),))
    for i in range(len(y)):
        total, row = np.float32(0), np.uintp(i) * size
        for line in range(0, len(x), 64):
            will_read(at + i * len(x) + AHEAD + line)
        for k in range(size):
            total += np.float32(w[row + k]) * x[k]
        y[i] = total


@compiled()
def list_active(x, active):
    """Write the places of what is not 0 (NaN is not), and return their number; ``active`` has one place more than x."""
    count = 0
    for j in range(len(x)):
        active[count] = j
        count += x[j] != x.dtype.type(0)
    return count


@compiled(fastmath={"contract"})
def sources_float(at, x, y, active):
    """y = x W for W (K, N) of float32, from the rows of sources that are not silent, four at a time."""
    count, size = list_active(x, active), np.uintp(len(y))
    w = carray(_floats(at), (len(y) * len(x),))
    y[:] = np.float32(0)
    whole = count - count % 4
    for i in range(0, whole, 4):
        j0, j1, j2, j3 = np.uintp(active[i]), np.uintp(active[i + 1]), np.uintp(active[i + 2]), np.uintp(active[i + 3])
        x0, x1, x2, x3 = x[j0], x[j1], x[j2], x[j3]
        r0, r1, r2, r3 = j0 * size, j1 * size, j2 * size, j3 * size
        for k in range(size):
            y[k] += (x0 * w[r0 + k] + x1 * w[r1 + k]) + (x2 * w[r2 + k] + x3 * w[r3 + k])
    for i in range(whole, count):
        j = np.uintp(active[i])
        value, row = x[j], j * size
        for k in range(size):
            y[k] += value * w[row + k]


@compiled(fastmath={"contract"})
def sources_int8(at, x, y, active):
    """y = x W for W (K, N) of int8, from the rows of sources that are not silent, eight at a time."""
    count, size = list_active(x, active), np.uintp(len(y))
    w = carray(_bytes(at), (len(y) * len(x),))
    y[:] = np.float32(0)
    whole = count - count % 8
    for i in range(0, whole, 8):
        for other in range(i + 8, min(i + 16, count)):
            for line in range(0, len(y), 64):
                will_read(at + active[other] * len(y) + line)
        j0, j1, j2, j3 = np.uintp(active[i]), np.uintp(active[i + 1]), np.uintp(active[i + 2]), np.uintp(active[i + 3])
        j4, j5, j6, j7 = (
            np.uintp(active[i + 4]),
            np.uintp(active[i + 5]),
            np.uintp(active[i + 6]),
            np.uintp(active[i + 7]),
        )
        x0, x1, x2, x3, x4, x5, x6, x7 = x[j0], x[j1], x[j2], x[j3], x[j4], x[j5], x[j6], x[j7]
        r0, r1, r2, r3 = j0 * size, j1 * size, j2 * size, j3 * size
        r4, r5, r6, r7 = j4 * size, j5 * size, j6 * size, j7 * size
        for k in range(size):
            first = x0 * np.float32(w[r0 + k]) + x1 * np.float32(w[r1 + k])
            first += x2 * np.float32(w[r2 + k]) + x3 * np.float32(w[r3 + k])
            second = x4 * np.float32(w[r4 + k]) + x5 * np.float32(w[r5 + k])
            second += x6 * np.float32(w[r6 + k]) + x7 * np.float32(w[r7 + k])
            y[k] += first + second
    for i in range(whole, count):
        j = np.uintp(active[i])
        value, row = x[j], j * size
        for k in range(size):
            y[k] += value * np.float32(w[row + k])


@compiled()
def pack(x, words):
    """Write spikes as bits, ``words (P, W)``: plane 0 marks +1, plane 1 marks -1."""
    for plane in range(words.shape[0]):
        sign = x.dtype.type(1 - 2 * plane)
        for i in range(words.shape[1]):
            word = np.uint32(0)
            for j in range(min(32, len(x) - 32 * i)):
                word |= np.uint32(x[32 * i + j] == sign) << np.uint32(j)
            words[plane, i] = np.int32(word)


@compiled()
def packed(at, words, y):
    """y = W s for ternary W, planes (2, N, W) of int32, and packed spikes ``words (P, W)``: whole numbers."""
    n, size = len(y), np.uintp(words.shape[1])
    w = carray(_words(at), (2 * len(y) * words.shape[1],))
    up, down = words[0], words[words.shape[0] - 1]
    for i in range(n):
        total, plus, minus = np.int32(0), np.uintp(i) * size, np.uintp(n + i) * size
        if words.shape[0] == 1:
            for k in range(size):
                total += count_bits(w[plus + k] & up[k]) - count_bits(w[minus + k] & up[k])
        else:
            for k in range(size):
                a, b = w[plus + k], w[minus + k]
                # The four sets are disjoint in pairs: a and b, and so are up and down.
                total += count_bits((a & up[k]) | (b & down[k])) - count_bits((a & down[k]) | (b & up[k]))
        y[i] = total


@intrinsic
def _signed_sum(typing, plus, minus, x, words):
    """Sum of x where bits of ``plus`` are set less that where bits of ``minus`` are: addresses, 32 numbers per word."""

    def emit(context, builder, signature, args):
        from numba.core import cgutils

        from spiking_lm.kernels.jit_core import _at

        plus, minus, x, words = args
        vector, half = ir.VectorType(ir.FloatType(), 16), ir.IntType(16)
        mask, zero = ir.VectorType(ir.IntType(1), 16), ir.Constant(vector, [0.0] * 16)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(4)]
        with cgutils.for_range(builder, words) as loop:
            at_bits = builder.mul(loop.index, ir.Constant(words.type, 4))
            at_x = builder.add(x, builder.mul(loop.index, ir.Constant(words.type, 128)))
            for part in range(2):
                value = builder.load(_at(builder, at_x, 64 * part, vector), align=4)
                for place, address in ((sums[part], plus), (sums[2 + part], minus)):
                    bits = builder.load(_at(builder, builder.add(address, at_bits), 2 * part, half), align=1)
                    chosen = builder.select(builder.bitcast(bits, mask), value, zero)
                    builder.store(builder.fadd(builder.load(place), chosen), place)
        a, b, c, d = (builder.load(place) for place in sums)
        top, index = builder.fsub(builder.fadd(a, b), builder.fadd(c, d)), ir.IntType(32)
        for step in (8, 4, 2, 1):
            order = ir.Constant(ir.VectorType(index, 16), [i ^ step for i in range(16)])
            top = builder.fadd(top, builder.shuffle_vector(top, ir.Constant(vector, ir.Undefined), order))
        return builder.extract_element(top, ir.Constant(index, 0))

    return types.float32(types.intp, types.intp, types.intp, types.intp), emit


@compiled()
def ternary(at, words, x_at, y):
    """y = W x for ternary W, planes (2, N, words) of int32, and x at an address, padded with zeros to whole words."""
    size = 4 * words
    for i in range(len(y)):
        y[i] = _signed_sum(at + i * size, at + (len(y) + i) * size, x_at, words)


# -- the ops: several rows ---------------------------------------------------------------------------------------------


@compiled()
def dense_linear(at, x, y, bias):
    """Rows of x (M, K) and y (M, N)."""
    if len(x) == 4:
        four_rows_float(at, x, y)
    else:
        for m in range(len(x)):
            rows_float(at, x[m], y[m])
    none = np.empty(0, np.float32)
    for m in range(len(x)):
        finish(y[m], none, bias)


@compiled()
def int8_linear(at, x, y, scale, bias):
    """Rows of x (M, K) and y (M, N)."""
    for m in range(len(x)):
        rows_int8(at, x[m], y[m])
        finish(y[m], scale, bias)


@compiled()
def spike_linear(at, x, y, bias):
    """Rows of x (M, K) and y (M, N)."""
    active, none = np.empty(x.shape[1] + 1, np.int64), np.empty(0, np.float32)
    for m in range(len(x)):
        sources_float(at, x[m], y[m], active)
        finish(y[m], none, bias)


@compiled()
def pack_spikes(x, words):
    """Rows of x (M, K) and words (M, P, W)."""
    for m in range(len(x)):
        pack(x[m], words[m])


@compiled()
def packed_linear(at, words, y, scale, bias):
    """Rows of words (M, P, W) and y (M, N)."""
    for m in range(len(words)):
        packed(at, words[m], y[m])
        finish(y[m], scale, bias)


@compiled()
def ternary_linear(at, n_words, x, y, scale, bias):
    """Rows of x (M, 32 n_words) and y (M, N)."""
    for m in range(len(x)):
        ternary(at, n_words, x.ctypes.data + m * x.shape[1] * 4, y[m])
        finish(y[m], scale, bias)
