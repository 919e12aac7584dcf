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

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm import create_neuron
from spiking_lm.errors import UsageError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.interfaces import Encoding, LMOutput, Neuron, SpikeSite, SpikingEncoder, State, mean_over_steps
from spiking_lm.kernels import products
from spiking_lm.watch import check_range
from spiking_lm.weights import QuantizedLinear, expect_packed
from spiking_lm_spikelm.config import SpikeLMConfig
from spiking_lm_spikelm.embedding import QuantizedEmbedding
from spiking_lm_spikelm.neuron import Elastic, calibrating

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


def make_neuron(config: SpikeLMConfig, *, memory: bool = True) -> Neuron | None:
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

    def __init__(self, config: SpikeLMConfig, n_in: int, n_out: int, name: str) -> None:
        super().__init__(n_in, n_out, bits=config.weights)
        self.neuron, self.name = make_neuron(config), name

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        """Multiply the spikes for currents ``x (T, B, S, I)`` with the matrix."""
        (y,) = project(x, (self,), record)
        return y


def project(x: Tensor, layers: Sequence[SpikingLinear], record: Record | None = None) -> list[Tensor]:
    """Return what each of ``layers`` makes of the same currents ``x (T, B, S, I)``.

    Where their neurons are interchangeable, one population spikes for all of them, and their matrices are one.
    """
    if len(layers) > 1 and not interchangeable(*(layer.neuron for layer in layers)):
        return [project(x, (layer,), record)[0] for layer in layers]
    spikes = fire(layers[0].neuron, x)
    if record is not None:
        for layer in layers:
            record.fired(f"{layer.name}.neuron", layer.neuron, spikes, feeds=layer.name)
    weights: list[Tensor] = [layer.effective_weight() for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers]
    weight, bias = (torch.cat(weights), torch.cat(biases)) if len(layers) > 1 else (weights[0], biases[0])
    y = products.linear(spikes.flatten(0, -2), weight.t(), bias)
    return list(torch.split(y.view(*x.shape[:-1], -1), [layer.out_features for layer in layers], -1))


class StepDropout(nn.Dropout):
    """Dropout with one mask for all spike steps: what a token loses, it loses in each of them."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x (T, ...)``."""
        if not self.training or self.p == 0 or len(x) == 1:
            return super().forward(x)
        return x * F.dropout(torch.ones_like(x[0]), self.p)


class Attention(nn.Module):
    """Attention in which keys and values are spikes; softmax and queries are real."""

    def __init__(self, config: SpikeLMConfig, name: str) -> None:
        super().__init__()
        self.config, self.name = config, name
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
        k = fire(self.key_neuron, k, memory=False)
        v = fire(self.value_neuron, v, memory=False)
        if record is not None:
            record.fired(f"{self.name}.key_neuron", self.key_neuron, k)
            record.fired(f"{self.name}.value_neuron", self.value_neuron, v)
        q, k, v = (y.reshape(*y.shape[:3], self.config.n_head, -1).transpose(2, 3) for y in (q, k, v))
        cache = None
        if self.config.causal:
            k, keys = self._remember(self.key_neuron, k, past and past.keys)
            v, values = self._remember(self.value_neuron, v, past and past.values)
            cache = LayerCache(keys, values)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + mask
        if record is not None and record.scores is not None:
            shown = scores if mask is None else scores.masked_fill(mask <= MASKED, MASKED)
            record.scores.append(shown.mean(0))
        y = self.dropout(scores.softmax(-1)) @ v
        return y.transpose(2, 3).reshape(x.shape), cache

    def _remember(self, neuron: Neuron | None, new: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys or values of all tokens, ``(T, B, heads, L, d)``, and the cache that holds them."""
        kept = new if neuron is None else codes(neuron, new)
        if self.cache_dtype is not None:
            kept = kept.detach().to(self.cache_dtype)
        kept = kept.transpose(0, 1)
        if past is None or past.shape[3] == 0:
            return new, kept
        before = past.transpose(0, 1).to(new.dtype)
        if isinstance(neuron, Elastic):
            before = before * neuron.amplitudes(len(new)).to(new.dtype).view(-1, 1, 1, 1, 1)
        return torch.cat([before, new], 3), torch.cat([past, kept], 3)

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """What keys and values are cached as: int8 where it holds their codes, None for the type they have."""
        neuron = self.key_neuron
        small = isinstance(neuron, Elastic) or (neuron is not None and neuron.spike_kind in ("binary", "ternary"))
        return torch.int8 if small else None


class Block(nn.Module):
    """Attention and feed-forward, each added to what they read and normalised behind that."""

    def __init__(self, config: SpikeLMConfig, layer: int) -> None:
        super().__init__()
        name, size = f"blocks.{layer}", config.n_embd
        self.attention = Attention(config, f"{name}.attention")
        self.output = SpikingLinear(config, size, size, f"{name}.output")
        self.norm1 = nn.LayerNorm(size, config.norm_eps)
        self.up = SpikingLinear(config, size, config.inner, f"{name}.up")
        self.down = SpikingLinear(config, config.inner, size, f"{name}.down")
        self.norm2 = nn.LayerNorm(size, config.norm_eps)
        self.dropout = StepDropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: LayerCache | None = None, record: Record | None = None
    ) -> tuple[Tensor, LayerCache | None]:
        mixed, cache = self.attention(x, mask, past, record)
        x = self.norm1(x + self.dropout(self.output(mixed, record)))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x, record)), record))), cache


class MaskedHead(nn.Module):
    """Predicts words from hidden states; its last matrix is the word embedding."""

    def __init__(self, config: SpikeLMConfig) -> None:
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


class SpikeLM(SpikingEncoder):
    """SpikeLM as an encoder or, with ``causal``, as a language model; its heads are its further capabilities."""

    config: SpikeLMConfig

    def __init__(self, config: SpikeLMConfig) -> None:
        super().__init__()
        self.config = config
        size = config.n_embd
        self.word = QuantizedEmbedding(config.vocab_size, size, config.embedding)
        self.position = nn.Embedding(config.ctx_len, size)
        self.kind = nn.Embedding(config.type_vocab_size, size)
        self.norm = nn.LayerNorm(size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.pooler = nn.Linear(size, size) if config.pooling == "cls" else None
        self.mlm_head = MaskedHead(config) if config.mlm or config.causal else None
        self.nsp_head = nn.Linear(size, 2) if config.nsp else None
        self.classify_head = nn.Linear(size, config.num_classes) if config.num_classes is not None else None
        heads = {"lm": config.causal, "mlm": config.mlm and not config.causal, "classify": self.classify_head}
        self.capabilities = frozenset({"encode", *(name for name, there in heads.items() if there)})
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                fan_in = module.weight.shape[1]
                nn.init.normal_(module.weight, std=0.02 if self.config.init == "bert" else fan_in**-0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def layers(self) -> list[Block]:
        """Return the blocks."""
        return cast("list[Block]", list(self.blocks))

    def expect(self, stored: Any) -> None:
        """Make room for packed ternary and binary matrices."""
        expect_packed(self, stored)

    # -- what it computes ----------------------------------------------------------------------------------------------

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[LayerCache, ...]:
        """Return empty caches. Raises UsageError for an encoder."""
        if not self.config.causal:
            return cast("tuple[LayerCache, ...]", super().init_state(batch_size))
        config, like = self.config, self.norm.weight
        shape = (batch_size, config.time_steps, config.n_head, 0, config.n_embd // config.n_head)

        def empty(block: Block) -> Tensor:
            return like.new_zeros(shape, device=device, dtype=block.attention.cache_dtype or dtype)

        return tuple(LayerCache(empty(block), empty(block)) for block in self.layers())

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        """Score ``tokens (B, S)`` of a causal model; returns logits ``(B, S, V)``, the next state and the spikes.

        Raises UsageError for an encoder, and for a text of more than ``ctx_len`` tokens.
        """
        if self.mlm_head is None or not self.config.causal:
            return super().forward(tokens, state)
        record = Record(spikes=return_spikes)
        hidden, after = self._run(tokens, past=state, record=record)
        x = self.mlm_head.transform(hidden[-1].mean(0))
        logits = F.linear(x, self.word.effective_weight(), self.mlm_head.bias)
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
        return cast(Tensor, self.classify_head(self.dropout(pooled)))

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
        x = self._embed(tokens, types, before)
        hidden = [x.expand(self.config.time_steps, *x.shape)]
        mask = self._mask(tokens, lengths, before, x.dtype)
        caches = []
        for layer, block in enumerate(self.layers()):
            x, cache = block(hidden[-1], mask, None if past is None else past[layer], record)
            hidden.append(x)
            caches.append(cache)
        return hidden, tuple(caches)

    def _embed(self, tokens: Tensor, types: Tensor | None, before: int) -> Tensor:
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
        kinds = self.kind.weight[0] if types is None else self.kind(types)
        return cast(Tensor, self.dropout(self.norm(x + self.position.weight[before:end] + kinds)))

    def _mask(self, tokens: Tensor, lengths: Tensor | None, before: int, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the scores, ``(B or 1, 1, S or 1, L)``; None where every token sees all others."""
        place = torch.arange(before + tokens.shape[1], device=tokens.device)
        seen: Tensor | None = None
        if self.config.causal:
            seen = (place <= place[before:, None])[None, None]
        if lengths is not None:
            true = (place < lengths.clamp(min=1)[:, None])[:, None, None]
            seen = true if seen is None else seen & true
        if seen is None:
            return None
        return torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, torch.finfo(dtype).min)

    # -- what it is ----------------------------------------------------------------------------------------------------

    def spike_sites(self) -> list[SpikeSite]:
        """Return the inputs of the matrices, and keys and values; the dense twin has none."""
        graph = self.graph()
        return [
            SpikeSite(op.name, cast(Any, op.emits), tuple(reader.name for reader in graph.readers(op.name)))
            for op in graph
            if op.kind == "neuron"
        ]

    def graph(self) -> LMGraph:
        """Describe one token; attention is charged for the average context of a text of ``ctx_len`` tokens."""
        return LMGraph(tuple(_ops(self)))

    def to_reference(self, *, grads: bool = False) -> dict[str, Tensor]:
        """Return weights, or their gradients, under the keys of the released code."""
        from spiking_lm_spikelm.reference import to_reference

        return to_reference(self, grads=grads)


def _ops(model: SpikeLM) -> list[Op]:
    """List the operations of one token, in order."""
    config = model.config
    listed: list[Op] = []
    size, inner, steps = config.n_embd, config.inner, config.time_steps
    context = (config.ctx_len + 1) / 2 if config.causal else config.ctx_len

    def add(name: str, kind: Any, inputs: tuple[str, ...], n: int, emits: Any = "real", **more: Any) -> str:
        listed.append(Op(name, kind, inputs, emits, n, **more))
        return name

    def norm(name: str, source: str, times: int = steps) -> str:
        return add(name, "norm", (source,), size, module=name, other_ops=8 * size, steps=times)

    def residual(name: str, x: str, added: str) -> str:
        return add(name, "residual", (x, added), size, other_ops=size, steps=steps)

    def neurons(name: str, neuron: Neuron | None, source: str, n: int) -> str:
        """Add the neurons of a site, if there are any, and return what the next op reads."""
        if neuron is None:
            return source
        kind = "ternary" if isinstance(neuron, Elastic) else neuron.spike_kind
        return add(name, "neuron", (source,), n, kind, other_ops=5 * n, steps=steps)

    def linear(name: str, source: str, n_out: int, n_in: int) -> str:
        layer = cast(SpikingLinear, model.get_submodule(name))
        source = neurons(f"{name}.neuron", layer.neuron, source, n_in)
        held = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        return add(name, "linear", (source,), n_out, weight=(n_out, n_in), parameters=held, steps=steps)

    x = add("word", "embedding", ("tokens",), size, module="word")
    x = norm("norm", add("embed", "elementwise", (x,), size, other_ops=2 * size), 1)
    for i, block in enumerate(model.layers()):
        p = f"blocks.{i}"
        q, k, v = (linear(f"{p}.attention.{matrix}", x, size, size) for matrix in ("query", "key", "value"))
        k = neurons(f"{p}.attention.key_neuron", block.attention.key_neuron, k, size)
        v = neurons(f"{p}.attention.value_neuron", block.attention.value_neuron, v, size)
        cost = round(context * (4 * size + 5 * config.n_head))  # two products, and a softmax of 5 operations
        mixed = add(f"{p}.attention", "elementwise", (q, k, v), size, other_ops=cost, steps=steps)
        out = linear(f"{p}.output", mixed, size, size)
        x = norm(f"{p}.norm1", residual(f"{p}.add_attention", x, out))
        up = linear(f"{p}.up", x, inner, size)
        up = add(f"{p}.gelu", "elementwise", (up,), inner, other_ops=8 * inner, steps=steps)
        down = linear(f"{p}.down", up, size, inner)
        x = norm(f"{p}.norm2", residual(f"{p}.add_feed_forward", x, down))
    x = add("mean", "pool", (x,), size, other_ops=size, steps=steps)
    if config.causal:
        vocab = config.vocab_size
        dense = add("mlm_head.dense", "linear", (x,), size, module="mlm_head.dense", weight=(size, size))
        x = add("mlm_head.norm", "norm", (dense,), size, module="mlm_head.norm", other_ops=9 * size)
        held = {"weight": "word.weight", "bias": "mlm_head.bias"}
        add("mlm_head", "linear", (x,), vocab, weight=(vocab, size), parameters=held)
    return listed
