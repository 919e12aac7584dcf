"""EGRU as functions, by Norse's conventions: NamedTuples of parameters and state, one step, and whole sequences.

:func:`egru_step` is the definition of the cell and has the signature of Norse's recurrent activations;
:func:`egru_norse` runs it in Norse's ``SNNRecurrent``. :func:`egru` computes the same with the core's kernel, much
faster, and does not need Norse. Time is the first dimension here.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spiking_lm.errors import MissingExtraError
from spiking_lm.kernels import egru_scan, lif_scan
from spiking_lm.kernels.events import linear

TRACE_DECAY = 0.9
"""What is left of the trace of events after one step."""


class EGRUParameters(NamedTuple):
    """What a cell needs beside its two matrices: tensors over the gates (3H,) or the units (H,), and constants."""

    thr: Tensor
    bias: Tensor
    recurrent_bias: Tensor
    dampening_factor: float = 0.7
    """Height of the surrogate gradient at the threshold."""
    pseudo_derivative_support: float = 1.0
    """The surrogate reaches zero at a distance of one over this."""
    zoneout: float = 0.0
    """Share of the old state that is mixed in: the expectation of zoneout, for evaluation."""


class EGRUState(NamedTuple):
    """State after a step, (B, H) each; or the same for all steps, with a dimension of time."""

    c: Tensor
    """Membrane after the reset."""
    y: Tensor
    """Event values, 0 where there is none: the output, and what the recurrence sees."""
    trace: Tensor
    """Decaying average of ``y``."""
    o: Tensor
    """Event flags, 0 or 1."""


def egru_step(
    input_tensor: Tensor,
    state: EGRUState,
    input_weights: Tensor,
    recurrent_weights: Tensor,
    p: EGRUParameters,
    dt: float = 0.001,
    *,
    keep: Tensor | None = None,
) -> tuple[Tensor, EGRUState]:
    """Advance one step with Norse's surrogate; usable as an activation of ``norse.torch.module.snn.SNNRecurrent``.

    ``input_tensor`` is (B, I); the weights are Norse's way round, (3H, I) and (3H, H), in blocks z, r, g. ``keep (B,
    H)`` is the zoneout mask of this step. ``dt`` belongs to the signature; the cell lives in discrete time.
    Returns ``(y (B, H), state)``. Raises: MissingExtraError without Norse.
    """
    threshold, _ = _norse()
    a_z, a_r, a_g = F.linear(input_tensor, input_weights, p.bias).chunk(3, -1)
    q_z, q_r, q_g = F.linear(state.y, recurrent_weights, p.recurrent_bias).chunk(3, -1)
    z, r = torch.sigmoid(a_z + q_z), torch.sigmoid(a_r + q_r)
    g = torch.tanh(a_g + r * q_g)  # r gates the recurrent bias as well
    before = z * state.c + (1 - z) * g
    if keep is not None:
        before = state.c + keep * (before - state.c)
    elif p.zoneout:
        before = p.zoneout * state.c + (1 - p.zoneout) * before
    # Norse's triangle has a support of 1: scaling its argument by epsilon gives gamma relu(1 - epsilon |v|).
    support = p.pseudo_derivative_support
    o = threshold(support * (before - p.thr), "triangle", p.dampening_factor / support)
    y = o * before
    return y, EGRUState(before - o * p.thr, y, TRACE_DECAY * state.trace + (1 - TRACE_DECAY) * y, o)


def egru_norse(
    x: Tensor,
    state: EGRUState,
    kernel: Tensor,
    recurrent_kernel: Tensor,
    p: EGRUParameters,
    *,
    keep: Tensor | None = None,
) -> tuple[Tensor, EGRUState]:
    """Run the definition over ``x (T, B, I)`` in Norse's ``SNNRecurrent``: arguments and results are those of
    :func:`egru` with ``return_sequences``.

    Raises: MissingExtraError without Norse.
    """
    _, recurrent_module = _norse()
    masks = None if keep is None else iter(keep.unbind(0))

    def activation(
        x_t: Tensor, before: EGRUState, w_in: Tensor, w_rec: Tensor, parameters: EGRUParameters, dt: float
    ) -> tuple[Tensor, EGRUState]:
        mask = None if masks is None else next(masks)
        return egru_step(x_t, before, w_in, w_rec, parameters, dt, keep=mask)

    recurrent = recurrent_module(
        activation,
        lambda _: state,
        kernel.shape[0],
        recurrent_kernel.shape[0],
        p,
        input_weights=kernel.t(),
        recurrent_weights=recurrent_kernel.t(),
        autapses=True,  # without it the diagonal of the given weights is overwritten with zeros
        record_states=True,
    )
    y, states = recurrent(x, state)
    return y, states


def egru(
    x: Tensor,
    state: EGRUState,
    kernel: Tensor,
    recurrent_kernel: Tensor,
    p: EGRUParameters,
    *,
    keep: Tensor | None = None,
    return_sequences: bool = False,
) -> tuple[Tensor, EGRUState]:
    """Run the cell over ``x (T, B, I)`` by the core's kernel, with one product for the inputs of all steps.

    ``kernel`` is (I, 3H) and ``recurrent_kernel`` (H, 3H), in blocks z, r, g; ``keep (T, B, H)`` is a zoneout mask.
    Returns ``(y (T, B, H), state)``: the state after the last step, or with ``return_sequences`` after every step. The
    state is float32, or float64 if the parameters are; ``y`` has the dtype of ``x``.
    """
    n_steps, batch, _ = x.shape
    a = linear(x.flatten(0, 1), kernel, p.bias).view(n_steps, batch, kernel.shape[1])
    y, c, o = egru_scan(
        a,
        recurrent_kernel,
        p.recurrent_bias,
        p.thr,
        state.c,
        state.y,
        gamma=p.dampening_factor,
        epsilon=p.pseudo_derivative_support,
        keep=keep,
        zoneout=p.zoneout,
    )
    if return_sequences:
        return y.to(x.dtype), EGRUState(c, y, _traces(y, state.trace), o)
    if n_steps == 0:
        return y.to(x.dtype), state
    return y.to(x.dtype), EGRUState(c[-1], y[-1], _last_trace(y, state.trace), o[-1])


def _traces(y: Tensor, trace: Tensor) -> Tensor:
    """Return the trace after every step of ``y (T, B, H)``: a leaky integrator that never fires."""
    _, traces = lif_scan(y, trace, beta=TRACE_DECAY, gain=1 - TRACE_DECAY, threshold=math.inf)
    return traces


def _last_trace(y: Tensor, trace: Tensor) -> Tensor:
    """Return the trace after the last step, as one weighted sum."""
    n_steps = y.shape[0]
    if n_steps == 1:
        return torch.lerp(trace.to(y.dtype), y[0], 1 - TRACE_DECAY)
    weights = torch.pow(TRACE_DECAY, torch.arange(n_steps - 1, -1, -1, device=y.device, dtype=y.dtype))
    added = torch.mv(y.flatten(1).t(), weights).view_as(y[0])
    return added.mul(1 - TRACE_DECAY).add(trace, alpha=TRACE_DECAY**n_steps)


@lru_cache(maxsize=1)
def _norse() -> tuple[Any, Any]:
    """Return Norse's ``threshold`` and ``SNNRecurrent``.

    Raises: MissingExtraError where Norse cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Norse uses what torch has deprecated
            from norse.torch.functional.threshold import threshold
            from norse.torch.module.snn import SNNRecurrent
    except ImportError as err:
        raise MissingExtraError("EGRU's plain path through Norse", "egru", detail=str(err)) from err
    return threshold, SNNRecurrent
