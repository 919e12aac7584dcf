"""SpikeGPT in one file: RWKV-4 blocks whose outputs are spikes (Zhu et al., arXiv 2302.13939).

One sequence position is one time step of the neurons. Inside, tensors are time-major ``(T, B, C)``, the layout of the
kernels; a public ``(B, S)`` view is one transpose away. With w = -exp(time_decay) and u = time_first the time mix is

    wkv_t = (sum_{i<t} e^{(t-1-i)w + k_i} v_i + e^{u+k_t} v_t) / (the same sum without v)

and a block is  x <- x + spike(TimeMix(LN1(x)));  x <- x + spike(ChannelMix(LN2(x))).

In that canonical placement spikes are what a sub-block *adds* to a real residual stream, so every matrix reads reals.
``placement="spike_input"`` puts a neuron in front of each matrix instead. :func:`spiking_lm.explain` shows what that
changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm import create_neuron
from spiking_lm.config import GIFConfig
from spiking_lm.errors import UsageError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.interfaces import (
    Encoding,
    GIFDynamics,
    LayerNormDynamics,
    LIFDynamics,
    LMOutput,
    Neuron,
    SigmoidGateDynamics,
    SpikeSite,
    SpikingLanguageModel,
    SquaredReLUDynamics,
    State,
    TokenShiftDynamics,
    WKVDynamics,
    mean_over_steps,
)
from spiking_lm.kernels import spike, wkv
from spiking_lm.kernels.dense import Linear
from spiking_lm_spikegpt.config import SpikeGPTConfig

RESCALE_EVERY = 6  # layers between two halvings of the released generation script
MIN_RATE = 0.02  # spikes per token; channels below it count as falling silent
MAX_AVERAGED = 128  # tokens; slower channels hardly settle within a training sequence


class BlockState(NamedTuple):
    """What a block remembers between tokens; every tensor is ``(B, C)`` unless its neuron says otherwise."""

    att_shift: Tensor
    """LN1 output of the previous token."""
    ffn_shift: Tensor
    """LN2 output of the previous token."""
    wkv: tuple[Tensor, Tensor, Tensor]
    """Numerator, denominator and log scale of the time mix."""
    neurons: dict[str, State]
    """Membranes, by the neuron's name within the block."""


class Firing(nn.Module):
    """The neurons of one spike site, with a learned gain and offset per channel when they stand before a matrix."""

    def __init__(self, config: SpikeGPTConfig, size: int) -> None:
        super().__init__()
        self.size = size
        params = dict(config.neuron)
        self.neuron: Neuron = create_neuron(params.pop("type"), size=size, **params)
        learned = config.placement == "spike_input"
        self.gain = nn.Parameter(torch.full((size,), config.input_gain)) if learned else None
        self.bias = nn.Parameter(torch.zeros(size)) if learned else None

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run ``x (T, B, N)``; return spikes of that shape and the next state."""
        if self.gain is not None and self.bias is not None:
            x = torch.addcmul(self.gain * self.bias, x, self.gain)
        spikes, state = self.neuron(x.transpose(0, 1), state)
        return cast(Tensor, spikes).transpose(0, 1), state


@dataclass
class Watch:
    """What a forward pass notes about the spikes, where it is not None."""

    spikes: dict[str, Tensor] | None = None
    """Site name -> spikes ``(B, S, N)``."""
    silence: list[Tensor] | None = None
    """Per site, how far its channels stay below MIN_RATE: 0 none, 1 all are silent."""
    hidden: list[Tensor] | None = None
    """What goes into the first block, and what comes out of each, the last behind its LayerNorm; ``(T, B, C)``."""


class Pass:
    """One forward pass through a block: neuron states in, neuron states out, and what is asked for about the spikes."""

    def __init__(self, block: Block, states: dict[str, State], watch: Watch) -> None:
        self.block, self.states, self.watch = block, states, watch
        self.new_states: dict[str, State] = {}

    def fire(self, site: str, x: Tensor) -> Tensor:
        """Return the spikes of ``site`` for input ``x (T, B, N)``, or ``x`` itself where no neuron stands."""
        if site not in self.block.neurons:
            return x
        spikes, self.new_states[site] = self.block.neurons[site](x, self.states[site])
        if self.watch.spikes is not None:
            self.watch.spikes[f"blocks.{self.block.layer}.{site}"] = spikes.transpose(0, 1)
        if self.watch.silence is not None:
            self.watch.silence.append(F.relu(1 - spikes.abs().float().mean((0, 1)) / MIN_RATE).mean())
        return cast(Tensor, spikes)


def mixes(x: Tensor, shift: Tensor, *weights: Tensor) -> list[Tensor]:
    """Return ``weight * x_t + (1 - weight) * x_{t-1}`` for each weight; ``x (T, B, C)``, ``shift (B, C)`` is x_{-1}."""
    previous = torch.cat([shift[None].to(x.dtype), x[:-1]])
    change = x - previous
    return [torch.addcmul(previous, change, weight) for weight in weights]


class TimeMix(nn.Module):
    """SRWKV: a linear-attention mix over all earlier tokens, in constant memory."""

    MATRICES = ("key", "value", "receptance", "output")

    def __init__(self, config: SpikeGPTConfig, layer: int) -> None:
        super().__init__()
        size = config.n_embd
        depth = layer / (config.n_layer - 1) if config.n_layer > 1 else 0.0
        rest = 1 - layer / config.n_layer
        channel = torch.arange(size) / max(size - 1, 1)
        ramp = (torch.arange(size) / size)[None, None]
        zigzag = (torch.arange(size) + 1) % 3 - 1
        self.time_decay = nn.Parameter(-5 + 8 * channel ** (0.7 + 1.3 * depth))
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * zigzag)
        self.time_mix_k = nn.Parameter(ramp**rest)
        self.time_mix_v = nn.Parameter(ramp**rest + 0.3 * depth)
        self.time_mix_r = nn.Parameter(ramp ** (rest / 2))
        self.key = Linear(size, size, bias=False)
        self.value = Linear(size, size, bias=False)
        self.receptance = Linear(size, size, bias=False)
        self.output = Linear(size, size, bias=False)

    def forward(self, x: Tensor, shift: Tensor, state: State, run: Pass) -> tuple[Tensor, State]:
        for_k, for_v, for_r = mixes(x, shift, self.time_mix_k, self.time_mix_v, self.time_mix_r)
        k = self.key(run.fire("att_key", for_k))
        v = self.value(run.fire("att_value", for_v))
        r = self.receptance(run.fire("att_receptance", for_r))
        y, state = wkv(self.time_decay, self.time_first, k.transpose(0, 1), v.transpose(0, 1), state)
        return self.output(run.fire("att_output", torch.sigmoid(r) * y.transpose(0, 1))), state


class ChannelMix(nn.Module):
    """SRFFN: a squared-ReLU feed-forward layer with a gate."""

    MATRICES = ("key", "receptance", "value")

    def __init__(self, config: SpikeGPTConfig, layer: int) -> None:
        super().__init__()
        size = config.n_embd
        ramp = (torch.arange(size) / size)[None, None] ** (1 - layer / config.n_layer)
        self.time_mix_k = nn.Parameter(ramp.clone())
        self.time_mix_r = nn.Parameter(ramp.clone())
        self.key = Linear(size, 4 * size, bias=False)
        self.receptance = Linear(size, size, bias=False)
        self.value = Linear(4 * size, size, bias=False)

    def forward(self, x: Tensor, shift: Tensor, run: Pass, name: str) -> Tensor:
        for_k, for_r = mixes(x, shift, self.time_mix_k, self.time_mix_r)
        k = self.key(run.fire(f"{name}_key", for_k))
        r = self.receptance(run.fire(f"{name}_receptance", for_r))
        v: Tensor = self.value(run.fire(f"{name}_value", F.relu(k).square()))
        return torch.sigmoid(r) * v


class Block(nn.Module):
    """Time mix and channel mix, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: SpikeGPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.rescale = config.rescale
        self.ln0 = nn.LayerNorm(config.n_embd) if layer == 0 else None
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att: TimeMix | ChannelMix
        self.att = ChannelMix(config, layer) if config.ffn_pre and layer == 0 else TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        self.neurons = nn.ModuleDict()
        if config.spiking and config.placement == "canonical":
            self.neurons.update({name: Firing(config, config.n_embd) for name in ("att", "ffn")})
        elif config.spiking:
            for name, mix in (("att", self.att), ("ffn", self.ffn)):
                for matrix in mix.MATRICES:
                    self.neurons[f"{name}_{matrix}"] = Firing(config, getattr(mix, matrix).in_features)
            self._raise_output_gain()

    def _raise_output_gain(self) -> None:
        """Give the neurons behind the time mix gains that make up for its averaging.

        A channel with decay lambda averages over about n = (1 + lambda) / (1 - lambda) tokens, which leaves 1/sqrt(n)
        of the fluctuation of its input, and the sigmoid of the gate about half of that.
        """
        if isinstance(self.att, TimeMix):
            decay = torch.exp(-torch.exp(self.att.time_decay.detach()))
            averaged = ((1 + decay) / (1 - decay)).sqrt().clamp(max=MAX_AVERAGED**0.5)
            gain = cast(Firing, self.neurons["att_output"]).gain
            assert gain is not None
            gain.data.mul_(2 * averaged)

    def firings(self) -> list[tuple[str, Firing]]:
        """Return the spike sites by name."""
        return cast("list[tuple[str, Firing]]", list(self.neurons.items()))

    def forward(self, x: Tensor, state: BlockState, watch: Watch) -> tuple[Tensor, BlockState]:
        run = Pass(self, state.neurons, watch)
        shrink = 0.5 ** (self.layer // RESCALE_EVERY) if self.rescale else 1.0
        if self.ln0 is not None:
            x = self.ln0(x)
        at_att = self.ln1(x)
        if isinstance(self.att, TimeMix):
            mixed, wkv_state = self.att(at_att, state.att_shift, state.wkv, run)
        else:
            mixed, wkv_state = self.att(at_att, state.att_shift, run, "att"), state.wkv
        x = x + run.fire("att", mixed * shrink if self.rescale else mixed)
        at_ffn = self.ln2(x)
        mixed = self.ffn(at_ffn, state.ffn_shift, run, "ffn")
        x = x + run.fire("ffn", mixed * shrink if self.rescale else mixed)
        if self.rescale and (self.layer + 1) % RESCALE_EVERY == 0:
            x = x / 2
        return self.dropout(x), BlockState(at_att[-1], at_ffn[-1], wkv_state, run.new_states)


class SpikeGPT(SpikingLanguageModel):
    """The SpikeGPT language model; ``capabilities`` gain ``classify`` when ``num_classes`` is set."""

    capabilities = frozenset({"lm", "encode"})
    config: SpikeGPTConfig

    def __init__(self, config: SpikeGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.binarise = config.spiking and config.binary_embedding and config.placement == "canonical"
        if config.num_classes is not None:
            self.classify_head = Linear(config.n_embd, config.num_classes)
            self.capabilities = self.capabilities | {"classify"}
        self._init_matrices()
        if config.head_tying:
            self.head.weight = self.emb.weight

    def layers(self) -> list[Block]:
        """Return the blocks."""
        return cast("list[Block]", list(self.blocks))

    def _init_matrices(self) -> None:
        """Draw the matrices; the time parameters were set where they were made."""
        config = self.config
        if config.init == "torch":
            return
        if config.init != "scaled":
            nn.init.orthogonal_(self.emb.weight, 1e-4 * math.sqrt(max(config.vocab_size, config.n_embd)))
        ratio = config.vocab_size / config.n_embd
        nn.init.orthogonal_(self.head.weight, 0.5 * math.sqrt(max(ratio, 1.0)) if config.init != "scaled" else 0.5)
        by_init = {  # matrices not named keep PyTorch's default under "scaled", and are zero under "rwkv"
            "scaled": {"att.value": 1.0, "att.output": 4.0, "ffn.key": 2.0, "ffn.value": 2.5},
            "spikes": {"att.value": 1.0, "att.output": 0.2, "ffn.key": 4.0, "ffn.value": 0.1},
            "rwkv": {"att.value": 1.0, "ffn.key": 2.0},
        }
        from_spikes = config.init == "scaled" and config.spiking and config.placement == "spike_input"
        gains = by_init.get("spikes" if from_spikes else config.init)
        for block in self.layers():
            for name in ("att", "ffn"):
                mix = getattr(block, name)
                kind = "att" if isinstance(mix, TimeMix) else "ffn"
                for matrix in mix.MATRICES:
                    weight = getattr(mix, matrix).weight
                    gain = 1.0 if gains is None else gains.get(f"{kind}.{matrix}")
                    if gain is not None:
                        nn.init.orthogonal_(weight, gain)
                    elif config.init == "rwkv":
                        nn.init.zeros_(weight)
            if from_spikes and isinstance(block.att, TimeMix):
                # Spikes have a mean; it must not reach the time mix as an offset that no average removes.
                block.att.value.weight.data -= block.att.value.weight.data.mean(1, keepdim=True)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[BlockState, ...]:
        device, dtype = device or self.emb.weight.device, dtype or self.emb.weight.dtype
        zeros = torch.zeros(batch_size, self.config.n_embd, device=device, dtype=dtype)
        return tuple(
            BlockState(
                att_shift=zeros,
                ffn_shift=zeros,
                wkv=(zeros, zeros, torch.full_like(zeros, -1e38)),
                neurons={
                    name: firing.neuron.init_state((batch_size, firing.size), device=device, dtype=dtype)
                    for name, firing in block.firings()
                },
            )
            for block in self.layers()
        )

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        """Score ``tokens (B, S)``; returns logits ``(B, S, V)``, the next state and on request the spikes."""
        penalise = self.training and self.config.spiking and self.config.silence_penalty > 0
        watch = Watch({} if return_spikes else None, [] if penalise else None)
        x, state = self._hidden(tokens, state, watch)
        logits = self.head(x).transpose(0, 1)
        aux = {}
        if watch.silence is not None:
            aux["silence"] = self.config.silence_penalty * torch.stack(watch.silence).mean()
        if self.config.l2wrap:
            aux["l2wrap"] = 0.5e-4 * logits.float().amax(-1).square().mean()
        return LMOutput(logits, state, watch.spikes, aux)

    def encode(self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False) -> Encoding:
        """Return the hidden states of right-padded ``tokens (B, S)`` with true ``lengths (B,)``; there are no scores.

        A token's state has seen what precedes it alone.
        """
        watch = Watch({} if return_spikes else None, hidden=[])
        x, _ = self._hidden(tokens, None, watch)
        lengths = lengths.clamp(min=1)
        if self.config.pool == "mean":
            pooled = mean_over_steps(x.transpose(0, 1), lengths)
        else:
            pooled = x[lengths - 1, torch.arange(len(lengths), device=x.device)]
        assert watch.hidden is not None
        return Encoding(tuple(state.transpose(0, 1) for state in watch.hidden), (), pooled, watch.spikes)

    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return class logits ``(B, num_classes)``; tokens past a row's length are ignored."""
        if self.config.num_classes is None:
            return super().classify(tokens, lengths)
        return self.classify_pooled(self.encode(tokens, lengths).pooled)

    def classify_pooled(self, pooled: Tensor) -> Tensor:
        """Return class logits for ``pooled (B, C)`` of :meth:`encode`."""
        if self.config.num_classes is None:
            return super().classify_pooled(pooled)
        return cast(Tensor, self.classify_head(pooled))

    def _hidden(self, tokens: Tensor, state: State | None, watch: Watch) -> tuple[Tensor, State]:
        """Return what the heads read, ``(T, B, C)``, and the next state."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise UsageError(
                f"SpikeGPT reads token ids (B, S) with S at least 1, not {tuple(tokens.shape)}",
                hint="tokens[None] makes a batch of one",
            )
        if state is None:
            state = self.init_state(tokens.shape[0], device=tokens.device)
        x = self.emb(tokens.t())
        if self.binarise:
            x = spike(x, 0.0)  # Θ(x), with derivative 1 / (1 + (pi x)^2)
            if watch.spikes is not None:
                watch.spikes["embedding"] = x.transpose(0, 1)
        new_states = []
        for block, block_state in zip(self.blocks, state, strict=True):
            if watch.hidden is not None:
                watch.hidden.append(x)
            x, block_state = block(x, block_state, watch)
            new_states.append(block_state)
        x = self.ln_out(x)
        if watch.hidden is not None:
            watch.hidden.append(x)
        return x, tuple(new_states)

    def spike_sites(self) -> list[SpikeSite]:
        graph = self.graph()
        return [
            SpikeSite(op.name, op.emits, tuple(reader.name for reader in graph.readers(op.name)))  # type: ignore[arg-type]
            for op in graph
            if op.kind == "neuron"
        ]

    def graph(self) -> LMGraph:
        """Describe one token: what each matrix reads is real in the canonical placement, binary in ``spike_input``."""
        return LMGraph(tuple(_ops(self)))

    def to_reference(self, *, grads: bool = False) -> dict[str, Tensor]:
        """Return weights, or their gradients, under the released checkpoints' keys."""
        from spiking_lm_spikegpt.reference import to_reference

        return to_reference(self, grads=grads)


def _dynamics(neuron: Neuron) -> LIFDynamics | GIFDynamics | None:
    """Return what a neuron computes, if it has declared it."""
    config = neuron.config
    if type(config) is GIFConfig:
        return GIFDynamics(config.levels, config.threshold)
    return neuron.dynamics


def _ops(model: SpikeGPT) -> list[Op]:
    """List the operations of one token, in order."""
    listed: list[Op] = []
    size = model.config.n_embd

    def add(name: str, kind: Any, inputs: tuple[str, ...], emits: Any = "real", n: int = size, **more: Any) -> str:
        listed.append(Op(name, kind, inputs, emits, n, **more))
        return name

    def neuron(block: Block, site: str, source: str) -> str:
        """Add the neuron of a site, if there is one, and return what the next op reads."""
        if site not in block.neurons:
            return source
        firing = dict(block.firings())[site]
        name = f"blocks.{block.layer}.{site}"
        module = f"blocks.{block.layer}.neurons.{site}.neuron"
        learned = (
            {} if firing.gain is None else {x: f"blocks.{block.layer}.neurons.{site}.{x}" for x in ("gain", "bias")}
        )
        more: dict[str, Any] = {"module": module, "parameters": learned, "dynamics": _dynamics(firing.neuron)}
        more["state"] = ((block.layer, "neurons", site),)
        ops = (4 + len(learned)) * firing.size
        return add(name, "neuron", (source,), firing.neuron.spike_kind, firing.size, other_ops=ops, **more)

    def linear(block: Block, mix: str, matrix: str, source: str) -> str:
        name = f"blocks.{block.layer}.{mix}.{matrix}"
        n_out, n_in = getattr(getattr(block, mix), matrix).weight.shape
        source = neuron(block, f"{mix}_{matrix}", source)
        return add(name, "linear", (source,), n=n_out, weight=(n_out, n_in), module=name)

    def norm(name: str, source: str) -> str:
        dynamics = LayerNormDynamics(model.ln_out.eps)
        return add(name, "norm", (source,), module=name, dynamics=dynamics, other_ops=8 * size)

    gating = SigmoidGateDynamics()
    x = add("emb", "embedding", ("tokens",), module="emb")
    if model.binarise:
        above_zero = LIFDynamics(beta=0.0, gain=1.0, threshold=0.0)
        x = add("embedding", "neuron", (x,), "binary", dynamics=above_zero, other_ops=size)
    for i, block in enumerate(model.layers()):
        if block.ln0 is not None:
            x = norm(f"blocks.{i}.ln0", x)
        for mix_name, norm_name in (("att", "ln1"), ("ffn", "ln2")):
            p = f"blocks.{i}.{mix_name}"
            normed = norm(f"blocks.{i}.{norm_name}", x)
            mix = getattr(block, mix_name)

            def shifted(which: str, p: str = p, normed: str = normed, last: Any = (i, f"{mix_name}_shift")) -> str:
                mix = {"mix": f"{p}.time_mix_{which}"}
                more: dict[str, Any] = {"dynamics": TokenShiftDynamics(), "other_ops": 3 * size}
                return add(f"{p}.shift_{which}", "token_shift", (normed,), parameters=mix, state=(last,), **more)

            key = linear(block, mix_name, "key", shifted("k"))
            if isinstance(mix, TimeMix):
                value = linear(block, mix_name, "value", shifted("v"))
                gate = linear(block, mix_name, "receptance", shifted("r"))
                times = {"decay": f"{p}.time_decay", "first": f"{p}.time_first"}
                dynamics = None if block.rescale else WKVDynamics()  # the graph knows nothing of halvings
                sums = tuple((i, "wkv", part) for part in range(3))
                more: dict[str, Any] = {"dynamics": dynamics, "state": sums, "other_ops": 20 * size}
                memory = add(f"{p}.wkv", "wkv", (key, value), parameters=times, **more)
                gated = add(f"{p}.gate", "elementwise", (memory, gate), dynamics=gating, other_ops=5 * size)
                out = linear(block, mix_name, "output", gated)
            else:
                gate = linear(block, mix_name, "receptance", shifted("r"))
                relu = add(
                    f"{p}.relu2",
                    "elementwise",
                    (key,),
                    "graded",
                    4 * size,
                    dynamics=SquaredReLUDynamics(),
                    other_ops=8 * size,
                )
                value = linear(block, mix_name, "value", relu)
                out = add(f"{p}.gate", "elementwise", (value, gate), dynamics=gating, other_ops=5 * size)
            x = add(f"blocks.{i}.add_{mix_name}", "residual", (x, neuron(block, mix_name, out)), other_ops=size)
    x = norm("ln_out", x)
    vocab = model.config.vocab_size
    add("head", "linear", (x,), n=vocab, weight=(vocab, size), module="head")
    return listed
