"""The fast form of ``gif_linear`` in plain PyTorch: fused quantisation, and products by oneDNN where that is faster.

``fake`` is one product. ``spike`` is one more for the salient channels alone, whose steps are rows of one matrix:
ordinary channels have all said what they have to say after the first step. ``binary`` does the same once per sub-step,
until nobody has anything left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spiking_lm.gif import encode, gif_quantize, grids, limits, split_steps
from spiking_lm.kernels.dense import linear
from spiking_lm.kernels.products import product
from spiking_lm.kernels.reference import compute_dtype
from spiking_lm.schemes import OFF, ActivationScheme

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def supports_gif_linear(x: Tensor, *_: object, **__: object) -> bool | str:
    """Say whether :func:`gif_linear` takes these inputs, or why not."""
    return x.dtype in _DTYPES or f"{x.dtype} is not one of float16, bfloat16, float32, float64"


def gif_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    salient: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    mode: str = "fake",
) -> Tensor:
    """Multiply Generalized Integrate-and-Fire spikes with a matrix; see :func:`spiking_lm.kernels.gif_linear`."""
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    simulated = mode != "fake" and scheme.bits < OFF
    fake = product_of(gif_quantize(x, scheme, salient, scale), weight, bias) if recorded or not simulated else None
    if not simulated:
        assert fake is not None
        return fake
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
        w = weight.to(rows.dtype)
        out = _spiking(rows, w, scheme, salient, scale, binary=mode == "binary")
        if bias is not None:
            out += bias
        out = out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)
    return out if fake is None else out + (fake - fake.detach())  # the gradient is that of fake


def product_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x (..., C) @ weight (O, C).T + bias`` in the type of ``x``, by the faster library."""
    if torch.is_autocast_enabled(x.device.type) or x.dtype != weight.dtype:
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return linear(x, weight, bias)
    out = product(x.reshape(-1, x.shape[-1]), weight.t())
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], weight.shape[0])


def _spiking(
    x: Tensor,
    weight: Tensor,
    scheme: ActivationScheme,
    salient: Tensor | None,
    scale: Tensor | None,
    *,
    binary: bool,
) -> Tensor:
    """Return what the spikes of ``x (N, C)`` and their zero points add up to, ``(N, O)``."""
    static, between = scale is not None, limits(x, scale)
    grid, fine = grids(between, scheme, salient)
    codes, zero = encode(x, grid, scheme, static=static)
    if salient is None:
        return _scaled(_added([codes], weight, binary), weight, grid.scale, zero)
    out = _scaled(_added([codes.masked_fill_(salient, 0)], weight, binary), weight * ~salient, grid.scale, zero)
    fine_codes, fine_zero = encode(x[:, salient], fine, scheme, static=static)
    fine_weight = weight[:, salient]
    steps = split_steps(fine_codes, scheme)
    return out.add_(_scaled(_added(steps, fine_weight, binary), fine_weight, fine.scale, fine_zero))


def _added(steps: list[Tensor], weight: Tensor, binary: bool) -> Tensor:
    """Return the sum of ``steps (N, C) @ weight (O, C).T``, or of the products of their sub-steps of one spike each."""
    out = weight.new_zeros((steps[0].shape[0], weight.shape[0]))
    for spikes in steps:
        if not binary:
            out += product(spikes, weight.t())
            continue
        size, sign, k = spikes.abs(), spikes.sign(), 1
        while (emitting := size >= k).any():
            out += product(sign * emitting, weight.t())
            k += 1
    return out


def _scaled(out: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return scale (out - zero rowsum(weight)); ``zero`` is 0 for all tokens unless spikes are unsigned."""
    if zero.any():
        out.addcmul_(zero, weight.sum(1), value=-1)
    return out.mul_(scale)
