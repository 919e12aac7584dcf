"""The projections of SpikeLLM: a weight matrix, and the neurons in front of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm.schemes import ActivationScheme, WeightScheme


class SpikingLinear(nn.Module):
    """A linear layer."""

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        weights: WeightScheme = WeightScheme(),
        activations: ActivationScheme = ActivationScheme(),
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.activations = weights, activations
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(out_features, in_features), std=0.02))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
