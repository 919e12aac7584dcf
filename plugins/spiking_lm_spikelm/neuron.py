"""The elastic bi-spiking neuron (Xing et al., arXiv 2406.03287), alone and in the manner of snnTorch.

Its amplitudes are set from the currents of one batch, and stay: :meth:`Elastic.calibrate`, or the first forward pass in
training. They are no part of the state, which lives within one call and is passed in and returned like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm.config import parse_config
from spiking_lm.errors import DivergedError, UsageError
from spiking_lm.interfaces import Neuron
from spiking_lm.kernels import elastic_scan, products
from spiking_lm.kernels.reference import LEAST_AMPLITUDE, compute_dtype
from spiking_lm.neurons import membrane_dtype
from spiking_lm_spikelm.neuron_config import STEPS, ElasticConfig


class ElasticState(NamedTuple):
    """What a population remembers between two steps."""

    carried: Tensor
    """What is left of the membranes, ``(B, N)``: the next step adds its currents."""
    step: Tensor
    """How many steps each row has made, ``(B,)``: which amplitude comes next."""


class Elastic(Neuron):
    """The neuron ``elastic``: three-level spikes whose size and threshold follow the scale of the currents.

    With current x_t, amplitude a_t (one number per step, for all neurons) and A_t = max(a_t, 1e-5)::

        m_t = r_{t-1} + x_t
        s_t = A_t clip(round(m_t / A_t), -1, 1)             fires where |m_t| > A_t / 2
        r_t = beta (a_t - s_t) m_t                          reset: symmetric has |s_t| in place of s_t

    The gradient is straight through while |m_t| <= A_t; what multiplies m_t in r_t is constant to it. Calibration sets
    a_t = k mean |m_t| over the whole batch, over all ranks when torch.distributed is running, and sets ``initialized``
    (T,). It happens in :meth:`calibrate` or in the first pass in training, never in evaluation, which refuses to begin
    without. The state is :class:`ElasticState`.
    """

    spike_kind = "graded"
    config: ElasticConfig
    alpha: Tensor
    initialized: Tensor

    def __init__(self, config: ElasticConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        steps = config.steps or STEPS
        if config.learn_alpha:
            self.alpha = nn.Parameter(torch.ones(steps))
        else:
            self.register_buffer("alpha", torch.ones(steps))
        self.register_buffer("initialized", torch.zeros(steps, dtype=torch.bool))
        self._ready = False  # what ``initialized`` says, known without waiting for a device
        self._calibrating = False
        self._compared: tuple[object, bool] | None = None

    def init_state(
        self, shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ElasticState:
        """Return membranes at rest, zero, of ``shape``, before the first step."""
        carried = torch.zeros(shape, device=device, dtype=membrane_dtype(dtype))
        return ElasticState(carried, torch.zeros(shape[:1], device=device, dtype=torch.long))

    def step(self, x: Tensor, state: ElasticState) -> tuple[Tensor, ElasticState]:
        """Advance one step: ``x (B, N)`` -> spikes in the dtype of ``x``, state; rows may be at different steps."""
        carried, step = state
        first = step[:1].tolist()
        if first and bool((step == first[0]).all()):
            spikes, after = self._run(x[None], first[0], carried)
            return spikes[0], ElasticState(cast(Tensor, after), step + 1)
        if not first:
            return x, state
        places = (slice(i, i + 1) for i in range(len(x)))
        rows = [self.step(x[row], ElasticState(carried[row], step[row])) for row in places]
        parts = zip(*(state for _, state in rows), strict=True)
        return torch.cat([spikes for spikes, _ in rows]), ElasticState(*(torch.cat(part) for part in parts))

    def forward(self, x: Tensor, state: ElasticState | None = None) -> tuple[Tensor, ElasticState]:
        """Run ``x (B, T, N)``; return spikes ``(B, T, N)`` and the state after the last step."""
        if state is None:
            state = self.init_state((x.shape[0], *x.shape[2:]), device=x.device, dtype=x.dtype)
        carried, step = state
        first = step[:1].tolist()
        if not first or not bool((step == first[0]).all()):
            return cast("tuple[Tensor, ElasticState]", self.scan(x, state))
        spikes, after = self._run(x.transpose(0, 1), first[0], carried)
        return spikes.transpose(0, 1), ElasticState(cast(Tensor, after), step + x.shape[1])

    def fire(self, x: Tensor) -> Tensor:
        """Return the spikes of currents ``x (T, ...)`` from rest, time first; nothing is carried on."""
        return self._run(x, 0, None, final=False)[0]

    def settled(self, x: Tensor) -> Tensor:
        """Return the amplitudes ``(T,)`` for currents ``x (T, ...)`` from rest, which set them if nothing has."""
        if not self._ready or self._calibrating:
            self._prepare(x, 0, None)
        return self._amplitudes(0, len(x))

    def fire_into(
        self, x: Tensor, weights_t: Sequence[Tensor], biases: Sequence[Tensor], *, gelu: bool = False
    ) -> tuple[Tensor, ...]:
        """Return ``spikes @ weight_t + bias`` for each matrix ``(N, O)``, for currents ``x (T, M, N)`` from rest.

        With ``gelu``, the currents are gelu(x).
        """
        calm = self._ready and not self._calibrating
        c, alpha = self.config, self.settled(F.gelu(x) if gelu and not calm else x)
        neurons = {"beta": c.beta, "bits": c.bits, "reset": c.reset}
        return products.elastic_linears(x, alpha, weights_t, biases, gelu=gelu, **neurons)

    def _run(
        self, x: Tensor, first: int, carried: Tensor | None, *, final: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        if not self._ready or self._calibrating:
            self._prepare(x, first, carried)
        c = self.config
        return elastic_scan(
            x, self._amplitudes(first, len(x)), carried, beta=c.beta, bits=c.bits, reset=c.reset, final=final
        )

    def all_amplitudes(self, steps: int) -> Tensor:
        """Return the amplitudes of the first ``steps`` steps as they are kept, ``(steps,)``."""
        return self._amplitudes(0, steps).detach()

    def amplitudes(self, steps: int) -> Tensor:
        """Return the sizes of spikes in the first ``steps`` steps, ``(steps,)``."""
        return self.all_amplitudes(steps).clamp(min=LEAST_AMPLITUDE)

    def equals(self, *others: object) -> bool:
        """Tell whether others of the same configuration have the same amplitudes, set and not learned.

        What was compared once is known until an amplitude changes, so that no device is waited for.
        """
        alike = [other for other in others if isinstance(other, Elastic) and other.config == self.config]
        settled = all(neuron._ready and not neuron._calibrating for neuron in (self, *alike))
        if len(alike) < len(others) or self.config.learn_alpha or not settled:
            return False
        source = tuple((n.alpha.data_ptr(), n.alpha._version, n.alpha.dtype) for n in (self, *alike))
        if self._compared is None or self._compared[0] != source:
            self._compared = source, all(torch.equal(self.alpha, other.alpha) for other in alike)
        return self._compared[1]

    def _amplitudes(self, first: int, steps: int) -> Tensor:
        """Return the amplitudes of ``steps`` steps from the ``first`` one on: a copy, for later ones may yet be set."""
        count = len(self.alpha)
        if first + steps <= count:
            return self.alpha[first : first + steps].clone()
        return self.alpha[torch.arange(first, first + steps, device=self.alpha.device).clamp(max=count - 1)]

    # -- calibration ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the amplitudes from currents ``x (B, T, N)`` that begin at rest, whatever they were before.

        Raises: DivergedError for currents that are not finite; the amplitudes are then as they were.
        """
        self._calibrate(x.transpose(0, 1), 0, None, known=torch.zeros_like(self.initialized))

    def _prepare(self, x: Tensor, first: int, carried: Tensor | None) -> None:
        """See to it that the amplitudes of these steps are set, or refuse."""
        own = slice(first, None) if first < len(self.alpha) else slice(-1, None)
        missing = not bool(self.initialized[own][: max(1, len(x))].all())
        if self._calibrating or (missing and self.training):
            with torch.no_grad():
                known = torch.zeros_like(self.initialized) if self._calibrating else self.initialized.clone()
                self._calibrate(x, first, carried, known)
        elif missing:
            raise UsageError(
                "the amplitudes of an elastic neuron are not set, and evaluation does not set them",
                hint="train it, load trained weights, or call calibrate() with a batch of the training data",
            )
        self._ready = bool(self.initialized.all())

    def _calibrate(self, x: Tensor, first: int, carried: Tensor | None, known: Tensor) -> None:
        """Set what is not ``known`` of the amplitudes, step by step: each decides on the membranes of the next."""
        c, alpha = self.config, self.alpha.detach().clone()
        dtype = compute_dtype(x, alpha, carried)
        known = known.clone()
        carried = x.new_zeros(x.shape[1:], dtype=dtype) if carried is None else carried
        for t, x_t in enumerate(x, first):
            place = min(t, len(alpha) - 1)
            if not known[place]:
                alpha[place] = c.k * _mean_size(carried + x_t.to(dtype))
                known[place] = True
            _, after = elastic_scan(
                x_t[None], alpha[place : place + 1], carried, beta=c.beta, bits=c.bits, reset=c.reset
            )
            carried = cast(Tensor, after)
        if not bool(torch.isfinite(alpha).all()):
            raise DivergedError(
                "an elastic neuron was to set its amplitudes from currents that are not finite",
                hint="look for NaN in the weights or the inputs; a lower learning rate, if training went before",
            )
        self.alpha.detach().copy_(alpha)
        self.initialized.logical_or_(known)
        self._ready = bool(self.initialized.all())

    def set_amplitudes(self, alpha: Tensor | None) -> None:
        """Take over amplitudes ``(T,)``, or forget those that are set with None."""
        with torch.no_grad():
            self.alpha.copy_(torch.ones_like(self.alpha) if alpha is None else alpha)
        self.initialized.fill_(alpha is not None)
        self._ready = alpha is not None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False


def _mean_size(m: Tensor) -> Tensor:
    """Return the mean of ``|m|``, over all ranks: each counts by its number of elements."""
    total = torch.stack([m.abs().sum(dtype=torch.float64), m.new_tensor(m.numel(), dtype=torch.float64)])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total[0] / total[1]


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Let every elastic neuron in ``model`` set its amplitudes anew in each pass, in training or not."""
    neurons = [module for module in model.modules() if isinstance(module, Elastic)]
    try:
        for neuron in neurons:
            neuron._calibrating = True
        yield
    finally:
        for neuron in neurons:
            neuron._calibrating = False


# -- in the manner of snnTorch -----------------------------------------------------------------------------------------


class Membrane(Tensor):
    """Membranes that know how many steps they have made: what takes the place of snnTorch's ``mem``."""

    step: int = 0


class SnnTorchElastic(nn.Module):
    """The elastic neuron for loops written for snnTorch: ``spk, mem = neuron(x, mem)``, one call per step.

    Parameters are those of the neuron ``elastic``. ``mem`` is the membrane before its reset, as snnTorch's is where
    ``reset_delay`` is on; it is all that a step knows of the last one. Start a sequence with :meth:`reset_mem`.
    """

    def __init__(self, **params: Any) -> None:
        super().__init__()
        self.neuron = Elastic(parse_config(ElasticConfig, params, where="neuron 'elastic'"))

    def reset_mem(self) -> Membrane:
        """Return what a sequence begins with."""
        return torch.zeros(0).as_subclass(Membrane)

    init_leaky = reset_mem

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Membrane]:
        """Advance one step: currents ``(B, N)`` and the last ``mem`` -> spikes ``(B, N)`` and the next ``mem``."""
        step = mem.step if isinstance(mem, Membrane) else 0
        carried = None
        if mem is not None and mem.numel():
            if mem.shape != input_.shape:
                raise UsageError(f"elastic: a membrane of {tuple(mem.shape)} for currents of {tuple(input_.shape)}")
            carried = self._carried(mem.as_subclass(Tensor), step - 1)
        spikes, _ = self.neuron._run(input_[None], step, carried, final=False)
        m = (input_ if carried is None else input_ + carried).as_subclass(Membrane)
        m.step = step + 1
        return spikes[0], m

    def _carried(self, m: Tensor, step: int) -> Tensor:
        """Return what the last step left of its membranes ``m``."""
        c, a = self.neuron.config, self.neuron._amplitudes(max(step, 0), 1)[0].detach()
        _, carried = elastic_scan(m[None], a[None], beta=c.beta, bits=c.bits, reset=c.reset)
        return cast(Tensor, carried)
