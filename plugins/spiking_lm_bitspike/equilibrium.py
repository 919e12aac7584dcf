"""The equilibrium of spiking populations: what their rates would settle at, and gradients through it.

A population that is charged by I per step, without leak, settles at the rate ``clamp(I / vth, 0, 1)``. With that in
place of spikes, blocks are an ordinary network, the clamp network. Without feedback its Jacobian with regard to its own
state is zero, and the gradient of the implicit function theorem *is* that of ordinary backpropagation; with feedback
the state is the root of an equation, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from spiking_lm_bitspike.blocks import Batch, Chain, Reading
from spiking_lm_bitspike.broyden import find_root
from spiking_lm_bitspike.config import BitspikeConfig


class Clamp(Reading):
    """Reads populations as rates ``(B, S, N)`` of the clamp network, some of them replaced.

    ``rates`` replace those of populations that they name; ``rounding`` replaces all by what T steps can have. Gradients
    are those of the clamp network all the same.
    """

    def __init__(
        self, config: BitspikeConfig, batch: Batch, *, rates: Mapping[str, Tensor] | None = None, rounding: bool = False
    ) -> None:
        super().__init__(batch.masks, {name: spikes.mean(0) for name, spikes in batch.earlier.items()})
        self.config, self.rates, self.rounding = config, rates or {}, rounding
        self.values: dict[str, Tensor] = {}
        """Of every population, as far as it has been read."""
        self.scores: list[Tensor] = []
        self.residual: Tensor | None = None
        """(B,), with feedback: how far the populations are from their equilibrium."""

    def fire(self, name: str, current: Tensor, *, averaged: bool = False) -> Tensor:
        config = self.config
        value = (current / config.vth).clamp(0, 1)
        if self.rounding:
            steps = config.steps
            rounded = (value.detach() * steps + config.charge).floor_().clamp_(max=steps).div_(steps)
            value = replaced(value, rounded, config.replace.share)
        elif name in self.rates:
            value = replaced(value, self.rates[name], config.replace.share)
        self.values[name] = value
        return value


def clamp_network(
    chain: Chain,
    config: BitspikeConfig,
    batch: Batch,
    *,
    rates: Mapping[str, Tensor] | None = None,
    rounding: bool = False,
) -> Clamp:
    """Return what the clamp network makes of a batch: one pass, or with feedback its equilibrium."""
    read = Clamp(config, batch, rates=rates, rounding=rounding)
    last: Tensor | None = None
    if chain.feedback is not None:
        last, read.residual = fixed_point(
            lambda z: cast(Tensor, chain(batch.charge, batch.mask, read, z)), torch.zeros_like(batch.charge)
        )
        read.scores.clear()
    chain(batch.charge, batch.mask, read, last)
    return read


def replaced(value: Tensor, rate: Tensor, share: float) -> Tensor:
    """Return ``value`` moved by ``share`` towards ``rate``, with the gradient of ``value``."""
    return value + share * (rate.to(value.dtype) - value).detach()


def fixed_point(function: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``z = function(z)``, found from ``start (B, ...)``, and the norm ``(B,)`` of what ``z`` is off.

    Rows do not depend on each other. Gradients reach everything that ``function`` computes with: for the gradient g of
    z they are those of ``function`` at v, where v = J^T v + g and J is its Jacobian.
    """
    root = find_root(lambda z: function(z) - z, start.detach())
    if not torch.is_grad_enabled():
        return root.x, root.residual
    z = root.x.detach().requires_grad_()
    value = function(z)
    if not value.requires_grad:
        return value, root.residual

    def adjoint(gradient: Tensor) -> Tensor:
        def excess(v: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(value, z, v, retain_graph=True)
            return back + gradient - v

        return find_root(excess, gradient).x

    result = value.clone()
    result.register_hook(adjoint)  # type: ignore[no-untyped-call]
    return result, root.residual
