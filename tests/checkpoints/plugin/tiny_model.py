"""The model of the plugin ``tiny``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spiking_lm.config import ModelConfig
from spiking_lm.errors import DataError
from spiking_lm.interfaces import LMOutput, SpikeSite, SpikingLanguageModel, State


class TinyConfig(ModelConfig):
    model_type: ClassVar[str] = "tiny"
    vocab_size: int = 7
    width: int = 5
    gain: float = 1.0
    tied: bool = False


class Tiny(SpikingLanguageModel):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.mix = nn.Linear(config.width, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.orthogonal_(self.mix.weight)
        if config.tied:
            self.head.weight = self.emb.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.full((3,), config.gain), persistent=False)

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        return torch.zeros(batch_size, self.config.width, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        hidden = self.mix(self.emb(tokens)) * self.scratch[0]
        spikes = (hidden > 0).to(hidden.dtype)
        return LMOutput(self.head(spikes + hidden), state, {"mix": spikes} if return_spikes else None)

    def spike_sites(self) -> list[SpikeSite]:
        return [SpikeSite("mix", "binary")]

    def graph(self) -> Any:
        raise NotImplementedError

    def to_reference(self, *, grads: bool = False) -> dict[str, Tensor]:
        return {f"paper.{name}": value.detach().clone() for name, value in self.state_dict().items()}


def read(state_dict: Mapping[str, Tensor], **config: Any) -> Tiny:
    if "paper.emb.weight" not in state_dict:
        raise DataError("not a tiny state dict: 'paper.emb.weight' is missing")
    vocab_size, width = state_dict["paper.emb.weight"].shape
    model = Tiny(TinyConfig(vocab_size=vocab_size, width=width, **config))
    model.load_state_dict({name.removeprefix("paper."): value for name, value in state_dict.items()})
    return model
