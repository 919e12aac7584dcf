"""A leaky recurrent layer with graded events; one matrix is in a module, one is a parameter, the head may be tied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from toy_config import ToyConfig

from spiking_lm.graph import LMGraph, Op
from spiking_lm.interfaces import LMOutput, SpikeSite, SpikingLanguageModel, State


class Toy(SpikingLanguageModel):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.mix = nn.Linear(config.width, config.width)
        self.lift = nn.Parameter(torch.randn(config.width, config.width) / config.width**0.5)
        self.head = nn.Linear(config.width, config.vocab_size)
        if config.tied:
            self.head.weight = self.emb.weight

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        return torch.zeros(batch_size, self.config.width, device=device, dtype=dtype or torch.float32)

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        h = self.init_state(len(tokens), device=tokens.device) if state is None else state
        steps = []
        for x in self.mix(self.emb(tokens)).unbind(1):
            h = 0.5 * h + x
            steps.append(h)
        y = torch.relu(torch.stack(steps, 1))
        output = LMOutput(self.head(y @ self.lift), h)
        if return_spikes:
            output.spikes, output.arrived = {"cells": y}, {"lift": y}
        return output

    def spike_sites(self) -> list[SpikeSite]:
        return [SpikeSite("cells", "graded", feeds=("lift",))]

    def graph(self) -> LMGraph:
        width, vocab = self.config.width, self.config.vocab_size
        return LMGraph(
            (
                Op("emb", "embedding", ("tokens",), "real", width, module="emb"),
                Op("mix", "linear", ("emb",), "real", width, module="mix", weight=(width, width)),
                Op("cells", "neuron", ("mix",), "graded", width),
                Op("lift", "linear", ("cells",), "real", width, weight=(width, width), parameters={"weight_t": "lift"}),
                Op("head", "linear", ("lift",), "real", vocab, module="head", weight=(vocab, width)),
            )
        )
