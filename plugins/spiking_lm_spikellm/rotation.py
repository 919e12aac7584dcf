"""Rotations that spread outliers over all channels and change nothing in float (QuaRot, arXiv 2404.00456).

A block reads and writes the residual stream x; with R orthogonal it reads and writes x R as well, if its matrices hold
R. So the few channels of a Llama that are a hundred times the others are shared out before few bits are all there is:

===================  ==========================  ================================================================
what                 rotated by                  where
===================  ==========================  ================================================================
residual stream      signs, Hadamard             in the matrices; on states behind the embedding, before the last norm
values               Hadamard of a head          in v_proj and o_proj
what o_proj reads    and across the heads        on activations; its inverse is in o_proj
what down_proj reads  Hadamard                   on activations; its inverse is in down_proj
queries and keys     Hadamard of a head          on activations, after the rotary positions; attention does not notice
===================  ==========================  ================================================================

Gains of the norms go into the matrices that read them. Embedding, last norm and head stay as they are, so that a tied
embedding stays tied and keeps its precision: turning a token's state twice costs less than a table of its own for the
head. A rotation is a Kronecker product of two small matrices, and never written out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from spiking_lm_spikellm.config import SpikeLLMConfig

_DENSE = 128
"""Up to this width a rotation is one matrix."""


def rotate(x: Tensor) -> Tensor:
    """Return the rows of ``x (..., n)`` times R, an orthogonal matrix that follows from n.

    R is the Kronecker product of two Hadamard matrices where there are some of the size, as for 576 = 24 x 24 and 1536
    = 32 x 48; else of Hartley ones, as for 9 heads, no element of which exceeds sqrt(2 / n).
    """
    return _kronecker(x, *_factors(x.shape[-1], x.dtype, x.device))


def rotate_back(x: Tensor) -> Tensor:
    """Return the rows of ``x (..., n)`` times R^T: what :func:`rotate` made ``x`` of."""
    left, right = _factors(x.shape[-1], x.dtype, x.device)
    return _kronecker(x, left.mT, right.mT)


def operations(n: int) -> int:
    """Return the multiplications and additions of :func:`rotate` on one row of n."""
    left, right = sizes(n)
    return 2 * n * (left * (left > 1) + right * (right > 1))


class ResidualRotation(nn.Module):
    """The rotation of the residual stream, which has random signs: without them a common offset would pile up."""

    signs: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("signs", torch.ones(n, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """Return what stands for the states ``x (..., n)`` in the rotated blocks."""
        return rotate(x * self.signs)

    def inverse(self, x: Tensor) -> Tensor:
        """Return the states ``x (..., n)`` as they would be without a rotation."""
        return rotate_back(x) * self.signs


class Rotation:
    """The rotations of a whole model, with random signs on the residual stream by ``seed``."""

    def __init__(self, n_embd: int, seed: int = 0) -> None:
        self.residual = ResidualRotation(n_embd)
        drawn = torch.randint(0, 2, (n_embd,), generator=torch.Generator().manual_seed(seed))
        self.residual.signs.copy_(2 * drawn - 1)

    def block(self, params: Mapping[str, Tensor], config: SpikeLLMConfig) -> dict[str, Tensor]:
        """Return the parameters of a block, names as below ``model.layers.i``, with the rotations in them, float32."""
        exact = {name: tensor.double() for name, tensor in params.items()}
        residual, size = self.residual.forward, config.head_size
        for norm, readers in _READERS.items():
            gain = exact[f"{norm}.weight"]
            exact[f"{norm}.weight"] = torch.ones_like(gain)
            for name in readers:
                exact[f"{name}.weight"] = residual(exact[f"{name}.weight"] * gain)
        for name in ("self_attn.v_proj.weight", "self_attn.v_proj.bias"):
            if name in exact:
                by_head = exact[name].view(config.kv_heads, size, -1)
                exact[name] = rotate(by_head.mT).mT.reshape(exact[name].shape)
        output = exact["self_attn.o_proj.weight"].view(-1, config.n_head, size)
        output = rotate(rotate(output).mT).mT.flatten(1)
        exact["self_attn.o_proj.weight"] = residual(output.mT).mT
        exact["mlp.down_proj.weight"] = residual(rotate(exact["mlp.down_proj.weight"]).mT).mT
        return {name: tensor.float().contiguous() for name, tensor in exact.items()}

    def ends(self, ends: Mapping[str, Tensor], config: SpikeLLMConfig) -> dict[str, Tensor]:
        """Return what a model has beside its blocks: ``ends`` as they are, and the signs of the residual stream."""
        return {**ends, "model.rotation.signs": self.residual.signs}


_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""What reads the output of each norm."""


@lru_cache
def sizes(n: int) -> tuple[int, int]:
    """Return the sizes of the two factors of a rotation of ``n`` channels."""
    if n <= _DENSE:
        return 1, n

    def cost(left: int) -> int:
        right = n // left
        return (left + right) * (1 if _has_hadamard(left) and _has_hadamard(right) else 2)

    left = min((left for left in range(1, int(n**0.5) + 1) if n % left == 0), key=cost)
    return left, n // left


@lru_cache(maxsize=64)
def _factors(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    left, right = (orthogonal(size).to(device, dtype) for size in sizes(n))
    return left, right


def _kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the rows of ``x (..., a b)`` times the Kronecker product of ``left (a, a)`` and ``right (b, b)``."""
    with torch.autocast(x.device.type, enabled=False):  # the residual stream keeps its precision
        if len(left) == 1:
            return x @ right
        y = left.mT @ (x.reshape(*x.shape[:-1], len(left), len(right)) @ right)
        return y.flatten(-2)


def orthogonal(n: int) -> Tensor:
    """Return an orthogonal matrix (n, n) of nearly equal magnitudes, float64: Hadamard's, or else Hartley's."""
    signs = hadamard(n)
    if signs is not None:
        return signs.double() / math.sqrt(n)
    k = torch.arange(n)
    angle = 2 * torch.pi * (k[:, None] * k % n).double() / n
    return (angle.cos() + angle.sin()) / math.sqrt(n)


def hadamard(n: int) -> Tensor | None:
    """Return a matrix (n, n) of -1 and 1 with orthogonal rows, int8, by Paley or Sylvester; None if neither has one."""
    if not _has_hadamard(n):
        return None
    if n <= 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)[:n, :n]
    for q in (n - 1, n // 2 - 1):
        if _is_paley(n, q):
            return _paley(q)
    half = hadamard(n // 2)
    assert half is not None
    return torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), half)


@lru_cache
def _has_hadamard(n: int) -> bool:
    if n <= 2:
        return True
    return n % 4 == 0 and (_is_paley(n, n - 1) or _is_paley(n, n // 2 - 1) or _has_hadamard(n // 2))


def _is_paley(n: int, q: int) -> bool:
    """Return whether the prime q gives a matrix of order n: q + 1 where 4 divides that, else 2 (q + 1)."""
    return q > 1 and n == (q + 1) * (1 if q % 4 == 3 else 2) and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley(q: int) -> Tensor:
    """Return Paley's matrix of an odd prime: of order q + 1 where 4 divides that, and twice so much where not."""
    squares = torch.zeros(q, dtype=torch.int8).sub_(1)
    squares[torch.arange(q) ** 2 % q] = 1
    squares[0] = 0
    k = torch.arange(q)
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = squares[(k[:, None] - k) % q]
    identity = torch.eye(q + 1, dtype=torch.int8)
    if q % 4 == 3:
        conference[1:, 0] = -1
        return conference + identity
    plus, minus = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.int8)
    return torch.kron(conference, plus) + torch.kron(identity, minus)
