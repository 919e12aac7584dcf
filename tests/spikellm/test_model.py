"""The model: goldens of the released code, Llama by its definition, the laws of spikes, caches and packed weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from spiking_lm import create_model, explain, generate, load_model, save_model
from spiking_lm.errors import CheckpointError, UsageError
from spiking_lm.gif import gif_encode
from spiking_lm.interfaces import select_rows
from spiking_lm.quantization import QuantizedWeight, round_to_nearest
from spiking_lm.schemes import WeightScheme
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.layers import SpikingLinear
from spiking_lm_spikellm.model import Block, LayerCache, Rotary, SpikeLLM, SpikeLLMState, TokenCounts

SIZES: dict[str, Any] = {
    **{"vocab_size": 29, "n_layer": 2, "n_embd": 16, "n_inner": 24, "n_head": 4, "n_kv_head": 2, "ctx_len": 32}
}
W4A4: dict[str, Any] = {
    "weights": {"bits": 4},
    "activations": {"bits": 4, "salient": {"rate": 0.2}},
    "cache": {"bits": 4, "query_bits": 4, "salient": {"rate": 0.2}},
}


def make(seed: int = 0, **changes: Any) -> SpikeLLM:
    """A random model with a fifth of its channels salient where there are such."""
    torch.manual_seed(seed)
    model = create_model("spikellm", **{**SIZES, **changes})
    assert isinstance(model, SpikeLLM)
    for name, buffer in model.named_buffers():
        if "salient" in name:
            buffer.copy_(torch.rand(buffer.shape) < 0.2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.3)
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(4))


# -- goldens of the released code --------------------------------------------------------------------------------------


def golden_block(shared: Path, file: str, tag: str | None, key_range: str) -> tuple[Block, Tensor, Any]:
    """The block of a golden file with its masks and, with a ``tag``, its weights rounded to nearest."""
    found = np.load(shared / "golden/spikellm" / file)
    rounded = np.load(shared / "golden/spikellm/block.npz")
    schemes: dict[str, Any] = {}
    if tag:
        salient = {"rate": 0.1, "steps": int(tag[1])}
        of_cache = {"rate": 0.1, "steps": 2}  # of keys and values always two
        schemes["activations"] = {"bits": 4, "grid": "reference", "salient": salient}
        schemes["cache"] = {
            "bits": 4,
            "query_bits": 4,
            "grid": "reference",
            "salient": of_cache,
            "key_range": key_range,
        }
    config = {"vocab_size": 8, "n_layer": 1, "n_embd": 64, "n_inner": 128, "n_head": 4, "norm_eps": 1e-6}
    block = Block(SpikeLLMConfig(**{**config, **schemes}))
    state = {name[3:]: torch.from_numpy(found[name]) for name in found.files if name.startswith("fp.")}
    if tag:
        state |= {name[4:]: torch.from_numpy(rounded[name]) for name in rounded.files if name.startswith("rtn.")}
        for name in found.files:
            if name.startswith(f"{tag}.") and name.endswith(".mask_low_mse"):
                salient_here, module = ~torch.from_numpy(found[name]), name[3:].removesuffix(".mask_low_mse")
                if module == "self_attn.qkt_matmul":
                    state["self_attn.salient_k"] = salient_here[0, :, :, 0]
                elif module == "self_attn.pv_matmul":
                    state["self_attn.salient_v"] = salient_here[0, :, 0]
                else:
                    state[f"{module}.salient"] = salient_here.flatten()
    block.load_state_dict(state)
    return block, torch.from_numpy(found["x"]), found


def relative(a: Tensor, b: Any) -> float:
    b = torch.from_numpy(b)
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_a_float_block_is_the_released_one(shared: Path) -> None:
    block, x, golden = golden_block(shared, "block.npz", None, "token")
    y, _ = block(x, torch.arange(x.shape[1]))
    assert relative(y, golden["y_fp"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("tag", ["T2", "T4"])
def test_a_quantised_block_is_the_released_one(shared: Path, tag: str) -> None:
    block, x, golden = golden_block(shared, "block.npz", tag, "channel")
    y, _ = block(x, torch.arange(x.shape[1]))
    assert relative(y, golden[f"{tag}.y_rtn"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("tag", ["T2", "T4"])
def test_a_quantised_block_with_a_range_per_key(shared: Path, tag: str) -> None:
    block, x, golden = golden_block(shared, "derived_block_causalK.npz", tag, "token")
    y, _ = block(x, torch.arange(x.shape[1]))
    assert relative(y, golden[f"{tag}.y_rtn_causalK"]) < 1e-5


# -- Llama by its definition -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 3])
def test_attention_by_its_definition(window: int | None) -> None:
    config = SpikeLLMConfig(**{**SIZES, "sliding_window": window, "head_dim": 6, "qkv_bias": True})
    torch.manual_seed(1)
    attention = Block(config).self_attn.double()
    attention.q_proj.bias.data.normal_()  # type: ignore[union-attr]
    x, size = torch.randn(7, 16, dtype=torch.float64), 6
    q = attention.q_proj(x).view(7, 4, size)
    k, v = (projection(x).view(7, 2, size) for projection in (attention.k_proj, attention.v_proj))

    def turned(vector: Tensor, position: int) -> Tensor:
        out = vector.clone()
        for j in range(size // 2):
            angle = position * config.rope_theta ** (-2 * j / size)
            a, b = vector[j], vector[j + size // 2]
            out[j] = a * math.cos(angle) - b * math.sin(angle)
            out[j + size // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    mixed = torch.zeros(7, 4, size, dtype=torch.float64)
    for t in range(7):
        seen = range(0 if window is None else max(0, t - window + 1), t + 1)
        for head in range(4):
            query = turned(q[t, head], t)
            scores = torch.stack([query @ turned(k[s, head // 2], s) for s in seen]) / math.sqrt(size)
            weights = scores.softmax(0)
            mixed[t, head] = sum(weight * v[s, head // 2] for weight, s in zip(weights, seen, strict=True))
    expected = attention.o_proj(mixed.flatten(1))
    y, _ = attention(x[None], torch.arange(7))
    torch.testing.assert_close(y[0], expected)


def test_llama3_scaling_leaves_fast_pairs_and_stretches_slow_ones() -> None:
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_ctx_len": 8192,
    }
    sizes = {**SIZES, "n_embd": 128, "head_dim": 128, "rope_theta": 5e5}
    plain = Rotary(SpikeLLMConfig(**sizes)).frequencies(torch.float64, torch.device("cpu"))
    scaled = Rotary(SpikeLLMConfig(**sizes, rope_scaling=scaling)).frequencies(torch.float64, torch.device("cpu"))
    for before, after in zip(plain.tolist(), scaled.tolist(), strict=True):
        length = 2 * math.pi / before  # tokens per turn
        if length < 8192 / 4.0:
            assert after == before
        elif length > 8192 / 1.0:
            assert after == pytest.approx(before / 8)
        else:
            smooth = (8192 / length - 1.0) / (4.0 - 1.0)
            assert after == pytest.approx((1 - smooth) * before / 8 + smooth * before)


def test_linear_scaling_is_a_slower_clock() -> None:
    slow = SpikeLLMConfig(**SIZES, rope_scaling={"type": "linear", "factor": 4.0})
    like = torch.zeros(1, dtype=torch.float64)
    stretched, plain = (Rotary(c)(torch.tensor([4 * n]), like) for c, n in ((slow, 4), (SpikeLLMConfig(**SIZES), 1)))
    torch.testing.assert_close(stretched, plain)


def test_a_head_may_have_a_size_of_its_own() -> None:
    model = make(head_dim=6)
    assert tuple(model.blocks()[0].self_attn.q_proj.weight.shape) == (24, 16)
    assert model(tokens(2, 5)).logits.shape == (2, 5, 29)


# -- states ------------------------------------------------------------------------------------------------------------


def padded(state: SpikeLLMState, length: int) -> SpikeLLMState:
    """Bring caches to a length with rubbish before what they hold."""

    def longer(part: Tensor) -> Tensor:
        rubbish = torch.full_like(part[:, :, :1], 3).expand(-1, -1, length - part.shape[2], -1)
        return torch.cat([rubbish, part], 2)

    def cache(kept: Any) -> Any:
        return TokenCounts(*map(longer, kept)) if isinstance(kept, TokenCounts) else longer(kept)

    return SpikeLLMState(state.length, tuple(LayerCache(*map(cache, layer)) for layer in state.layers))


def joined(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    parts = [joined(a, b) for a, b in zip(first, second, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


@torch.no_grad()
@pytest.mark.parametrize("schemes", [{}, W4A4], ids=["float", "w4a4"])
@pytest.mark.parametrize("window", [None, 4])
def test_rows_may_have_read_texts_of_different_lengths(schemes: dict[str, Any], window: int | None) -> None:
    model = make(**schemes, sliding_window=window).double()
    long, short, more = tokens(1, 9), tokens(1, 20)[:, :3], tokens(2, 6)
    states = [model(text).state for text in (long, short)]
    length = states[0].layers[0].keys[0].shape[-2]
    both = joined(states[0], padded(states[1], length if window is None else window - 1))
    together = model(more, both)
    for row, state in enumerate(states):
        alone = model(more[row : row + 1], state)
        torch.testing.assert_close(together.logits[row : row + 1], alone.logits)
    apart = select_rows(together.state, torch.tensor([1]))
    assert apart.length.tolist() == [9]
    torch.testing.assert_close(
        model.step(more[1:, 0], apart)[0], model.step(more[1:, 0], model(torch.cat([short, more[1:]], 1)).state)[0]
    )


@torch.no_grad()
def test_cached_codes_take_a_byte_and_stand_for_what_attention_saw() -> None:
    model = make(**W4A4).double()
    text = tokens(2, 12)
    cache = model(text).state.layers[0]
    assert isinstance(cache.keys, TokenCounts)
    assert cache.keys.codes.dtype == torch.uint8
    assert cache.keys.codes.shape == (2, 2, 12, 4)
    assert int(cache.keys.codes.max()) > 15  # of salient channels; ordinary ones end there
    for cut in (1, 5, 11):
        state = model(text[:, :cut]).state
        torch.testing.assert_close(model(text[:, cut:], state).logits, model(text).logits[:, cut:])


@torch.no_grad()
def test_generation_with_a_cache_of_codes_is_generation_without() -> None:
    model = make(**W4A4).double()
    out = generate(model, [1, 2, 3], max_new_tokens=10, temperature=0)
    for length in range(3, 13):
        assert int(model(out[None, :length]).logits[0, -1].argmax()) == out[length]


@torch.no_grad()
def test_keys_that_depend_on_all_tokens_are_refused_a_cache() -> None:
    model = make(**{**W4A4, "cache": {"bits": 4, "key_range": "channel"}})
    state = model(tokens(1, 5)).state
    with pytest.raises(UsageError, match="a key depends on all tokens"):
        model.step(tokens(1), state)


def test_ids_beyond_the_vocabulary_are_named() -> None:
    with pytest.raises(Exception, match="the model knows 0 to 28"):
        make()(torch.tensor([[29]]))


# -- spikes ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("spikes", ["signed", "unsigned"])
def test_all_modes_compute_the_same_from_the_same_spikes(spikes: str) -> None:
    model = make(**{**W4A4, "activations": {**W4A4["activations"], "spikes": spikes}}).double()
    fake = model(tokens(2, 7), return_spikes=True)
    assert fake.spikes
    for mode in ("spike", "binary"):
        model.set_mode(mode)  # type: ignore[arg-type]
        other = model(tokens(2, 7), return_spikes=True)
        torch.testing.assert_close(other.logits, fake.logits)
        assert other.spikes
        for name, codes in fake.spikes.items():
            assert torch.equal(other.spikes[name], codes), name
    assert min(int(s.min()) for s in fake.spikes.values()) < 0 or spikes == "unsigned"


def test_the_mode_is_part_of_the_model(tmp_path: Path) -> None:
    model = make(**W4A4)
    model.set_mode("spike")
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert isinstance(again, SpikeLLM)
    assert {layer.mode for layer in again.modules() if isinstance(layer, SpikingLinear)} == {"spike"}
    with pytest.raises(UsageError, match="no mode 'fast'"):
        model.set_mode("fast")  # type: ignore[arg-type]


@torch.no_grad()
def test_the_spikes_returned_are_what_the_projections_read() -> None:
    model = make(**W4A4)
    seen: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SpikingLinear)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    spikes = model(tokens(2, 6), return_spikes=True).spikes
    assert len(layers) == 14
    for name, layer in layers.items():
        codes = gif_encode(seen[name], layer.activations, layer.salient).codes
        assert torch.equal(spikes[f"{name}.input"], codes.to(torch.int16))
    keys = spikes["model.layers.1.self_attn.keys"]
    assert keys.shape == (2, 6, 2 * 4)
    assert torch.equal(spikes["model.layers.0.self_attn.q_proj.input"] == 0, _silent(seen, layers))


def _silent(seen: dict[str, Tensor], layers: dict[str, SpikingLinear]) -> Tensor:
    """Where a signed count is silent: the value is nearer to zero than half a step of its grid (ties to even)."""
    name = "model.layers.0.self_attn.q_proj"
    counts = gif_encode(seen[name], layers[name].activations, layers[name].salient)
    return (seen[name] / counts.scale).round() - counts.zero == 0


def test_counts_drive_the_seven_projections() -> None:
    spiking, real = explain(make(**W4A4), tokens(2, 16)), explain(make(), tokens(2, 16))
    kinds = {op.name: op.op_class for op in spiking.ops if op.op_class}
    assert kinds.pop("lm_head") == "MAC"
    assert set(kinds.values()) == {"integer-AC"}
    assert len(kinds) == 14
    assert spiking.classes["integer-AC"].matrices == 14
    assert real.classes["MAC"].matrices == 15
    assert "100 % MAC" in real.answer
    assert {site.name.rpartition(".")[2] for site in spiking.sites} == {"input", "queries", "keys", "values"}
    assert spiking.neurobench.parameter_count == real.neurobench.parameter_count
    assert spiking.other_parameters == real.other_parameters
    assert spiking.neurobench.footprint_bytes < real.neurobench.footprint_bytes


def test_weights_of_few_bits_that_read_reals_are_multiplied() -> None:
    told = explain(make(weights={"bits": 2}, activations={}), tokens(1, 16))
    assert told.classes["MAC"].matrices == 15
    assert told.neurobench.connection_sparsity > explain(make(), tokens(1, 16)).neurobench.connection_sparsity


def test_counts_beyond_a_byte_are_not_called_small_integers() -> None:
    told = explain(make(activations={"bits": 8, "salient": {"rate": 0.2}}), tokens(1, 16))
    assert {site.kind for site in told.sites} == {"graded"}
    assert {op.name: op.seen_input for op in told.ops}["model.layers.0.self_attn.q_proj"] == "real"


# -- packed weights ----------------------------------------------------------------------------------------------------


SCHEMES = {
    "w4": WeightScheme(bits=4),
    "w3 in groups": WeightScheme(bits=3, group_size=7),
    "w5 symmetric": WeightScheme(bits=5, symmetric=True),
    "w12": WeightScheme(bits=12),
    "ternary": WeightScheme(type="ternary"),
    "ternary in groups": WeightScheme(type="ternary", group_size=6),
}


def quantised(scheme: WeightScheme, seed: int, permuted: bool = True) -> QuantizedWeight:
    """A matrix (24, 16) as solvers return it: with columns in another order, or of different ternary steps."""
    torch.manual_seed(seed)
    matrix = torch.randn(24, 16) + 2 * (seed % 2)  # shifted: zero points beyond the codes
    order = torch.randperm(16) if permuted else None
    steps = torch.randint(1, 4, (16,)) if scheme.type == "ternary" else 1
    found = round_to_nearest(matrix if order is None else matrix[:, order], scheme, steps)
    return QuantizedWeight(found.codes, found.grid, scheme, order, found.steps)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_packed_matrix_is_what_was_set(name: str, seed: int) -> None:
    scheme = SCHEMES[name]
    layer = SpikingLinear(16, 24, weights=scheme)
    weight = quantised(scheme, seed, permuted=scheme.group_size is not None)
    layer.set_weight(weight)
    assert torch.equal(layer.weight, weight.dequantize())
    assert torch.equal(layer.quantized_weight().dequantize(), weight.dequantize())
    assert not list(layer.parameters())
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), x @ weight.dequantize().T)
    other = SpikingLinear(16, 24, weights=scheme)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(layer.double().weight, layer.quantized_weight().dequantize(torch.float64))
    layer.set_weight(quantised(scheme, seed + 2, permuted=scheme.group_size is not None))
    assert not torch.equal(layer(x.double()).float(), other(x))


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEMES)
def test_packed_models_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    model = make(**{**W4A4, "weights": scheme.model_dump()})
    for i, block in enumerate(model.blocks()):
        weight = quantised(scheme, i, permuted=scheme.group_size is not None)
        block.mlp.gate_proj.set_weight(weight)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert not [n for n in again.state_dict() if n.endswith("_proj.weight")]


def test_four_bits_take_a_quarter_of_sixteen(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "n_layer": 1, "n_embd": 256, "n_inner": 688, "n_head": 8, "tie_embeddings": True}
    model = create_model("spikellm", **sizes, weights={"bits": 4}, activations={"bits": 4})
    halves = 2 * sum(p.numel() for p in create_model("spikellm", **sizes).parameters())
    save_model(model, tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").stat().st_size < 0.29 * halves


def test_a_packed_model_misses_what_its_file_misses(tmp_path: Path) -> None:
    model = make(**W4A4)
    layer = model.blocks()[0].self_attn.q_proj
    del layer._buffers["weight_scale"]
    save_model(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale"):
        load_model(tmp_path / "model")(tokens(1, 3))


@torch.no_grad()
def test_an_embedding_in_half_precision_computes_in_full() -> None:
    model, half = make(tie_embeddings=True), make(tie_embeddings=True)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = model.model.embed_tokens.weight.detach().to(dtype)
        half.model.embed_tokens.weight = half.lm_head.weight = torch.nn.Parameter(rounded)
        whole = make(tie_embeddings=True)
        whole.model.embed_tokens.weight.copy_(rounded)
        assert torch.equal(half(tokens(1, 5)).logits, whole(tokens(1, 5)).logits)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_a_block_trains_through_its_counts_with_parameters_from_outside() -> None:
    block = Block(SpikeLLMConfig(**{**SIZES, **{key: W4A4[key] for key in ("activations", "cache")}}))
    given = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    given["input_layernorm.bias"] = torch.full((16,), 0.1, requires_grad=True)
    given["mlp.up_proj.bias"] = torch.full((24,), 0.1, requires_grad=True)
    x = torch.randn(2, 5, 16)
    y, _ = functional_call(block, given, (x, torch.arange(5)))
    y.square().mean().backward()
    dead = [name for name, p in given.items() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert not dead
    assert not torch.equal(y, block(x, torch.arange(5))[0])
    assert block.input_layernorm.bias is None
