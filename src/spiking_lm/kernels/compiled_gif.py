"""The compiled form of ``gif_linear``: quantised in one pass over the charges, multiplied by the library.

A token's range, its grid and its values are found while its channels are in the cache, salient ones in the same loop as
the others; so are the gradients. The product stays with oneDNN, which leaves nothing to be gained at 200 GFLOP/s.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_lm.gif import SCALE_FLOOR, levels
from spiking_lm.kernels.compiled import fresh, memory, nothing, run, takes
from spiking_lm.kernels.reference import compute_dtype
from spiking_lm.kernels.torch_gif import product_of
from spiking_lm.schemes import OFF, ActivationScheme


@lru_cache(maxsize=1)
def _jit() -> ModuleType:
    from spiking_lm.kernels import jit_gif

    return jit_gif


def supports_gif_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    salient: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    mode: str = "fake",
) -> bool | str:
    """Say whether :func:`gif_linear` takes these inputs, or why not."""
    if mode != "fake" or scheme.bits >= OFF:
        return "only mode='fake' with fewer than 16 bits is compiled: the others are not there for speed"
    # A single token is little work, but its product is not, and these are one call instead of a dozen.
    return takes(x.numel() + weight.numel() // 4, x, weight, bias, scale)


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
    if torch.is_grad_enabled() and x.requires_grad:
        values: Tensor = _Quantize.apply(x, scheme, salient, scale)
    else:
        values = _quantized(x, scheme, salient, scale)
    return product_of(values, weight, bias)


def _arguments(x: Tensor, scheme: ActivationScheme, salient: Tensor | None, scale: Tensor | None) -> tuple[Any, ...]:
    """Return ``x`` as rows and all that the loops want to know beside gradients and results."""
    dtype = compute_dtype(x)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = rows if rows.dtype == dtype else rows.to(dtype)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    numbers = _numbers(scheme, salient is not None, dtype)
    limits = nothing(dtype) if scale is None else scale.detach().to(dtype).numpy()
    mask = nothing(torch.uint8) if salient is None else salient.contiguous().view(torch.uint8).numpy()
    return rows.shape[1], memory(rows), rows.stride(0), mask, limits, *numbers


@lru_cache(maxsize=64)
def _numbers(scheme: ActivationScheme, salient: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    tops = torch.tensor([levels(scheme), levels(scheme, salient=salient)], dtype=dtype).numpy()
    floor, tiny = torch.tensor([SCALE_FLOOR, torch.finfo(dtype).tiny], dtype=dtype).numpy()
    return tops, floor, tiny


def _quantized(x: Tensor, scheme: ActivationScheme, salient: Tensor | None, scale: Tensor | None) -> Tensor:
    args = _arguments(x, scheme, salient, scale)
    out = fresh(torch.empty(x.shape, dtype=compute_dtype(x)))
    run(_jit().quantize, x.numel() // x.shape[-1], x.numel(), *args, memory(out))
    return out if out.dtype == x.dtype else out.to(x.dtype)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: ActivationScheme, salient: Tensor | None, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, salient, scale)
        ctx.scheme = scheme
        return _quantized(x, scheme, salient, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, salient, scale = ctx.saved_tensors
        args = _arguments(x, ctx.scheme, salient, scale)
        g = grads[0].to(compute_dtype(x)).contiguous()
        gx = fresh(torch.empty(x.shape, dtype=g.dtype))
        run(_jit().pull_back, x.numel() // x.shape[-1], 2 * x.numel(), *args, memory(g), memory(gx))
        return gx.to(x.dtype), None, None, None
