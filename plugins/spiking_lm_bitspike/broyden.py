"""Broyden's method for systems of equations, each row of a batch on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MOST_STEPS = 60
"""Also the rank to which an inverse Jacobian is corrected."""


class Root(NamedTuple):
    """What a solver found."""

    x: Tensor
    """(B, ...), of all iterates the one with the least residual, in each row."""
    residual: Tensor
    """(B,), the norm of what is left of the equations there."""
    steps: int


@torch.no_grad()
def find_root(
    function: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float | None = None, most: int = MOST_STEPS
) -> Root:
    """Return where ``function (B, ...) -> (B, ...)``, whose rows do not depend on each other, is zero.

    Broyden's good method from ``start``: the first step takes the Jacobian for -1, as fits ``f(x) - x``, and each step
    corrects the inverse by one rank, so that it maps the last change of values to the last change of x. A row is done
    when its residual is at most ``tolerance`` times the root of its size (None: 2e-10, or 2e-6 in single precision);
    it is not moved any further.
    """
    if tolerance is None:
        tolerance = 2e-10 if start.dtype == torch.float64 else 2e-6
    rows = start.shape[0]
    x = start.flatten(1)
    goal = tolerance * x.shape[1] ** 0.5
    value = function(start).flatten(1)
    best, residual = x, value.norm(dim=1)
    # The inverse Jacobian is -1 + sum over k of left[k] right[k]^T.
    left, right = x.new_zeros(rows, most, x.shape[1]), x.new_zeros(rows, most, x.shape[1])
    step = 0
    while step < most and bool((residual > goal).any()):
        moving = (residual > goal)[:, None]
        inverse = _times(left[:, :step], right[:, :step], value)
        change = torch.where(moving, -inverse, 0)
        x = x + change
        new = torch.where(moving, function(x.view_as(start)).flatten(1), value)
        difference = new - value
        mapped = _times(left[:, :step], right[:, :step], difference)
        adjoint = _times(right[:, :step], left[:, :step], change)
        scale = (change * mapped).sum(1, keepdim=True)
        usable = moving & (scale.abs() > torch.finfo(x.dtype).tiny)
        left[:, step] = torch.where(usable, (change - mapped) / torch.where(usable, scale, 1), 0)
        right[:, step] = torch.where(usable, adjoint, 0)
        value = new
        norm = value.norm(dim=1)
        better = norm < residual
        best, residual = torch.where(better[:, None], x, best), torch.where(better, norm, residual)
        step += 1
    return Root(best.view_as(start), residual, step)


def _times(left: Tensor, right: Tensor, vector: Tensor) -> Tensor:
    """Return ``(-1 + sum_k left[k] right[k]^T) vector`` for each row: factors (B, K, n), vectors (B, n)."""
    weights = torch.einsum("bkn,bn->bk", right, vector)
    return torch.einsum("bkn,bk->bn", left, weights) - vector
