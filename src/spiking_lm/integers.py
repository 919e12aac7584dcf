"""A layer of spiking neurons and few-bit weights as whole numbers, which is what hardware computes with (no torch).

Neurons with a fixed threshold turn what a layer reads into counts of spikes, a matrix of int8 adds them up, and one
multiplication by a real number per output and group of weights ends it::

    n_c = clamp(round(x_c / threshold_c), low_c, high_c)          count_c = n_c - zero_c
    sum_og = sum_{c in g} weight_oc gain_c count_c + shift_og sum_{c in g} gain_c count_c + zero_bias_og
    y_o = threshold sum_g scale_og sum_og + bias_o

A salient channel has T steps and a threshold T times as fine; a spike of the others therefore counts T times: its
``gain``. ``shift`` is what the codes of weights lack to be int8; it is zero for weights of less than 8 bits whose grid
holds zero. ``zero_bias`` is what the counts lack that start from another number than 0; signed spikes have none.
Everything up to the sums is exact. No backend is known here; :mod:`spiking_lm.host` computes the rest of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import LoweringError
from spiking_lm.schemes import OFF, ActivationScheme, WeightScheme

if TYPE_CHECKING:
    from torch import Tensor

    from spiking_lm.interfaces import SpikingLanguageModel
    from spiking_lm.quantization import QuantizedWeight

Array = NDArray[Any]

WEIGHT_BITS = 8
"""What is stored of a weight."""
SUM_BITS = 32
"""What a sum may take, sign included."""
_EXACT_FLOAT32 = 2**24


@dataclass(frozen=True, eq=False)
class GIFNeurons:
    """Generalized Integrate-and-Fire neurons with fixed thresholds, one per channel, of two kinds: ordinary, salient.

    Arrays of two hold what the kinds have.
    """

    bits: int
    """A neuron emits at most 2^bits - 1 spikes per step."""
    steps: int
    """Of the salient channels; ordinary ones have one."""
    salient: Array
    """(C,) bool."""
    threshold: Array
    """(2,) float64."""
    low: Array
    """(2,) int64: the least multiple of the threshold."""
    high: Array
    """(2,) int64: the greatest multiple of it."""
    zero: Array
    """(2,) int64: the multiple at which a neuron is silent."""

    def encode(self, x: Array) -> NDArray[np.int64]:
        """Return the counts of ``x (..., C)``, of either sign if spikes are signed; computed in the type of ``x``."""
        kind = self.salient.astype(np.intp)
        n = np.rint(x / self.threshold.astype(x.dtype)[kind])
        counts: NDArray[np.int64] = np.clip(n, self.low[kind], self.high[kind]).astype(np.int64)
        counts -= self.zero[kind]
        return counts

    @property
    def most(self) -> NDArray[np.int64]:
        """The greatest size of a count, (2,)."""
        most: NDArray[np.int64] = np.maximum(np.abs(self.low - self.zero), np.abs(self.high - self.zero))
        return most


@dataclass(frozen=True, eq=False)
class IntegerProduct:
    """A matrix of whole numbers that counts of spikes are added up by."""

    weight: Array
    """(O, C) int8, inputs in their original order."""
    group: Array
    """(C,) int32: which scale the weights of an input have."""
    scale: Array
    """(O, G) float64: what a one of the sums stands for, in thresholds."""
    shift: Array
    """(O, G) int32: what is to be added to the weights."""
    zero_bias: Array
    """(O, G) int32."""
    gain: Array
    """(C,) int32: how often a spike counts."""
    threshold: float
    """The finest one."""
    bias: Array
    """(O,) float64."""

    def __post_init__(self) -> None:
        (outputs, inputs), groups = self.weight.shape, self.scale.shape[1]
        shapes = [self.group.shape, self.gain.shape, self.scale.shape, self.shift.shape, self.zero_bias.shape]
        fits = shapes == [(inputs,), (inputs,), *3 * [(outputs, groups)]] and self.bias.shape == (outputs,)
        if not fits or self.weight.dtype != np.int8 or self.group.min() < 0 or self.group.max() >= groups:
            raise ValueError(f"the parts of a product of {self.weight.dtype} {self.weight.shape} do not fit together")

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return int(self.scale.shape[1])

    @property
    def shifts(self) -> bool:
        """Whether the spikes of a group have to be counted as well."""
        return bool(self.shift.any())

    def add_up(self, counts: Array) -> NDArray[np.int64]:
        """Return the sums ``(S, O, G)`` of ``counts (S, C)``, exactly."""
        charges = counts * self.gain
        # Whole numbers are added up by the fast float product: in float32 where no partial sum can leave its range.
        largest = 128 * int(np.abs(charges).sum(1).max(initial=0))
        dtype = np.float32 if largest < _EXACT_FLOAT32 else np.float64
        charges = charges.astype(dtype)
        sums = np.empty((len(counts), *self.scale.shape), np.int64)
        for g in range(self.groups):
            columns = slice(None) if self.groups == 1 else np.flatnonzero(self.group == g)
            mine = charges[:, columns]
            sums[:, :, g] = mine @ self.weight[:, columns].T.astype(dtype)
            sums[:, :, g] += mine.sum(1).astype(np.int64)[:, None] * self.shift[:, g]
        return sums + self.zero_bias

    def real(self, sums: Array) -> NDArray[np.float64]:
        """Return what the sums ``(S, O, G)`` stand for, ``(S, O)``."""
        y: NDArray[np.float64] = (sums * self.scale).sum(-1) * self.threshold + self.bias
        return y

    def bound(self, neurons: GIFNeurons) -> int:
        """Return the size that no sum can exceed, whatever is read: at most C T (2^bits - 1) times the largest weight.

        Every partial sum stays below it, in whatever order spikes arrive.
        """
        most = self.gain * neurons.most[neurons.salient.astype(np.intp)]
        greatest = 0
        for g in range(self.groups):
            columns = self.group == g
            added = np.abs(self.weight[:, columns].astype(np.int64)) @ most[columns]
            added += np.abs(self.shift[:, g].astype(np.int64)) * most[columns].sum() + np.abs(self.zero_bias[:, g])
            greatest = max(greatest, int(added.max()))
        return greatest


class IntegerLayer(NamedTuple):
    """A projection as whole numbers: its neurons, and the product behind them."""

    neurons: GIFNeurons
    product: IntegerProduct

    def __call__(self, x: Array) -> NDArray[np.float64]:
        """Compute the layer on ``x (S, C)``."""
        return self.product.real(self.product.add_up(self.neurons.encode(x)))


@dataclass(frozen=True)
class SpikeProduct:
    """The declared dynamics of a ``linear`` op of few-bit weights that reads counts of spikes, enough to lower it."""

    name: str
    """Of the op."""
    weights: WeightScheme
    activations: ActivationScheme
    export: Callable[..., IntegerLayer] | None = None
    """``f(*, double=False)`` gives it as whole numbers, with the thresholds that the model has in its own type or those
    that it would have in float64. None in a graph of a model that is not there yet. Raises: LoweringError."""

    def check(self) -> None:
        """Raise LoweringError, naming the op and what to do, unless schemes as these can be written as whole numbers.

        It takes weights of at most 8 bits, spikes on the exact grid, and a static scale: one threshold for all tokens.
        """
        weights, activations = self.weights, self.activations
        reason = hint = None
        if activations.bits >= OFF:
            reason = "reads real values, not spikes"
            hint = "convert.activations.bits=8 convert.activations.scale=static"
        elif activations.scale == "dynamic":
            reason = "has a threshold of its own for every token (a dynamic scale), and hardware has fixed ones"
            hint = "convert.activations.scale=static"
        elif activations.salient is not None and activations.grid == "reference":
            reason = "counts on the reference grid, whose highest counts spikes cannot emit"
            hint = "convert.activations.grid=exact"
        elif weights.off:
            reason, hint = "has real weights", f"convert.weights.bits={WEIGHT_BITS}, or less"
        elif weights.type == "uniform" and weights.bits > WEIGHT_BITS:
            reason = f"has weights of {weights.bits} bits, more than int8 holds"
            hint = f"convert.weights.bits={WEIGHT_BITS}, or less"
        if reason is not None:
            raise LoweringError(f"op {self.name!r} (linear) {reason}", hint=f"convert the model with {hint}")


def export(model: SpikingLanguageModel) -> dict[str, IntegerLayer]:
    """Return every projection of ``model`` that reads spikes as whole numbers, by the names of its graph's ops.

    Raises: LoweringError naming the op that cannot be written so, and what to convert the model with instead.
    """
    found = {}
    for op in model.graph():
        if isinstance(op.dynamics, SpikeProduct):
            op.dynamics.check()
            assert op.dynamics.export is not None
            found[op.name] = op.dynamics.export()
    if not found:
        raise LoweringError("the model has no op that can be written as whole numbers", hint="convert one to spikellm")
    return found


def integer_layer(
    name: str,
    weight: QuantizedWeight,
    activations: ActivationScheme,
    limits: Tensor,
    salient: Tensor | None = None,
    bias: Tensor | None = None,
) -> IntegerLayer:
    """Write a layer as whole numbers; ``limits (2,)`` are those of its static scale, ``salient (C,)`` its mask.

    Raises: LoweringError naming the layer when it has no form in whole numbers (:meth:`SpikeProduct.check`), when a sum
    could leave 32 bits, or when its range is so narrow that the thresholds are not multiples of one another.
    """
    SpikeProduct(name, weight.scheme, activations).check()
    neurons = _neurons(activations, limits, salient, weight.codes.shape[1])
    marked = bool(neurons.salient.any())
    ratio = float(neurons.threshold[0] / neurons.threshold[1]) if marked else 1.0
    if abs(ratio - round(ratio)) > 1e-6:
        raise LoweringError(
            f"{name}: what it reads has a range of {float(limits[1] - limits[0]):.3g}, too narrow for salient channels",
            hint="convert the model with convert.activations.salient=null",
        )
    gain = np.where(neurons.salient, 1, round(ratio)).astype(np.int32)
    values, group, scale = _weights(weight)
    shift = np.zeros(scale.shape, np.int32)
    zero_bias = np.zeros(scale.shape, np.int64)
    zero = gain * neurons.zero[neurons.salient.astype(np.intp)]
    for g in range(scale.shape[1]):
        columns = group == g
        of_group = values[:, columns]
        zero_bias[:, g] = of_group.astype(np.int64) @ zero[columns]
        # int8 holds any 256 neighbouring numbers, though not always these
        shift[:, g] = np.maximum(of_group.max(1) - 127, 0) + np.minimum(of_group.min(1) + 128, 0)
        values[:, columns] -= shift[:, g, None]
    product = IntegerProduct(
        values.astype(np.int8),
        group,
        scale,
        shift,
        zero_bias.clip(-(2**31), 2**31 - 1).astype(np.int32),
        gain,
        float(neurons.threshold[int(marked)]),
        np.zeros(len(values)) if bias is None else _array(bias).astype(np.float64),
    )
    if max(product.bound(neurons), int(np.abs(zero_bias).max())) >= 2 ** (SUM_BITS - 1):
        raise LoweringError(
            f"{name}: {len(gain)} inputs of {activations.bits} bits times weights of up to {np.abs(values).max()} can "
            f"add up to {product.bound(neurons):,}, more than {SUM_BITS} bits hold",
            hint="convert the model with less convert.activations.bits or convert.weights.bits",
        )
    return IntegerLayer(neurons, product)


def _neurons(scheme: ActivationScheme, limits: Tensor, salient: Tensor | None, channels: int) -> GIFNeurons:
    from spiking_lm.gif import grids

    kinds = grids((limits[0], limits[1]), scheme, salient)
    low, high = (np.array([int(getattr(grid, end)) for grid in kinds], np.int64) for end in ("low", "high"))
    return GIFNeurons(
        scheme.bits,
        scheme.salient.steps if scheme.salient is not None else 1,
        np.zeros(channels, np.bool_) if salient is None else _array(salient),
        np.array([float(grid.scale) for grid in kinds]),
        low,
        high,
        low if scheme.spikes == "unsigned" else np.maximum(low, 0) + np.minimum(high, 0),
    )


def _weights(weight: QuantizedWeight) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
    """Return whole numbers ``(O, C)``, the group of each input and the scales ``(O, G)``, in the inputs' own order."""
    codes, size = _array(weight.codes).astype(np.int64), weight.scheme.group_size
    inputs = codes.shape[1]
    order = np.arange(inputs) if weight.order is None else _array(weight.order).astype(np.intp)
    in_order = np.arange(inputs) // (size or inputs)
    codes -= _array(weight.grid.zero).astype(np.int64)[:, in_order]
    values, group = np.empty_like(codes), np.empty(inputs, np.int32)
    values[:, order], group[order] = codes, in_order
    return values, group, _array(weight.grid.scale).astype(np.float64)


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array
