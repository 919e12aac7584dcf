"""snnTorch's ``Leaky`` as a neuron with explicit state. snnTorch is imported here and nowhere else."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType

import torch
from snntorch import Leaky, SpikingNeuron
from torch import Tensor

from spiking_lm.config import LIFConfig
from spiking_lm.errors import UsageError
from spiking_lm.interfaces import LIFDynamics, Neuron
from spiking_lm.kernels.reference import compute_dtype, spike
from spiking_lm.neurons import membrane_dtype


class SnnTorchLeaky(Neuron):
    """The neuron ``snntorch.leaky``: ``snntorch.Leaky`` on ``gain x``, which makes it SpikeGPT's neuron by default.

    :meth:`step` is one call of snnTorch and remains the definition. With ``reset: zero`` the dynamics are those of
    :func:`spiking_lm.kernels.lif_scan`, which :meth:`forward` then runs. ``reset: subtract`` has no such dynamics:
    snnTorch decides on a spike after subtracting the threshold for the previous one once more, so it runs step by step.

    ``detach_reset`` chooses ``reset_delay``: snnTorch detaches exactly the reset that it applies one step late. Where
    it resets to zero, that reset is applied here at once, so that the state is the membrane after the reset either way.
    """

    config: LIFConfig

    def __init__(self, config: LIFConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        self.leaky = _stateless(
            Leaky(
                # 0-dim float64: exact for float64 inputs, and too small to promote any other.
                beta=torch.tensor(config.beta, dtype=torch.float64),
                threshold=torch.tensor(config.threshold, dtype=torch.float64),
                reset_mechanism=config.reset,
                reset_delay=config.detach_reset,
                # snnTorch's own surrogates fire above the threshold, never at it, and return float32 whatever they get.
                spike_grad=partial(spike, threshold=0.0, compare=config.compare, surrogate=config.surrogate),
            )
        )
        if config.reset == "zero":
            self.dynamics = LIFDynamics(
                beta=config.beta,
                gain=config.gain,
                threshold=config.threshold,
                v_reset=0.0,
                compare=config.compare,
                surrogate=config.surrogate,
                detach_reset=config.detach_reset,
            )

    def init_state(
        self, shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return membranes at rest, zero, of ``shape``."""
        return torch.zeros(shape, device=device, dtype=membrane_dtype(dtype))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Advance one time step: ``x (B, N)`` and membranes ``(B, N)`` -> spikes in the dtype of ``x``, membranes."""
        if state.shape != x.shape:  # snnTorch would go on with a membrane of zeros
            raise UsageError(
                f"snntorch.leaky: a membrane of shape {tuple(state.shape)} for input of shape {tuple(x.shape)}"
            )
        v = state.to(compute_dtype(x, state))
        # snnTorch leaves membrane and reset in the module, and with them the graph of everything before. Here they end
        # with this copy, so that neither calls nor threads meet.
        leaky = copy.copy(self.leaky)
        leaky.state_function = MethodType(leaky.state_function.__func__, leaky)  # was bound to the original
        spikes, v = leaky(self.config.gain * x.to(v.dtype), v)
        if leaky.reset_delay and self.config.reset == "zero":
            v = (1 - leaky.mem_reset(v)) * v
        return spikes.to(x.dtype), v


def _stateless(leaky: Leaky) -> Leaky:
    """Free a new ``Leaky`` of what snnTorch keeps of it, and of what it would put into the state dict."""
    # The class keeps every neuron ever built, and utils.reset() of any network resets them all.
    SpikingNeuron.instances[:] = [other for other in SpikingNeuron.instances if other is not leaky]
    # Constants as plain attributes: they are the configuration's, not weights to be saved, loaded or cast to bfloat16.
    for name, value in list(leaky.named_buffers()):
        delattr(leaky, name)
        setattr(leaky, name, value)
    return leaky
