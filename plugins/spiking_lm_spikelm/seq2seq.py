"""SpikeLM that reads a source and writes a target: an encoder and a decoder of the blocks of :mod:`.model`.

The paper's generative half is an encoder-decoder; its code was never released. This is its smallest form. The encoder
is SpikeLM's. A block of the decoder is a causal block with one sub-block more, between the two that it has. With x the
target's and e the source's last hidden states, both of one spike step::

    q = Wq s(x) + bq      k = s'(Wk s(e) + bk)      v = s'(Wv s(e) + bv)        s': each step by itself
    y = LN(x + Wo s(softmax(q k^T / sqrt(d)) v))

In step t the decoder looks at step t of the encoder: nothing is averaged between them, only behind the last block.
Words, places, and the head's last matrix are shared; a source is of segment kind 0, a target of kind 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from spiking_lm.errors import UsageError
from spiking_lm.graph import LMGraph
from spiking_lm.interfaces import LMOutput, State
from spiking_lm.kernels.dense import linear
from spiking_lm_spikelm.config import SpikeLMSeq2SeqConfig
from spiking_lm_spikelm.model import (
    Attention,
    Block,
    Embedded,
    LayerCache,
    MaskedHead,
    Record,
    SpikingLinear,
    hide,
    project,
    seen_before,
    true_tokens,
)
from spiking_lm_spikelm.neuron import calibrating
from spiking_lm_spikelm.ops import Ops

SOURCE, TARGET = 0, 1
"""Kinds of segments."""

Looked = Sequence[Tensor]
"""Keys and values of a source, spikes ``(T, B, heads, S, d)``."""


class Seq2SeqState(NamedTuple):
    """What the decoder knows of the source, and of the target so far."""

    source: tuple[LayerCache, ...]
    """Keys and values of the source in each block of the decoder, ``(B, T, heads, S, d)``."""
    lengths: Tensor
    """True tokens of each source, ``(B,)``."""
    target: tuple[LayerCache, ...]
    """Those of the target so far, in each block."""


class CrossAttention(Attention):
    """Attention of a target to a source."""

    def look_at(self, source: Tensor, record: Record | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values of ``source (T, B, S, H)``, as spikes ``(T, B, heads, S, d)``."""
        k, v = project(source, (self.key, self.value), record)
        return self.fire(k, v, record)

    def find(self, x: Tensor, looked: Looked, mask: Tensor | None, record: Record | None = None) -> Tensor:
        """Return what the tokens ``x (T, B, N, H)`` of a target find in a source."""
        k, v = looked
        return self.mix(self.query(x, record), k, v, mask, record)


class DecoderBlock(Block):
    """A causal block that looks at a source before its feed-forward half."""

    def __init__(self, config: SpikeLMSeq2SeqConfig, name: str) -> None:
        super().__init__(config, name, causal=True)
        size = config.n_embd
        self.cross = CrossAttention(config, f"{name}.cross")
        self.cross_output = SpikingLinear(config, size, size, f"{name}.cross_output")
        self.cross_norm = nn.LayerNorm(size, config.norm_eps)

    def decode(
        self,
        x: Tensor,
        mask: Tensor,
        past: LayerCache | None,
        looked: Looked,
        source_mask: Tensor,
        record: Record | None = None,
    ) -> tuple[Tensor, LayerCache]:
        """Return ``x (T, B, N, H)`` after the block, and keys and values of all tokens of the target so far."""
        x, cache = self.attend(x, mask, past, record)
        found = self.cross.find(x, looked, source_mask, record)
        x = self.cross_norm(x + self.dropout(self.cross_output(found, record)))
        assert cache is not None
        return self.feed_forward(x, record), cache


class SpikeLMSeq2Seq(Embedded):
    """SpikeLM as an encoder and a decoder, with the capability ``seq2seq`` and no other."""

    config: SpikeLMSeq2SeqConfig
    capabilities = frozenset({"seq2seq"})

    def __init__(self, config: SpikeLMSeq2SeqConfig) -> None:
        super().__init__(config, kinds=2)
        self.encoder = nn.ModuleList(Block(config, f"encoder.{i}") for i in range(config.n_layer))
        self.decoder = nn.ModuleList(DecoderBlock(config, f"decoder.{i}") for i in range(config.decoder_layers))
        self.mlm_head = MaskedHead(config)
        self.init_weights()

    def encoder_blocks(self) -> list[Block]:
        """Return the blocks of the encoder."""
        return cast("list[Block]", list(self.encoder))

    def decoder_blocks(self) -> list[DecoderBlock]:
        """Return the blocks of the decoder."""
        return cast("list[DecoderBlock]", list(self.decoder))

    # -- what it computes ----------------------------------------------------------------------------------------------

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Refuse: a target begins with a source."""
        raise self._cannot("begins with a source: read() gives the first state")

    def read(self, source: Tensor, lengths: Tensor) -> Seq2SeqState:
        """Return the state before the first token of a target, for right-padded ``source (B, S)``, ``lengths (B,)``.

        It holds codes of spikes, through which no gradient goes. Raises UsageError for a source of more than
        ``ctx_len`` tokens.
        """
        blocks = self.decoder_blocks()
        looked = self._look_at(source, lengths, None)
        kept = tuple(block.cross.keep(*seen) for block, seen in zip(blocks, looked, strict=True))
        like = self.norm.weight
        return Seq2SeqState(kept, lengths, tuple(block.attention.empty_cache(len(source), like) for block in blocks))

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        """Score the next tokens of a target, ``tokens (B, N)``, going on from ``state``; spikes are the decoder's.

        Raises UsageError without a state, and for a target of more than ``ctx_len`` tokens.
        """
        if state is None:
            raise self._cannot("begins with a source: forward() goes on from the state that read() gives")
        pairs = zip(self.decoder_blocks(), state.source, strict=True)
        looked = [block.cross.recall(kept, self.norm.weight.dtype) for block, kept in pairs]
        record = Record(spikes=return_spikes)
        logits, target = self._decode(tokens, looked, state.lengths, state.target, record)
        return LMOutput(logits, state._replace(target=target), record.spikes, arrived=record.arrived or {})

    def score_pairs(self, source: Tensor, lengths: Tensor, target: Tensor, *, return_spikes: bool = False) -> LMOutput:
        """Score ``target (B, N)`` after ``source (B, S)`` in one pass, with gradients and the spikes of both halves."""
        record = Record(spikes=return_spikes)
        looked = self._look_at(source, lengths, record)
        logits, kept = self._decode(target, looked, lengths, None, record)
        caches = tuple(block.cross.keep(*seen) for block, seen in zip(self.decoder_blocks(), looked, strict=True))
        state = Seq2SeqState(caches, lengths, kept)
        return LMOutput(logits, state, record.spikes, arrived=record.arrived or {})

    @torch.no_grad()
    def calibrate(self, source: Tensor, lengths: Tensor, target: Tensor) -> None:
        """Set all amplitudes from pairs, best a batch of the training data, whatever they were before."""
        training = self.training
        self.eval()
        try:
            with calibrating(self):
                self.score_pairs(source, lengths, target)
        finally:
            self.train(training)

    def _look_at(self, source: Tensor, lengths: Tensor, record: Record | None) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of a source in each block of the decoder."""
        if source.ndim == 2 and lengths.shape != source.shape[:1]:
            raise UsageError(f"{len(source)} sources and lengths of shape {tuple(lengths.shape)}", hint="one for each")
        x = self.embed(source, SOURCE)
        mask = hide(true_tokens(lengths, source.shape[1]), x.dtype)
        for block in self.encoder_blocks():
            x, _ = block(x, mask, None, record)
        return [block.cross.look_at(x, record) for block in self.decoder_blocks()]

    def _decode(
        self,
        tokens: Tensor,
        looked: Sequence[Looked],
        lengths: Tensor,
        past: tuple[LayerCache, ...] | None,
        record: Record,
    ) -> tuple[Tensor, tuple[LayerCache, ...]]:
        """Return logits ``(B, N, V)`` after each of ``tokens (B, N)``, and the caches of the target behind them."""
        before = 0 if past is None else past[0].keys.shape[3]
        x = self.embed(tokens, TARGET, before)
        mask = hide(seen_before(before, tokens.shape[1], tokens.device), x.dtype)
        source_mask = hide(true_tokens(lengths, looked[0][0].shape[3]), x.dtype)
        caches = []
        for i, (block, seen) in enumerate(zip(self.decoder_blocks(), looked, strict=True)):
            x, cache = block.decode(x, mask, None if past is None else past[i], seen, source_mask, record)
            caches.append(cache)
        hidden = self.mlm_head.transform(x.mean(0))
        if record.arrived is not None:
            record.arrived["mlm_head"] = hidden
        return linear(hidden, self.word.effective_weight(), self.mlm_head.bias), tuple(caches)

    # -- what it is ----------------------------------------------------------------------------------------------------

    def graph(self) -> LMGraph:
        """Describe one token of a source and one of a target.

        Attention is charged for texts of ``ctx_len`` tokens: all of a source, the average context within a target.
        """
        ops, most = Ops(self, self.config), self.config.ctx_len
        source = ops.embedding()
        for i, block in enumerate(self.encoder_blocks()):
            source = ops.feed_forward(f"encoder.{i}", ops.self_attention(f"encoder.{i}", block, source, most))
        x = ops.embedding("target_")
        for i, block in enumerate(self.decoder_blocks()):
            name = f"decoder.{i}"
            x = ops.self_attention(name, block, x, (most + 1) / 2)
            found = ops.linear(f"{name}.cross_output", ops.attention(f"{name}.cross", block.cross, x, source, most))
            x = ops.norm(f"{name}.cross_norm", ops.residual(f"{name}.add_cross", x, found))
            x = ops.feed_forward(name, x)
        ops.head(ops.mean(x))
        return ops.graph()
