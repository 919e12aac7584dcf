"""Ternary and binary weight matrices: trained straight through, kept in 1.6 and in 1 bit.

A ternary matrix is ``codes * scale`` with codes -1, 0 and 1 and ``scale = mean |w|`` over the matrix (Ma et al.,
arXiv 2402.17764, "b1.58"); a binary one has the codes -1 and 1, the side of its mean on which a weight lies (Wang et
al., arXiv 2310.11453). Training keeps real weights behind the matrix, to which the gradient passes as it is. Other
schemes, with scales per row or group, are in :mod:`spiking_lm.quantization`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spiking_lm import packing
from spiking_lm.errors import CheckpointError, UsageError
from spiking_lm.kernels.dense import linear

T = TypeVar("T")

Precision = Literal["full", "ternary", "binary"]

LEAST_SCALE = 1e-5
"""What a ternary scale is at least, so that a matrix of zeros has one."""

_LEVELS = {"ternary": 3, "binary": 2}

_EFFECTIVE: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()
"""In evaluation, matrices in few levels that layers multiply with, and the version of the weights they follow from."""

_DERIVED: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()
"""What layers that store a matrix packed multiply with, by what it is: no copy, state dict or footprint has it."""


class Codes(NamedTuple):
    """A matrix in few levels: it stands for ``codes * scale``."""

    codes: Tensor
    """(O, I), -1, 0 or 1, in the type of the matrix."""
    scale: Tensor
    """(), not negative."""


def ternary_codes(w: Tensor) -> Codes:
    """Return codes -1, 0 and 1 of ``w`` (O, I), rounded half to even, and the scale, the mean of ``|w|``."""
    w = w.detach()
    scale = w.abs().mean().clamp(min=LEAST_SCALE)
    return Codes((w / scale).round_().clamp_(-1, 1), scale)


def binary_codes(w: Tensor) -> Codes:
    """Return codes -1 and 1 of ``w`` (O, I), 1 above its mean, and the scale, the mean of ``|w|``."""
    w = w.detach()
    return Codes(torch.where(w > w.mean(), 1.0, -1.0).to(w.dtype), w.abs().mean())


def ternary_weight(w: Tensor) -> Tensor:
    """Return ``w`` (O, I) in three levels; the gradient passes to ``w`` unchanged."""
    return cast(Tensor, _StraightThrough.apply(w, ternary_codes))


def binary_weight(w: Tensor) -> Tensor:
    """Return ``w`` (O, I) in two levels; the gradient passes to ``w`` unchanged."""
    return cast(Tensor, _StraightThrough.apply(w, binary_codes))


def int8_activation(x: Tensor) -> Tensor:
    """Return ``x (..., I)`` on 256 levels per row, scaled by the greatest ``|x|``; the gradient passes unchanged.

    It is what 1.58-bit matrices read where spikes do not feed them (Ma et al., arXiv 2402.17764).
    """
    return cast(Tensor, _StraightThrough.apply(x, _int8))


class PackedLayer(nn.Module, ABC):
    """A layer that may hold its matrix packed, in buffers: ``weight`` is then what they stand for.

    It is unpacked when it is first asked for, and kept beside the layer until the buffers may have changed. A layer
    says whether it is :attr:`packed`, how to :meth:`unpack`, and how to :meth:`make_room` for a state dict.
    """

    @property
    @abstractmethod
    def packed(self) -> bool:
        """Whether the matrix is held packed, and cannot be trained any more."""

    @property
    @abstractmethod
    def own_dtype(self) -> torch.dtype:
        """The type in which ``weight`` is given."""

    @abstractmethod
    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return what the packed matrix stands for, (O, I)."""

    @abstractmethod
    def make_room(self, stored: Mapping[str, Tensor]) -> None:
        """Take on the form of the tensors ``stored`` of a state dict below this layer, if they are packed."""

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return what the packed matrix stands for, (O, I), computed once."""
        return self.derived(dtype, lambda: self.unpack(dtype))

    def derived(self, what: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` makes of the packed matrix, computed once, until the buffers may have changed."""
        known = _DERIVED.setdefault(self, {})
        if what not in known:
            known[what] = make()
        return cast(T, known[what])

    def hold(self, buffers: Mapping[str, Tensor]) -> None:
        """Hold a packed matrix in place of ``weight``."""
        self._parameters.pop("weight", None)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        _DERIVED.pop(self, None)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.packed:
            return self.unpacked(self.own_dtype)
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _DERIVED.pop(self, None)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.make_room({name[len(prefix) :]: t for name, t in state_dict.items() if name.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)
        _DERIVED.pop(self, None)


class QuantizedLinear(PackedLayer, nn.Linear):
    """A linear layer that multiplies with its weights in few levels.

    ``weight`` (O, I) is what is trained, :meth:`effective_weight` what is multiplied with; with ``bits="full"`` they
    are the same. :meth:`pack` replaces the trained weights by codes for good, and ``weight`` is then what those stand
    for. A state dict has ``weight`` before, and ``codes`` and ``scale`` afterwards; either can be loaded.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, bits: Precision = "full") -> None:
        super().__init__(in_features, out_features, bias)
        self.bits: Precision = bits

    @property
    def packed(self) -> bool:
        """Whether the matrix is held as codes, and cannot be trained any more."""
        return "codes" in self._buffers

    def effective_weight(self) -> Tensor:
        """Return the matrix (O, I) that inputs are multiplied with, differentiable until it is packed."""
        if self.packed or self.bits == "full":
            return self.weight
        if self.training or torch.is_grad_enabled():
            return ternary_weight(self.weight) if self.bits == "ternary" else binary_weight(self.weight)
        source, kept = (self.weight.data_ptr(), self.weight._version), _EFFECTIVE.get(self)
        if kept is None or kept[0] != source:
            codes, scale = (ternary_codes if self.bits == "ternary" else binary_codes)(self.weight)
            kept = _EFFECTIVE[self] = source, codes * scale
        return kept[1]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x (..., I)`` with the matrix in few levels."""
        return linear(x, self.effective_weight(), self.bias)

    def pack(self) -> None:
        """Keep codes and scale in place of the trained weights: 1.6 bits a weight, or 1; outputs stay the same.

        Raises: UsageError for full weights, which have no codes.
        """
        if self.bits == "full":
            raise UsageError("full weights have no codes to pack", hint="set bits to ternary or binary, and train")
        if self.packed:
            return
        codes, scale = (ternary_codes if self.bits == "ternary" else binary_codes)(self.weight)
        digits = codes + 1 if self.bits == "ternary" else codes > 0
        self.hold({"codes": packing.pack(digits.to(torch.uint8), _LEVELS[self.bits]), "scale": scale})

    def make_room(self, stored: Mapping[str, Tensor]) -> None:
        """Take on the packed form if ``stored``, the tensors of a state dict below this layer, is in it.

        Raises: CheckpointError when those codes are of other weights than this layer's ``bits``.
        """
        if "codes" not in stored or "scale" not in stored:
            return
        count, codes = self.in_features * self.out_features, stored["codes"]
        sizes = {bits: packing.packed_size(count, levels) for bits, levels in _LEVELS.items()}
        if codes.dtype != torch.uint8 or codes.numel() != sizes.get(self.bits):
            found = next((bits for bits, size in sizes.items() if codes.numel() == size), "other")
            raise CheckpointError(
                f"the checkpoint holds packed {found} weights for a layer of {self.bits} ones "
                f"({self.in_features} to {self.out_features})",
                hint=f"make the model with {found} weights" if found in _LEVELS else "the file is of another model",
            )
        self.hold({name: torch.empty_like(stored[name]) for name in ("codes", "scale")})

    @property
    def own_dtype(self) -> torch.dtype:
        """That of the scale, which follows the model's."""
        return self.scale.dtype

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return codes times scale, (O, I)."""
        shape = (self.out_features, self.in_features)
        digits = packing.unpack(self.codes, _LEVELS[self.bits], shape[0] * shape[1]).view(shape).to(dtype)
        return (digits - 1 if self.bits == "ternary" else 2 * digits - 1) * self.scale.to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}{', packed' if self.packed else ''}"


def pack_weights(model: nn.Module) -> int:
    """Pack every matrix in few levels that ``model`` holds, in place; return how many there are."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m.bits != "full"]
    for layer in layers:
        layer.pack()
    return len(layers)


def expect_packed(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Make room in ``model`` for the packed matrices of a state dict: a model's ``expect`` may call this.

    Raises: CheckpointError when they are of another precision.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            own = {leaf: stored[f"{name}.{leaf}"] for leaf in ("codes", "scale") if f"{name}.{leaf}" in stored}
            layer.make_room(own)


class _StraightThrough(torch.autograd.Function):
    """What a function makes of a tensor, with the gradient of the identity.

    ``x + (f(x) - x).detach()`` would be the same but for rounding, and then a matrix would have more than its levels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Any]) -> Tensor:
        made = function(x)
        return made.codes * made.scale if isinstance(made, Codes) else cast(Tensor, made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _int8(x: Tensor) -> Tensor:
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=LEAST_SCALE)
    return (x * scale).round_().clamp_(-128, 127) / scale
