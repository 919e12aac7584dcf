"""The 1 and 1.58-bit spiking language model: SpikingBERT's populations with weights in few levels.

6 L + 1 populations of integrate-and-fire neurons (Bal & Sengupta, arXiv 2308.10873; :mod:`~spiking_lm_bitspike.blocks`)
are simulated for T steps per text (:mod:`~spiking_lm_bitspike.dynamics`). What their rates would settle at is the clamp
network (:mod:`~spiking_lm_bitspike.equilibrium`), through which they are trained. Weights of one or 1.58 bits (Bal,
Jiang & Sengupta, arXiv 2405.02543) are :mod:`spiking_lm.weights`. In evaluation everything is read off the rates of a
simulation; in training, off the clamp network, with the values that ``config.replace`` puts in place of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm import create_neuron
from spiking_lm.errors import UsageError
from spiking_lm.graph import LMGraph
from spiking_lm.interfaces import Encoding, LMOutput, SpikeSite, SpikingEncoder, State, mean_over_steps
from spiking_lm.kernels.dense import Linear
from spiking_lm.watch import check_range
from spiking_lm.weights import QuantizedLinear, expect_packed
from spiking_lm_bitspike.blocks import MASKED, Batch, Block, Chain
from spiking_lm_bitspike.config import BitspikeConfig
from spiking_lm_bitspike.dynamics import Simulated, Spiking, pack_bits, simulate, unpack_bits
from spiking_lm_bitspike.equilibrium import Clamp, clamp_network, replaced
from spiking_lm_bitspike.ops import operations


class BlockState(NamedTuple):
    """The spikes of every simulation step of all earlier tokens, as bits: ``(B, n, T, H / 8)``."""

    keys: Tensor
    values: Tensor


class Bitspike(SpikingEncoder):
    """The language model; what it can do follows from ``causal``, ``masked`` and ``num_classes``."""

    config: BitspikeConfig

    def __init__(self, config: BitspikeConfig) -> None:
        super().__init__()
        self.config = config
        size = config.n_embd
        self.embed = nn.Embedding(config.vocab_size, size)
        self.positions = nn.Embedding(config.ctx_len, size)
        self.types = nn.Embedding(config.token_types, size) if config.token_types else None
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.chain = Chain(config)
        self.neurons = nn.ModuleDict(
            {
                name.replace(".", "_"): create_neuron(
                    "lif", beta=config.leak, gain=1.0, threshold=config.vth, reset="subtract"
                )
                for name in self.chain.names()
            }
        )
        scores_tokens = config.causal or config.masked
        self.head = Linear(size, config.vocab_size) if scores_tokens else None
        self.classifier = nn.Linear(size, config.num_classes) if config.num_classes else None
        self.teacher_map = nn.Linear(size, config.teacher_embd) if config.teacher_embd else None
        self._draw()
        granted = {"lm": config.causal, "mlm": config.masked, "classify": config.num_classes is not None}
        self.capabilities = frozenset({"encode"} | {name for name, held in granted.items() if held})

    def _draw(self) -> None:
        for table in (self.embed, self.positions, self.types):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        for layer in (self.head, self.classifier, self.teacher_map):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        if self.head is not None and self.config.tie_weights:
            self.head.weight = self.embed.weight

    def layers(self) -> list[Block]:
        """Return the blocks."""
        return cast("list[Block]", list(self.chain.blocks))

    # -- what it does with texts ---------------------------------------------------------------------------------------

    def encode(
        self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False, types: Tensor | None = None
    ) -> Encoding:
        """Return rates of the first population and of every block, and the attention scores of the clamp network.

        ``types (B, S)`` are the parts of the text that tokens belong to, where the model knows any.
        """
        batch = self._batch(tokens, lengths=lengths, types=types)
        hidden, clamped, simulated = self._read(batch, keep=self.chain.names() if return_spikes else ())
        spikes = simulated.spikes if simulated is not None and return_spikes else None
        return Encoding(hidden, tuple(clamped.scores), self._pool(hidden[-1], lengths), _by_token(spikes))

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        """Score ``tokens (B, S)``; the state is the spikes of all earlier keys and values.

        Raises UsageError for texts longer than ``ctx_len`` and for models that are not causal.
        """
        if not self.config.causal or self.head is None:
            return super().forward(tokens, state)
        batch = self._batch(tokens, state=state)
        cached = [f"{block.name}.{what}" for block in self.layers() for what in ("keys", "values")]
        hidden, clamped, simulated = self._read(batch, keep=self.chain.names() if return_spikes else cached)
        spikes = simulated.spikes if simulated is not None else self._paced(clamped, batch, cached)
        state = self.init_state(len(tokens), device=tokens.device) if state is None else state
        after = [
            BlockState(*(torch.cat([old, pack_bits(spikes[f"{block.name}.{what}"])], 1) for what, old in pairs))
            for block, pairs in (
                (block, before._asdict().items()) for block, before in zip(self.layers(), state, strict=True)
            )
        ]
        logits = self.head(hidden[-1])
        return LMOutput(logits, tuple(after), _by_token(spikes if return_spikes else None))

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Return the state before the first token: no bits yet, whatever ``dtype``."""
        if not self.config.causal:
            return super().init_state(batch_size, device=device, dtype=dtype)
        shape = (batch_size, 0, self.config.steps, -(-self.config.n_embd // 8))
        empty = torch.zeros(shape, dtype=torch.uint8, device=device or self.embed.weight.device)
        return tuple(BlockState(empty, empty) for _ in self.layers())

    def predict_masked(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return logits ``(B, S, V)`` of the token at every place, itself masked."""
        if not self.config.masked or self.head is None:
            return super().predict_masked(tokens, lengths)
        return cast(Tensor, self.head(self.encode(tokens, lengths).hidden[-1]))

    def classify_pooled(self, pooled: Tensor) -> Tensor:
        """Return class logits ``(B, num_classes)`` of pooled rates ``(B, H)``.

        As published, a ReLU lets no gradient through to neurons that did not fire.
        """
        if self.classifier is None:
            return super().classify_pooled(pooled)
        return cast(Tensor, self.classifier(F.relu(pooled)))

    def classify_also(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Return the class logits of the clamp network, which those of the spikes are to come near."""
        clamped = self.clamp(self._batch(tokens, lengths=lengths))
        last = clamped.values[self.chain.ends()[-1]]
        return {"clamp network": self.classify_pooled(self._pool(last, lengths))}

    @torch.no_grad()
    def rate_gap(self, tokens: Tensor, lengths: Tensor) -> dict[str, float]:
        """Return how far rates are from the clamp network's values, by population: the mean over true tokens.

        In ``mode: consistent`` it goes to zero as T grows; in ``mode: released`` only before the first norm.
        """
        batch = self._batch(tokens, lengths=lengths)
        rates, values = self.simulate(batch).rates, self.clamp(batch).values
        return {n: float((rates[n] - values[n])[batch.valid].abs().mean()) for n in self.chain.names()}

    @torch.no_grad()
    def steps_taken(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return how many simulation steps each text took, ``(B,)``: T, or with a ``tolerance`` perhaps fewer."""
        return self.simulate(self._batch(tokens, lengths=lengths)).steps

    def to_teacher(self, hidden: Tensor) -> Tensor:
        """Return rates ``(..., H)`` in a teacher's space, ``(..., teacher_embd)``; as they are without a map."""
        return hidden if self.teacher_map is None else cast(Tensor, self.teacher_map(hidden))

    # -- how ----------------------------------------------------------------------------------------------------------

    def clamp(self, batch: Batch, *, rates: Mapping[str, Tensor] | None = None, rounding: bool = False) -> Clamp:
        """Return the clamp network's values and attention scores for a batch."""
        return clamp_network(self.chain, self.config, batch, rates=rates, rounding=rounding)

    def simulate(self, batch: Batch, keep: Collection[str] = ()) -> Simulated:
        """Return rates of a simulation for a batch, and the spikes of the populations in ``keep``."""
        return simulate(self.chain, self.config, self._neurons(), batch, keep)

    def _neurons(self) -> dict[str, nn.Module]:
        return {name: self.neurons[name.replace(".", "_")] for name in self.chain.names()}

    def _batch(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        types: Tensor | None = None,
        state: State | None = None,
    ) -> Batch:
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise UsageError(f"Bitspike reads token ids (B, S) with S at least 1, not {tuple(tokens.shape)}")
        before = 0 if state is None else state[0].keys.shape[1]
        total = before + tokens.shape[1]
        if total > config.ctx_len:
            raise UsageError(
                f"the text has {total} tokens, and this model reads at most {config.ctx_len} (ctx_len)",
                hint="cut the text, or make a model with a larger ctx_len",
            )
        places = torch.arange(before, total, device=tokens.device)
        try:
            x = self.embed(tokens) + self.positions(places)
        except IndexError:
            check_range(tokens, config.vocab_size)
            raise
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        charge = self.norm(x)
        all_places = torch.arange(total, device=tokens.device)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        unseen = all_places > places[:, None] if config.causal else torch.zeros_like(all_places, dtype=torch.bool)[None]
        unseen = unseen[None]
        if lengths is not None:
            valid = all_places < lengths[:, None]
            unseen = unseen | ~valid[:, None]
        mask = (unseen[:, None] * MASKED).to(charge.dtype).expand(len(tokens), -1, -1, -1)
        masks: dict[str, Tensor] = {}
        if self.training and config.dropout:
            charge = F.dropout(charge, config.dropout)
            names = (f"{block.name}.{what}" for block in self.layers() for what in ("mixed", "output"))
            masks = {name: F.dropout(torch.ones_like(charge), config.dropout) for name in names}
        earlier: dict[str, Tensor] = {}
        if state is not None and before:
            for block, bits in zip(self.layers(), state, strict=True):
                for what, packed in bits._asdict().items():
                    earlier[f"{block.name}.{what}"] = unpack_bits(packed, config.n_embd, charge.dtype)
        return Batch(charge, mask, valid, masks, earlier)

    def _read(self, batch: Batch, keep: Collection[str]) -> tuple[tuple[Tensor, ...], Clamp, Simulated | None]:
        """Return what losses and heads read, ``(B, S, H)`` each, the clamp network, and the simulation if there was.

        ``keep`` are populations whose spikes are wanted where there is a simulation anyway.
        """
        ends, replace = self.chain.ends(), self.config.replace
        if not self.training:
            simulated = self.simulate(batch, keep)
            with torch.no_grad():
                clamped = self.clamp(batch)
            return tuple(simulated.rates[name].to(batch.charge.dtype) for name in ends), clamped, simulated
        whole = len(keep) == len(self.chain.names())
        sampled = self.simulate(batch, keep) if whole or replace.by in ("simulation", "populations") else None
        rates = sampled.rates if sampled is not None and replace.by == "populations" else None
        clamped = self.clamp(batch, rates=rates, rounding=replace.by == "rounding")
        values = [clamped.values[name] for name in ends]
        if sampled is not None and replace.by == "simulation":
            values = [replaced(v, sampled.rates[n], replace.share) for n, v in zip(ends, values, strict=True)]
        return tuple(values), clamped, sampled

    def _paced(self, clamped: Clamp, batch: Batch, names: list[str]) -> dict[str, Tensor]:
        """Return spikes ``(T, B, S, H)`` of populations at the clamp network's rates, for want of a simulation."""
        read = Spiking(self.config, self._neurons(), batch, names)
        with torch.no_grad():
            for name in names:
                current = self.config.vth * clamped.values[name]
                read.fire(name, current.expand(self.config.steps, *current.shape))
        return {name: pieces[0] for name, pieces in read.spikes.items()}

    def _pool(self, last: Tensor, lengths: Tensor) -> Tensor:
        return last[:, 0] if self.config.pooling == "cls" else mean_over_steps(last, lengths)

    # -- what it is ----------------------------------------------------------------------------------------------------

    def spike_sites(self) -> list[SpikeSite]:
        """Return the populations."""
        graph = self.graph()
        readers = {name: tuple(op.name for op in graph.readers(name)) for name in self.chain.names()}
        return [SpikeSite(name, "binary", feeds) for name, feeds in readers.items()]

    def graph(self) -> LMGraph:
        """Describe one token, over up to T spike steps; attention is charged for a text of ``ctx_len`` tokens."""
        return LMGraph(tuple(operations(self.config)))

    def num_parameters(self) -> int:
        """Count the weights, each once, packed ones too."""
        packed = (m for m in self.modules() if isinstance(m, QuantizedLinear) and m.packed)
        return super().num_parameters() + sum(layer.in_features * layer.out_features for layer in packed)

    def expect(self, stored: Mapping[str, Tensor]) -> None:
        """Make room for packed matrices. Raises CheckpointError when they are of another precision."""
        expect_packed(self, stored)

    def to_reference(self, *, grads: bool = False) -> dict[str, Tensor]:
        """Return weights, or their gradients, under the keys of the released SpikingBERT."""
        from spiking_lm_bitspike.reference import to_reference

        return to_reference(self, grads=grads)


def _by_token(spikes: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return spikes ``(T, B, S, N)`` as ``(B, S, T, N)``."""
    return None if spikes is None else {name: s.permute(1, 2, 0, 3) for name, s in spikes.items()}
