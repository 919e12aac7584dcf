# mypy: ignore-errors
"""What the compiled kernels are made of, for numba: how they are compiled, exponentials, and tiles of products.

Machine code is kept on disk, per processor and version of these files.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spiking_lm.data.tokenfile import default_cache_dir

F = TypeVar("F", bound=Callable[..., Any])

BLOCK = 4096
"""Elements that go through all their steps together: what they carry stays in the cache."""

_WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
ROWS, COLUMNS = (8, 32) if _WIDE else (4, 16)
"""Size of the tile of a product whose sums stay in registers."""
PAD = 32
"""Rows and columns of matrices in the cache are multiples of this, and so of the tile."""


@lru_cache(maxsize=1)
def _version() -> str:
    """Return a name for this version of all compiled code: numba itself looks at the caller's file only."""
    files = sorted(Path(__file__).parent.glob("jit*.py"))
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in files)):08x}"


def compiled(**options: Any) -> Callable[[F], F]:
    """Compile a function when it is first called, and keep the result in the package's cache folder."""

    def decorate(function: F) -> F:
        stated, numba.config.CACHE_DIR = (
            numba.config.CACHE_DIR,
            numba.config.CACHE_DIR or str(default_cache_dir() / "numba" / _version()),
        )
        try:
            kernel: F = numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no folder can be written to
            kernel = numba.njit(nogil=True, error_model="numpy", **options)(function)
        finally:
            numba.config.CACHE_DIR = stated
        return kernel

    return decorate


# -- exponentials and tiles, which Python cannot say -------------------------------------------------------------------

_EXP: dict[str, tuple[float, ...]] = {
    # the least argument, 1.5 * 2^mantissa bits, the two parts of ln 2 (Cephes)
    "float": (-87.33, 12582912.0, 0.693359375, -2.12194440e-4),
    "double": (-708.0, 6755399441055744.0, 6.93145751953125e-1, 1.42860682030941723212e-6),
}
_POLYNOMIAL: dict[str, tuple[float, ...]] = {
    "float": (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    "double": tuple(1.0 / float(np.prod(np.arange(1.0, k + 1))) for k in range(13, 1, -1)),
}


@intrinsic
def exp(typing: Any, x: Any) -> Any:
    """exp(x) for x up to 80, as plain arithmetic that a loop can do for many elements at once; 0 where it is tiny."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x,) = args
        name = "float" if x.type == ir.FloatType() else "double"
        bits, mantissa, bias = (ir.IntType(32), 23, 127) if name == "float" else (ir.IntType(64), 52, 1023)
        least, magic, high, low = (ir.Constant(x.type, value) for value in _EXP[name])
        shifted = builder.fadd(builder.fmul(x, ir.Constant(x.type, 1.4426950408889634)), magic)
        n = builder.fsub(shifted, magic)
        r = builder.fsub(builder.fsub(x, builder.fmul(n, high)), builder.fmul(n, low))
        y = ir.Constant(x.type, _POLYNOMIAL[name][0])
        for coefficient in _POLYNOMIAL[name][1:]:
            y = builder.fadd(builder.fmul(y, r), ir.Constant(x.type, coefficient))
        y = builder.fadd(builder.fadd(builder.fmul(y, builder.fmul(r, r)), r), ir.Constant(x.type, 1.0))
        whole = builder.sub(builder.bitcast(shifted, bits), builder.bitcast(magic, bits))
        power = builder.shl(builder.add(whole, ir.Constant(bits, bias)), ir.Constant(bits, mantissa))
        y = builder.fmul(y, builder.bitcast(power, x.type))
        return builder.select(builder.fcmp_ordered("<", x, least), ir.Constant(x.type, 0.0), y)

    return x(x), emit


@intrinsic
def where(typing: Any, condition: Any, yes: Any, no: Any) -> Any:
    """One of two numbers, as the instruction: branches that Python's ``if`` makes of nested choices stay branches."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return yes(types.boolean, yes, yes), emit


_FUSED = llvmlite.binding.get_host_cpu_features().get("fma", "aarch64" in llvmlite.binding.get_process_triple())


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once where the processor can, as torch does it."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args) if _FUSED else builder.fadd(builder.fmul(args[0], args[1]), args[2])

    return z(z, z, z), emit


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    undefined, index = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), ir.IntType(32)
    first = builder.insert_element(undefined, value, ir.Constant(index, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(index, lanes), [0] * lanes))


def _at(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    """Return a pointer to ``kind`` at an address and an offset, both in bytes."""
    offset = ir.Constant(address.type, offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _prefetching(write: int) -> Any:
    @intrinsic
    def prefetch(typing: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            numbers = (ir.Constant(number, n) for n in (write, 2, 1))  # into the second-level cache; data, not code
            builder.call(function, [builder.inttoptr(args[0], pointer), *numbers])
            return context.get_dummy_value()

        return types.void(types.intp), emit

    return prefetch


will_read, will_write = _prefetching(0), _prefetching(1)
"""Ask for the line of the cache at an address, long before it is needed."""


@intrinsic
def largest_of_sixteens(typing: Any, address: Any, count: Any, start: Any) -> Any:
    """The largest of ``start`` and ``count`` times sixteen numbers: a plain running maximum is found one by one."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, count, start = args
        vector, size = ir.VectorType(start.type, 16), 4 if start.type == ir.FloatType() else 8
        lanes = cgutils.alloca_once_value(builder, _splat(builder, start, 16))
        with cgutils.for_range(builder, count) as loop:
            offset = builder.mul(loop.index, ir.Constant(address.type, 16 * size))
            x, top = builder.load(_at(builder, address, offset, vector), align=size), builder.load(lanes)
            builder.store(builder.select(builder.fcmp_ordered(">", x, top), x, top), lanes)
        top, index = builder.load(lanes), ir.IntType(32)
        for half in (8, 4, 2, 1):
            order = ir.Constant(ir.VectorType(index, 16), [i ^ half for i in range(16)])
            other = builder.shuffle_vector(top, ir.Constant(vector, ir.Undefined), order)
            top = builder.select(builder.fcmp_ordered(">", other, top), other, top)
        return builder.extract_element(top, ir.Constant(index, 0))

    return start(types.intp, types.intp, start), emit


def _add_products(builder: Any, sums: Any, vector: Any, a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, n: Any):
    """Add to the sums in registers, ROWS x COLUMNS of them, the product of n columns of a and n rows of b."""
    lanes, kind = vector.count, vector.element
    with cgutils.for_range(builder, n) as loop:
        at_b = builder.add(b, builder.mul(loop.index, b_row))
        at_a = builder.add(a, builder.mul(loop.index, a_column))
        row_of_b = [builder.load(_at(builder, at_b, 64 * j, vector), align=64 // lanes) for j in range(COLUMNS // 16)]
        for i, row in enumerate(sums):
            offset = builder.mul(a_row, ir.Constant(a_row.type, i))
            x = _splat(builder, builder.load(_at(builder, at_a, offset, kind)), lanes)
            for place, y in zip(row, row_of_b, strict=True):
                term = builder.fmul(x, y, flags=["contract"])
                builder.store(builder.fadd(term, builder.load(place), flags=["contract"]), place)


def _registers(builder: Any, kind: Any) -> Any:
    vector = ir.VectorType(kind, 64 // (4 if kind == ir.FloatType() else 8))
    return vector, [[cgutils.alloca_once(builder, vector) for _ in range(COLUMNS // 16)] for _ in range(ROWS)]


@intrinsic
def tile(
    typing: Any, c: Any, c_row: Any, a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, n: Any, scale: Any
) -> Any:
    """c = scale a b for ROWS x COLUMNS of c and n columns of a: addresses, and distances in bytes."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, c_row, *operands, scale = args
        vector, sums = _registers(builder, scale.type)
        for place in (place for row in sums for place in row):
            builder.store(ir.Constant(vector, [0.0] * vector.count), place)
        _add_products(builder, sums, vector, *operands)
        factor = _splat(builder, scale, vector.count)
        for i, row in enumerate(sums):
            at_c = builder.add(c, builder.mul(c_row, ir.Constant(c_row.type, i)))
            for j, place in enumerate(row):
                value = builder.fmul(builder.load(place), factor)
                builder.store(value, _at(builder, at_c, 64 * j, vector), align=64 // vector.count)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 8, scale), emit


@intrinsic
def tile_onto(
    typing: Any, c: Any, c_row: Any, origin: Any, origin_row: Any, a: Any, a_row: Any, a_column: Any, b: Any,
    b_row: Any, n: Any, like: Any,
) -> Any:  # fmt: skip
    """c = origin + a b, as :func:`tile`, for numbers ``like`` that one; origin may be c, or one row for all."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, c_row, origin, origin_row, *operands, like = args
        vector, sums = _registers(builder, like.type)
        for i, row in enumerate(sums):
            at = builder.add(origin, builder.mul(origin_row, ir.Constant(origin_row.type, i)))
            for j, place in enumerate(row):
                builder.store(builder.load(_at(builder, at, 64 * j, vector), align=64 // vector.count), place)
        _add_products(builder, sums, vector, *operands)
        for i, row in enumerate(sums):
            at = builder.add(c, builder.mul(c_row, ir.Constant(c_row.type, i)))
            for j, place in enumerate(row):
                builder.store(builder.load(place), _at(builder, at, 64 * j, vector), align=64 // vector.count)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 10, like), emit


@intrinsic
def _turn(typing: Any, source: Any, source_row: Any, target: Any, target_row: Any, like: Any) -> Any:
    """Write a block of as many rows as a vector has lanes across: addresses, and distances in bytes.

    Left to itself the compiler scatters single numbers, which takes several times as long.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, source_row, target, target_row, like = args
        vector, index = _registers(builder, like.type)[0], ir.IntType(32)
        lanes = vector.count

        def at(address: Any, distance: Any, i: int) -> Any:
            return _at(builder, builder.add(address, builder.mul(distance, ir.Constant(distance.type, i))), 0, vector)

        rows = [builder.load(at(source, source_row, i), align=64 // lanes) for i in range(lanes)]
        step = 1
        while step < lanes:  # two rows at a time exchange what is off the diagonal of blocks of two, four, eight ...
            first = [e if not e & step else lanes + e - step for e in range(lanes)]
            second = [e + step if not e & step else lanes + e for e in range(lanes)]
            for i in (i for i in range(lanes) if not i & step):
                pair = rows[i], rows[i + step]
                rows[i], rows[i + step] = (
                    builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(index, lanes), order))
                    for order in (first, second)
                )
            step *= 2
        for i, row in enumerate(rows):
            builder.store(row, at(target, target_row, i), align=64 // lanes)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 4, like), emit


@compiled()
def across(a, out):
    """Write a padded matrix in the cache across into another one."""
    size = a.itemsize
    lanes = 64 // size
    for i in range(0, a.shape[0], lanes):
        for j in range(0, a.shape[1], lanes):
            _turn(
                a.ctypes.data + (i * a.shape[1] + j) * size, a.shape[1] * size,
                out.ctypes.data + (j * out.shape[1] + i) * size, out.shape[1] * size, a.dtype.type(0),
            )  # fmt: skip


@compiled()
def aligned(rows, columns, like):
    """A matrix of zeros, of numbers ``like`` those of an array, that begins with a line of the cache."""
    memory = np.zeros(rows * columns + 16, like.dtype)
    first = (64 - np.intp(memory.ctypes.data) % 64) % 64 // like.itemsize
    return memory[first : first + rows * columns].reshape(rows, columns)


@compiled()
def product(c, a, across, b, rows, columns, n, scale):
    """c = scale a b, or scale a^T b with ``across``, for padded matrices in the cache; n is the length of the sums."""
    size = c.itemsize
    a_row, a_column = (size, a.shape[1] * size) if across else (a.shape[1] * size, size)
    wide = COLUMNS * 4 // size
    for j in range(0, columns, wide):
        for i in range(0, rows, ROWS):
            tile(
                c.ctypes.data + i * c.shape[1] * size + j * size, c.shape[1] * size,
                a.ctypes.data + i * a_row, a_row, a_column,
                b.ctypes.data + j * size, b.shape[1] * size, n, scale,
            )  # fmt: skip
