"""The ops as single nodes of a graph: ``torch.ops.spiking_lm.<op>``, for torch.compile, torch.export and fake tensors.

A tracer must not look into an op: it would find a loop over time, unrolled, or compiled code that it cannot read. So
each op is declared here with its schema, with the shapes of what it returns (the fake kernel), and with its gradient,
which is a second node. What runs behind either is what :mod:`spiking_lm.kernels.dispatch` chooses when the graph runs,
on any device and from any plugin.

The way back knows the inputs alone: it runs the op once more, recording, and asks that implementation for its gradient.
So a traced training step does each op's forward pass twice, and keeps nothing for it in between. Under autocast the ops
see what they are given, and their own products stay in that precision.

Only :mod:`spiking_lm.kernels.ops` calls this module, and only while something is traced: calls outside go past it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.library import custom_op

from spiking_lm.config import SurrogateConfig
from spiking_lm.interfaces import LMOutput
from spiking_lm.kernels.dispatch import call
from spiking_lm.kernels.reference import WKVState, compute_dtype
from spiking_lm.schemes import ActivationScheme, SalientChannels

Outputs = tuple[Tensor, ...]

torch.export.register_dataclass(LMOutput)  # what a model returns is then what an exported one returns


@contextmanager
def _recording() -> Iterator[None]:
    """Record gradients within the kernel of an op, which torch calls where that is switched off."""
    keys, let_through = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with torch.enable_grad(), let_through(keys.AutogradFunctionality, False), let_through(keys.ADInplaceOrView, False):
        yield


def _as_promised(found: Sequence[Tensor], promised: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """Return what was found in the layout that the fake kernel promised, and in memory that no input shares."""
    taken = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    results = []
    for out, like in zip(found, promised, strict=True):
        place = out.untyped_storage().data_ptr()
        fits = place not in taken and out.stride() == like.stride() and out.dtype == like.dtype
        results.append(out.detach() if fits else like.copy_(out))
        taken.add(results[-1].untyped_storage().data_ptr())
    return results


def declare(
    name: str, tensors: str, options: str, outputs: int, run: Callable[..., Outputs], fake: Callable[..., Outputs]
) -> Callable[..., Any]:
    """Make ``spiking_lm::name`` of ``run``, which calls the op, and of ``fake``, which returns empty results.

    ``tensors`` and ``options`` are the schema's arguments, tensors first; both functions take all of them in that
    order, and return so many tensors.
    """
    count, arguments = tensors.count(",") + 1, f"{tensors}, {options}".rstrip(", ")

    def forward(*args: Any) -> Any:
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            found = run(*args)
        results = _as_promised(found, fake(*args), args)
        return results[0] if outputs == 1 else tuple(results)

    def gradients(grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        given = args[:count]
        with torch.autocast(args[0].device.type, enabled=False), _recording():
            inputs = [t if t is None else t.detach() for t in given]
            wanted = [t.requires_grad_() for t, need in zip(inputs, needs, strict=True) if need and t is not None]
            pairs = [p for p in zip(run(*inputs, *args[count:]), grads, strict=True) if p[0].requires_grad]
            leaving, arriving = zip(*pairs, strict=True) if pairs else ((), ())
            found = torch.autograd.grad(leaving, wanted, arriving, allow_unused=True) if pairs else [None] * len(wanted)
        zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]
        return _as_promised(zeros, [torch.empty_like(t) for t in wanted], (*args, *grads))

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:]

    def backward(ctx: Any, *grads: Tensor) -> Any:
        given = ctx.saved_tensors
        needs = [need and t is not None for need, t in zip(ctx.needs_input_grad[:count], given, strict=True)]
        found = iter(back(list(grads), needs, *given, *ctx.options))
        return (*(next(found) if need else None for need in needs), *(None for _ in ctx.options))

    returned = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    op = custom_op(f"spiking_lm::{name}", forward, mutates_args=(), schema=f"({arguments}) -> {returned}")
    back = custom_op(
        f"spiking_lm::{name}_backward",
        gradients,
        mutates_args=(),
        schema=f"(Tensor[] grads, bool[] needs, {arguments}) -> Tensor[]",
    )

    def fake_forward(*args: Any) -> Any:
        results = fake(*args)
        return results[0] if outputs == 1 else results

    def fake_backward(grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        return [torch.empty_like(t) for t, need in zip(args[:count], needs, strict=True) if need]

    op.register_fake(fake_forward)
    back.register_fake(fake_backward)
    op.register_autograd(backward, setup_context=setup_context)
    return op


# -- lif_scan ----------------------------------------------------------------------------------------------------------


def _run_lif(x: Tensor, v0: Tensor | None, *options: Any) -> Outputs:
    beta, gain, threshold, v_reset, compare, surrogate, alpha, detach_reset, final_only = options
    return cast(
        "Outputs",
        call(
            "lif_scan",
            x,
            v0,
            beta=beta,
            gain=gain,
            threshold=threshold,
            v_reset=v_reset,
            compare=compare,
            surrogate=_surrogate(surrogate, alpha),
            detach_reset=detach_reset,
            final_only=final_only,
        ),
    )


@lru_cache(maxsize=64)
def _surrogate(name: Any, alpha: float) -> SurrogateConfig:
    return SurrogateConfig(name=name, alpha=alpha)


def _fake_lif(x: Tensor, v0: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    state = compute_dtype(x, v0)
    v = x.new_empty(x.shape[1:], dtype=state) if options[-1] else torch.empty_like(x, dtype=state)
    return torch.empty_like(x), v


_lif_scan = declare(
    "lif_scan",
    "Tensor x, Tensor? v0",
    "float beta, float gain, float threshold, float? v_reset, str compare, str surrogate, float alpha, "
    "bool detach_reset, bool final_only",
    2,
    _run_lif,
    _fake_lif,
)


def lif_scan(
    x: Tensor,
    v0: Tensor | None,
    beta: float,
    gain: float,
    threshold: float,
    v_reset: float | None,
    compare: str,
    surrogate: SurrogateConfig,
    detach_reset: bool,
    final_only: bool,
) -> tuple[Tensor, Tensor]:
    """Be :func:`spiking_lm.kernels.lif_scan` in a graph."""
    # Whole numbers may be given where the schema has real ones.
    numbers = float(beta), float(gain), float(threshold), None if v_reset is None else float(v_reset)
    spikes, v = _lif_scan(x, v0, *numbers, compare, surrogate.name, float(surrogate.alpha), detach_reset, final_only)
    return spikes, v


# -- wkv ---------------------------------------------------------------------------------------------------------------


def _run_wkv(decay: Tensor, first: Tensor, k: Tensor, v: Tensor, *state: Any) -> Outputs:
    y, after = call("wkv", decay, first, k, v, None if state[0] is None else state)
    return (y, *after)


def _fake_wkv(decay: Tensor, first: Tensor, k: Tensor, v: Tensor, *state: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, q, o = (k.new_empty((k.shape[0], k.shape[2]), dtype=compute_dtype(k, v)) for _ in range(3))
    return torch.empty_like(v), p, q, o


_wkv = declare(
    "wkv",
    "Tensor time_decay, Tensor time_first, Tensor k, Tensor v, Tensor? p, Tensor? q, Tensor? o",
    "",
    4,
    _run_wkv,
    _fake_wkv,
)


def wkv(
    time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None
) -> tuple[Tensor, WKVState]:
    """Be :func:`spiking_lm.kernels.wkv` in a graph."""
    y, p, q, o = _wkv(time_decay, time_first, k, v, *((None, None, None) if state is None else state))
    return y, (p, q, o)


# -- egru_scan ---------------------------------------------------------------------------------------------------------


def _run_egru(*args: Any) -> Outputs:
    *given, keep, gamma, epsilon, zoneout = args
    return cast("Outputs", call("egru_scan", *given, gamma=gamma, epsilon=epsilon, keep=keep, zoneout=zoneout))


def _fake_egru(a: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(a, *args[:5])
    y, c, o = (a.new_empty((*a.shape[:2], args[2].shape[0]), dtype=dtype) for _ in range(3))
    return y, c, o


_egru_scan = declare(
    "egru_scan",
    "Tensor a, Tensor recurrent_kernel, Tensor recurrent_bias, Tensor threshold, Tensor? c0, Tensor? y0, Tensor? keep",
    "float gamma, float epsilon, float zoneout",
    3,
    _run_egru,
    _fake_egru,
)


def egru_scan(*tensors: Tensor | None, gamma: float, epsilon: float, zoneout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Be :func:`spiking_lm.kernels.egru_scan` in a graph; the last of the tensors is ``keep``."""
    y, c, o = _egru_scan(*tensors, float(gamma), float(epsilon), float(zoneout))
    return y, c, o


# -- elastic_scan ------------------------------------------------------------------------------------------------------


def _run_elastic(*args: Any) -> Outputs:
    x, alpha, carried, beta, bits, reset, final = args
    spikes, after = call("elastic_scan", x, alpha, carried, beta=beta, bits=bits, reset=reset, final=final)
    return spikes, spikes.new_empty(0) if after is None else after


def _fake_elastic(x: Tensor, alpha: Tensor, carried: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    final = options[-1]
    after = x.new_empty(x.shape[1:], dtype=compute_dtype(x, alpha, carried)) if final else x.new_empty(0)
    return torch.empty_like(x), after


_elastic_scan = declare(
    "elastic_scan",
    "Tensor x, Tensor alpha, Tensor? carried",
    "float beta, int bits, str reset, bool final",
    2,
    _run_elastic,
    _fake_elastic,
)


def elastic_scan(
    x: Tensor, alpha: Tensor, carried: Tensor | None, beta: float, bits: int, reset: str, final: bool
) -> tuple[Tensor, Tensor | None]:
    """Be :func:`spiking_lm.kernels.elastic_scan` in a graph."""
    spikes, after = _elastic_scan(x, alpha, carried, float(beta), bits, reset, final)
    return spikes, after if final else None


# -- attention ---------------------------------------------------------------------------------------------------------


def _run_attention(*args: Any) -> Outputs:
    *given, bits = args
    return (call("attention", *given, bits=bits),)


def _fake_attention(q: Tensor, *args: Any) -> tuple[Tensor]:
    n_steps, batch, heads, length, size = q.shape
    return (q.new_empty(n_steps, batch, length, heads, size).transpose(2, 3),)


_attention = declare(
    "attention",
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? keep, Tensor? amplitudes",
    "int bits",
    1,
    _run_attention,
    _fake_attention,
)


def attention(*tensors: Tensor | None, bits: int) -> Tensor:
    """Be :func:`spiking_lm.kernels.attention` in a graph."""
    y: Tensor = _attention(*tensors, bits)
    return y


# -- gif_linear --------------------------------------------------------------------------------------------------------


def _run_gif(x: Tensor, weight: Tensor, bias: Tensor | None, salient: Any, scale: Any, *options: Any) -> Outputs:
    *fields, mode = options
    return (call("gif_linear", x, weight, bias, _scheme(*fields), salient, scale, mode=mode),)


@lru_cache(maxsize=64)
def _scheme(bits: int, steps: Any, grid: Any, spikes: Any, scale: Any) -> ActivationScheme:
    salient = None if steps is None else SalientChannels(rate=0.5, steps=steps)  # their share has been decided
    return ActivationScheme(bits=bits, salient=salient, grid=grid, spikes=spikes, scale=scale)


def _fake_gif(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], weight.shape[0])),)


_gif_linear = declare(
    "gif_linear",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? salient, Tensor? scale",
    "int bits, int? salient_steps, str grid, str spikes, str range, str mode",
    1,
    _run_gif,
    _fake_gif,
)


def gif_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    salient: Tensor | None,
    scale: Tensor | None,
    mode: Literal["fake", "spike", "binary"],
) -> Tensor:
    """Be :func:`spiking_lm.kernels.gif_linear` in a graph."""
    steps = None if scheme.salient is None else scheme.salient.steps
    fields = scheme.bits, steps, scheme.grid, scheme.spikes, scheme.scale
    out: Tensor = _gif_linear(x, weight, bias, salient, scale, *fields, mode)
    return out
