"""A small encoder that obeys every law, and copies of it that each break one."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm import hookimpl
from spiking_lm.config import ModelConfig
from spiking_lm.graph import LMGraph, Op
from spiking_lm.hookspecs import Register
from spiking_lm.interfaces import Encoding, LMOutput, SpikeSite, SpikingEncoder, State
from spiking_lm.kernels import spike
from spiking_lm.records import ModelSpec


class ToyEncoderConfig(ModelConfig):
    """Attention over binary spikes."""

    model_type: ClassVar[str] = "toy-encoder"
    vocab_size: int = 19
    n_layer: int = 2
    n_embd: int = 12
    n_head: int = 2
    ctx_len: int = 32
    num_classes: int | None = None
    mlm: bool = True
    dropout: float = 0.0


class ToyLayer(nn.Module):
    """h + O attention(spikes of the normalised h)."""

    def __init__(self, config: ToyEncoderConfig) -> None:
        super().__init__()
        size = config.n_embd
        self.heads = config.n_head
        self.norm = nn.LayerNorm(size)
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spikes = spike(self.norm(h), 0.3)
        q, k, v = (
            m(spikes).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(scores.dtype).min)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return h + self.dropout(self.out(mixed)), scores, spikes


class ToyEncoder(SpikingEncoder):
    """Embedding -> layers -> mean over the true tokens; heads for classes and for masked tokens."""

    config: ToyEncoderConfig

    def __init__(self, config: ToyEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = nn.Embedding(config.ctx_len, config.n_embd)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(config.n_layer))
        capabilities = {"encode"}
        if config.num_classes is not None:
            self.classifier = nn.Linear(config.n_embd, config.num_classes)
            capabilities.add("classify")
        if config.mlm:
            self.head = nn.Linear(config.n_embd, config.vocab_size)
            capabilities.add("mlm")
        self.capabilities = frozenset(capabilities)

    def encode(self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False) -> Encoding:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        valid = places < lengths[:, None]
        h = self.emb(tokens) + self.position(places)
        hidden, all_scores, all_spikes = [h], [], {}
        for i, layer in enumerate(self.layers):
            h, scores, spikes = layer(h, valid)
            hidden.append(h)
            all_scores.append(scores)
            all_spikes[f"layers.{i}.spikes"] = spikes
        return Encoding(
            tuple(hidden), tuple(all_scores), self.pool(h, valid), all_spikes if return_spikes else None, None
        )

    def pool(self, h: Tensor, valid: Tensor) -> Tensor:
        return (h * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)

    def classify_pooled(self, pooled: Tensor) -> Tensor:
        if self.config.num_classes is None:
            return super().classify_pooled(pooled)
        return self.classifier(pooled)

    def predict_masked(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        if not self.config.mlm:
            return super().predict_masked(tokens, lengths)
        return self.head(self.encode(tokens, lengths).hidden[-1])

    def spike_sites(self) -> list[SpikeSite]:
        readers = {i: tuple(f"layers.{i}.{m}" for m in ("query", "key", "value")) for i in range(self.config.n_layer)}
        return [SpikeSite(f"layers.{i}.spikes", "binary", feeds=names) for i, names in readers.items()]

    def graph(self) -> LMGraph:
        c, n = self.config, self.config.n_embd
        ops = [Op("emb", "embedding", ("tokens",), "real", n, module="emb")]
        ops.append(Op("sum", "residual", ("emb",), "real", n, other_ops=n))
        x = "sum"
        for i in range(c.n_layer):
            p = f"layers.{i}"
            ops.append(Op(f"{p}.norm", "norm", (x,), "real", n, module=f"{p}.norm", other_ops=8 * n))
            ops.append(Op(f"{p}.spikes", "neuron", (f"{p}.norm",), "binary", n))
            matrices = [f"{p}.{m}" for m in ("query", "key", "value")]
            ops += [Op(m, "linear", (f"{p}.spikes",), "real", n, m, (n, n)) for m in matrices]
            ops.append(Op(f"{p}.attend", "elementwise", tuple(matrices), "real", n))
            ops.append(Op(f"{p}.out", "linear", (f"{p}.attend",), "real", n, f"{p}.out", (n, n)))
            ops.append(Op(f"{p}.add", "residual", (x, f"{p}.out"), "real", n, other_ops=n))
            x = f"{p}.add"
        return LMGraph(tuple(ops))


class EncoderPlugin:
    """Registers the toy, so that it can be saved, loaded and named in recipes."""

    @hookimpl
    def spiking_lm_models(self, register: Register) -> None:
        register(
            ModelSpec(
                name="toy-encoder",
                config=f"{__name__}:ToyEncoderConfig",
                factory=f"{__name__}:ToyEncoder",
                capabilities=frozenset({"encode", "classify", "mlm"}),
            )
        )


# -- encoders that break a law -----------------------------------------------------------------------------------------


class LooksAtPadding(ToyEncoder):
    def encode(self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False) -> Encoding:
        everything = torch.full_like(lengths, tokens.shape[1])
        return super().encode(tokens, everything, return_spikes=return_spikes)


class PoolsThePadding(ToyEncoder):
    def pool(self, h: Tensor, valid: Tensor) -> Tensor:
        return h.mean(1)


class MixesTexts(ToyEncoder):
    def pool(self, h: Tensor, valid: Tensor) -> Tensor:
        pooled = super().pool(h, valid)
        return pooled - 0.1 * pooled.mean(0)


class LeavesOutTheEmbedding(ToyEncoder):
    def encode(self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False) -> Encoding:
        encoding = super().encode(tokens, lengths, return_spikes=return_spikes)
        return encoding._replace(hidden=encoding.hidden[1:])


class LooksBackOnly(ToyEncoder):
    def encode(self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False) -> Encoding:
        encoding = super().encode(tokens, lengths, return_spikes=return_spikes)
        ends = range(1, 1 + tokens.shape[1])
        seen = [super(LooksBackOnly, self).encode(tokens[:, :end], lengths.clamp(max=end)) for end in ends]
        past = torch.stack([one.hidden[-1][:, -1] for one in seen], 1)
        return encoding._replace(hidden=(*encoding.hidden[:-1], past))


class AlwaysGivesSpikes(ToyEncoder):
    def encode(self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False) -> Encoding:
        return super().encode(tokens, lengths, return_spikes=True)


class HasAnotherHead(ToyEncoder):
    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return 2 * super().classify(tokens, lengths)


class PredictsFromTheTokenAlone(ToyEncoder):
    def predict_masked(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.emb(tokens))


class PredictsFromPadding(ToyEncoder):
    def predict_masked(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.encode(tokens, torch.full_like(lengths, tokens.shape[1])).hidden[-1])


class ScoresNextTokensAnyway(ToyEncoder):
    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        return LMOutput(self.predict_masked(tokens, torch.full((len(tokens),), tokens.shape[1])), None)


class GradedButSaysBinary(ToyEncoder):
    def encode(self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False) -> Encoding:
        encoding = super().encode(tokens, lengths, return_spikes=return_spikes)
        spikes = {name: 1.001 * s for name, s in (encoding.spikes or {}).items()}
        return encoding._replace(spikes=spikes if return_spikes else None)


class CutsTheGradient(ToyEncoder):
    def pool(self, h: Tensor, valid: Tensor) -> Tensor:
        return super().pool(h, valid).detach()

    def predict_masked(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return super().predict_masked(tokens, lengths).detach() + 0 * self.head.bias


class DropsOutInEval(ToyEncoder):
    def pool(self, h: Tensor, valid: Tensor) -> Tensor:
        return F.dropout(super().pool(h, valid), 0.5)


class HidesAWeight(ToyEncoder):
    def __init__(self, config: ToyEncoderConfig) -> None:
        super().__init__(config)
        self.scale = torch.rand(())  # neither parameter nor buffer: not saved

    def pool(self, h: Tensor, valid: Tensor) -> Tensor:
        return (super().pool(h, valid) * self.scale).to(h.dtype)


def toy_encoder(seed: int = 0, **config: Any) -> ToyEncoder:
    """Return a toy whose weights follow the seed."""
    torch.manual_seed(seed)
    return ToyEncoder(ToyEncoderConfig(**config))
