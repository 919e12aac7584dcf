"""Timings of SpikeLM: a training step, against the same model written with snnTorch as its users write it."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm.bench import Row, interleaved
from spiking_lm.errors import MissingExtraError
from spiking_lm.kernels import elastic_scan
from spiking_lm_spikelm.config import SpikeLMConfig
from spiking_lm_spikelm.model import SpikeLM

STEPS = 4
SIZES: dict[str, Any] = {"vocab_size": 2000, "n_layer": 2, "n_embd": 128, "n_head": 4, "n_hidden": 256, "ctx_len": 64}


class SteppedBlock(nn.Module):
    """A block of SpikeLM in which ``snntorch.Leaky`` stands for the elastic neuron; called once per step."""

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        from snntorch import Leaky, SpikingNeuron

        size, inner = config.n_embd, config.inner
        self.heads, self.rate = config.n_head, config.dropout
        self.query, self.key, self.value, self.output = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, inner), nn.Linear(inner, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.dropout)
        self.neurons = nn.ModuleList(Leaky(beta=0.25, threshold=0.5) for _ in range(8))
        ours = set(map(id, self.neurons))  # the class would keep them, and reset them together with a user's own
        SpikingNeuron.instances[:] = [neuron for neuron in SpikingNeuron.instances if id(neuron) not in ours]

    def rest(self) -> list[Tensor]:
        """Return the membranes before the first step."""
        return [neuron.reset_mem() for neuron in self.neurons]  # type: ignore[operator]

    def forward(self, x: Tensor, mem: list[Tensor]) -> Tensor:
        """Advance one step: ``x (B, S, H)``; the membranes are replaced in ``mem``."""

        def fire(i: int, current: Tensor, membrane: Tensor | None = None) -> Tensor:
            spikes, after = self.neurons[i](current, mem[i] if membrane is None else membrane)
            mem[i] = after
            return cast(Tensor, spikes)

        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)

        q, k, v = self.query(fire(0, x)), self.key(fire(1, x)), self.value(fire(2, x))
        k, v = fire(3, k, torch.zeros_like(k)), fire(4, v, torch.zeros_like(v))
        q, k, v = heads(q), heads(k), heads(v)
        weights = self.dropout((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1))
        mixed = (weights @ v).transpose(1, 2).reshape(x.shape)
        x = self.norm1(x + self.dropout(self.output(fire(5, mixed))))
        inner = F.gelu(self.up(fire(6, x)))
        return cast(Tensor, self.norm2(x + self.dropout(self.down(fire(7, inner)))))


class SteppedModel(nn.Module):
    """The classifier that :func:`train` compares with: the whole network runs once per step, in a loop in Python."""

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = nn.Embedding(config.ctx_len, config.n_embd)
        self.norm = nn.LayerNorm(config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(SteppedBlock(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.num_classes or 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return class logits for ``tokens (B, S)``."""
        embedded = self.dropout(self.norm(self.word(tokens) + self.position.weight[: tokens.shape[1]]))
        membranes = [block.rest() for block in self.blocks]  # type: ignore[operator]
        outputs = []
        for _ in range(STEPS):
            x = embedded
            for block, mem in zip(self.blocks, membranes, strict=True):
                x = block(x, mem)
            outputs.append(x)
        return cast(Tensor, self.head(torch.stack(outputs).mean(0).mean(1)))


def neuron(repeats: int, *, batch_size: int = 32, tokens: int = 64, size: int = 128) -> Row:
    """Time the neurons alone: T = 4 steps of a layer and the way back, against snnTorch's Leaky stepped in Python."""
    what = "four steps of a layer of neurons and the way back: snnTorch's Leaky stepped in Python, over elastic ones"
    try:
        from snntorch import Leaky, SpikingNeuron
    except ImportError:
        return Row("spikelm/neuron", what, None, target=2.0, note=str(MissingExtraError("snntorch", "spikegpt")))
    leaky = Leaky(beta=0.25, threshold=0.5)
    SpikingNeuron.instances[:] = [other for other in SpikingNeuron.instances if other is not leaky]
    x = torch.randn(STEPS, batch_size * tokens, size).requires_grad_()
    gradient, alpha = torch.randn_like(x), torch.full((STEPS,), 1.6)

    def ours() -> None:
        spikes, _ = elastic_scan(x, alpha, final=False)
        spikes.backward(gradient)  # type: ignore[no-untyped-call]

    def theirs() -> None:
        mem, spikes = leaky.reset_mem(), []
        for x_t in x.unbind(0):
            s, mem = leaky(x_t, mem)
            spikes.append(s)
        torch.stack(spikes).backward(gradient)  # type: ignore[no-untyped-call]

    times = interleaved({"elastic": ours, "snnTorch": theirs}, repeats)
    ms = times.ms()
    note = f"{batch_size * tokens} x {size} neurons"
    return Row("spikelm/neuron", what, ms["snnTorch"] / ms["elastic"], target=2.0, note=note, details=times.to_dict())


def train(repeats: int, *, batch_size: int = 32, tokens: int = 64) -> Row:
    """Time a training step with T = 4: ours, and the same network of snnTorch neurons stepped in Python."""
    what = "a training step of a classifier with T = 4: snnTorch's Leaky stepped in Python, over elastic neurons"
    config = SpikeLMConfig(**SIZES, steps=STEPS, num_classes=4)
    torch.manual_seed(0)
    try:
        stepped = SteppedModel(config)
    except ImportError:
        return Row("spikelm/train", what, None, target=3.0, note=str(MissingExtraError("snntorch", "spikegpt")))
    ids, labels = torch.randint(config.vocab_size, (batch_size, tokens)), torch.arange(batch_size) % 4
    lengths = torch.full((batch_size,), tokens)
    models: dict[str, nn.Module] = {
        "elastic": SpikeLM(config),
        "snnTorch": stepped,
        "dense": SpikeLM(config.model_copy(update={"neuron": None})),
    }
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, model in models.items()}

    def step(name: str) -> None:
        model = models[name].train()
        logits = model.classify(ids, lengths) if isinstance(model, SpikeLM) else model(ids)
        F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)

    times = interleaved({name: partial(step, name) for name in models}, repeats)
    ms = times.ms()
    note = f"{batch_size} x {tokens} tokens; the dense twin takes {ms['dense'] / ms['elastic']:.2f} of our time"
    return Row("spikelm/train", what, ms["snnTorch"] / ms["elastic"], target=3.0, note=note, details=times.to_dict())
