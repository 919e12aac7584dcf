"""A small model and a small neuron that obey every law, and copies of them that each break one."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm import create_neuron, hookimpl
from spiking_lm.config import LIFConfig, ModelConfig
from spiking_lm.graph import LMGraph, Op
from spiking_lm.hookspecs import Register
from spiking_lm.interfaces import LMOutput, SpikeSite, SpikingLanguageModel, State
from spiking_lm.kernels import spike
from spiking_lm.neurons import LIF
from spiking_lm.records import ModelSpec


class ToyConfig(ModelConfig):
    """A one-layer model."""

    model_type: ClassVar[str] = "toy"
    vocab_size: int = 17
    n_embd: int = 24
    num_classes: int = 3


class ToyState(NamedTuple):
    """The previous embedding and the membranes."""

    previous: Tensor
    v: Tensor


class Toy(SpikingLanguageModel):
    """Embedding + a look at the previous token -> neurons -> head; and a classifier that counts spikes."""

    config: ToyConfig
    capabilities = frozenset({"lm", "classify"})

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.mix = nn.Linear(config.n_embd, config.n_embd)
        self.neuron = create_neuron("lif", size=config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        self.classifier = nn.Linear(config.n_embd, config.num_classes)

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        size = self.config.n_embd
        dtype = dtype or torch.get_default_dtype()
        return ToyState(
            torch.zeros(batch_size, size, device=device, dtype=dtype),
            self.neuron.init_state((batch_size, size), device=device, dtype=dtype),
        )

    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        x = self.emb(tokens)
        shifted = torch.cat([state.previous[:, None].to(x.dtype), x[:, :-1]], 1)
        spikes, v = self.neuron(3 * self.mix(x + shifted).to(x.dtype), state.v)
        return spikes, ToyState(x[:, -1], v)

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        spikes, state = self.features(tokens, state or self.start(tokens))
        return LMOutput(self.head(spikes), state, {"cells": spikes} if return_spikes else None)

    def start(self, tokens: Tensor) -> State:
        return self.init_state(len(tokens), device=tokens.device, dtype=self.emb.weight.dtype)

    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        spikes, _ = self.features(tokens, self.start(tokens))
        mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])[..., None]
        return self.classifier((spikes * mask).sum(1) / lengths[:, None])

    def spike_sites(self) -> list[SpikeSite]:
        return [SpikeSite("cells", "binary", feeds=("head", "classifier"))]

    def graph(self) -> LMGraph:
        c, n = self.config, self.config.n_embd
        return LMGraph(
            (
                Op("emb", "embedding", ("tokens",), "real", n, module="emb"),
                Op("shift", "token_shift", ("emb",), "real", n, other_ops=n),
                Op("mix", "linear", ("shift",), "real", n, module="mix", weight=(n, n)),
                Op("cells", "neuron", ("mix",), "binary", n, module="neuron"),
                Op("head", "linear", ("cells",), "real", c.vocab_size, module="head", weight=(c.vocab_size, n)),
                Op("classifier", "linear", ("cells",), "real", c.num_classes, "classifier", (c.num_classes, n)),
            )
        )


class ToyPlugin:
    """Registers the toy, so that it can be saved and loaded."""

    @hookimpl
    def spiking_lm_models(self, register: Register) -> None:
        register(ModelSpec(name="toy", config=f"{__name__}:ToyConfig", factory=f"{__name__}:Toy"))


# -- models that break a law -------------------------------------------------------------------------------------------


class RemembersInModule(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        if getattr(self, "kept", None) is not None and self.kept.shape == state.v.shape:
            state = state._replace(v=self.kept)
        spikes, state = super().features(tokens, state)
        self.kept = state.v.detach()
        return spikes, state


class StepForgets(Toy):
    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        logits, new = super().step(token, state)
        return logits, new._replace(v=torch.zeros_like(new.v))


class LosesStateBetweenPieces(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        if tokens.shape[1] > 1:
            state = state._replace(previous=torch.zeros_like(state.previous))
        return super().features(tokens, state)


class SeesTheFuture(Toy):
    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        output = super().forward(tokens, state, return_spikes=return_spikes)
        output.logits = output.logits + 1e-6 * output.logits.mean(1, keepdim=True)
        return output


class HasNoMemory(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        flat = tokens.reshape(-1, 1)
        spikes, new = super().features(flat, self.start(flat))
        last = ToyState(*(t.unflatten(0, tokens.shape)[:, -1] for t in new))
        return spikes.reshape(*tokens.shape, -1), last


class MixesRows(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        spikes, new = super().features(tokens, state)
        return spikes, new._replace(previous=new.previous + 0.1 * new.previous.mean(0))


class IgnoresInitState(Toy):
    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        state = self.start(tokens)._replace(v=torch.full((len(tokens), 24), 0.9)) if state is None else state
        return super().forward(tokens, state, return_spikes=return_spikes)


class ChangesStateInPlace(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        spikes, new = super().features(tokens, state)
        state.v.copy_(new.v.detach())
        return spikes, new


class StateIsNotBatchFirst(Toy):
    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        return super().init_state(batch_size, device=device, dtype=dtype)._replace(v=torch.zeros(24, batch_size))

    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        spikes, new = super().features(tokens, state._replace(v=state.v.T.contiguous()))
        return spikes, new._replace(v=new.v.T.contiguous())


class StateStaysFloat32(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        spikes, new = super().features(tokens, state)
        return spikes, new._replace(v=new.v.float())


class GradedButSaysBinary(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        spikes, new = super().features(tokens, state)
        return 1.001 * spikes, new


class ForgetsASite(Toy):
    def spike_sites(self) -> list[SpikeSite]:
        return [*super().spike_sites(), SpikeSite("elsewhere", "binary")]


class IsSilent(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        spikes, new = super().features(tokens, state)
        return 0 * spikes, new


class AlwaysReturnsSpikes(Toy):
    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        return super().forward(tokens, state, return_spikes=True)


class HasADeadParameter(Toy):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.unused = nn.Parameter(torch.ones(3))


class CutsTheGradient(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        spikes, new = super().features(tokens, state)
        return spikes.detach(), new


class LeavesAParameterOut(Toy):
    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return super().parameter_groups(weight_decay)[:1]


class OverflowsInBfloat16(Toy):
    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        output = super().forward(tokens, state, return_spikes=return_spikes)
        if output.logits.dtype == torch.bfloat16:
            output.logits = output.logits / (1 - (1 - torch.tensor(1e-3, dtype=torch.bfloat16)) - 0.0)
        return output


class DrawsItsOwnWeights(Toy):
    count = 0

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        DrawsItsOwnWeights.count += 1
        nn.init.normal_(self.head.bias, generator=torch.Generator().manual_seed(DrawsItsOwnWeights.count))


class DropsOutInEval(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        spikes, new = super().features(tokens, state)
        return F.dropout(spikes, 0.5), new


class HidesAWeight(Toy):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.scale = torch.rand(())  # neither parameter nor buffer: not saved

    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        spikes, new = super().features(tokens, state)
        return (spikes * self.scale).to(spikes.dtype), new


class LooseConfig(ToyConfig):
    """Accepts whatever it is given."""

    model_config: ClassVar[Any] = {"extra": "ignore"}


class GrowsItsStateDict(Toy):
    def features(self, tokens: Tensor, state: ToyState) -> tuple[Tensor, ToyState]:
        self.register_buffer("seen", torch.ones(1))
        return super().features(tokens, state)


class GraphNamesNoModule(Toy):
    def graph(self) -> LMGraph:
        return LMGraph((*super().graph().ops, Op("extra", "elementwise", ("head",), "real", 1, module="no.such")))


class GraphHasAnotherShape(Toy):
    def graph(self) -> LMGraph:
        ops = list(super().graph())
        ops[2] = Op("mix", "linear", ("shift",), "real", 8, module="mix", weight=(8, 24))
        return LMGraph(tuple(ops))


class GraphForgetsAMatrix(Toy):
    def graph(self) -> LMGraph:
        return LMGraph(super().graph().ops[:-1])

    def spike_sites(self) -> list[SpikeSite]:
        return [SpikeSite("cells", "binary", feeds=("head",))]


class GraphLeavesOutTheMiddle(Toy):
    def graph(self) -> LMGraph:
        c, n = self.config, self.config.n_embd
        emb = Op("emb", "embedding", ("tokens",), "real", n, module="emb")
        return LMGraph((emb, Op("head", "linear", ("emb",), "real", c.vocab_size, "head", (c.vocab_size, n))))


class GraphSaysReal(Toy):
    def graph(self) -> LMGraph:
        ops = list(super().graph())
        ops[3] = Op("cells", "neuron", ("mix",), "real", 24, module="neuron")
        return LMGraph(tuple(ops))


class FeedsSomethingElse(Toy):
    def spike_sites(self) -> list[SpikeSite]:
        return [SpikeSite("cells", "binary", feeds=("head", "mix"))]


class ReadsThePadding(Toy):
    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        spikes, _ = self.features(tokens, self.start(tokens))
        return self.classifier(spikes.mean(1))


# -- neurons that break a law ------------------------------------------------------------------------------------------


class Healthy(LIF):
    """A LIF with a learned gain, run step by step."""

    def __init__(self, config: LIFConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        self.dynamics = None  # type: ignore[assignment]
        self.weight = nn.Parameter(torch.full((size or 1,), 1.5))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().step(x * self.weight, state)


class KeepsItsMembrane(Healthy):
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        spikes, self.v = super().step(x, state)
        return spikes, self.v


class SharesItsMembrane(Healthy):
    def __init__(self, config: LIFConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        self.register_buffer("v", torch.zeros(1), persistent=False)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.v.shape == state.shape:
            state = 0.5 * (state + self.v)
        spikes, v = super().step(x, state)
        self.v = v.detach()
        return spikes, v


class ResetsInPlace(Healthy):
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        spikes, v = super().step(x, state)
        with torch.no_grad():
            state.copy_(v)
        return spikes, v


class WrongDynamics(LIF):
    """Says that it forgets half of its membrane, and forgets a little more."""

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().step(x, 0.98 * state)


class WrongTie(LIF):
    """Says ``>=`` and fires above the threshold only."""

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        h = c.beta * state + c.gain * x
        s = spike(h, c.threshold, ">", c.surrogate)
        return s, (1 - s) * h


class WrongResetGradient(LIF):
    """Detaches the reset without saying so."""

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        h = c.beta * state + c.gain * x.to(state.dtype)
        s = spike(h, c.threshold, c.compare, c.surrogate)
        return s.to(x.dtype), (1 - s.detach()) * h


class ForwardOfItsOwn(Healthy):
    """Has a fast forward() that forgets the state it is given."""

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return super().forward(x, None)


class StateWithoutGradient(Healthy):
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().step(x, state.detach())


class SpikesOfThree(Healthy):
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        spikes, v = super().step(x, state)
        return torch.where(x < -2, -1.0, spikes.double()).to(x.dtype), v


class NeverFires(Healthy):
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().step(-x.abs(), state)


class DeadGradient(Healthy):
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        h = c.beta * state + c.gain * x * self.weight
        s = (h >= c.threshold).to(x.dtype)  # no surrogate
        return s, (1 - s) * h


class DeadParameter(Healthy):
    def __init__(self, config: LIFConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        self.beta = nn.Parameter(torch.tensor(0.5))


class AlwaysFloat32(Healthy):
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        spikes, v = super().step(x, state)
        return spikes.float(), v


class CouplesRows(Healthy):
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().step(x - 0.2 * x.mean(0), state)


class StateWithoutBatch(Healthy):
    def init_state(self, shape: tuple[int, ...], *, device: Any = None, dtype: Any = None) -> Tensor:
        return super().init_state(shape[1:], device=device, dtype=dtype)


class Explodes(Healthy):
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().step(torch.exp(x.clamp(min=-4)) - 1, state)


class CannotBeCopied(Healthy):
    """Keeps a tensor of the graph, like modules with hidden state do."""

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.last = x * 1
        return super().step(x, state)


class RandomThreshold(Healthy):
    count = 0

    def __init__(self, config: LIFConfig, *, size: int | None = None) -> None:
        super().__init__(config, size=size)
        RandomThreshold.count += 1
        self.scale = 1 + 1 / RandomThreshold.count

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().step(x * self.scale, state)


class LooseNeuronConfig(LIFConfig):
    """Accepts whatever it is given."""

    model_config: ClassVar[Any] = {"extra": "ignore"}


class StartsElsewhere(Healthy):
    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return super().forward(x, torch.full_like(x[:, 0], 0.9) if state is None else state)


class NoSteps(Healthy):
    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        spikes, state = super().forward(x, state)
        return spikes, state if x.shape[1] else torch.zeros_like(state)
