"""The projections of SpikeLLM: neurons, and the weight matrix behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spiking_lm.gif import gif_encode, gif_quantize
from spiking_lm.integers import IntegerLayer, SpikeProduct, integer_layer
from spiking_lm.kernels import gif_linear, int8_linear
from spiking_lm.kernels.compiled import missing
from spiking_lm.kernels.compiled_linear import LEAST_WEIGHTS, MOST_ROWS
from spiking_lm.kernels.dense import linear
from spiking_lm.quantization import QuantizedWeight, round_to_nearest
from spiking_lm.schemes import OFF, ActivationScheme, WeightScheme
from spiking_lm.weights import PackedLayer

Mode = Literal["fake", "spike", "binary"]

_PREFIX = "weight_"
"""Begins the names of the buffers that hold a packed matrix."""

_WIDENED: WeakKeyDictionary[nn.Module, tuple[tuple[int, int, torch.dtype], Tensor]] = WeakKeyDictionary()
"""Matrices of :class:`Head` as they are multiplied with, and what each follows from."""


class Record:
    """What is wanted of a pass beside its result: the spikes, and what arrived at the weight matrices, by name."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self.spikes: dict[str, Tensor] = {}
        self.arrived: dict[str, Tensor] = {}

    def fed(self, layer: nn.Module, codes: Tensor) -> None:
        """Take down the counts ``(B, S, I)`` that a projection reads."""
        name = self._names[layer]
        self.spikes[f"{name}.input"] = self.arrived[name] = _narrow(codes)

    def emitted(self, layer: nn.Module, what: str, codes: Tensor) -> None:
        """Take down the counts ``(B, S, ...)`` of a part of a module."""
        self.spikes[f"{self._names[layer]}.{what}"] = _narrow(codes).flatten(2)


def _narrow(codes: Tensor) -> Tensor:
    """Return counts in half the memory where they fit."""
    fits = codes.dtype == torch.uint8 or bool((codes.abs() < 2**15).all())
    return codes.to(torch.int16) if fits else codes


def _unprefixed(name: str) -> str:
    """Return under which name :meth:`QuantizedWeight.tensors` gives the buffer ``name``, which may have no dot."""
    return name.removeprefix(_PREFIX).replace("codes_", "codes.")


class SpikingLinear(PackedLayer):
    """A linear layer of few-bit weights that reads counts of spikes, as far as its two schemes say so.

    ``weight`` (O, I) is a parameter as long as it is real; a packed matrix is kept in buffers, and ``weight`` is what
    they stand for. ``salient`` (I,) marks the inputs that have more spike steps, ``scale`` (2,) holds the least and the
    greatest value that a static scale was calibrated to.
    """

    bias: Tensor | None
    salient: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        weights: WeightScheme = WeightScheme(),
        activations: ActivationScheme = ActivationScheme(),
        mode: Mode = "fake",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.activations, self.mode = weights, activations, mode
        matrix = nn.init.normal_(torch.empty(out_features, in_features), std=0.02)
        if weights.off:
            self.register_parameter("weight", nn.Parameter(matrix))
        else:
            self.set_weight(round_to_nearest(matrix, weights))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        spiking = activations.bits < OFF
        marked = spiking and activations.salient is not None
        static = spiking and activations.scale == "static"
        self.register_buffer("salient", torch.zeros(in_features, dtype=torch.bool) if marked else None)
        self.register_buffer("scale", torch.tensor([-4.0, 4.0]) if static else None)  # until it is calibrated

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        """Multiply ``x (..., I)``, its values rounded to what spikes can carry, with the matrix."""
        if record is not None and self.activations.bits < OFF:
            record.fed(self, gif_encode(x, self.activations, self.salient, self.scale).codes)
        held = self._parameters.get("weight")
        if held is None and self.mode == "fake" and not torch.is_grad_enabled() and self._takes_codes(x):
            return self._by_codes(x)
        weight = self.unpacked(x.dtype) if held is None else held
        return gif_linear(x, weight, self.bias, self.activations, self.salient, self.scale, mode=self.mode)

    def _takes_codes(self, x: Tensor) -> bool:
        """Return whether ``x`` is the few rows of single tokens, for which reading the weights is all the work."""
        scheme = self.weights
        return (
            scheme.type == "uniform"
            and scheme.bits <= 8
            and scheme.group_size is None
            and self.in_features * self.out_features >= LEAST_WEIGHTS
            and x.numel() <= MOST_ROWS * self.in_features
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and missing() is None
        )

    def _by_codes(self, x: Tensor) -> Tensor:
        """Multiply with the codes themselves, a quarter of the bytes: ``scale (codes x - zero sum(x)) + bias``."""
        codes, scale, offset = self.derived("int8", self._int8)
        values = gif_quantize(x, self.activations, self.salient, self.scale)
        return int8_linear(values, codes, scale, self.bias) - values.sum(-1, keepdim=True) * offset

    def _int8(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (O, I) around 0, so that they fit into a byte, and per row their scale and scaled zero point."""
        matrix = self.quantized_weight()
        middle = 2 ** (matrix.scheme.bits - 1)
        codes = (matrix.codes - middle).to(torch.int8)
        if matrix.order is not None:
            codes = torch.empty_like(codes).index_copy_(1, matrix.order.long(), codes)
        scale, zero = matrix.grid.scale[:, 0].float(), matrix.grid.zero[:, 0].float() - middle
        return codes.contiguous(), scale, zero * scale

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Replace the matrix by a packed one."""
        if weight.scheme.group_size is not None and weight.order is None:
            weight = dataclasses.replace(weight, order=torch.arange(self.in_features, device=weight.codes.device))
        self.weights = weight.scheme
        self._hold_packed(weight.tensors())

    def quantized_weight(self) -> QuantizedWeight:
        """Return the packed matrix as codes and grid."""
        shape = (self.out_features, self.in_features)
        return QuantizedWeight.from_tensors(self._packed(), self.weights, shape)

    def integer_layer(self, name: str, *, double: bool = False) -> IntegerLayer:
        """Return the layer as whole numbers, its thresholds in the layer's own type, or ``double``, as in float64.

        ``name`` is for errors. Raises: LoweringError without a static scale.
        """
        if self.weights.off or self.scale is None:
            SpikeProduct(name, self.weights, self.activations).check()
        assert self.scale is not None
        limits = self.scale.double() if double else self.scale
        return integer_layer(name, self.quantized_weight(), self.activations, limits, self.salient, self.bias)

    def make_room(self, stored: Mapping[str, Tensor]) -> None:
        """Take on the form of packed tensors that are about to be loaded, which depends on what is packed.

        ``stored`` are the tensors of a state dict below this module.
        """
        packed = {_unprefixed(name): torch.empty_like(t) for name, t in stored.items() if name.startswith(_PREFIX)}
        needed = {"scale", "codes", "zero"} if self.weights.type == "uniform" else {"scale"}
        if not self.weights.off and packed.keys() >= needed:  # else loading says what is missing
            self._hold_packed(packed)

    def _hold_packed(self, tensors: Mapping[str, Tensor]) -> None:
        for name in [name for name in self._buffers if name.startswith(_PREFIX)]:
            del self._buffers[name]  # those of another scheme
        self.hold({_PREFIX + name.replace(".", "_"): tensor for name, tensor in tensors.items()})

    def _packed(self) -> dict[str, Tensor]:
        named = {name: buffer for name, buffer in self._buffers.items() if name.startswith(_PREFIX)}
        return {_unprefixed(name): buffer for name, buffer in named.items() if buffer is not None}

    @property
    def packed(self) -> bool:
        """Whether the matrix is in few bits."""
        return any(name.startswith(_PREFIX) for name in self._buffers)

    @property
    def own_dtype(self) -> torch.dtype:
        """float32, or wider as the scales: they may be stored in 16 bits."""
        return torch.promote_types(self._packed()["scale"].dtype, torch.float32)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (O, I) in real numbers."""
        return self.quantized_weight().dequantize(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Head(nn.Linear):
    """The matrix behind the last norm, which may be stored in a shorter type than it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return linear(x, self.weight, self.bias)
        source = (self.weight.data_ptr(), self.weight._version, x.dtype)
        kept = _WIDENED.get(self)
        if kept is None or kept[0] != source:
            kept = _WIDENED[self] = source, self.weight.detach().to(x.dtype)
        return linear(x, kept[1])
