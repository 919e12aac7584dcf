"""The omni pipeline against what the released SpikeLLM computes: one given block, and whole calibrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import mse_loss, rms_norm

from spiking_lm.schemes import ActivationScheme, CacheScheme, SalientChannels, WeightScheme
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.model import Block, turn
from spiking_lm_spikellm.omni import (
    PROJECTIONS,
    Learned,
    OmniResult,
    calibrate_block,
    first_logits,
    float_twin,
    input_maxima,
    keep_from_zero,
    run_block,
    transform,
    write_block,
)
from spiking_lm_spikellm.omni_config import OmniOptions
from spiking_lm_spikellm.saliency import CacheSaliency, SecondMoment, activation_saliency, choose

W4 = WeightScheme(bits=4)  # of all goldens here
SHIFTED = {
    "qkv": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "fc1": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "out": ("self_attn.v_proj", ("self_attn.o_proj",)),
}


def load(shared: Path, name: str) -> dict[str, Any]:
    path = shared / "golden" / "spikellm" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"golden/spikellm/{name}.npz is not here")
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    return {key: json.loads(str(a)) if a.dtype.kind == "U" else torch.from_numpy(a) for key, a in arrays.items()}


def published(hidden: int, inner: int, heads: int, activations: int, steps: int, **more: Any) -> SpikeLLMConfig:
    """The released scheme: the greater grid, keys over tokens, two steps for salient keys and values."""
    rate = {2: 0.1, 4: 0.05}[steps]
    return SpikeLLMConfig(
        n_embd=hidden,
        n_inner=inner,
        n_head=heads,
        activations=ActivationScheme(
            bits=activations, salient=SalientChannels(rate=rate, steps=steps), grid="reference", spikes="unsigned"
        ),
        cache=CacheScheme(
            bits=activations,
            query_bits=activations,
            salient=SalientChannels(rate=rate, steps=2),
            grid="reference",
            key_range="channel",
        ),
        **more,
    )


def block_config(golden: dict[str, Any], steps: int) -> SpikeLLMConfig:
    c = golden["config"]
    return published(
        c["hidden"], c["inter"], c["heads"], c["abits"], steps,
        vocab_size=8, n_layer=1, norm_eps=c["rms_eps"], rope_theta=c["rope_theta"],
    )  # fmt: skip


def params_of(golden: dict[str, Any], prefix: str = "fp.") -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def mark_salient(block: Block, golden: dict[str, Any], prefix: str) -> None:
    """Put the golden's masks, True = ordinary, into the block's buffers, True = salient."""
    for name in PROJECTIONS:
        block.get_submodule(name).salient.copy_(~golden[f"{prefix}{name}.mask_low_mse"].flatten())
    heads = (block.self_attn.config.kv_heads, block.self_attn.config.head_size)
    block.self_attn.salient_k.copy_(~golden[f"{prefix}self_attn.qkt_matmul.mask_low_mse"].view(heads))
    block.self_attn.salient_v.copy_(~golden[f"{prefix}self_attn.pv_matmul.mask_low_mse"].view(heads))


def shift(params: dict[str, Tensor], shifts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move what a matrix reads by a constant, and take the constant's product into its bias.

    Llama's shifts are zero and never learnt, so this is not part of the product; the golden block has them anyway.
    They come before the scales, which then scale the biases like those of any model.
    """
    params = dict(params)

    def add(name: str, value: Tensor) -> None:
        params[name] = params[name] + value if name in params else value

    for key, (writer, readers) in SHIFTED.items():
        add(f"{writer}.bias", -shifts[key])
        for reader in readers:
            add(f"{reader}.bias", params[f"{reader}.weight"] @ shifts[key])
    return params


def block_goldens(
    golden: dict[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Scales, shifts and logits of clipping."""
    heads = (golden["config"]["heads"], -1)
    scales = {key: golden[f"let.{key}_smooth_scale"].clone() for key in ("qkv", "fc1", "out", "qkt")}
    scales = {key: value.view(heads) if key in ("out", "qkt") else value for key, value in scales.items()}
    shifts = {key: golden[f"let.{key}_smooth_shift"].clone() for key in SHIFTED}
    clipping = {name: (golden[f"lwc.{name}.up"].clone(), golden[f"lwc.{name}.low"].clone()) for name in PROJECTIONS}
    return scales, shifts, clipping


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def assert_on_grid(ours: Tensor, golden: Tensor, rtol: float = 1e-5) -> None:
    """Equal but for 0.1 % of the weights, which may round the other way."""
    wrong = (ours - golden).abs() > 1e-5 + rtol * golden.abs()
    assert wrong.float().mean() <= 1e-3


def test_transformation_alone(shared: Path) -> None:
    golden = load(shared, "block")
    config = SpikeLLMConfig(
        vocab_size=8, n_layer=1, n_embd=64, n_inner=128, n_head=4, norm_eps=golden["config"]["rms_eps"]
    )
    scales, shifts, _ = block_goldens(golden)
    keep_from_zero(scales)
    params = params_of(golden)
    changed = transform(shift(params, shifts), scales, config)
    compared = 0
    for key, expected in params_of(golden, "letonly.").items():
        if expected.numel() == 1:  # down_proj has no bias
            assert key not in changed
            continue
        torch.testing.assert_close(changed[key], expected, rtol=1e-5, atol=1e-5)
        compared += 1
    assert compared == 17
    block = Block(config, 0)
    with torch.no_grad():
        assert relative(run_block(block, params, golden["x"]), golden["y_fp"]) <= 1e-5
        assert relative(run_block(block, changed, golden["x"]), golden["y_letonly"]) <= 1e-5


def test_clipped_weights(shared: Path) -> None:
    golden = load(shared, "block")
    config = block_config(golden, 2)
    scales, shifts, clipping = block_goldens(golden)
    keep_from_zero(scales)
    written = write_block(shift(params_of(golden), shifts), Learned(scales, clipping), W4, config)
    for name in PROJECTIONS:
        assert_on_grid(written[f"{name}.weight"], golden[f"letlwc.{name}.weight"])


@pytest.mark.parametrize("steps", [2, 4])
def test_whole_block(shared: Path, steps: int) -> None:
    golden = load(shared, "block")
    tag = f"T{steps}"
    config = block_config(golden, steps)
    block = Block(config, 0)
    mark_salient(block, golden, f"{tag}.")
    scales, shifts, clipping = block_goldens(golden)
    keep_from_zero(scales)
    leaves = {f"{key}_smooth_scale": value for key, value in scales.items()}
    leaves |= {f"{key}_smooth_shift": value for key, value in shifts.items()}
    for name, (upper, lower) in clipping.items():
        leaves |= {f"{name}.weight_quantizer.upbound_factor": upper, f"{name}.weight_quantizer.lowbound_factor": lower}
    for leaf in leaves.values():
        leaf.requires_grad_()
    written = write_block(shift(params_of(golden), shifts), Learned(scales, clipping), W4, config)

    seen: dict[str, Tensor] = {}
    hooks = [
        block.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: seen.update({name: y[:1]}))
        for name in ("input_layernorm", "post_attention_layernorm", *PROJECTIONS)
    ]
    y = run_block(block, written, golden["x"])
    for hook in hooks:
        hook.remove()
    for name, value in seen.items():
        assert relative(value, golden[f"{tag}.inter.{name}"]) <= 1e-3, name
    assert relative(y, golden[f"{tag}.y_let_lwc"]) <= 1e-3
    assert relative(y, golden[f"{tag}.y_inplace"]) <= 1e-3
    loss = mse_loss(y, golden["y_fp"])
    torch.testing.assert_close(loss, golden[f"{tag}.loss"], rtol=1e-3, atol=0)
    loss.backward()
    expected = params_of(golden, f"{tag}.grad.")
    assert leaves.keys() == expected.keys()
    for name, gradient in expected.items():
        ours = leaves[name].grad
        assert ours is not None
        assert torch.cosine_similarity(ours.flatten(), gradient.flatten(), dim=0) >= 0.999, name
        assert float(ours.norm()) == pytest.approx(float(gradient.norm()), rel=0.02), name


@pytest.mark.parametrize("steps", [2, 4])
def test_rounded_block(shared: Path, steps: int) -> None:
    golden = load(shared, "block")
    config = block_config(golden, steps)
    block = Block(config, 0)
    mark_salient(block, golden, f"T{steps}.")
    params = params_of(golden)
    written = write_block(params, Learned({}, first_logits(params, W4)), W4, config)
    for name in PROJECTIONS:
        assert_on_grid(written[f"{name}.weight"], golden[f"rtn.{name}.weight"])
    with torch.no_grad():
        assert relative(run_block(block, written, golden["x"]), golden[f"T{steps}.y_rtn"]) <= 1e-3


class Calibrated(NamedTuple):
    """What a whole calibration left behind, by layer."""

    maxima: list[dict[str, Tensor]]
    results: list[OmniResult]
    masks: list[dict[str, Tensor]]
    logits: Tensor
    logits_float: Tensor


def calibrate(golden: dict[str, Any]) -> Calibrated:
    """Walk through the model as the released code does: masks from float blocks that read what quantised ones wrote."""
    c = golden["config"]
    steps = 2 ** c["addbit"]
    config = published(
        c["hidden"], c["inter"], c["heads"], c["ab"], steps,
        vocab_size=c["vocab"], n_layer=c["layers"], norm_eps=1e-6,
    )  # fmt: skip
    options = OmniOptions(clipping=c["lwc"], transformation=c["let"], tie_rotary=False, epochs=c["epochs"])
    embedding = golden["fp.model.embed_tokens.weight"]
    x_float = x_quantised = embedding[golden["calib_ids"]]
    test_float = test = embedding[golden["test_ids"]]
    done = Calibrated([], [], [], test, test)
    for layer in range(c["layers"]):
        params = params_of(golden, f"fp.model.layers.{layer}.")
        block = Block(config, layer)
        masks = salient_channels(block, params, x_quantised, config)
        done.masks.append(masks)
        for name, mask in masks.items():
            block.get_buffer(name).copy_(mask)
        twin, buffers = float_twin(block)
        done.maxima.append(input_maxima(twin, {**buffers, **params}, x_float))
        with torch.no_grad():
            targets = run_block(twin, {**buffers, **params}, x_float)
            test_float = run_block(twin, {**buffers, **params}, test_float)
        result = calibrate_block(block, params, x_float, x_quantised, targets, options, weights=W4)
        done.results.append(result)
        written = {**result.params, **{f"{name}.weight": w.dequantize() for name, w in result.weights.items()}}
        with torch.no_grad():
            x_float, x_quantised = targets, run_block(block, written, x_quantised)
            test = run_block(block, written, test)

    def head(x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], golden["fp.model.norm.weight"], 1e-6) @ golden["fp.lm_head.weight"].T

    return done._replace(logits=head(test), logits_float=head(test_float))


def salient_channels(block: Block, params: dict[str, Tensor], x: Tensor, config: SpikeLLMConfig) -> dict[str, Tensor]:
    """Return the masks, by the names of the block's buffers."""
    scheme = config.activations.salient
    assert scheme is not None
    twin, _ = float_twin(block)
    reads: dict[str, Tensor] = {}
    returns: dict[str, Tensor] = {}
    for name in PROJECTIONS:

        def note(module: Module, args: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
            reads[name], returns[name] = args[0], y

        twin.get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        run_block(twin, params, x)
    masks = {}
    for name in PROJECTIONS:
        moment = SecondMoment(reads[name].shape[-1])
        moment.update(reads[name])
        masks[f"{name}.salient"] = choose(activation_saliency([params[f"{name}.weight"]], moment), scheme.rate)
    angles = block.self_attn.rotary(torch.arange(x.shape[1]), x)

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.head_size)).transpose(1, 2)

    q, k = (turn(by_head(returns[f"self_attn.{name}_proj"]), *angles) for name in "qk")
    cache = CacheSaliency(config.kv_heads, config.head_size)
    cache.update(q, k, by_head(reads["self_attn.o_proj"]))
    masks["self_attn.salient_k"] = choose(cache.keys, scheme.rate)
    masks["self_attn.salient_v"] = choose(cache.values, scheme.rate)
    return masks


def mask_flips(ours: dict[str, Tensor], golden: dict[str, Any], layer: int) -> int:
    names = {name: name.replace(".salient", ".mask_low_mse") for name in ours}
    names["self_attn.salient_k"] = "self_attn.qkt_matmul.mask_low_mse"
    names["self_attn.salient_v"] = "self_attn.pv_matmul.mask_low_mse"
    return sum(
        int((mask.flatten() == golden[f"q.model.layers.{layer}.{names[name]}"].flatten()).sum())
        for name, mask in ours.items()
    )


def check_maxima(done: Calibrated, golden: dict[str, Any]) -> None:
    for layer, maxima in enumerate(done.maxima):
        for name in PROJECTIONS:
            expected = golden[f"act_scale.model.layers.{layer}.{name}"]
            torch.testing.assert_close(maxima[name], expected, rtol=1e-4, atol=1e-5)


def test_learnt_clipping_of_a_whole_model(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load(shared, "pipeline_w4a4_T2_lwc_only")
    norms: list[Tensor] = []

    class Watched(torch.optim.AdamW):
        def step(self, *args: Any) -> None:  # type: ignore[override]
            leaves = [leaf.grad for group in self.param_groups for leaf in group["params"] if leaf.grad is not None]
            norms.append(torch.stack([gradient.norm() for gradient in leaves]).norm())
            super().step(*args)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    done = calibrate(golden)
    check_maxima(done, golden)
    epochs = golden["epoch_gradnorm"]
    torch.testing.assert_close(torch.stack(norms).view(*epochs.shape, -1).mean(-1), epochs, rtol=1e-3, atol=0)
    for layer, result in enumerate(done.results):
        assert mask_flips(done.masks[layer], golden, layer) == 0
        losses = torch.tensor(result.report.losses)
        torch.testing.assert_close(losses, golden["epoch_loss"][layer], rtol=1e-3, atol=0)
        for name in PROJECTIONS:
            at = f"omni.{layer}.{name}.weight_quantizer"
            upper, lower = result.learned.clipping[name]
            torch.testing.assert_close(upper, golden[f"{at}.upbound_factor"], rtol=1e-3, atol=0)
            torch.testing.assert_close(lower, golden[f"{at}.lowbound_factor"], rtol=1e-3, atol=0)
            at = f"q.model.layers.{layer}.{name}"
            weight = result.weights[name]
            torch.testing.assert_close(weight.grid.scale, golden[f"{at}.weight_quantizer.scales"], rtol=1e-3, atol=0)
            assert (weight.grid.zero == golden[f"{at}.weight_quantizer.zeros"]).float().mean() >= 0.999
            assert_on_grid(weight.dequantize(), golden[f"{at}.weight"], rtol=1e-3)
    assert relative(done.logits_float, golden["logits_fp"]) <= 1e-5
    assert relative(done.logits, golden["logits_q"]) <= 1e-3


def test_learnt_transformation_of_a_whole_model(shared: Path) -> None:
    golden = load(shared, "pipeline_w4a4_T2_let_lwc")
    done = calibrate(golden)
    check_maxima(done, golden)
    for layer, result in enumerate(done.results):
        assert mask_flips(done.masks[layer], golden, layer) <= (0, 2)[layer]
        losses = torch.tensor(result.report.losses)
        torch.testing.assert_close(losses, golden["epoch_loss"][layer], rtol=(0.01, 0.03)[layer], atol=0)
        for key, scale in result.learned.scales.items():
            expected = golden[f"omni.{layer}.{key}_smooth_scale"]
            torch.testing.assert_close(scale.flatten(), expected, rtol=(2e-3, 5e-2)[layer], atol=0)
    assert relative(done.logits, golden["logits_q"]) <= 0.15
