"""GPTQ (Frantar et al., arXiv 2210.17323): weights are rounded column by column, and later columns make up for it.

With H the second derivative of the output error by a row of weights, the error of a rounded column is spread over the
columns that are still real, so that the output changes least. What a column is rounded to is up to a :class:`Rounder`:
a uniform grid, ternary spikes, or PB-LLM's mixture (:mod:`spiking_lm_spikellm.pbllm`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spiking_lm.errors import ConfigError, DivergedError
from spiking_lm.quantization import Grid, QuantizedWeight, encode, ternary_grid, weight_grid
from spiking_lm.schemes import WeightScheme
from spiking_lm_spikellm.saliency import SecondMoment, choose

_BLOCK = 128
"""Columns whose errors are spread over the rest of the matrix at once."""
_MOST_DAMP = 10.0


@dataclass(frozen=True, eq=False)
class Factor:
    """An inverse Hessian, factored; matrices that read the same share it."""

    hessian: Tensor
    """(I, I), as given."""
    upper: Tensor
    """U (I, I) float64, upper triangular, with H^-1 = U^T U in the order of ``order``."""
    order: Tensor
    """(I,): column k of U is input ``order[k]``."""
    act_order: bool
    """Whether the inputs of greatest activity come first."""
    dead: Tensor
    """(I,) bool: inputs that were always zero. Their weights become zero."""
    damp: float
    """What was added to the diagonal of H, as a share of its mean: as asked for, or more if H was still singular."""


def factorize(hessian: Tensor, *, act_order: bool = True, damp: float = 0.01, first: Tensor | None = None) -> Factor:
    """Factor a Hessian (I, I), at best :attr:`SecondMoment.hessian`, in float64.

    ``act_order`` puts the inputs of greatest activity first, and those of the mask ``first`` (I,) before all others.
    Where H plus ``damp`` times its mean diagonal is not positive definite, ``damp`` is raised tenfold until it is.
    Raises: DivergedError for a Hessian that is not finite or stays indefinite.
    """
    if not torch.isfinite(hessian).all():
        raise DivergedError("the Hessian of a matrix is not finite", hint="the calibration text overflows the model")
    diagonal = hessian.diagonal().to(torch.float64, copy=True)
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
        if first is not None:
            order = order[(~first[order]).to(torch.int8).argsort(stable=True)]
    diagonal[dead] = mean
    # H = M M^T with M upper triangular, from the Cholesky factor of H read backwards; then U is M^-1. Matrices of this
    # size are the most that a conversion holds, so each goes as soon as it can.
    backwards = order.flip(0)
    h = hessian[backwards].to(torch.float64)[:, backwards]
    while True:
        h.diagonal().copy_(diagonal[backwards] + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            break
        damp = max(10 * damp, 1e-6)
        if damp > _MOST_DAMP:
            raise DivergedError(
                "the Hessian of a matrix is not positive definite", hint="use a longer calibration text"
            )
    del h
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    del lower, identity
    upper = inverse.flip(0, 1).contiguous()
    return Factor(hessian, upper, order, act_order, dead, damp)


class Rounder(Protocol):
    """What columns are rounded to; matrices are transposed here, (inputs, O), so that a column is contiguous."""

    def fit(self, columns: Tensor, first: int) -> None:
        """Fit the grid of the group that starts at column ``first`` to its ``columns (n, O)``, as they now are."""

    def round(self, column: Tensor, index: int) -> Tensor:
        """Return what column ``index``, (O,), is rounded to."""


def compensate(
    w: Tensor, upper: Tensor, rounder: Rounder, *, group_size: int, block: int | None = None
) -> tuple[Tensor, float]:
    """Round the columns of ``w`` (I, O) in order, each error being made up for by later columns.

    Returns the rounded (I, O) and the loss, sum (w - q)^2 / (2 U_jj^2), which is half the increase of tr(dW H dW^T).
    A group's grid is fitted to columns that make up for the blocks before its own. By default a block ends where a
    group begins, and after 128 columns; ``block`` gives its length, whatever the groups.
    """
    w, rounded = w.clone(), torch.empty_like(w)
    upper = upper.to(w)
    inputs = len(w)
    starts = set(range(0, inputs, group_size))
    edges = set(range(0, inputs, block or _BLOCK)) | (set() if block else starts) | {inputs}
    loss = 0.0
    for start, stop in pairwise(sorted(edges)):
        u = upper[start:stop, start:stop]
        scaled = u / u.diagonal()[:, None]
        columns, errors = w[start:stop].clone(), torch.empty_like(w[start:stop])
        for i in range(stop - start):
            if start + i in starts:
                rounder.fit(w[start + i : start + i + group_size], start + i)
            q = rounder.round(columns[i], start + i)
            rounded[start + i] = q
            torch.sub(columns[i], q, out=errors[i])
            columns[i + 1 :].addr_(scaled[i, i + 1 :], errors[i], alpha=-1)
        errors /= u.diagonal()[:, None]
        loss += float(errors.square().sum(dtype=torch.float64)) / 2
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return rounded, loss


class Solution(NamedTuple):
    """A matrix in few bits, and what that cost."""

    weight: QuantizedWeight
    loss: float
    """Sum over rows of half of d^T H d: the mean squared error of a token's output where H is 2 E[x x^T]."""
    damp: float
    """The damping that H needed, see :class:`Factor`."""


def gptq(
    w: Tensor,
    hessian: Tensor | Factor,
    scheme: WeightScheme,
    *,
    act_order: bool = True,
    mse: bool = False,
    static_groups: bool = False,
    damp: float = 0.01,
    block: int | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """Return ``w`` (O, I) in few bits, uniform or ternary, with the errors made up for within each row.

    ``hessian`` (I, I) is factored here, with ``act_order`` and ``damp`` as :func:`factorize` has them; matrices that
    read the same may share its :class:`Factor`, which then settles both. ``static_groups`` fits all grids to the matrix
    as it was, so that groups are of consecutive inputs in spite of ``act_order``; otherwise they are formed in the
    order of the solution, which the result keeps, and fitted to what they are by then. ``mse`` narrows uniform ranges,
    see :func:`spiking_lm.quantization.weight_grid`. ``block`` is for :func:`compensate`, ``generator`` for
    salient columns that are chosen at random.

    Salient columns of a ternary scheme are those of the greatest H_jj mean_i w_ij^2, what leaving them out costs. They
    come first under ``act_order``, so that they share scales with their like. (Saliency w^2 / U_jj^2 depends on the
    order of the columns, and chose 8 % worse in the error of outputs, measured on projections of SmolLM2-135M.)
    Raises: ConfigError for a scheme that is off; what :func:`factorize` raises.
    """
    if scheme.off:
        raise ConfigError("no solution is needed for weights that are off", hint="set bits below 16, or type: ternary")
    factor = hessian if isinstance(hessian, Factor) else factorize(hessian, act_order=act_order, damp=damp)
    inputs = w.shape[1]
    w = w.detach().float().masked_fill(factor.dead, 0)
    steps = None
    if scheme.salient is not None:
        saliency = factor.hessian.diagonal() * w.double().square().mean(0)
        salient = choose(saliency, scheme.salient.rate, choice=scheme.salient.choice, generator=generator)
        if factor.act_order:
            factor = factorize(factor.hessian, damp=factor.damp, first=salient)
        steps = torch.where(salient, scheme.salient.steps, 1)[factor.order]
    order = factor.order
    rounder = _OnGrid(scheme, steps, mse, factor.upper.diagonal() ** -2)
    if static_groups:
        rounder.keep(w, order)
    columns = w.T[order].contiguous()
    group_size = min(scheme.group_size or inputs, inputs)
    rounded, loss = compensate(columns, factor.upper, rounder, group_size=group_size, block=block)
    grid = rounder.grid()
    kept: Tensor | None = order
    if static_groups or group_size == inputs or not factor.act_order:
        back = order.argsort()
        rounded, steps, kept = rounded[back], None if steps is None else steps[back], None
    codes = encode(rounded.T.contiguous(), grid, scheme, 1 if steps is None else steps)
    return Solution(QuantizedWeight(codes, grid, scheme, kept, steps), loss, factor.damp)


class Drift:
    """How far what a matrix reads has drifted from what the float model reads in its place; streamed like a moment."""

    def __init__(self, channels: int) -> None:
        self._total = torch.zeros(channels, channels, dtype=torch.float64)

    def update(self, x: Tensor, in_float: Tensor) -> None:
        """Add tokens ``x (..., C)``, and what the float model reads for them."""
        x, in_float = (part.detach().reshape(-1, part.shape[-1]) for part in (x, in_float))
        self._total = self._total.to(x.device)
        for seen, missing in zip(torch.split(x, 512), torch.split(in_float - x, 512), strict=True):
            self._total += seen.T @ missing

    def missing(self, moment: SecondMoment, *, damp: float = 0.01) -> Tensor:
        """Return what is to be added to ``x`` to come nearest to the float model's input, as a matrix (C, C) on ``x``.

        Least squares, damped as the Hessian is (Li et al., arXiv 2504.02692, which goes all the way, column by column).
        """
        h = moment.mean
        h.diagonal().add_(damp * h.diagonal().mean())
        found: Tensor = torch.linalg.solve(h, self._total / moment.tokens)
        return found


def follow(w: Tensor, missing: Tensor, share: float) -> Tensor:
    """Return the matrix (O, I) that makes of ``x`` the ``share`` of what ``w`` makes of the float model's input.

    ``missing`` is of :meth:`Drift.missing`; matrices that read the same share it. With 1, little text and many channels
    this fits the text rather than the drift.
    """
    followed: Tensor = torch.addmm(w.double(), w.double(), missing.T, alpha=share).to(w.dtype)
    return followed


class _OnGrid:
    """Rounds to grids that are fitted as the columns come, or to those of the matrix as it was."""

    def __init__(self, scheme: WeightScheme, steps: Tensor | None, mse: bool, importance: Tensor) -> None:
        self._scheme, self._mse, self._steps, self._importance = scheme, mse, steps, importance
        self._one_group = scheme.model_copy(update={"group_size": None})
        self._most_steps = None if steps is None else steps.tolist()
        self._grids: list[Grid] = []
        self._group_of: list[int] | None = None

    def keep(self, w: Tensor, order: Tensor) -> None:
        """Take the grids of ``w`` (O, I), whose inputs will come in this order, once and for all."""
        size = self._scheme.group_size or w.shape[1]
        self._group_of = (order // size).tolist()
        for places in torch.split(order.argsort(), size):
            self._grids.append(self._fitted(w[:, order[places]], places))

    def fit(self, columns: Tensor, first: int) -> None:
        if self._group_of is None:
            self._grids.append(self._fitted(columns.T, torch.arange(first, first + len(columns))))
            self._take(self._grids[-1])

    def round(self, column: Tensor, index: int) -> Tensor:
        if self._group_of is not None:
            self._take(self._grids[self._group_of[index]])
        code = (column / self._scale).round_()
        if self._scheme.type == "ternary":
            steps = 1 if self._most_steps is None else self._most_steps[index]
            return code.clamp_(-steps, steps).mul_(self._scale)
        return code.clamp_(self._least, self._most).mul_(self._scale)

    def grid(self) -> Grid:
        """Return the grids of all groups."""
        return Grid(*(torch.cat(parts, 1) for parts in zip(*self._grids, strict=True)))

    def _fitted(self, group: Tensor, places: Tensor) -> Grid:
        """Return the grid of a ``group`` (O, n) of columns, which have these places in the order of the solution."""
        if self._scheme.type == "uniform":
            return weight_grid(group, self._one_group, with_zero=True, mse=self._mse)
        steps = 1 if self._steps is None else self._steps[places]
        scale, zero = ternary_grid(group, steps, self._one_group, importance=self._importance[places])
        short = scale.half().to(scale.dtype)  # stored in 16 bits, and what that loses is made up for as well
        return Grid(torch.where((short / scale - 1).abs() < 1e-3, short, scale), zero)

    def _take(self, grid: Grid) -> None:
        self._scale, zero = (part.squeeze(1) for part in grid)
        self._least, self._most = -zero, 2**self._scheme.bits - 1 - zero
