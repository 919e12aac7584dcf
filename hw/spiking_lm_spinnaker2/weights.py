"""The parts of a lowered language model as the chip holds them: arrays in numpy, fp32 or int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import DataError

Array = NDArray[Any]

S0_15 = 1 << 15
"""One in s0.15, the format of states and thresholds with int8 numerics."""
U0_8 = 1 << 8
"""One in u0.8, the format of events with int8 numerics."""


def quantise_rows(matrix: Array) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise each row symmetrically to -127 .. 127; return the whole numbers and the scale of each row."""
    scales = (np.abs(matrix).max(1, initial=0) / 127).astype(np.float32)
    scales[scales == 0] = 1
    return np.clip(np.rint(matrix / scales[:, None]), -127, 127).astype(np.int8), scales


@dataclass(frozen=True)
class SparseRows:
    """A matrix in compressed sparse rows, columns ascending; ``scales`` per row make int8 values real."""

    shape: tuple[int, int]
    pointers: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: Array
    scales: NDArray[np.float32] | None = None

    @classmethod
    def from_dense(cls, matrix: Array, *, int8: bool, keep_zeros: bool) -> SparseRows:
        """Store ``matrix (out, in)``; what is zero, or becomes zero in int8, is left out unless ``keep_zeros``."""
        values, scales = quantise_rows(matrix) if int8 else (np.asarray(matrix, np.float32), None)
        stored = np.ones(values.shape, bool) if keep_zeros else values != 0
        pointers = np.concatenate([[0], np.cumsum(stored.sum(1))])
        columns = np.nonzero(stored)[1].astype(np.int32)
        return cls((values.shape[0], values.shape[1]), pointers, columns, values[stored], scales)

    @property
    def row_counts(self) -> NDArray[np.int64]:
        """Stored weights of each row."""
        return np.diff(self.pointers)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each stored weight."""
        return np.repeat(np.arange(self.shape[0]), self.row_counts)

    def to_tensors(self, prefix: str) -> dict[str, Array]:
        """Return the arrays under ``prefix`` for a program's folder."""
        tensors: dict[str, Array] = {"pointers": self.pointers, "columns": self.columns, "values": self.values}
        if self.scales is not None:
            tensors["scales"] = self.scales
        return {f"{prefix}.{name}": array for name, array in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array], prefix: str, shape: tuple[int, int], int8: bool) -> SparseRows:
        """Take back what :meth:`to_tensors` gave. Raises DataError naming what is missing or does not fit."""
        pointers = tensor(tensors, f"{prefix}.pointers", (shape[0] + 1,), np.int64)
        stored = int(pointers[-1])
        if pointers[0] != 0 or np.any(np.diff(pointers) < 0):
            raise DataError(f"{prefix}.pointers do not ascend from 0")
        columns = tensor(tensors, f"{prefix}.columns", (stored,), np.int32)
        if stored and (columns.min() < 0 or columns.max() >= shape[1]):
            raise DataError(f"{prefix}.columns point outside the {shape[1]} columns")
        values = tensor(tensors, f"{prefix}.values", (stored,), np.int8 if int8 else np.float32)
        scales = tensor(tensors, f"{prefix}.scales", shape[:1], np.float32) if int8 else None
        return cls(shape, pointers, columns, values, scales)


@dataclass(frozen=True)
class Table:
    """The embedding: ``rows (V, E)`` float32, or int8 with one ``scale``."""

    name: str
    rows: Array
    scale: float = 1.0

    @classmethod
    def build(cls, name: str, rows: Array, *, int8: bool) -> Table:
        """Quantise the table as a whole with ``int8``: its values are the activations that the first layer reads."""
        if not int8:
            return cls(name, np.asarray(rows, np.float32))
        scale = float(np.abs(rows).max(initial=0)) / 127 or 1.0
        return cls(name, np.rint(rows / scale).astype(np.int8), scale)


@dataclass(frozen=True)
class EGRULayer:
    """One layer of event-based gated units; matrices have 3 H rows in blocks z, r, g."""

    name: str
    input_name: str
    recurrent_name: str
    input: SparseRows
    recurrent: SparseRows
    bias: NDArray[np.float32]
    """(4, H): z and r (both matrices' biases added up), candidate from the input, candidate from the units."""
    threshold: Array
    """(H,) float32, or int16 in s0.15."""
    zoneout: float = 0.0
    input_scale: float = 1.0
    """int8: what a one of the input stands for."""

    @classmethod
    def build(
        cls,
        names: tuple[str, str, str],
        kernel: Array,
        recurrent_kernel: Array,
        bias: Array | None,
        recurrent_bias: Array | None,
        threshold: Array,
        *,
        zoneout: float = 0.0,
        int8: bool = False,
        keep_zeros: bool = False,
        input_scale: float = 1.0,
    ) -> EGRULayer:
        """Build a layer from ``kernel (3H, I)``, ``recurrent_kernel (3H, H)``, biases ``(3H,)``, thresholds ``(H,)``.

        ``names`` are those of the ops: layer, input matrix, recurrent matrix. Thresholds are held in [0, 1].
        """
        units = len(threshold)
        none = np.zeros(3 * units)
        x, q = (
            np.asarray(none if part is None else part, np.float32).reshape(3, units) for part in (bias, recurrent_bias)
        )
        held = np.clip(np.asarray(threshold, np.float32), 0, 1)
        if int8:
            held = np.minimum(np.rint(held * S0_15), S0_15 - 1).astype(np.int16)
        return cls(
            *names,
            SparseRows.from_dense(kernel, int8=int8, keep_zeros=keep_zeros),
            SparseRows.from_dense(recurrent_kernel, int8=int8, keep_zeros=keep_zeros),
            np.stack([x[0] + q[0], x[1] + q[1], x[2], q[2]]),
            held,
            zoneout,
            input_scale,
        )

    @property
    def n_units(self) -> int:
        """Units of the layer."""
        return self.recurrent.shape[1]

    @property
    def n_inputs(self) -> int:
        """Values that the layer reads from the one before."""
        return self.input.shape[1]

    @property
    def unit_weights(self) -> NDArray[np.int64]:
        """Stored weights of each unit, all gates of both matrices."""
        total: NDArray[np.int64] = (self.input.row_counts + self.recurrent.row_counts).reshape(3, -1).sum(0)
        return total


@dataclass(frozen=True)
class Linear:
    """A dense layer of the output head: ``weight (out, in)`` float32, or int8 with ``scales`` per row."""

    name: str
    weight: Array
    bias: NDArray[np.float32]
    scales: NDArray[np.float32] | None = None

    @classmethod
    def build(cls, name: str, weight: Array, bias: Array | None, *, int8: bool) -> Linear:
        """Quantise the rows with ``int8``; without a bias it is zero."""
        held = np.zeros(len(weight), np.float32) if bias is None else np.asarray(bias, np.float32)
        if int8:
            values, scales = quantise_rows(weight)
            return cls(name, values, held, scales)
        return cls(name, np.asarray(weight, np.float32), held)


@dataclass(frozen=True)
class Parts:
    """Everything of a lowered model, in the order in which it is computed."""

    embedding: Table
    layers: tuple[EGRULayer, ...]
    head: tuple[Linear, ...]

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        return len(self.embedding.rows)


def tensor(tensors: Mapping[str, Array], name: str, shape: tuple[int | None, ...], dtype: Any) -> Array:
    """Return a tensor of a program's folder. Raises DataError when it is missing, or of another shape or type."""
    if name not in tensors:
        raise DataError(f"the program's weights lack {name!r}", hint="lower the model again")
    found = tensors[name]
    fits = len(found.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
    if not fits or found.dtype != np.dtype(dtype):
        wanted = f"{np.dtype(dtype)} {tuple('any' if n is None else n for n in shape)}"
        raise DataError(f"the program's weights: {name!r} is {found.dtype} {found.shape}, expected {wanted}")
    return found
