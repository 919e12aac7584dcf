"""EGRU as modules: a cell for one step and a layer over time, both with explicit state.

They do what the paper says where its released implementation does something else: gradients are those of the true
triangle, zoneout works in evaluation, the membrane is carried from call to call, and thresholds are put back into
[0, 1] in training only. ``state_carry="y_only"`` is there to compare with published figures.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm.errors import UsageError
from spiking_lm.kernels.reference import compute_dtype
from spiking_lm_egru.functional import EGRUParameters, EGRUState, egru

StateCarry = Literal["full", "y_only"]


class _EGRUBase(nn.Module):
    """The parameters of a cell, and one pass over time-major input."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        dropout: float = 0.0,
        zoneout: float = 0.0,
        dampening_factor: float = 0.7,
        pseudo_derivative_support: float = 1.0,
        thr_mean: float = 0.3,
        weight_initialization_gain: float = 1.0,
        state_carry: StateCarry = "full",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for option, value, good, range_ in (
            ("input_size", input_size, input_size >= 1, "at least 1"),
            ("hidden_size", hidden_size, hidden_size >= 1, "at least 1"),
            ("dropout", dropout, 0 <= dropout < 1, "in [0, 1)"),
            ("zoneout", zoneout, 0 <= zoneout < 1, "in [0, 1)"),
            ("dampening_factor", dampening_factor, dampening_factor >= 0, "at least 0"),
            ("pseudo_derivative_support", pseudo_derivative_support, pseudo_derivative_support > 0, "above 0"),
            ("thr_mean", thr_mean, 0 < thr_mean < 1, "in (0, 1)"),
            ("state_carry", state_carry, state_carry in ("full", "y_only"), "'full' or 'y_only'"),
        ):
            if not good:
                raise UsageError(f"{name}: {option} must be {range_}, not {value!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.dropout, self.zoneout = dropout, zoneout
        self.dampening_factor, self.pseudo_derivative_support = dampening_factor, pseudo_derivative_support
        self.thr_mean, self.weight_initialization_gain = thr_mean, weight_initialization_gain
        self.state_carry: StateCarry = state_carry
        # One row per source, so that an event is one contiguous read; columns in blocks z (update), r (reset), g.
        self.kernel = nn.Parameter(torch.empty(input_size, 3 * hidden_size))
        self.recurrent_kernel = nn.Parameter(torch.empty(hidden_size, 3 * hidden_size))
        self.bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.recurrent_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.thr = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw kernels Xavier normal over all three gates at once, thresholds Beta with mean ``thr_mean``."""
        nn.init.xavier_normal_(self.kernel, self.weight_initialization_gain)
        nn.init.xavier_normal_(self.recurrent_kernel, self.weight_initialization_gain)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.recurrent_bias)
        spread = torch.distributions.Beta(3 * self.thr_mean / (1 - self.thr_mean), 3.0)
        with torch.no_grad():
            self.thr.copy_(spread.sample(self.thr.shape))

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> EGRUState:
        """Return the state before the first step, zeros; by default where the parameters are, float32 or float64."""
        zeros = torch.zeros(
            (batch, self.hidden_size), device=device or self.thr.device, dtype=dtype or compute_dtype(self.thr)
        )
        return EGRUState(zeros, zeros, zeros, zeros)

    def parameters_for_step(self) -> EGRUParameters:
        """Return what the functional forms need beside the two kernels, as it holds for the present mode.

        In training, thresholds that an optimiser has moved out of [0, 1] are put back in place, which their gradient
        does not see; in evaluation nothing is changed and only the values used are clamped.
        """
        if self.training:
            self.thr.data.clamp_(0, 1)
        return EGRUParameters(
            self.thr if self.training else self.thr.clamp(0, 1),
            self.bias,
            self.recurrent_bias,
            self.dampening_factor,
            self.pseudo_derivative_support,
            0.0 if self.training else self.zoneout,
        )

    def _run(self, x: Tensor, state: EGRUState | None, *, return_sequences: bool = False) -> tuple[Tensor, EGRUState]:
        """Run ``x (T, B, I)`` from ``state``, with fresh masks of DropConnect and zoneout in training."""
        if state is None:
            state = self.init_state(x.shape[1], device=x.device)
        elif self.state_carry == "y_only":  # as published: everything but y begins anew at each call
            state = self.init_state(x.shape[1], device=x.device)._replace(y=state.y)
        keep = None
        if self.training and self.zoneout:
            keep = torch.empty((*x.shape[:2], self.hidden_size), device=x.device, dtype=state.c.dtype)
            keep.bernoulli_(1 - self.zoneout)
        recurrent = F.dropout(self.recurrent_kernel, self.dropout, self.training)  # one mask for all rows and steps
        return egru(
            x, state, self.kernel, recurrent, self.parameters_for_step(), keep=keep, return_sequences=return_sequences
        )

    def extra_repr(self) -> str:
        """Say sizes and options."""
        return (
            f"{self.input_size}, {self.hidden_size}, dropout={self.dropout}, zoneout={self.zoneout}, "
            f"dampening_factor={self.dampening_factor}, pseudo_derivative_support={self.pseudo_derivative_support}, "
            f"state_carry={self.state_carry!r}"
        )


class EGRUCell(_EGRUBase):
    """One step of event-based gated recurrent units: ``(B, I) -> (B, H)``; options as for :class:`EGRU`.

    In training each call draws its own masks; over a sequence :class:`EGRU` shares that of DropConnect and is faster.
    """

    def forward(self, x: Tensor, state: EGRUState | None = None) -> tuple[Tensor, EGRUState]:
        """Advance one step: ``x (B, I)`` -> ``(y (B, H), state)``; None is the state of rest."""
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise UsageError(f"EGRUCell: x has shape {tuple(x.shape)}, not (B, {self.input_size})")
        y, state = self._run(x.unsqueeze(0), state)
        return y[0], state


class EGRU(_EGRUBase):
    """A layer of event-based gated recurrent units over time (Subramoney et al., arXiv 2206.06178).

    ``dropout`` is DropConnect on the recurrent kernel, one mask per call; ``zoneout`` keeps membranes as they were, at
    random in training and by its expectation in evaluation. ``dampening_factor`` and ``pseudo_derivative_support`` are
    height and steepness of the surrogate gradient; ``thr_mean`` is the mean of the initial thresholds.
    ``state_carry="y_only"`` lets every call begin with an empty membrane, whatever state it is given.
    Usable in ``norse.torch.SequentialState`` (there with ``batch_first=False``).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        batch_first: bool = True,
        dropout: float = 0.0,
        zoneout: float = 0.0,
        dampening_factor: float = 0.7,
        pseudo_derivative_support: float = 1.0,
        thr_mean: float = 0.3,
        weight_initialization_gain: float = 1.0,
        state_carry: StateCarry = "full",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            dropout=dropout,
            zoneout=zoneout,
            dampening_factor=dampening_factor,
            pseudo_derivative_support=pseudo_derivative_support,
            thr_mean=thr_mean,
            weight_initialization_gain=weight_initialization_gain,
            state_carry=state_carry,
        )
        self.batch_first = batch_first

    def forward(
        self, x: Tensor, state: EGRUState | None = None, *, return_sequences: bool = False
    ) -> tuple[Tensor, EGRUState]:
        """Run ``x (B, T, I)`` -> ``(y (B, T, H), state)``, or time first with ``batch_first=False``.

        The state is that after the last step, (B, H) each, or with ``return_sequences`` that after every step, laid out
        like ``y``. None is the state of rest.
        """
        if x.dim() != 3 or x.shape[2] != self.input_size:
            layout = "(B, T, {})" if self.batch_first else "(T, B, {})"
            raise UsageError(f"EGRU: x has shape {tuple(x.shape)}, not {layout.format(self.input_size)}")
        y, after = self._run(x.transpose(0, 1) if self.batch_first else x, state, return_sequences=return_sequences)
        if self.batch_first:
            y = y.transpose(0, 1)
            if return_sequences:
                after = EGRUState(*(value.transpose(0, 1) for value in after))
        return y, after
