"""Rotations: orthogonal, fast, and without effect in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm.schemes import CacheScheme
from spiking_lm.testing import ModelContract
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.model import SpikeLLM
from spiking_lm_spikellm.rotation import (
    ResidualRotation,
    Rotation,
    hadamard,
    operations,
    orthogonal,
    rotate,
    rotate_back,
    sizes,
)

WIDTHS = [1, 2, 3, 4, 8, 9, 12, 43, 64, 96, 172, 576, 1536, 2048, 4096, 5632, 8960, 11008, 13824, 14336]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 44, 48, 60, 64, 72, 128, 144, 576, 1536])
def test_hadamard_matrices(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix.double() @ matrix.double().T, n * torch.eye(n).double())


@pytest.mark.parametrize("n", [3, 5, 6, 9, 43, 52, 86, 172])
def test_hartley_where_there_is_none(n: int) -> None:
    assert hadamard(n) is None
    matrix = orthogonal(n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n).double(), rtol=0, atol=1e-12)
    assert float(matrix.abs().max()) <= (2 / n) ** 0.5 + 1e-12


@pytest.mark.parametrize("n", WIDTHS)
def test_factors_are_small_and_their_product_is_the_width(n: int) -> None:
    left, right = sizes(n)
    assert left * right == n
    assert max(left, right) <= max(128, 4 * n**0.5)


@given(st.integers(1, 700), st.integers(0, 2**31), st.booleans())
def test_orthogonal_at_any_width(n: int, seed: int, signed: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    residual = Rotation(n, seed).residual
    turn, back = (residual.forward, residual.inverse) if signed else (rotate, rotate_back)
    x, y = torch.randn(2, 3, n, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(back(turn(x)), x)
    torch.testing.assert_close(turn(back(x)), x)
    torch.testing.assert_close(turn(x) @ turn(y).T, x @ y.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(turn(2 * x + y), 2 * turn(x) + turn(y))


@pytest.mark.parametrize("n", [64, 172, 576, 1536])
def test_an_outlier_is_shared_out(n: int) -> None:
    spread = rotate(torch.eye(n))
    assert float(spread.abs().max()) <= (2 / n) ** 0.5 + 1e-6
    assert spread.dtype == torch.float32
    left, right = (orthogonal(size) for size in sizes(n))
    torch.testing.assert_close(spread, torch.kron(left, right).float(), rtol=0, atol=1e-6)


def test_only_signs_are_stored() -> None:
    signs = ResidualRotation(64).state_dict()
    assert signs.keys() == {"signs"}
    assert signs["signs"].dtype == torch.int8
    assert operations(64) == 2 * 64 * 64
    assert operations(576) == 2 * 576 * (24 + 24)


def test_signs_follow_the_seed() -> None:
    signs = [Rotation(576, seed).residual.signs for seed in (1, 1, 2)]
    assert all(set(s.tolist()) == {-1, 1} for s in signs)
    assert torch.equal(*signs[:2])
    assert not torch.equal(*signs[1:])


# -- a Llama of plain tensors ---------------------------------------------------------------------------------------


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], gain, 1e-5)


def turn(x: Tensor) -> Tensor:
    """Rotary positions on ``(B, H, S, d)``."""
    size = x.shape[-1]
    angle = torch.arange(x.shape[2]).double()[:, None] * 100.0 ** (-torch.arange(0, size, 2).double() / size)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def run(p: dict[str, Tensor], x: Tensor, c: SpikeLLMConfig, *, rotated: bool, keys: bool = False) -> Tensor:
    """Run one block on ``x (B, S, C)``, float64; ``rotated`` applies what a rotated block applies to activations."""
    p = {name: tensor.double() for name, tensor in p.items()}
    linear = lambda x, name: F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))  # noqa: E731
    h = rms(x, p["input_layernorm.weight"])
    q, k, v = (
        linear(h, f"self_attn.{n}_proj").unflatten(-1, (-1, c.head_size)).transpose(1, 2) for n in ("q", "k", "v")
    )
    q, k = turn(q), turn(k)
    if keys:
        q, k = rotate(q), rotate(k)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    if rotated:
        y = rotate(y.mT).mT
    x = x + linear(y.flatten(2), "self_attn.o_proj")
    h = rms(x, p["post_attention_layernorm.weight"])
    g = F.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj")
    return x + linear(rotate(g) if rotated else g, "mlp.down_proj")


def block_params(c: SpikeLLMConfig, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64) / shape[-1] ** 0.5  # noqa: E731
    queries, keys = c.n_head * c.head_size, c.kv_heads * c.head_size
    p = {
        "self_attn.q_proj.weight": draw(queries, c.n_embd),
        "self_attn.k_proj.weight": draw(keys, c.n_embd),
        "self_attn.v_proj.weight": draw(keys, c.n_embd),
        "self_attn.o_proj.weight": draw(c.n_embd, queries),
        "mlp.gate_proj.weight": draw(c.n_inner, c.n_embd),
        "mlp.up_proj.weight": draw(c.n_inner, c.n_embd),
        "mlp.down_proj.weight": draw(c.n_embd, c.n_inner),
        "input_layernorm.weight": 1 + draw(c.n_embd) * 5,
        "post_attention_layernorm.weight": 1 + draw(c.n_embd) * 5,
    }
    if c.qkv_bias:
        p |= {f"self_attn.{n}_proj.bias": draw(len(p[f"self_attn.{n}_proj.weight"])) for n in "qkv"}
    return {name: tensor.float() for name, tensor in p.items()}


MODELS: dict[str, dict[str, Any]] = {
    "plain": {"n_embd": 64, "n_inner": 172, "n_head": 8},
    "grouped": {"n_embd": 64, "n_inner": 172, "n_head": 8, "n_kv_head": 4},
    "smollm2": {"n_embd": 576, "n_inner": 1536, "n_head": 9, "n_kv_head": 3},
    "qwen2": {"n_embd": 60, "n_inner": 130, "n_head": 6, "n_kv_head": 2, "head_dim": 14, "qkv_bias": True},
    "odd": {"n_embd": 45, "n_inner": 147, "n_head": 3, "n_kv_head": 1, "head_dim": 10},
}


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_float_blocks_do_not_notice(name: str, keys: bool) -> None:
    config = SpikeLLMConfig(vocab_size=11, **MODELS[name])
    rotation = Rotation(config.n_embd, seed=3)
    layers = [block_params(config, seed) for seed in (1, 2)]
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(2, 7, config.n_embd, generator=rng, dtype=torch.float64) * torch.rand(config.n_embd).mul(4).exp()
    plain, turned = x, rotation.residual(x)
    for layer in layers:
        given = {name: tensor.clone() for name, tensor in layer.items()}
        folded = rotation.block(layer, config)
        assert folded.keys() == layer.keys()
        assert all(torch.equal(layer[name], given[name]) for name in given)
        assert all(t.dtype == torch.float32 and t.shape == layer[n].shape for n, t in folded.items())
        assert (folded["input_layernorm.weight"] == 1).all()
        plain = run(layer, plain, config, rotated=False)
        turned = run(folded, turned, config, rotated=True, keys=keys)
    # The folded matrices are rounded to float32; nothing else differs.
    error = (rotation.residual.inverse(turned) - plain).norm() / plain.norm()
    assert float(error) < 2e-6


def test_ends_stay_as_they_are() -> None:
    config = SpikeLLMConfig(vocab_size=11, **MODELS["plain"])
    ends = {"model.embed_tokens.weight": torch.randn(11, 64).half(), "model.norm.weight": torch.ones(64)}
    found = Rotation(64, seed=1).ends(ends, config)
    assert all(found[name] is tensor for name, tensor in ends.items())
    assert found.keys() - ends.keys() == {"model.rotation.signs"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [False, True])
def test_float_models_do_not_notice(name: str, tied: bool) -> None:
    """The whole model, its cache included; keys and queries of many bits show that they are rotated alike."""
    torch.manual_seed(0)
    config = SpikeLLMConfig(vocab_size=23, n_layer=2, ctx_len=32, tie_embeddings=tied, **MODELS[name])
    plain = SpikeLLM(config).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape) / (parameter.shape[-1] ** 0.5) + (parameter.ndim == 1))
    tokens = torch.randint(0, 23, (2, 9))
    rotation = Rotation(config.n_embd, seed=5)
    state = {name: tensor for name, tensor in plain.state_dict().items() if ".layers." not in name}
    state = rotation.ends(state, config)
    for i, block in enumerate(plain.blocks()):
        turned = rotation.block(block.state_dict(), config)
        state |= {f"model.layers.{i}.{key}": tensor for key, tensor in turned.items()}
    for cache, tolerance in (({}, 1e-4), ({"bits": 15, "query_bits": 15}, 2e-3)):
        changes = {"rotation": True, "cache": CacheScheme(**cache)}
        rotated = SpikeLLM(config.model_copy(update=changes)).eval()
        rotated.load_state_dict(state)
        with torch.no_grad():
            want, whole = plain(tokens).logits, rotated(tokens).logits
            first = rotated(tokens[:, :4])
            rest = rotated(tokens[:, 4:], first.state).logits
        torch.testing.assert_close(whole, want, rtol=0, atol=tolerance)
        torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=0, atol=1e-4)
        assert {op.name for op in rotated.graph()} - {op.name for op in plain.graph()}


class TestRotatedModel(ModelContract):
    """Counts of rotated activations, keys and values."""

    @pytest.fixture
    def model(self) -> SpikeLLM:
        torch.manual_seed(7)
        schemes = {"activations": {"bits": 4}, "cache": {"bits": 4, "query_bits": 6}, "rotation": True}
        sizes = {"vocab_size": 23, "n_layer": 2, "ctx_len": 32, "n_embd": 20, "n_inner": 28, "n_head": 6, "head_dim": 4}
        model = SpikeLLM(SpikeLLMConfig.model_validate({**sizes, "n_kv_head": 2, "tie_embeddings": True, **schemes}))
        signs = Rotation(20, seed=1).residual.signs
        assert model.model.rotation is not None
        model.model.rotation.signs.copy_(signs)
        return model
