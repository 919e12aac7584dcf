"""The configurations of the Norse neurons (torch-free), under Norse's own names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spiking_lm.config import NeuronConfig, SurrogateConfig

SurrogateMethod = Literal["super", "triangle", "tanh", "circ", "heavi_erfc"]


class NorseConfig(NeuronConfig):
    """What both Norse neurons have. One token is one time step ``dt``; the defaults are Norse's, ``alpha`` apart."""

    dt: float = Field(default=0.001, gt=0)
    """Seconds per token; only its products with the inverse time constants matter."""
    tau_mem_inv: float = Field(default=100.0, gt=0)
    """1 / time constant of the membrane, in 1/s; the membrane decays by 1 - dt tau_mem_inv per token."""
    v_leak: float = 0.0
    """Where a membrane without input rests."""
    v_th: float = 1.0
    """A membrane above it fires; one exactly at it does not."""
    v_reset: float = 0.0
    method: SurrogateMethod = "super"
    """Norse's name of the surrogate gradient."""
    alpha: float = Field(default=1.0, gt=0)
    """Its parameter. ``super`` has none: Norse takes one and leaves it out of the formula."""

    @model_validator(mode="after")
    def _consistent(self) -> NorseConfig:
        if self.dt * self.tau_mem_inv > 1:
            raise ValueError(f"dt * tau_mem_inv is {self.dt * self.tau_mem_inv:g}: above 1 the membrane overshoots")
        if self.v_th <= max(self.v_reset, self.v_leak):
            raise ValueError("v_th must lie above v_reset and v_leak: a neuron at rest is silent")
        if self.method == "super" and self.alpha != 1:
            raise ValueError("Norse's 'super' is 1 / (1 + |v - v_th|)^2 whatever alpha is; leave alpha out")
        return self

    @property
    def surrogate(self) -> SurrogateConfig | None:
        """The same surrogate in the kernels' closed table; None where no entry is the same function."""
        same = {
            ("super", 1.0): SurrogateConfig(name="fast_sigmoid", alpha=1.0),
            ("triangle", 1.0): SurrogateConfig(name="triangle", alpha=1.0),  # Norse's support is 1, whatever alpha
            ("tanh", 2.0): SurrogateConfig(name="sigmoid", alpha=4.0),  # 1 - tanh(2u)^2 = 4 sigma(4u) (1 - sigma(4u))
        }
        return same.get((self.method, self.alpha))


class NorseLIFBoxConfig(NorseConfig):
    """The neuron ``norse.lif_box``."""

    reset_method: Literal["value", "subtract"] = "value"
    """value: to ``v_reset``. subtract: by ``v_th``."""


class NorseLIFConfig(NorseConfig):
    """The neuron ``norse.lif``: Norse's ``LIFParameters``, with a synaptic current; it always resets to ``v_reset``."""

    tau_syn_inv: float = Field(default=200.0, gt=0)
    """1 / time constant of the synaptic current, in 1/s; the current decays by 1 - dt tau_syn_inv per token."""

    @model_validator(mode="after")
    def _current_decays(self) -> NorseLIFConfig:
        if self.dt * self.tau_syn_inv > 1:
            raise ValueError(f"dt * tau_syn_inv is {self.dt * self.tau_syn_inv:g}: above 1 the current changes sign")
        return self
