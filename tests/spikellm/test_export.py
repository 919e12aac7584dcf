"""A static-scale SpikeLLM as whole numbers: the same spikes, sums and logits in numpy as in torch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spiking_lm
from spiking_lm import host, integers
from spiking_lm.errors import DataError, LoweringError
from spiking_lm.gif import gif_encode
from spiking_lm.quantization import QuantizedWeight, round_to_nearest
from spiking_lm.schemes import ActivationScheme, WeightScheme
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.layers import SpikingLinear
from spiking_lm_spikellm.model import SpikeLLM

SIZES: dict[str, Any] = {
    **{"vocab_size": 60, "n_layer": 2, "n_embd": 24, "n_inner": 40, "n_head": 4, "n_kv_head": 2, "head_dim": 6},
    **{"ctx_len": 64, "rope_theta": 500.0},
}
STATIC = {"weights": {"bits": 4}, "activations": {"bits": 8, "scale": "static"}}
SALIENT = {"rate": 0.25, "steps": 2}


def tiny(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> SpikeLLM:
    """Return a random model, whose every mask, sign, range and gain says something."""
    torch.manual_seed(seed)
    model = SpikeLLM(SpikeLLMConfig(**{**SIZES, **STATIC, **config}))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1)
    for module in model.modules():
        if isinstance(module, SpikingLinear):
            module.set_weight(round_to_nearest(torch.randn(module.out_features, module.in_features), module.weights))
            if module.scale is not None:
                module.scale = torch.tensor([-1.5, 2.5])
    for name, buffer in model.named_buffers():
        if "salient" in name:
            buffer.copy_(torch.rand(buffer.shape) < 0.3)
        elif name.endswith("signs"):
            buffer.copy_(torch.randint(0, 2, buffer.shape) * 2 - 1)
    return model.to(dtype).eval()


# -- a layer -----------------------------------------------------------------------------------------------------------

weight_schemes = st.one_of(
    st.builds(
        WeightScheme,
        bits=st.integers(2, 8),
        group_size=st.sampled_from([None, 4, 5, 7]),
        symmetric=st.booleans(),
    ),
    st.builds(WeightScheme, type=st.just("ternary"), group_size=st.sampled_from([None, 5])),
)
salient_channels = st.none() | st.builds(lambda steps: {"rate": 0.3, "steps": steps}, st.sampled_from([2, 4, 8]))
activation_schemes = st.builds(
    lambda bits, salient, spikes: ActivationScheme(bits=bits, salient=salient, spikes=spikes, scale="static"),
    st.integers(2, 10),
    salient_channels,
    st.sampled_from(["signed", "unsigned"]),
)


def layer_of(
    weights: WeightScheme,
    activations: ActivationScheme,
    seed: int,
    dtype: torch.dtype,
    shape: tuple[int, int] = (6, 13),
) -> tuple[SpikingLinear, Tensor]:
    """Return a random layer, its columns in an order as GPTQ leaves them, and what it reads."""
    generator = torch.Generator().manual_seed(seed)
    layer = SpikingLinear(shape[1], shape[0], True, weights, activations)
    matrix = torch.randn(*shape, generator=generator) + torch.randn(shape[0], 1, generator=generator)
    steps: Tensor | int = 1
    if weights.type == "ternary":
        steps = torch.randint(1, 4, shape[1:], generator=generator)
    packed = round_to_nearest(matrix, weights, steps)
    order = torch.randperm(shape[1], generator=generator)
    layer.set_weight(QuantizedWeight(packed.codes, packed.grid, weights, order, packed.steps))
    assert layer.bias is not None
    layer.bias.data = torch.randn(shape[0], generator=generator)
    least, greatest = torch.rand(2, generator=generator) * 3
    layer.scale = torch.stack([-least, greatest])
    if layer.salient is not None:
        layer.salient = torch.rand(shape[1], generator=generator) < 0.4
    x = torch.randn(9, shape[1], generator=generator) * 2  # beyond the range on both sides
    return layer.to(dtype), x.to(dtype)


@given(weight_schemes, activation_schemes, st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_a_layer_in_whole_numbers_is_that_layer(
    weights: WeightScheme, activations: ActivationScheme, seed: int, dtype: torch.dtype
) -> None:
    layer, x = layer_of(weights, activations, seed, dtype)
    neurons, product = exported = layer.integer_layer("layer")
    counts = neurons.encode(x.numpy())
    np.testing.assert_array_equal(counts, gif_encode(x, activations, layer.salient, layer.scale).codes)
    sums = product.add_up(counts)
    assert product.weight.dtype == np.int8
    assert int(np.abs(sums).max()) <= product.bound(neurons) < 2**31
    # by the definition: codes less zero points, times what the counts stand for, group by group
    grid, order = layer.quantized_weight().grid, layer.quantized_weight().order
    assert order is not None
    size = weights.group_size or x.shape[1]
    whole = (layer.quantized_weight().codes - grid.zero[:, torch.arange(x.shape[1]) // size]).long().numpy()
    charges = (counts + neurons.zero[neurons.salient.astype(int)]) * product.gain
    for g in range(product.groups):
        columns = slice(g * size, (g + 1) * size)
        expected = charges[:, order.numpy()[columns]] @ whole[:, columns].T
        np.testing.assert_array_equal(sums[:, :, g], expected)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for mode in ("fake", "spike"):
        layer.mode = mode
        expected = layer(x).detach().numpy()
        np.testing.assert_allclose(
            exported(x.numpy()), expected, rtol=0, atol=tolerance * float(np.abs(expected).max())
        )


def test_codes_of_8_bits_that_int8_does_not_hold_are_shifted() -> None:
    matrix = torch.linspace(-0.2, 1.0, 256, dtype=torch.float64)[None].repeat(3, 1)
    scheme = WeightScheme(bits=8)
    activations = ActivationScheme(bits=8, scale="static")
    layer = integers.integer_layer("x", round_to_nearest(matrix, scheme), activations, torch.tensor([-1.0, 1.0]))
    assert layer.product.shifts
    x = np.random.default_rng(0).normal(size=(4, 256))
    values = layer.neurons.encode(x) * layer.neurons.threshold[0]
    np.testing.assert_allclose(layer(x), values @ round_to_nearest(matrix, scheme).dequantize(torch.float64).numpy().T)


def test_sums_are_exact_where_float32_is_not() -> None:
    matrix = torch.ones(1, 4096)
    matrix[0, 0] = 1 / 127
    weight = round_to_nearest(matrix, WeightScheme(bits=8, symmetric=True))
    activations = ActivationScheme(bits=10, scale="static")
    neurons, product = integers.integer_layer("x", weight, activations, torch.tensor([0.0, 1.0]))
    counts = np.full((1, 4096), 1023)
    expected = 1023 * int(product.weight.astype(np.int64).sum())
    assert expected > 2**24
    assert product.add_up(counts).item() == expected == product.bound(neurons)


def test_sums_that_could_leave_32_bits_are_refused_by_name() -> None:
    weight = round_to_nearest(torch.tensor([[1.0, -1.0]]).repeat(2, 300), WeightScheme(bits=8, symmetric=True))
    wide = ActivationScheme(bits=15, scale="static")
    with pytest.raises(LoweringError, match=r"mlp\.up: 600 inputs of 15 bits .* more than 32 bits hold") as error:
        integers.integer_layer("mlp.up", weight, wide, torch.tensor([0.0, 1.0]))
    assert "less convert.activations.bits" in str(error.value.hint)
    integers.integer_layer("mlp.up", weight, wide.model_copy(update={"bits": 14}), torch.tensor([0.0, 1.0]))


def test_a_range_at_the_floor_of_the_scale_is_refused_with_salient_channels() -> None:
    layer, _ = layer_of(
        WeightScheme(bits=4), ActivationScheme(bits=8, salient=SALIENT, scale="static"), 0, torch.float32
    )
    layer.scale = torch.tensor([0.0, 3e-3])
    with pytest.raises(LoweringError, match=r"q: what it reads has a range of 0\.003, too narrow for salient channels"):
        layer.integer_layer("q")


# -- a model -----------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "salient, rotated": {
        "weights": {"bits": 4, "group_size": 9},
        "activations": {"bits": 6, "scale": "static", "salient": SALIENT, "spikes": "unsigned"},
        "cache": {"bits": 5, "query_bits": 7, "salient": SALIENT},
        "rotation": True,
    },
    "biases, window": {"qkv_bias": True, "sliding_window": 7, "cache": {"bits": 4}, "tie_embeddings": True},
    "stretched": {"rope_scaling": {"type": "llama3", "factor": 4.0, "original_ctx_len": 16}, "weights": {"bits": 8}},
    "ternary": {"weights": {"type": "ternary", "group_size": 8}, "activations": {"bits": 4, "scale": "static"}},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_host_in_numpy_has_the_models_spikes_and_logits(name: str) -> None:
    """In float64, where no sum is so far off that a count changes; logits differ as far as sums of reals do."""
    single = tiny(torch.float32, **MODELS[name])  # as a conversion leaves it
    model = copy.deepcopy(single).double()
    tokens = torch.randint(60, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, return_spikes=True)
    seen: dict[str, list[np.ndarray]] = {}
    numpy_model = host.host_model(single)
    logits, _ = numpy_model.run(tokens[0].numpy(), watch=lambda op, n, _: seen.setdefault(op, []).append(n))
    assert len(seen) == 14
    for op, counts in seen.items():
        np.testing.assert_array_equal(np.concatenate(counts), expected.spikes[f"{op}.input"][0], err_msg=op)
    np.testing.assert_allclose(logits, expected.logits[0], rtol=0, atol=1e-11)
    # in two parts, and read back
    records, tensors = numpy_model.to_folder()
    again = host.HostModel.from_folder(json.loads(json.dumps(records)), tensors)
    first, state = again.run(tokens[0, :13].numpy())
    second, _ = again.run(tokens[0, 13:].numpy(), state)
    np.testing.assert_allclose(np.concatenate([first, second]), logits, rtol=0, atol=1e-12)


def test_long_texts_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = host.host_model(tiny(sliding_window=9, cache={"bits": 6}))
    tokens = np.random.default_rng(0).integers(0, 60, 50)
    expected, _ = model.run(tokens)
    monkeypatch.setattr(host, "_TOKENS_AT_ONCE", 8)
    np.testing.assert_allclose(model.run(tokens)[0], expected, rtol=0, atol=1e-12)


def test_a_tied_table_is_stored_once() -> None:
    tied, apart = (host.host_model(tiny(tie_embeddings=x)).to_folder()[1] for x in (True, False))
    assert sum(array.shape == (60, 24) for array in tied.values()) == 1
    assert sum(array.shape == (60, 24) for array in apart.values()) == 2


@pytest.mark.parametrize(
    ("config", "reason", "hint"),
    [
        ({"activations": {"bits": 8}}, "dynamic scale", "convert.activations.scale=static"),
        ({"activations": {}}, "reads real values", "convert.activations.bits=8 convert.activations.scale=static"),
        ({"weights": {}}, "real weights", "convert.weights.bits=8"),
        ({"weights": {"bits": 9}}, "weights of 9 bits", "convert.weights.bits=8"),
        (
            {"activations": {"bits": 4, "scale": "static", "salient": SALIENT, "grid": "reference"}},
            "reference grid",
            "convert.activations.grid=exact",
        ),
    ],
)
def test_what_has_no_form_in_whole_numbers_is_refused(config: dict[str, Any], reason: str, hint: str) -> None:
    torch.manual_seed(0)
    model = SpikeLLM(SpikeLLMConfig(**{**SIZES, **STATIC, **config}))
    for call in (integers.export, host.host_model):
        with pytest.raises(
            LoweringError, match=rf"'model\.layers\.0\.self_attn\.q_proj' \(linear\).*{reason}"
        ) as error:
            call(model)
        assert hint in str(error.value.hint)


def test_keys_that_depend_on_later_tokens_are_refused() -> None:
    model = tiny(cache={"bits": 4, "key_range": "channel"})
    assert len(integers.export(model)) == 14
    with pytest.raises(LoweringError, match=r"'model\.layers\.0\.self_attn\.attention' .*, and 1 more") as error:
        host.host_model(model)
    assert "key_range" in str(error.value.hint)


def test_parameters_that_are_not_finite_are_named() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(LoweringError, match=r"'model\.norm' \(norm\): its weight"):
        host.host_model(model)


def test_a_damaged_folder_is_refused() -> None:
    records, tensors = host.host_model(tiny()).to_folder()
    name = "model.layers.0.mlp.up_proj:weight"
    with pytest.raises(DataError, match=f"lack '{name}'"):
        host.HostModel.from_folder(records, {x: t for x, t in tensors.items() if x != name})
    with pytest.raises(ValueError, match="do not fit together"):
        host.HostModel.from_folder(records, tensors | {name: tensors[name][1:]})
    with pytest.raises(ValueError, match=r"'model\.norm' does not fit"):
        host.HostModel.from_folder(records, tensors | {"model.norm.weight": np.ones(23)})


# -- a recipe that converts and deploys --------------------------------------------------------------------------------


@pytest.fixture
def settings_of(llama_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """What makes the recipe quick: a tiny Llama, a page of text, and nothing but conversion and deployment."""
    text = tmp_path / "text.txt"
    text.write_text("it is a truth universally acknowledged, that the cat sat on the mat.\n" * 60, encoding="utf-8")
    stages = ("evaluate", "generate", "explain", "compare", "report")
    return {
        "convert.source": str(llama_folder),
        "convert.calibration": {"samples": 4, "window": 32},
        "data": {"type": "text", "path": str(text)},
        "deploy.tokens": 40,
        **dict.fromkeys(stages),
    }


def test_a_recipe_converts_and_deploys(settings_of: dict[str, Any], tmp_path: Path) -> None:
    run = spiking_lm.run_recipe("spikellm/spinnaker2", settings_of, out=tmp_path / "runs")
    account = json.loads((run.path / "deployment.json").read_text(encoding="utf-8"))
    assert account["largest_difference"] < 1e-4, "beyond the rounding of a model that was stored in float32"
    assert account["same_guess"] == 1.0
    assert account["perplexity"] == pytest.approx(account["model_perplexity"], rel=1e-6)
    assert account["counters"]["tokens"] == 40


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"convert.activations.scale": "dynamic"}, r"'model\.layers\.0\.self_attn\.q_proj' .*dynamic scale"),
        ({"deploy.pes_per_chip": 9}, r"model\.layers\.1\.self_attn\.v_proj does not fit: .* 9 the chip has"),
        ({"deploy.numerics": "fp32"}, "whole numbers"),
    ],
)
def test_what_has_no_place_is_refused_before_it_is_converted(
    change: dict[str, Any], reason: str, settings_of: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(LoweringError, match=reason):
        spiking_lm.run_recipe("spikellm/spinnaker2", settings_of | change, out=tmp_path / "runs")
    (run,) = (tmp_path / "runs" / "spikellm" / "spinnaker2").glob("2*")
    assert not (run / "conversion").exists()
    assert not (run / "conversion.json").exists()
