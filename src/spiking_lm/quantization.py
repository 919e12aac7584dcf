"""Weight matrices in few bits: grids, codes, learnable clipping and ternary spikes.

A grid has one scale and one zero point per output row, or per group of consecutive inputs of a row; a weight is
``(code - zero) * scale``. Matrices are ``(O, I)``, grids ``(O, G)``; the last group of a row may be shorter.

Two conventions of ranges are in use, and both are here: OmniQuant's (Shao et al., arXiv 2308.13137), whose range is
that of the weights and need not hold zero, and GPTQ's (Frantar et al., arXiv 2210.17323), whose range always does.
Ternary weights are spikes: over T steps of -1, 0 or 1 a weight is their sum times the scale (Xing et al., arXiv
2407.04752).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spiking_lm import packing
from spiking_lm.errors import CheckpointError, ConfigError, DataError
from spiking_lm.schemes import WeightScheme

LEAST_SCALE, GREATEST_SCALE = 1e-5, 1e4
FARTHEST_ZERO = 1e4
"""Zero points lie at most so many steps outside the range; a narrow range far from zero gets a wider step instead."""
_SHARES = tuple(1 - step / 100 for step in range(80))
"""Of the range, among which the one with the least error is chosen."""
_ERROR_EXPONENT = 2.4
_ROWS = 2**15
"""Weights that the search looks at together: what it needs for them stays in a processor's cache."""


class Grid(NamedTuple):
    """Scale and zero point per row and group: a weight is ``(code - zero) * scale``."""

    scale: Tensor
    """(O, G), positive."""
    zero: Tensor
    """(O, G), whole numbers of the scale's type. Zero for ternary weights."""


def weight_grid(
    w: Tensor,
    scheme: WeightScheme,
    *,
    upper: Tensor | None = None,
    lower: Tensor | None = None,
    with_zero: bool = False,
    mse: bool = False,
) -> Grid:
    """Return the grid of a uniform scheme that fits ``w`` (O, I).

    ``upper`` and ``lower`` (O, G) are logits of learnable clipping: the range is ``sigmoid(lower) * min`` to
    ``sigmoid(upper) * max``, and gradients reach them and ``w`` through the scale. ``with_zero`` is GPTQ's convention:
    the range holds 0, and an all-zero group has the range -1 to 1. ``mse`` takes of the range and 79 narrower ones the
    one with the least sum of ``|error|^2.4``, as GPTQ does. A constant group without ``with_zero`` is returned exactly.
    Float16 and bfloat16 weights have a float32 grid. Raises: ConfigError for a scheme that is ternary or off.
    """
    if scheme.type != "uniform" or scheme.off:
        raise ConfigError(f"no uniform grid of {_words(scheme)}", hint="type: uniform with 2 to 15 bits has one")
    w = _real(w)
    groups = split_groups(w, scheme.group_size)
    low = torch.cat([group.amin(2) for group in groups], 1)
    high = torch.cat([group.amax(2) for group in groups], 1)
    constant = (low == high) & (low != 0)
    value = low
    if upper is not None:
        high = torch.sigmoid(upper) * high
    if lower is not None:
        low = torch.sigmoid(lower) * low
    grid_of = _range_with_zero if with_zero else _range
    grid = grid_of(low, high, scheme)
    if mse:
        shrunk = [grid_of(low * share, high * share, scheme) for share in _SHARES]
        grid = _least_error(groups, shrunk, scheme)
    if with_zero:
        return grid
    # One step from zero: times the scale that is the constant itself.
    zero = grid.zero if scheme.symmetric else torch.where(constant, (value < 0).to(w.dtype), grid.zero)
    return Grid(torch.where(constant, value.abs(), grid.scale), zero)


def encode(w: Tensor, grid: Grid, scheme: WeightScheme, steps: Tensor | int = 1) -> Tensor:
    """Return the codes of ``w`` (O, I) as int32, rounded half to even: 0 to 2^bits - 1, or -T to T of a ternary scheme.

    ``steps`` are the ternary steps T, of each column (I,) or of all. Columns of one group may also be given alone,
    with the grid of that group (O, 1).
    """
    most = steps if isinstance(steps, int) else split_groups(steps[None].to(grid.scale.dtype), scheme.group_size)
    codes = []
    for index, (group, scale, zero) in enumerate(_by_group(w.detach(), grid, scheme)):
        code = (group / scale).round_()
        if scheme.type == "uniform":
            code.add_(zero).clamp_(0, 2**scheme.bits - 1)
        elif isinstance(most, int):
            code.clamp_(-most, most)
        else:
            code.clamp_(-most[index], most[index])
        codes.append(code.to(torch.int32).flatten(1))
    return _joined(codes)


def decode(codes: Tensor, grid: Grid, scheme: WeightScheme) -> Tensor:
    """Return ``(codes - zero) * scale`` (O, I), of uniform and of ternary codes, in the type of the grid."""
    values = []
    for group, scale, zero in _by_group(codes, grid, scheme):
        values.append(group.to(scale.dtype).sub(zero).mul_(scale).flatten(1))
    return _joined(values)


def fake_quantize_weight(
    w: Tensor, scheme: WeightScheme, upper: Tensor | None = None, lower: Tensor | None = None
) -> Tensor:
    """Return ``w`` (O, I) on the grid of a uniform scheme, differentiable; a scheme that is off returns ``w`` itself.

    ``upper`` and ``lower`` (O, G) are logits of learnable clipping, see :func:`weight_grid`. Rounding passes gradients
    through, the first and last code stop them, the scale has its true gradient, the zero point none.
    """
    if scheme.off:
        return w
    grid = weight_grid(w, scheme, upper=upper, lower=lower)
    most = 2**scheme.bits - 1
    groups = [_FakeQuantize.apply(*group, most).flatten(1) for group in _by_group(_real(w), grid, scheme)]
    return _joined(groups).to(w.dtype)


def round_to_nearest(w: Tensor, scheme: WeightScheme, steps: Tensor | int = 1) -> QuantizedWeight:
    """Return ``w`` (O, I) on the grid that fits it, weight by weight: the baseline of every other method.

    ``steps`` are the steps T of a ternary scheme, of each column (I,) or of all.
    Raises: DataError for weights that are not finite, ConfigError for a scheme that is off.
    """
    if not bool(w.isfinite().all()):
        raise DataError("the matrix holds values that are not finite", hint="the checkpoint is damaged or diverged")
    w = w.detach()
    if scheme.type == "uniform":
        grid = weight_grid(w, scheme)
        return QuantizedWeight(encode(w, grid, scheme), grid, scheme)
    grid = ternary_grid(w, steps, scheme)
    per_column = None if isinstance(steps, int) and steps == 1 else torch.as_tensor(steps).expand(w.shape[1])
    return QuantizedWeight(encode(w, grid, scheme, steps), grid, scheme, steps=per_column)


def ternary_grid(
    w: Tensor, steps: Tensor | int, scheme: WeightScheme, *, fit: bool = True, importance: Tensor | None = None
) -> Grid:
    """Return the grid of a ternary scheme for ``w`` (O, I), of which each column (I,) or all have ``steps`` steps T.

    ``fit`` minimises the squared error over all scales and spikes, each column's times its positive ``importance``
    (I,); without it the scale is the least that clips nothing, ``max(|w| / T)``. A group whose weights all have one
    magnitude is returned exactly.
    Raises: ConfigError for a scheme that is not ternary.
    """
    if scheme.type != "ternary":
        raise ConfigError(f"no ternary grid of {_words(scheme)}", hint="set type: ternary")
    magnitude = _real(w.detach()).abs()
    limit = torch.as_tensor(steps, dtype=magnitude.dtype, device=w.device).expand(w.shape[1])[None]
    counts = torch.ones_like(limit) if importance is None else (importance / importance.mean()).to(limit)[None]
    scales = []
    for group, most, count in zip(
        *(split_groups(x, scheme.group_size) for x in (magnitude, limit, counts)), strict=True
    ):
        scale = _least_squares_scale(group, most, count) if fit else (group / most).amax(2)
        scales.append(torch.where(scale > 0, scale, 1))  # all weights are zero: any scale will do
    scale = _joined(scales)
    return Grid(scale, torch.zeros_like(scale))


def ternary_spikes(codes: Tensor, steps: int) -> Tensor:
    """Return the spikes (T, ...) of -1, 0 and 1, int8, that sum to ``codes`` in -T..T: ``|code|`` early steps fire."""
    count = torch.arange(1, steps + 1, device=codes.device).view(-1, *[1] * codes.dim())
    return (codes.abs() >= count).to(torch.int8) * codes.sign().to(torch.int8)


def split_groups(x: Tensor, group_size: int | None) -> tuple[Tensor, ...]:
    """Return views of ``x`` (O, I): its whole groups (O, n, size) and, if need be, the shorter last (O, 1, rest)."""
    inputs = x.shape[1]
    size = min(group_size or inputs, inputs)
    whole = inputs // size * size
    groups = x[:, :whole].reshape(len(x), -1, size)
    return (groups,) if whole == inputs else (groups, x[:, whole:].unsqueeze(1))


def group_count(inputs: int, group_size: int | None) -> int:
    """Return how many groups a row of ``inputs`` weights has."""
    return -(-inputs // group_size) if group_size else 1


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix as codes and grid; everything here is in the order of the groups, only :meth:`dequantize` is not."""

    codes: Tensor
    """(O, I), whole numbers: 0 to 2^bits - 1, or -T to T of a ternary scheme."""
    grid: Grid
    scheme: WeightScheme
    order: Tensor | None = None
    """(I,) whole numbers: ``codes[:, k]`` are of input ``order[k]``. None: of input k."""
    steps: Tensor | None = None
    """(I,) whole numbers: the ternary steps of ``codes[:, k]``. None: one of each."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix (O, I), inputs in their original order."""
        values = decode(self.codes, self.grid, self.scheme).to(dtype)
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order.long(), values)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that has to be stored, packed; :meth:`from_tensors` makes the same matrix of it.

        ``codes`` (of a ternary scheme ``codes.T`` for each number of steps T, of the columns that have it), ``scale``,
        ``zero`` of a uniform scheme (one number where all are equal), ``order`` and ``steps`` where there are any.
        Scales that a shorter floating-point type holds exactly are stored in it.
        """
        tensors = {"scale": _narrowest(self.grid.scale)}
        if self.scheme.type == "uniform":
            levels = 2**self.scheme.bits
            tensors["codes"] = packing.pack(self.codes, levels)
            zero = self.grid.zero.to(torch.int16)
            if bool((zero == zero[0, 0]).all()):
                tensors["zero"] = zero[0, :1].clone()
            elif levels <= 256 and bool(((zero >= 0) & (zero < levels)).all()):
                tensors["zero"] = packing.pack(zero, levels)
            else:
                tensors["zero"] = zero
        else:
            for step, columns in _columns_by_steps(self.steps, self.codes.shape[1]):
                tensors[f"codes.{step}"] = packing.pack(self.codes[:, columns] + step, 2 * step + 1)
            if self.steps is not None:
                tensors["steps"] = self.steps.to(torch.uint8)
        if self.order is not None:
            tensors["order"] = self.order.to(torch.int16 if self.codes.shape[1] <= 2**15 else torch.int32)
        return tensors

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: WeightScheme, shape: tuple[int, int]
    ) -> QuantizedWeight:
        """Return the matrix of ``shape`` (O, I) that :meth:`tensors` packed, codes as int32.

        Raises: CheckpointError when tensors are missing, damaged, or belong to another scheme or shape.
        """
        outputs, inputs = shape
        groups = (outputs, group_count(inputs, scheme.group_size))
        scale = _real(_stored(tensors, "scale", groups))
        order = _stored(tensors, "order", (inputs,)).int() if "order" in tensors else None
        if order is not None and not torch.equal(order.sort().values, torch.arange(inputs).to(order)):
            raise CheckpointError("the stored order of the inputs is no permutation", hint="the file is damaged")
        steps = _stored(tensors, "steps", (inputs,)) if "steps" in tensors else None
        if scheme.type == "uniform":
            levels = 2**scheme.bits
            codes = packing.unpack(_stored(tensors, "codes"), levels, outputs * inputs).int().view(shape)
            zero = _stored(tensors, "zero")
            if zero.dtype == torch.uint8:
                zero = packing.unpack(zero, levels, groups[0] * groups[1]).view(groups)
            elif zero.numel() != 1 and zero.shape != groups:
                raise CheckpointError(f"the stored zero points are {tuple(zero.shape)}, not {groups}")
            return cls(codes, Grid(scale, zero.to(scale.dtype).expand(groups)), scheme, order)
        codes = torch.zeros(shape, dtype=torch.int32, device=scale.device)
        for step, columns in _columns_by_steps(steps, inputs):
            count = codes[0, columns].numel()
            packed = packing.unpack(_stored(tensors, f"codes.{step}"), 2 * step + 1, outputs * count)
            codes[:, columns] = packed.int().view(outputs, count) - step
        return cls(codes, Grid(scale, torch.zeros_like(scale)), scheme, order, steps)

    def bits_per_weight(self) -> float:
        """Return the bits of everything that is stored, per weight: codes, scales, zero points, order and steps."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors().values()) / self.codes.numel()

    def additions_per_weight(self) -> float:
        """Return the spikes other than zero per weight of a ternary matrix: so many additions an input spike costs."""
        return float(self.codes.abs().sum(dtype=torch.float64)) / self.codes.numel()


class _FakeQuantize(torch.autograd.Function):
    """Rounding to a grid: (O, n, size) with scale and zero (O, n, 1)."""

    @staticmethod
    def forward(ctx: Any, group: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
        ctx.save_for_backward(group, scale, zero)
        ctx.most = most
        return (group / scale).round_().clamp_(-zero, most - zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        group, scale, zero = ctx.saved_tensors
        ratio = group / scale
        rounded = ratio.round()
        code = rounded.clamp(-zero, ctx.most - zero)
        # The two end codes count as clipped: they also stand for all weights beyond the range.
        through = torch.where((rounded > -zero) & (rounded < ctx.most - zero), gradients[0], 0)
        to_scale = (gradients[0] * code - through * ratio).sum(2, keepdim=True)
        return through, to_scale, None, None


def _range(low: Tensor, high: Tensor, scheme: WeightScheme) -> Grid:
    """Return OmniQuant's grid of ranges (O, G)."""
    if scheme.symmetric:
        most = 2 ** (scheme.bits - 1) - 1
        scale = (torch.maximum(low.abs(), high.abs()) / most).clamp(LEAST_SCALE, GREATEST_SCALE)
        return Grid(scale, torch.full_like(scale, most))
    scale = ((high - low) / (2**scheme.bits - 1)).clamp(LEAST_SCALE, GREATEST_SCALE)
    scale = torch.maximum(scale, low.abs() / FARTHEST_ZERO)
    return Grid(scale, (-low.detach() / scale.detach()).round_())


def _range_with_zero(low: Tensor, high: Tensor, scheme: WeightScheme) -> Grid:
    """Return GPTQ's grid of ranges (O, G), which are widened to hold zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = low == high
    low, high = torch.where(empty, -1, low), torch.where(empty, 1, high)
    scale = ((high - low) / (2**scheme.bits - 1)).clamp(min=torch.finfo(low.dtype).tiny)
    if scheme.symmetric:
        return Grid(scale, torch.full_like(scale, 2 ** (scheme.bits - 1)))
    return Grid(scale, (-low.detach() / scale.detach()).round_())


def _least_squares_scale(magnitude: Tensor, most: Tensor, importance: Tensor) -> Tensor:
    """Return the scale (O, n) that minimises ``|magnitude - scale * code|^2`` over codes in 0..most as well.

    Squares count by their ``importance`` (1, n, size), and so do products < , >.
    For a given scale the best codes are the rounded ones; as it shrinks, a code goes from k - 1 to k at
    ``magnitude / (k - 1/2)``. For given codes the best scale is <magnitude, code> / <code, code>, and the error is the
    less, the greater <magnitude, code>^2 / <code, code> is. So all changes are sorted and summed up to the best place.
    """
    k = torch.arange(1, int(most.max()) + 1, dtype=magnitude.dtype, device=magnitude.device)
    allowed = k <= most[..., None]
    gain = torch.where(allowed, magnitude[..., None], 0)
    order = (gain / (k - 0.5)).flatten(2).argsort(2, descending=True)
    product = (gain * importance[..., None]).flatten(2).gather(2, order).cumsum(2)
    norm = (allowed * (2 * k - 1) * importance[..., None]).expand(gain.shape).flatten(2).gather(2, order).cumsum(2)
    norm = norm.clamp(min=torch.finfo(norm.dtype).tiny)
    best = (product.square() / norm).argmax(2, keepdim=True)
    scale = (product.gather(2, best) / norm.gather(2, best)).squeeze(2)
    greatest = magnitude.amax(2)
    return torch.where(magnitude.amin(2) == greatest, greatest, scale)


def _by_group(x: Tensor, grid: Grid, scheme: WeightScheme) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield groups (O, n, size) with their scale and zero (O, n, 1): the whole ones, then the shorter last one."""
    start = 0
    for group in split_groups(x, scheme.group_size):
        end = start + group.shape[1]
        yield group, grid.scale[:, start:end, None], grid.zero[:, start:end, None]
        start = end


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _columns_by_steps(steps: Tensor | None, inputs: int) -> list[tuple[int, slice | Tensor]]:
    """Return each number of ternary steps that occurs, with the columns that have it."""
    if steps is None:
        return [(1, slice(inputs))]
    return [(step, (steps == step).nonzero()[:, 0]) for step in sorted(set(steps.tolist()))]


def _narrowest(scale: Tensor) -> Tensor:
    """Return ``scale`` in the shortest floating-point type that holds it exactly."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if torch.equal(scale.to(dtype).to(scale.dtype), scale):
            return scale.to(dtype)
    return scale


def _stored(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"a quantised matrix lacks {name!r}; it has {', '.join(sorted(tensors)) or 'nothing'}")
    tensor = tensors[name]
    if shape is not None and tuple(tensor.shape) != shape:
        raise CheckpointError(f"the stored {name!r} of a quantised matrix is {tuple(tensor.shape)}, not {shape}")
    return tensor


def _real(w: Tensor) -> Tensor:
    """Return ``w`` in float32 at least: few bits of a bfloat16 matrix are not computed in bfloat16."""
    return w if w.dtype in (torch.float32, torch.float64) else w.float()


def _words(scheme: WeightScheme) -> str:
    return "weights that are off" if scheme.off else f"{scheme.type} weights"


def _least_error(groups: tuple[Tensor, ...], grids: list[Grid], scheme: WeightScheme) -> Grid:
    """Return of the grids (O, G), group by group, the first with the least sum of |error|^2.4."""
    most = 2**scheme.bits - 1
    scales, zeros = torch.stack([g.scale for g in grids]), torch.stack([g.zero for g in grids])
    chosen, start = [], 0
    for group in groups:
        rows, count, size = group.shape
        flat = group.detach().reshape(-1, size)
        scale, zero = (x[:, :, start : start + count].reshape(len(grids), -1, 1) for x in (scales, zeros))
        start += count
        best = []
        step = max(1, _ROWS // size)
        for first in range(0, len(flat), step):
            part = flat[first : first + step]
            errors = []
            for s, z in zip(scale[:, first : first + step], zero[:, first : first + step], strict=True):
                value = (part / s).round_().clamp_(-z, most - z).mul_(s)
                errors.append(value.sub_(part).abs_().pow_(_ERROR_EXPONENT).sum(1))
            best.append(torch.stack(errors).argmin(0))
        chosen.append(torch.cat(best).view(rows, count))
    index = torch.cat(chosen, 1)[None]
    return Grid(scales.gather(0, index)[0], zeros.gather(0, index)[0])
