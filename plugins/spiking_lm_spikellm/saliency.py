"""Optimal Brain Spiking: which channels gain most from more spike steps (Xing et al., arXiv 2407.04752).

The paper's saliency of an input channel is a mean over tokens of x o (x W^T W). Written out it needs no tokens, only
their second moment C = E[x x^T], which the solver of the weights needs as well; so calibration text streams by once,
in whatever batches, and nothing of size (tokens, channels) is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from spiking_lm.errors import DivergedError, UsageError

_CHUNK = 512
"""Tokens whose products are summed in the tokens' own precision before they join the float64 sum."""


class SecondMoment:
    """E[x x^T] of what a matrix reads, streamed and summed in float64; matrices that read the same share one."""

    def __init__(self, channels: int) -> None:
        self.total = torch.zeros(channels, channels, dtype=torch.float64)
        """Sum of x x^T over all tokens, (C, C)."""
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add the tokens of ``x (..., C)``."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.total = self.total.to(x.device)
        for chunk in torch.split(x, _CHUNK):
            self.total += chunk.T @ chunk
        self.tokens += x.shape[0]

    @property
    def mean(self) -> Tensor:
        """E[x x^T], (C, C) float64. Raises: UsageError before the first token."""
        if not self.tokens:
            raise UsageError("no token has been seen: the calibration text is empty")
        return self.total / self.tokens

    @property
    def hessian(self) -> Tensor:
        """2 E[x x^T]: second derivative of a token's mean squared output error by the weights of a row."""
        return self.mean.mul_(2)


def activation_saliency(weights: Sequence[Tensor], moment: SecondMoment) -> Tensor:
    """Return s_c = sum_j (W^T W)_cj E[x x^T]_cj, (C,) float64: what quantising channel c costs.

    ``weights`` are one or more matrices (O, C) that read the same quantised ``x``; their costs add up. Values may be
    negative: errors of a channel can cancel those of others.
    """
    mean = moment.mean
    return torch.stack([((w := weight.detach().to(mean)) @ mean * w).sum(0) for weight in weights]).sum(0)


class CacheSaliency:
    """Saliency of the channels of keys and values, streamed; heads of queries that share a key add up.

    Per sequence of S tokens, keys cost diag(Q^T Q K^T K) / S and values diag(V^T P^T P V) / S; the latter is the mean
    square of what attention returns, so that the probabilities P need not be kept. All after the rotary positions.
    """

    def __init__(self, kv_heads: int, head_size: int) -> None:
        self._keys = torch.zeros(kv_heads, head_size, dtype=torch.float64)
        self._values = torch.zeros(kv_heads, head_size, dtype=torch.float64)
        self._sequences = 0

    def update(self, queries: Tensor, keys: Tensor, attended: Tensor) -> None:
        """Add whole sequences: ``queries`` and ``attended (B, H, S, d)``, ``keys (B, KV, S, d)``.

        ``attended`` is probabilities times values, before the output projection.
        """
        kv_heads, length = keys.shape[1:3]
        q, k, o = (x.detach().double() for x in (queries, keys, attended))
        q, o = (x.reshape(len(x), kv_heads, -1, x.shape[-1]) for x in (q, o))  # heads of a group count as more tokens
        self._keys = self._keys.to(k.device) + ((q.mT @ q) * (k.mT @ k)).sum((0, -1)) / length
        self._values = self._values.to(k.device) + o.square().sum((0, 2)) / length
        self._sequences += len(keys)

    @property
    def keys(self) -> Tensor:
        """Saliency of the keys' channels, (KV, d) float64."""
        return self._keys / max(self._sequences, 1)

    @property
    def values(self) -> Tensor:
        """Saliency of the values' channels, (KV, d) float64."""
        return self._values / max(self._sequences, 1)


def choose(
    saliency: Tensor,
    rate: float,
    *,
    choice: Literal["obs", "random"] = "obs",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mask of the salient channels, bool of the shape of ``saliency``: True for the share ``rate`` of most.

    Of C channels, floor((1 - rate) C) stay ordinary, as published, where a rate so high that none did made none
    salient instead. The channels of all heads compete. ``random`` draws as many by ``generator``, as a baseline.
    Raises: DivergedError when a saliency is not finite.
    """
    flat = saliency.flatten()
    if not torch.isfinite(flat).all():
        raise DivergedError(
            f"saliency: {int((~torch.isfinite(flat)).sum())} of {flat.numel()} channels are not finite",
            hint="the calibration text overflows the model: try another text, or float32",
        )
    ordinary = int((1 - rate) * flat.numel() + 1e-9)
    if choice == "random":
        order = torch.randperm(flat.numel(), generator=generator).to(flat.device)
    else:
        order = flat.argsort(stable=True)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order[ordinary:]] = True
    return mask.view(saliency.shape)


def weight_saliency(w: Tensor, factor: Tensor) -> Tensor:
    """Return rho_ij = w_ij^2 / U_jj^2, (O, I): the loss when weight ij goes and later columns make up for it.

    ``factor`` is U (I, I), the upper Cholesky factor of the inverse Hessian, in the order of the columns of ``w``.
    """
    return (w / factor.diagonal().to(w)).square()
