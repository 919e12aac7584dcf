"""PB-LLM (Shang et al., arXiv 2310.00034): a few weights of eight bits among weights of one; a comparison only.

Which weights matter is decided weight by weight, so that a mask of the matrix has to be stored and a product cannot be
additions alone. Weights in ternary spikes (:mod:`spiking_lm_spikellm.gptq`) are measured against it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spiking_lm.quantization import Grid, weight_grid
from spiking_lm.schemes import WeightScheme
from spiking_lm_spikellm.gptq import Factor, compensate, factorize
from spiking_lm_spikellm.saliency import weight_saliency

HIGH_BITS = 8
"""Of a salient weight."""
Low = Literal["xnor", "sign", "prune"]
"""What becomes of the weights that are not salient."""
_GRID_BITS = 3 * 16 + HIGH_BITS
"""Of a row of a group: mean and scale of one-bit weights and scale of salient ones in float16, and a zero point."""


class PBSolution(NamedTuple):
    """What PB-LLM makes of a matrix (O, I)."""

    weight: Tensor
    """As real numbers."""
    salient: Tensor
    """The weights of eight bits, bool."""
    bits_per_weight: float
    """Stored: codes, a mask of one bit per weight, scales, means and zero points, and the order of the columns."""
    equal_steps: float
    """The mean bits of a weight, without all else: what mean steps of ternary spikes are compared with."""
    loss: float
    """As of :class:`spiking_lm_spikellm.gptq.Solution`."""
    damp: float


def pb_llm(
    w: Tensor,
    hessian: Tensor | Factor,
    *,
    low_frac: float = 0.95,
    metric: Literal["hessian", "magnitude"] = "hessian",
    low: Low = "xnor",
    act_order: bool = True,
    group_size: int | None = 64,
    damp: float = 0.01,
    block: int | None = None,
    released_mean: bool = False,
) -> PBSolution:
    """Give the share ``low_frac`` of the weights of each group of columns one bit, and the others eight.

    ``metric`` ranks weights by w^2 / U_jj^2 or by size. A weight of one bit is m + a or m - a, with mean m and mean
    distance a of those of its row and group. With ``low`` sign it is 0 or the mean of what is positive, and with prune
    always 0: the released code has these too, they are much worse, and here for parity. ``released_mean`` counts
    salient weights as zeros in all means, as the released code does by mistake, which shrinks a. ``hessian``,
    ``act_order``, ``damp`` and ``block`` are as of :func:`spiking_lm_spikellm.gptq.gptq`. The defaults are the best
    setting found on SmolLM2-135M; released are groups of 128 columns in their natural order.
    """
    factor = hessian if isinstance(hessian, Factor) else factorize(hessian, act_order=act_order, damp=damp)
    outputs, inputs = w.shape
    columns = w.detach().float().masked_fill(factor.dead, 0).T[factor.order].contiguous()
    group_size = min(group_size or inputs, inputs)
    rounder = _OneBitOrEight(factor, low_frac, metric, low, released_mean)
    rounded, loss = compensate(columns, factor.upper, rounder, group_size=group_size, block=block)
    back = factor.order.argsort()
    salient = torch.cat(rounder.salient)[back].T.contiguous()
    low_bits, share = 0 if low == "prune" else 1, float(salient.double().mean())
    equal_steps = low_bits + (HIGH_BITS - low_bits) * share
    beside = 1 + _GRID_BITS * len(rounder.salient) / inputs + (16 / outputs if factor.act_order else 0)
    found = rounded[back].T.contiguous()
    return PBSolution(found, salient, equal_steps + beside, equal_steps, loss, factor.damp)


class _OneBitOrEight:
    """Rounds to one of two values, or salient weights to 256 levels."""

    def __init__(self, factor: Factor, low_frac: float, metric: str, low: Low, released_mean: bool) -> None:
        self._factor, self._low_frac, self._metric, self._low = factor, low_frac, metric, low
        self._released_mean = released_mean
        self._dead = factor.dead[factor.order].tolist()
        self._first = 0
        self.salient: list[Tensor] = []
        """Masks of the groups so far, (n, O)."""

    def fit(self, columns: Tensor, first: int) -> None:
        self._first = first
        part = slice(first, first + len(columns))
        by_size = self._metric == "magnitude"
        saliency = columns.abs() if by_size else weight_saliency(columns.T, self._factor.upper[part, part]).T
        ranked = saliency.flatten().sort().values
        low = saliency <= ranked[min(int(ranked.numel() * self._low_frac), ranked.numel() - 1)]
        self.salient.append(~low)
        counted = torch.full_like(low, self._released_mean).logical_or_(low)
        count = counted.sum(0).clamp(min=1)
        shown = columns * low
        mean = shown.sum(0) / count
        distance = ((shown - mean).abs() * counted).sum(0) / count
        if self._low == "xnor":
            self._middle, self._below, self._above = mean, mean - distance, mean + distance
        else:
            self._middle = self._below = torch.zeros_like(mean)
            self._above = self._middle if self._low == "prune" else shown.clamp(min=0).sum(0) / count
        self._grid: Grid = weight_grid(columns.T, WeightScheme(bits=HIGH_BITS), with_zero=True)

    def round(self, column: Tensor, index: int) -> Tensor:
        if self._dead[index]:
            return torch.zeros_like(column)
        low = torch.where(column > self._middle, self._above, self._below)
        scale, zero = (part.squeeze(1) for part in self._grid)
        high = (column / scale).round_().clamp_(-zero, 2**HIGH_BITS - 1 - zero).mul_(scale)
        return torch.where(self.salient[-1][index - self._first], high, low)
