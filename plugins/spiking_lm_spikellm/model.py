"""SpikeLLM in one file: a Llama-family transformer whose projections read spike counts (Xing et al., arXiv 2407.04752).

::

    tokens -> embedding -> block 0 -> ... -> block N-1 -> norm -> head
    x <- x + o(attention(q(h), k(h), v(h))),  h = norm(x)         positions turn queries and keys (rotary embedding)
    x <- x + down(silu(gate(h)) * up(h)),     h = norm(x)

The seven projections of a block are :class:`~spiking_lm_spikellm.layers.SpikingLinear`: what they read becomes counts
of Generalized Integrate-and-Fire spikes where ``config.activations`` says so, and their weights are packed where
``config.weights`` does. Embedding, norms, softmax, residual stream and head stay real. With every scheme off this is
Llama, Mistral or Qwen2 itself; module names are those of Hugging Face.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm import host
from spiking_lm.errors import UsageError
from spiking_lm.gif import TokenCounts, gif_encode_tokens, gif_quantize_tokens, levels
from spiking_lm.graph import LMGraph, Op, ValueKind
from spiking_lm.integers import SpikeProduct
from spiking_lm.interfaces import LMOutput, SpikeSite, SpikingLanguageModel, State
from spiking_lm.schemes import OFF, ActivationScheme, CacheScheme
from spiking_lm.watch import LARGEST_INTEGER, check_range
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.layers import Head, Mode, Record, SpikingLinear
from spiking_lm_spikellm.rotation import ResidualRotation, operations, orthogonal, rotate, sizes

Kept = Tensor | TokenCounts
"""Keys or values of all tokens so far, ``(B, H, L, d)``: real, or as counts with the range of each token and head."""


class LayerCache(NamedTuple):
    """What a block remembers of the tokens so far; keys are kept after their rotation by position."""

    keys: Kept
    values: Kept


class SpikeLLMState(NamedTuple):
    """What the model remembers; the caches grow with the text.

    Caches are aligned at their end: the last ``length[b]`` entries of row b are its tokens, and what is before them is
    not looked at. So rows may have read texts of different lengths.
    """

    length: Tensor
    """Tokens read, ``(B,)``."""
    layers: tuple[LayerCache, ...]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation; ``bias`` is empty unless a transformation of the weights puts one there."""

    bias: Tensor | None

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return x if self.bias is None else x + self.bias


class Rotary(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864): channel pairs (j, j + d/2) of a head turn with the position."""

    def __init__(self, config: SpikeLLMConfig) -> None:
        super().__init__()
        self.config = config

    def frequencies(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the angle per token of every pair, ``(d/2,)``."""
        config, size = self.config, self.config.head_size
        exponents = torch.arange(0, size, 2, dtype=dtype, device=device) / size
        turning = config.rope_theta**-exponents
        scaling = config.rope_scaling
        if scaling is None:
            return turning
        if scaling.type == "linear":
            return turning / scaling.factor
        # llama3: slow pairs are stretched, fast ones stay, and how often a pair turns in the context mixes the two
        turns = scaling.original_ctx_len * turning / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = share.clamp(0, 1)
        return (1 - share) * turning / scaling.factor + share * turning

    def forward(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine for ``positions (S,)`` or ``(B, S)``, shaped to turn ``(B, H, S, d)``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        angles = positions.view(-1, 1, positions.shape[-1], 1).to(dtype) * self.frequencies(dtype, like.device)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of ``x (B, H, S, d)`` by the angles of their positions."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Causal attention: ``n_head`` heads of queries share ``kv_heads`` heads of keys and values.

    ``salient_k`` and ``salient_v`` (kv_heads, d) mark the channels of keys and values that have more spike steps.
    """

    salient_k: Tensor | None
    salient_v: Tensor | None

    def __init__(self, config: SpikeLLMConfig) -> None:
        super().__init__()
        self.config = config
        size, queries, keys = config.n_embd, config.n_head * config.head_size, config.kv_heads * config.head_size
        schemes = config.weights, config.activations, config.mode
        self.q_proj = SpikingLinear(size, queries, config.qkv_bias, *schemes)
        self.k_proj = SpikingLinear(size, keys, config.qkv_bias, *schemes)
        self.v_proj = SpikingLinear(size, keys, config.qkv_bias, *schemes)
        self.o_proj = SpikingLinear(queries, size, False, *schemes)
        self.rotary = Rotary(config)
        marked = config.cache.bits < OFF and config.cache.salient is not None
        for name in ("salient_k", "salient_v"):
            mask = torch.zeros(config.kv_heads, config.head_size, dtype=torch.bool)
            self.register_buffer(name, mask if marked else None)

    def forward(
        self, x: Tensor, positions: Tensor, past: LayerCache | None = None, record: Record | None = None
    ) -> tuple[Tensor, LayerCache]:
        """Mix ``x (B, S, C)`` with the tokens before it; see :class:`Block`."""
        heads = (*x.shape[:2], -1, self.config.head_size)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (projection(x, record).view(heads).transpose(1, 2) for projection in projections)
        cos, sin = self.rotary(positions, x)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        if _rotates_keys(self.config):
            q, k = rotate(q), rotate(k)
        if self.config.cache.query_bits < OFF:
            if record is not None:
                codes = gif_encode_tokens(q, self.config.cache, of="query").codes
                record.emitted(self, "queries", codes.transpose(1, 2))
            q = gif_quantize_tokens(q, self.config.cache, of="query")
        keys, kept_keys = self._remember(k, None if past is None else past.keys, "key", record)
        values, kept_values = self._remember(v, None if past is None else past.values, "value", record)
        y = self._attend(q, keys, values, positions).transpose(1, 2)
        if self.config.rotation:
            y = rotate(y.mT).mT  # across the heads; v_proj holds the rotation within each
        return self.o_proj(y.flatten(2), record), LayerCache(kept_keys, kept_values)

    def _remember(
        self, new: Tensor, past: Kept | None, of: Literal["key", "value"], record: Record | None
    ) -> tuple[Tensor, Kept]:
        """Return keys or values of all tokens as attention sees them, and as they are kept; ``new (B, H, S, d)``."""
        cache, salient = self.config.cache, self.salient_k if of == "key" else self.salient_v
        if cache.bits >= OFF:
            whole = new if past is None else torch.cat([cast(Tensor, past), new], 2)
            return whole, whole
        if of == "key" and cache.key_range == "channel":
            if past is not None and cast(Tensor, past).shape[2]:
                raise UsageError(
                    "with cache.key_range: channel a key depends on all tokens: a text cannot be gone on with",
                    hint="set cache.key_range to token",
                )
            return gif_quantize_tokens(new, cache, salient, of=of), new
        kept = gif_encode_tokens(new, cache, salient, of=of)
        if record is not None:
            record.emitted(self, f"{of}s", kept.codes.transpose(1, 2))
        if torch.is_grad_enabled() and new.requires_grad:
            whole = gif_quantize_tokens(new, cache, salient, of=of)
        else:
            whole = kept.decode(cache, salient, of=of).to(new.dtype)
        if past is not None:
            before = cast(TokenCounts, past)
            whole = torch.cat([before.decode(cache, salient, of=of).to(new.dtype), whole], 2)
            kept = TokenCounts(*(torch.cat(parts, 2) for parts in zip(before, kept, strict=True)))
        return whole, kept

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Mix values ``v (B, H, L, d)`` by how queries ``q (B, heads, S, d)`` of the last S tokens fit the keys."""
        window, length = self.config.sliding_window, k.shape[2]
        plain = length == q.shape[2] and (window is None or length <= window)
        mask = None if plain else self._mask(positions, length)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, enable_gqa=True)

    def _mask(self, positions: Tensor, length: int) -> Tensor:
        """Say which of ``length`` cached tokens each query may look at: ``(B or 1, 1, S, L)``."""
        asks = positions.view(-1, positions.shape[-1])
        holds = asks[:, -1:] + torch.arange(1 - length, 1, device=positions.device)
        distance = asks[:, :, None] - holds[:, None, :]
        seen = (distance >= 0) & (holds >= 0)[:, None, :]
        if self.config.sliding_window is not None:
            seen &= distance < self.config.sliding_window
        return seen[:, None]


class FeedForward(nn.Module):
    """The gated feed-forward layer, SwiGLU."""

    def __init__(self, config: SpikeLLMConfig) -> None:
        super().__init__()
        self.config = config
        schemes = config.weights, config.activations, config.mode
        self.gate_proj = SpikingLinear(config.n_embd, config.n_inner, False, *schemes)
        self.up_proj = SpikingLinear(config.n_embd, config.n_inner, False, *schemes)
        self.down_proj = SpikingLinear(config.n_inner, config.n_embd, False, *schemes)

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        gated = F.silu(self.gate_proj(x, record)) * self.up_proj(x, record)
        if self.config.rotation:
            gated = rotate(gated)
        return cast(Tensor, self.down_proj(gated, record))


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream. It works without the model too."""

    def __init__(self, config: SpikeLLMConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, positions: Tensor, past: LayerCache | None = None, record: Record | None = None
    ) -> tuple[Tensor, LayerCache]:
        """Run ``x (B, S, C)`` of tokens at ``positions (S,)`` or ``(B, S)``, behind those in ``past``.

        The cache returned holds them all. ``record`` takes down the spikes.
        """
        mixed, cache = self.self_attn(self.input_layernorm(x), positions, past, record)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x), record), cache


class Trunk(nn.Module):
    """Embedding, blocks and final norm; a module of its own for the sake of Hugging Face's names."""

    def __init__(self, config: SpikeLLMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.rotation = ResidualRotation(config.n_embd) if config.rotation else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)


class SpikeLLM(SpikingLanguageModel):
    """A Llama, Mistral or Qwen2 model, float or spiking by its config's schemes."""

    config: SpikeLLMConfig

    def __init__(self, config: SpikeLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=0.02)

    def blocks(self) -> list[Block]:
        """Return the blocks."""
        return cast("list[Block]", list(self.model.layers))

    def set_mode(self, mode: Mode) -> None:
        """Compute the products in another mode from now on, with equal results; it is saved with the model."""
        if mode not in get_args(Mode):
            raise UsageError(f"there is no mode {mode!r}", hint=f"modes are: {', '.join(get_args(Mode))}")
        self.config = self.config.model_copy(update={"mode": mode})
        for module in self.modules():
            if isinstance(module, SpikingLinear):
                module.mode = mode

    def num_parameters(self) -> int:
        packed = [m for m in self.modules() if isinstance(m, SpikingLinear) and "weight" not in m._parameters]
        return super().num_parameters() + sum(layer.in_features * layer.out_features for layer in packed)

    def expect(self, stored: Mapping[str, Tensor]) -> None:
        """Make room for the packed matrices of a checkpoint."""
        by_layer: dict[str, dict[str, Tensor]] = {}
        for name, tensor in stored.items():
            layer, _, leaf = name.rpartition(".")
            by_layer.setdefault(layer, {})[leaf] = tensor
        for name, module in self.named_modules():
            if isinstance(module, SpikingLinear):
                module.make_room(by_layer.get(name, {}))

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SpikeLLMState:
        """Return empty caches."""
        config, like = self.config, self.model.norm.weight
        empty = like.new_zeros(batch_size, config.kv_heads, 0, config.head_size, device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.long, device=empty.device)
        keys: Kept = empty
        values: Kept = empty
        if config.cache.bits < OFF:
            values = gif_encode_tokens(empty, config.cache, of="value")
            keys = empty if config.cache.key_range == "channel" else values
        return SpikeLLMState(length, (LayerCache(keys, values),) * config.n_layer)

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        """Score ``tokens (B, S)``; returns logits ``(B, S, V)``, the next state and on request the spikes.

        Raises UsageError for tokens of another shape, DataError for ids beyond the vocabulary.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise UsageError(
                f"SpikeLLM reads token ids (B, S) with S at least 1, not {tuple(tokens.shape)}",
                hint="tokens[None] makes a batch of one",
            )
        if state is None:
            state = self.init_state(tokens.shape[0], device=tokens.device)
        record = Record(self) if return_spikes else None
        try:
            x = self.model.embed_tokens(tokens).to(self.model.norm.weight.dtype)
        except IndexError:
            check_range(tokens, self.config.vocab_size)
            raise
        if self.model.rotation is not None:
            x = self.model.rotation(x)
        positions = state.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        caches = []
        for block, past in zip(self.blocks(), state.layers, strict=True):
            x, cache = block(x, positions, past, record)
            caches.append(self._within_window(cache))
        if self.model.rotation is not None:
            x = self.model.rotation.inverse(x)
        logits = self.lm_head(self.model.norm(x))
        after = SpikeLLMState(state.length + tokens.shape[1], tuple(caches))
        if record is None:
            return LMOutput(logits, after)
        return LMOutput(logits, after, record.spikes, arrived=record.arrived)

    def _within_window(self, cache: LayerCache) -> LayerCache:
        """Drop what is too far back for the next token to look at."""
        window = self.config.sliding_window
        if window is None:
            return cache

        def last(kept: Kept) -> Kept:
            if isinstance(kept, TokenCounts):
                return TokenCounts(*(part[:, :, max(part.shape[2] - window + 1, 0) :] for part in kept))
            return kept[:, :, max(kept.shape[2] - window + 1, 0) :]

        return LayerCache(last(cache.keys), last(cache.values))

    def spike_sites(self) -> list[SpikeSite]:
        """Return the inputs of the projections and the cached keys and values, as far as they are counts."""
        graph = self.graph()
        return [
            SpikeSite(op.name, cast(Any, op.emits), tuple(reader.name for reader in graph.readers(op.name)))
            for op in graph
            if op.kind == "neuron"
        ]

    def graph(self) -> LMGraph:
        """Describe one token; attention is charged for the average context of a text of ``ctx_len`` tokens."""
        return LMGraph(tuple(_ops(self.config, self.get_submodule)))


def graph_of(config: SpikeLLMConfig) -> LMGraph:
    """Return the graph of a model that is not there yet: all that its configuration tells."""
    return LMGraph(tuple(_ops(config)))


def _ops(config: SpikeLLMConfig, module: Callable[[str], nn.Module] | None = None) -> list[Op]:
    """List the operations of one token, in order; ``module`` finds the projections by name."""
    listed: list[Op] = []
    size, inner = config.n_embd, config.n_inner
    queries, keys = config.n_head * config.head_size, config.kv_heads * config.head_size
    window = min(config.sliding_window or config.ctx_len, config.ctx_len)
    context = (window + 1) / 2 * window / config.ctx_len + window * (1 - window / config.ctx_len)

    def add(name: str, kind: Any, inputs: tuple[str, ...], n: int, emits: Any = "real", **more: Any) -> str:
        listed.append(Op(name, kind, inputs, emits, n, **more))
        return name

    def norm(name: str, source: str) -> str:
        dynamics = host.RMSNorm(config.norm_eps)
        return add(name, "norm", (source,), size, module=name, dynamics=dynamics, other_ops=4 * size)

    def counted(name: str, source: str, n: int, scheme: ActivationScheme | CacheScheme, bits: int, **more: Any) -> str:
        """Add the neurons of a site, if there are any, and return what the next op reads."""
        if bits >= OFF:
            return source
        counts = ActivationScheme(bits=bits, salient=scheme.salient, grid=scheme.grid)
        most = levels(counts, salient=True)
        kind: ValueKind = "integer" if most <= LARGEST_INTEGER else "graded"
        if isinstance(scheme, CacheScheme):
            more["dynamics"] = host.TokenNeurons(config.head_size, levels(counts), most)
        return add(name, "neuron", (source,), n, kind, other_ops=6 * n, **more)

    def kept(name: str, source: str) -> str:
        """Add the neurons of keys or values."""
        marked = {"salient": f"{p}.self_attn.salient_{name[0]}"} if config.cache.salient is not None else {}
        site = f"{p}.self_attn.{name}"
        return counted(site, source, keys, config.cache, config.cache.bits, parameters=marked)

    def projection(name: str, source: str, n_out: int, n_in: int) -> str:
        scheme = config.activations
        export = None if module is None else partial(cast(SpikingLinear, module(name)).integer_layer, name)
        dynamics = SpikeProduct(name, config.weights, scheme, export)
        if scheme.bits >= OFF:
            return add(name, "linear", (source,), n_out, module=name, weight=(n_out, n_in), dynamics=dynamics)
        source = counted(f"{name}.input", source, n_in, scheme, scheme.bits)
        held = {"weight": f"{name}.weight"} | ({"bias": f"{name}.bias"} if _biased(config, name) else {})
        return add(name, "linear", (source,), n_out, weight=(n_out, n_in), parameters=held, dynamics=dynamics)

    def rotated(name: str, source: str, n: int, row: int, *, stride: int = 1, back: bool = False) -> str:
        """Add the rotation of ``n`` values in rows, if the model has been rotated."""
        if not config.rotation:
            return source
        held = {"signs": "model.rotation.signs"} if name.startswith("model.rotate") else {}
        how, cost = _rotation(row, stride, back), n // row * operations(row)
        return add(name, "elementwise", (source,), n, other_ops=cost, dynamics=how, parameters=held)

    frequencies = Rotary(config).frequencies(torch.float64, torch.device("cpu"))
    turning = host.Rotary(tuple(frequencies.tolist()))
    attention = host.Attention(config.n_head, config.kv_heads, config.head_size, config.sliding_window)
    x = add("model.embed_tokens", "embedding", ("tokens",), size, module="model.embed_tokens")
    x = rotated("model.rotate", x, size, size)
    for i in range(config.n_layer):
        p = f"model.layers.{i}"
        normed = norm(f"{p}.input_layernorm", x)
        q = projection(f"{p}.self_attn.q_proj", normed, queries, size)
        k = projection(f"{p}.self_attn.k_proj", normed, keys, size)
        v = projection(f"{p}.self_attn.v_proj", normed, keys, size)
        q = add(f"{p}.self_attn.q_rotary", "elementwise", (q,), queries, other_ops=3 * queries, dynamics=turning)
        k = add(f"{p}.self_attn.k_rotary", "elementwise", (k,), keys, other_ops=3 * keys, dynamics=turning)
        if _rotates_keys(config):
            q = rotated(f"{p}.self_attn.rotate_q", q, queries, config.head_size)
            k = rotated(f"{p}.self_attn.rotate_k", k, keys, config.head_size)
        q = counted(f"{p}.self_attn.queries", q, queries, CacheScheme(grid=config.cache.grid), config.cache.query_bits)
        by_token = config.cache.key_range == "token"
        k = kept("keys", k) if by_token else k
        v = kept("values", v)
        cost = round(context * (4 * queries + 5 * config.n_head))  # two products, and a softmax of 5 operations
        how = attention if by_token else None  # keys that depend on later tokens are no dynamics of a token
        mixed = add(f"{p}.self_attn.attention", "elementwise", (q, k, v), queries, other_ops=cost, dynamics=how)
        mixed = rotated(f"{p}.self_attn.rotate", mixed, queries, config.n_head, stride=config.head_size)
        out = projection(f"{p}.self_attn.o_proj", mixed, size, queries)
        x = add(f"{p}.add_attention", "residual", (x, out), size, other_ops=size)
        normed = norm(f"{p}.post_attention_layernorm", x)
        gate = projection(f"{p}.mlp.gate_proj", normed, inner, size)
        up = projection(f"{p}.mlp.up_proj", normed, inner, size)
        gated = add(f"{p}.mlp.gated", "elementwise", (gate, up), inner, other_ops=6 * inner, dynamics=host.Gate())
        gated = rotated(f"{p}.mlp.rotate", gated, inner, inner)
        down = projection(f"{p}.mlp.down_proj", gated, size, inner)
        x = add(f"{p}.add_feed_forward", "residual", (x, down), size, other_ops=size)
    x = rotated("model.rotate_back", x, size, size, back=True)
    vocab = config.vocab_size
    add("lm_head", "linear", (norm("model.norm", x),), vocab, module="lm_head", weight=(vocab, size))
    return listed


@lru_cache(maxsize=64)
def _rotation(row: int, stride: int, back: bool) -> host.Rotation:
    """Return the rotation of rows of ``row`` values, ``stride`` apart, or the turn back."""
    left, right = (orthogonal(size).numpy() for size in sizes(row))
    return host.Rotation(left.T if back else left, right.T if back else right, stride, back)


def _biased(config: SpikeLLMConfig, projection: str) -> bool:
    return config.qkv_bias and projection.endswith(("q_proj", "k_proj", "v_proj"))


def _rotates_keys(config: SpikeLLMConfig) -> bool:
    """Return whether queries and keys are rotated: where they have few bits; attention does not notice."""
    return config.rotation and min(config.cache.bits, config.cache.query_bits) < OFF
