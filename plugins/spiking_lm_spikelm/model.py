"""SpikeLM in one file: BERT blocks whose matrices read elastic spikes (Xing et al., arXiv 2406.03287), and their twins.

Each token is worked on in T spike steps. Inside, tensors are time-major ``(T, B, S, H)``: the embedding is repeated T
times, and the mean over T is taken behind the last block. With s(x) the spikes of neurons that read x step by step::

    q = Wq s(x) + bq        k = s'(Wk s(x) + bk)        v = s'(Wv s(x) + bv)          s': each step by itself
    y = LN(x + Wo s(softmax(q k^T / sqrt(d)) v))        x = LN(y + Wd s(gelu(Wu s(y))))

So all six matrices read spikes, and each product of attention has spikes on one side; queries, softmax, norms, GELU,
residual additions, the embedding and the heads are real. Neurons remember from step to step, never from token to token:
tokens meet in attention alone, and a causal mask makes a language model of it. Without neurons (the dense twin) this is
BERT, in one step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm import create_neuron
from spiking_lm.errors import UsageError
from spiking_lm.graph import LMGraph
from spiking_lm.interfaces import (
    Encoding,
    LMOutput,
    Neuron,
    SpikeSite,
    SpikingEncoder,
    SpikingLanguageModel,
    State,
    mean_over_steps,
)
from spiking_lm.kernels import attention, products
from spiking_lm.kernels.dense import linear
from spiking_lm.watch import check_range
from spiking_lm.weights import QuantizedLinear, expect_packed
from spiking_lm_spikelm.config import SpikeLMConfig, SpikeLMSizes
from spiking_lm_spikelm.embedding import QuantizedEmbedding
from spiking_lm_spikelm.neuron import Elastic, calibrating
from spiking_lm_spikelm.ops import Ops, spike_sites

MASKED = -1e4
"""What stands in ``Encoding.scores`` where nobody looks."""


class LayerCache(NamedTuple):
    """Keys and values of the tokens so far, ``(B, T, heads, L, d)``: codes of spikes as int8, else real numbers."""

    keys: Tensor
    values: Tensor


class Record:
    """What is wanted of a pass beside its result; each part is None unless it is asked for."""

    def __init__(self, *, spikes: bool = False, scores: bool = False) -> None:
        self.spikes: dict[str, Tensor] | None = {} if spikes else None
        self.arrived: dict[str, Tensor] | None = {} if spikes else None
        self.scores: list[Tensor] | None = [] if scores else None

    def fired(self, site: str, neuron: Neuron | None, spikes: Tensor, *, feeds: str | None = None) -> None:
        """Take down the spikes ``(T, B, S, N)`` of a site that has neurons, and what the matrix ``feeds`` reads."""
        if self.spikes is None or self.arrived is None:
            return
        seen = (spikes if neuron is None else codes(neuron, spikes)).movedim(0, 2)
        if neuron is not None:
            self.spikes[site] = seen
        if feeds is not None:
            self.arrived[feeds] = seen


def make_neuron(config: SpikeLMSizes, *, memory: bool = True) -> Neuron | None:
    """Return a population as the config says; without ``memory`` an elastic one forgets each step."""
    if config.neuron is None:
        return None
    params = dict(config.neuron)
    name = params.pop("type")
    if name == "elastic":
        params["steps"] = params.get("steps") or config.steps
        params["beta"] = params.get("beta", 0.25) if memory else 0.0
    return create_neuron(name, **params)


def fire(neuron: Neuron | None, x: Tensor, *, memory: bool = True) -> Tensor:
    """Return the spikes of currents ``x (T, B, S, N)``; without ``memory``, each step begins at rest."""
    if neuron is None:
        return x
    if isinstance(neuron, Elastic):
        return neuron.fire(x)
    spikes, _ = neuron(x.flatten(1, 2).transpose(0, 1) if memory else x.flatten(0, 2)[:, None])
    return cast(Tensor, spikes.transpose(0, 1) if memory else spikes[:, 0]).reshape(x.shape)


def codes(neuron: Neuron, spikes: Tensor) -> Tensor:
    """Return spikes as a matrix needs them that multiplies by the amplitude afterwards: elastic ones as -1, 0 and 1."""
    return spikes.sign() if isinstance(neuron, Elastic) else spikes


def interchangeable(*neurons: Neuron | None) -> bool:
    """Tell whether populations give the same spikes for the same currents, so that one of them need do."""
    first = neurons[0]
    if isinstance(first, Elastic):
        return first.equals(*neurons[1:])
    return first is None or next(first.parameters(), next(first.buffers(), None)) is None


class SpikingLinear(QuantizedLinear):
    """A matrix and the neurons in front of it."""

    def __init__(self, config: SpikeLMSizes, n_in: int, n_out: int, name: str) -> None:
        super().__init__(n_in, n_out, bits=config.weights)
        self.neuron, self.name = make_neuron(config), name

    def forward(self, x: Tensor, record: Record | None = None, *, gelu: bool = False) -> Tensor:
        """Multiply the spikes for currents ``x (T, B, S, I)``, or for gelu(x), with the matrix."""
        (y,) = project(x, (self,), record, gelu=gelu)
        return y


def project(
    x: Tensor, layers: Sequence[SpikingLinear], record: Record | None = None, *, gelu: bool = False
) -> list[Tensor]:
    """Return what each of ``layers`` makes of the same currents ``x (T, B, S, I)``, or gelu(x).

    Where their neurons are interchangeable, one population spikes for all of them.
    """
    if len(layers) > 1 and not interchangeable(*(layer.neuron for layer in layers)):
        return [project(x, (layer,), record, gelu=gelu)[0] for layer in layers]
    neuron = layers[0].neuron
    weights, biases = [layer.effective_weight().t() for layer in layers], [layer.bias for layer in layers]
    ys: Sequence[Tensor]
    if isinstance(neuron, Elastic) and (record is None or record.spikes is None):  # nobody wants to see the spikes
        ys = neuron.fire_into(x.flatten(1, -2), weights, biases, gelu=gelu)
    else:
        spikes = fire(neuron, F.gelu(x) if gelu else x)
        if record is not None:
            for layer in layers:
                record.fired(f"{layer.name}.neuron", layer.neuron, spikes, feeds=layer.name)
        ys = products.linears(spikes.flatten(0, -2), weights, biases)
    return [y.view(*x.shape[:-1], -1) for y in ys]


class StepDropout(nn.Dropout):
    """Dropout with one mask for all spike steps: what a token loses, it loses in each of them."""

    def mask(self, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """Draw what to multiply with, 0 or 1/(1 - p), or return None where nothing is dropped.

        An element costs 16 random bits, a quarter of what torch's own dropout takes for one; p is a multiple of 2^-16.
        """
        if not self.training or self.p == 0:
            return None
        n, dropped = math.prod(shape), min(max(1, round(self.p * 2**16)), 2**16 - 1)
        words = torch.empty((n + 3) // 4, dtype=torch.int64, device=like.device).random_(-(2**63), None)
        kept = words.view(torch.int16)[:n].view(*shape) >= dropped - 2**15
        return kept * like.new_tensor(2**16 / (2**16 - dropped))

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x (T, ...)``."""
        mask = self.mask(x.shape[1:], x)
        return x if mask is None else x * mask


class Attention(nn.Module):
    """Attention in which keys and values are spikes; softmax and queries are real."""

    def __init__(self, config: SpikeLMSizes, name: str, *, causal: bool = False) -> None:
        super().__init__()
        self.config, self.name, self.causal = config, name, causal
        size = config.n_embd
        self.query = SpikingLinear(config, size, size, f"{name}.query")
        self.key = SpikingLinear(config, size, size, f"{name}.key")
        self.value = SpikingLinear(config, size, size, f"{name}.value")
        self.key_neuron = make_neuron(config, memory=False)
        self.value_neuron = make_neuron(config, memory=False)
        self.dropout = StepDropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: LayerCache | None = None, record: Record | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        """Mix ``x (T, B, S, H)`` with the tokens before it; ``mask (B or 1, 1, S or 1, L)`` is added to the scores.

        The cache of a causal model holds all tokens; an encoder has none.
        """
        q, k, v = project(x, (self.query, self.key, self.value), record)
        key, value = self.key_neuron, self.value_neuron
        seen = record is not None and (record.spikes is not None or record.scores is not None)
        unseen = not seen and not self.causal  # nobody wants to see the spikes, or keep them
        if unseen and isinstance(key, Elastic) and isinstance(value, Elastic) and not key.config.learn_alpha:
            amplitudes = torch.stack([key.settled(k), value.settled(v)])
            return self.mix(q, self._by_head(k), self._by_head(v), mask, amplitudes=amplitudes), None
        k, v = self.fire(k, v, record)
        cache = None
        if self.causal:
            new = self.keep(k, v)
            cache = new
            if past is not None and past.keys.shape[3]:
                k, v = (torch.cat(pair, 3) for pair in zip(self.recall(past, k.dtype), (k, v), strict=True))
                cache = LayerCache(*(torch.cat(pair, 3) for pair in zip(past, new, strict=True)))
        return self.mix(q, k, v, mask, record), cache

    def fire(self, k: Tensor, v: Tensor, record: Record | None) -> tuple[Tensor, Tensor]:
        """Return the spikes of keys and values ``(T, B, L, H)``, by head: ``(T, B, heads, L, d)``."""
        k = fire(self.key_neuron, k, memory=False)
        v = fire(self.value_neuron, v, memory=False)
        if record is not None:
            record.fired(f"{self.name}.key_neuron", self.key_neuron, k)
            record.fired(f"{self.name}.value_neuron", self.value_neuron, v)
        return self._by_head(k), self._by_head(v)

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        record: Record | None = None,
        amplitudes: Tensor | None = None,
    ) -> Tensor:
        """Return what queries ``(T, B, S, H)`` find in keys and values ``(T, B, heads, L, d)``: ``(T, B, S, H)``.

        With ``amplitudes (2, T)``, keys and values are currents that have yet to fire.
        """
        by_head = self._by_head(q)
        if record is not None and record.scores is not None:
            scores = by_head @ k.transpose(-1, -2) / by_head.shape[-1] ** 0.5
            record.scores.append((scores if mask is None else scores.masked_fill(mask <= MASKED, MASKED)).mean(0))
        keep = self.dropout.mask((*by_head.shape[1:4], k.shape[3]), q)
        bits = self.key_neuron.config.bits if isinstance(self.key_neuron, Elastic) else 2
        y = attention(by_head, k, v, mask, keep, amplitudes, bits=bits)
        return y.transpose(2, 3).reshape(q.shape)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:3], self.config.n_head, -1).transpose(2, 3)

    def keep(self, k: Tensor, v: Tensor) -> LayerCache:
        """Return what a cache holds of the spikes of keys and values ``(T, B, heads, L, d)``."""
        pairs = ((self.key_neuron, k), (self.value_neuron, v))
        kept = [x if neuron is None else codes(neuron, x) for neuron, x in pairs]
        if self.cache_dtype is not None:
            kept = [x.detach().to(self.cache_dtype) for x in kept]
        return LayerCache(*(x.transpose(0, 1) for x in kept))

    def recall(self, cache: LayerCache, dtype: torch.dtype) -> list[Tensor]:
        """Return the spikes of keys and values, ``(T, B, heads, L, d)``, that a cache holds."""
        spikes = []
        for neuron, kept in zip((self.key_neuron, self.value_neuron), cache, strict=True):
            x = kept.transpose(0, 1).to(dtype)
            if isinstance(neuron, Elastic):
                x = x * neuron.amplitudes(len(x)).to(dtype).view(-1, 1, 1, 1, 1)
            spikes.append(x)
        return spikes

    def empty_cache(self, batch_size: int, like: Tensor) -> LayerCache:
        """Return a cache without tokens, of the type of ``like`` where spikes are no small integers."""
        c = self.config
        shape = (batch_size, c.time_steps, c.n_head, 0, c.n_embd // c.n_head)
        keys, values = (like.new_zeros(shape, dtype=self.cache_dtype) for _ in range(2))
        return LayerCache(keys, values)

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """What keys and values are cached as: int8 where it holds their codes, None for the type they have."""
        neuron = self.key_neuron
        small = isinstance(neuron, Elastic) or (neuron is not None and neuron.spike_kind in ("binary", "ternary"))
        return torch.int8 if small else None


class Block(nn.Module):
    """Attention and feed-forward, each added to what they read and normalised behind that."""

    def __init__(self, config: SpikeLMSizes, name: str, *, causal: bool = False) -> None:
        super().__init__()
        size = config.n_embd
        self.attention = Attention(config, f"{name}.attention", causal=causal)
        self.output = SpikingLinear(config, size, size, f"{name}.output")
        self.norm1 = nn.LayerNorm(size, config.norm_eps)
        self.up = SpikingLinear(config, size, config.inner, f"{name}.up")
        self.down = SpikingLinear(config, config.inner, size, f"{name}.down")
        self.norm2 = nn.LayerNorm(size, config.norm_eps)
        self.dropout = StepDropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: LayerCache | None = None, record: Record | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        """Return ``x (T, B, S, H)`` after the block, and the cache of :class:`Attention`."""
        x, cache = self.attend(x, mask, past, record)
        return self.feed_forward(x, record), cache

    def attend(
        self, x: Tensor, mask: Tensor | None, past: LayerCache | None, record: Record | None
    ) -> tuple[Tensor, LayerCache | None]:
        """Return ``x (T, B, S, H)`` after the first half of the block, and the cache."""
        mixed, cache = self.attention(x, mask, past, record)
        return self.norm1(x + self.dropout(self.output(mixed, record))), cache

    def feed_forward(self, x: Tensor, record: Record | None) -> Tensor:
        """Return ``x (T, B, S, H)`` after the second half of the block."""
        return cast(Tensor, self.norm2(x + self.dropout(self.down(self.up(x, record), record, gelu=True))))


class MaskedHead(nn.Module):
    """Predicts words from hidden states; its last matrix is the word embedding."""

    def __init__(self, config: SpikeLMSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(config.n_embd, config.n_embd)
        self.norm = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = F.relu if config.mlm_activation == "relu" else F.gelu

    def transform(self, x: Tensor) -> Tensor:
        """Return what the word embedding is multiplied with."""
        return cast(Tensor, self.norm(self.activation(self.dense(x))))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Return logits ``(..., V)`` for hidden states ``x (..., H)`` and the word embedding ``(V, H)``."""
        return F.linear(self.transform(x), words, self.bias)


def seen_before(before: int, length: int, device: torch.device) -> Tensor:
    """Return ``(1, 1, length, before + length)``: whether a token comes before one, or is that one."""
    place = torch.arange(before + length, device=device)
    return (place <= place[before:, None])[None, None]


def true_tokens(lengths: Tensor, length: int) -> Tensor:
    """Return ``(B, 1, 1, length)``: whether a token is a true one of a row and no padding."""
    return (torch.arange(length, device=lengths.device) < lengths.clamp(min=1)[:, None])[:, None, None]


def hide(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores so that only what is ``seen`` counts."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


class Embedded(SpikingLanguageModel):
    """What every form of SpikeLM begins with: the embedding of words, places and kinds of segments."""

    config: SpikeLMSizes

    def __init__(self, config: SpikeLMSizes, kinds: int) -> None:
        super().__init__()
        self.config = config
        size = config.n_embd
        self.word = QuantizedEmbedding(config.vocab_size, size, config.embedding)
        self.position = nn.Embedding(config.ctx_len, size)
        self.kind = nn.Embedding(kinds, size)
        self.norm = nn.LayerNorm(size, config.norm_eps)
        self.dropout = StepDropout(config.dropout)

    def init_weights(self) -> None:
        """Draw the weights of all matrices and tables."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                fan_in = module.weight.shape[1]
                nn.init.normal_(module.weight, std=0.02 if self.config.init == "bert" else fan_in**-0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def expect(self, stored: Any) -> None:
        """Make room for packed ternary and binary matrices."""
        expect_packed(self, stored)

    def embed(self, tokens: Tensor, kind: Tensor | int = 0, before: int = 0) -> Tensor:
        """Return what the first block reads of ``tokens (B, S)`` in each of the steps, ``(T, B, S, H)``.

        ``kind`` is that of all their segments, or ``(B, S)``; ``before`` is how many tokens went before them. Raises
        UsageError for what is no batch of texts, and for more than ``ctx_len`` tokens.
        """
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise UsageError(
                f"SpikeLM reads token ids (B, S) with S at least 1, not {tuple(tokens.shape)}",
                hint="tokens[None] makes a batch of one",
            )
        end = before + tokens.shape[1]
        if end > config.ctx_len:
            raise UsageError(
                f"a text of {end} tokens for a model that knows {config.ctx_len} positions",
                hint="cut the text, or train a model with a greater ctx_len",
            )
        try:
            x = self.word(tokens)
        except IndexError:
            check_range(tokens, config.vocab_size)
            raise
        if self.training and config.word_dropout:
            x = x * (torch.rand(tokens.shape, device=x.device) >= config.word_dropout)[..., None]
        kinds = self.kind.weight[kind] if isinstance(kind, int) else self.kind(kind)
        x = self.norm(x + self.position.weight[before:end] + kinds)
        return cast(Tensor, self.dropout(x[None]).expand(config.time_steps, *x.shape))

    def spike_sites(self) -> list[SpikeSite]:
        """Return the inputs of the matrices, and keys and values; the dense twin has none."""
        return spike_sites(self.graph())


class SpikeLM(Embedded, SpikingEncoder):
    """SpikeLM as an encoder or, with ``causal``, as a language model; its heads are its further capabilities."""

    config: SpikeLMConfig

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__(config, config.type_vocab_size)
        size = config.n_embd
        self.blocks = nn.ModuleList(Block(config, f"blocks.{i}", causal=config.causal) for i in range(config.n_layer))
        self.pooler = nn.Linear(size, size) if config.pooling == "cls" else None
        self.mlm_head = MaskedHead(config) if config.mlm or config.causal else None
        self.nsp_head = nn.Linear(size, 2) if config.nsp else None
        self.classify_head = nn.Linear(size, config.num_classes) if config.num_classes is not None else None
        heads = {"lm": config.causal, "mlm": config.mlm and not config.causal, "classify": self.classify_head}
        self.capabilities = frozenset({"encode", *(name for name, there in heads.items() if there)})
        self.init_weights()

    def layers(self) -> list[Block]:
        """Return the blocks."""
        return cast("list[Block]", list(self.blocks))

    # -- what it computes ----------------------------------------------------------------------------------------------

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[LayerCache, ...]:
        """Return empty caches. Raises UsageError for an encoder."""
        if not self.config.causal:
            return cast("tuple[LayerCache, ...]", super().init_state(batch_size))
        like = self.norm.weight.new_zeros((), device=device, dtype=dtype)
        return tuple(block.attention.empty_cache(batch_size, like) for block in self.layers())

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        """Score ``tokens (B, S)`` of a causal model; returns logits ``(B, S, V)``, the next state and the spikes.

        Raises UsageError for an encoder, and for a text of more than ``ctx_len`` tokens.
        """
        if self.mlm_head is None or not self.config.causal:
            return super().forward(tokens, state)
        record = Record(spikes=return_spikes)
        hidden, after = self._run(tokens, past=state, record=record)
        x = self.mlm_head.transform(hidden[-1].mean(0))
        logits = linear(x, self.word.effective_weight(), self.mlm_head.bias)
        arrived = {} if record.arrived is None else {**record.arrived, "mlm_head": x}
        return LMOutput(logits, after, record.spikes, arrived=arrived)

    def encode(
        self, tokens: Tensor, lengths: Tensor, *, types: Tensor | None = None, return_spikes: bool = False
    ) -> Encoding:
        """Return the hidden states of right-padded ``tokens (B, S)`` with true ``lengths (B,)``, means over the steps.

        ``types (B, S)`` are the kinds of segments; None: 0 everywhere.
        """
        record = Record(spikes=return_spikes, scores=True)
        hidden, _ = self._run(tokens, lengths, types, record=record)
        means = tuple(x.mean(0) for x in hidden)
        assert record.scores is not None
        return Encoding(means, tuple(record.scores), self._pool(means[-1], lengths), record.spikes, record.arrived)

    def predict_masked(self, tokens: Tensor, lengths: Tensor, *, types: Tensor | None = None) -> Tensor:
        """Return logits ``(B, S, V)`` of the word at every place of right-padded ``tokens (B, S)``."""
        if self.mlm_head is None or self.config.causal:
            return super().predict_masked(tokens, lengths)
        hidden, _ = self._run(tokens, lengths, types)
        return cast(Tensor, self.mlm_head(hidden[-1].mean(0), self.word.effective_weight()))

    def predict_next(self, tokens: Tensor, lengths: Tensor, types: Tensor) -> Tensor:
        """Return logits ``(B, 2)``: that the segment of kind 1 follows that of kind 0 (class 0), or does not (1)."""
        if self.nsp_head is None:
            raise self._cannot("has no head for the next sentence")
        hidden, _ = self._run(tokens, lengths, types)
        return cast(Tensor, self.nsp_head(self._pool(hidden[-1].mean(0), lengths)))

    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return class logits ``(B, num_classes)``; with one class, the value that regression predicts."""
        if self.classify_head is None:
            return super().classify(tokens, lengths)
        hidden, _ = self._run(tokens, lengths)
        return self.classify_pooled(self._pool(hidden[-1].mean(0), lengths))

    def classify_pooled(self, pooled: Tensor) -> Tensor:
        """Return class logits for ``pooled (B, H)`` of :meth:`encode`."""
        if self.classify_head is None:
            raise self._cannot("has no classification head")
        return cast(Tensor, self.classify_head(self.dropout(pooled[None])[0]))

    @torch.no_grad()
    def calibrate(self, tokens: Tensor, lengths: Tensor | None = None) -> None:
        """Set all amplitudes from ``tokens (B, S)``, best a batch of the training data, whatever they were before."""
        training = self.training
        self.eval()
        try:
            with calibrating(self):
                self._run(tokens, lengths)
        finally:
            self.train(training)

    def _pool(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.pooler is not None:
            return torch.tanh(self.pooler(x[:, 0]))
        return mean_over_steps(x, lengths.clamp(min=1))

    def _run(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        types: Tensor | None = None,
        *,
        past: tuple[LayerCache, ...] | None = None,
        record: Record | None = None,
    ) -> tuple[list[Tensor], tuple[LayerCache | None, ...]]:
        """Return what goes into each block and out of the last, ``(T, B, S, H)``, and the caches after the text."""
        before = 0 if past is None else past[0].keys.shape[3]
        hidden = [self.embed(tokens, 0 if types is None else types, before)]
        mask = self._mask(tokens, lengths, before, hidden[0].dtype)
        caches = []
        for layer, block in enumerate(self.layers()):
            x, cache = block(hidden[-1], mask, None if past is None else past[layer], record)
            hidden.append(x)
            caches.append(cache)
        return hidden, tuple(caches)

    def _mask(self, tokens: Tensor, lengths: Tensor | None, before: int, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the scores, ``(B or 1, 1, S or 1, L)``; None where every token sees all others."""
        seen = seen_before(before, tokens.shape[1], tokens.device) if self.config.causal else None
        if lengths is not None:
            true = true_tokens(lengths, before + tokens.shape[1])
            seen = true if seen is None else seen & true
        return None if seen is None else hide(seen, dtype)

    # -- what it is ----------------------------------------------------------------------------------------------------

    def graph(self) -> LMGraph:
        """Describe one token; attention is charged for the average context of a text of ``ctx_len`` tokens."""
        ops, causal = Ops(self, self.config), self.config.causal
        context = (self.config.ctx_len + 1) / 2 if causal else self.config.ctx_len
        x = ops.embedding()
        for i, block in enumerate(self.layers()):
            x = ops.feed_forward(f"blocks.{i}", ops.self_attention(f"blocks.{i}", block, x, context))
        x = ops.mean(x)
        if causal:
            ops.head(x)
        return ops.graph()

    def to_reference(self, *, grads: bool = False) -> dict[str, Tensor]:
        """Return weights, or their gradients, under the keys of the released code."""
        from spiking_lm_spikelm.reference import to_reference

        return to_reference(self, grads=grads)
