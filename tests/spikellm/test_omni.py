"""The omni pipeline: an equivalent transformation is equivalent, and what is learnt helps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import mse_loss

from spiking_lm.errors import ConfigError, DivergedError
from spiking_lm.quantization import fake_quantize_weight, round_to_nearest
from spiking_lm.schemes import WeightScheme
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.model import Block
from spiking_lm_spikellm.omni import (
    PROJECTIONS,
    Learned,
    OmniResult,
    calibrate_block,
    first_logits,
    first_scales,
    float_twin,
    input_maxima,
    keep_from_zero,
    run_block,
    transform,
    write_block,
)
from spiking_lm_spikellm.omni_config import OmniOptions

SIZES = {"vocab_size": 8, "n_layer": 1, "n_embd": 24, "n_inner": 40, "head_dim": 6}
W4 = WeightScheme(bits=4)


def block_and_params(seed: int = 0, **config: object) -> tuple[Block, dict[str, Tensor]]:
    """A random block with some outlier channels, so that there is something to gain."""
    torch.manual_seed(seed)
    block = Block(SpikeLLMConfig.model_validate({**SIZES, "n_head": 4, **config}), 0)
    params = {}
    for name, value in block.named_parameters():
        if name.endswith("norm.weight"):
            params[name] = torch.rand_like(value) + 0.5
            params[name][3] = 8.0
        else:
            params[name] = torch.randn_like(value) / value.shape[-1] ** 0.5
    return block, params


def scales_of(config: SpikeLLMConfig, generator: torch.Generator, tied: bool = True) -> dict[str, Tensor]:
    width = config.head_size // 2 if tied else config.head_size
    shapes = {
        "qkv": (config.n_embd,),
        "fc1": (config.n_embd,),
        "out": (1 if config.rotation else config.kv_heads, config.head_size),
        "qkt": (config.kv_heads, width),
    }
    scales = {}
    for key, shape in shapes.items():
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        scales[key] = sign * torch.exp(torch.randn(shape, generator=generator))
    return scales


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- the transformation


@settings(max_examples=20)
@given(kv_heads=st.sampled_from([1, 2, 4]), bias=st.booleans(), rotation=st.booleans(), seed=st.integers(0, 2**31))
def test_the_float_function_is_preserved(kv_heads: int, bias: bool, rotation: bool, seed: int) -> None:
    block, params = block_and_params(seed, n_kv_head=kv_heads, qkv_bias=bias, rotation=rotation)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, 24, generator=generator)
    config = block.self_attn.config
    changed = transform(params, scales_of(config, generator), config)
    assert changed.keys() == params.keys()
    assert not torch.allclose(changed["self_attn.q_proj.weight"], params["self_attn.q_proj.weight"])
    with torch.no_grad():
        assert relative(run_block(block, changed, x), run_block(block, params, x)) <= 1e-5


def test_rotary_pairs_with_scales_of_their_own_change_the_function() -> None:
    block, params = block_and_params(n_kv_head=2)
    config, x = block.self_attn.config, torch.randn(2, 9, 24)
    scales = scales_of(config, torch.Generator().manual_seed(1), tied=False)
    with torch.no_grad():
        before, after = run_block(block, params, x), run_block(block, transform(params, scales, config), x)
    assert relative(after, before) > 1e-3


def test_nothing_changes_without_scales() -> None:
    block, params = block_and_params()
    changed = transform(params, {}, block.self_attn.config)
    assert all(changed[name] is params[name] for name in params)


def test_scales_stay_away_from_zero_and_keep_their_sign() -> None:
    scales = {"qkv": torch.tensor([0.004, -0.004, 0.0, -0.0, 0.01, -2.0])}
    keep_from_zero(scales)
    assert scales["qkv"].tolist() == pytest.approx([0.01, -0.01, 0.01, 0.01, 0.01, -2.0])


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, True), (2, False)])
def test_first_scales_follow_the_maxima(kv_heads: int, tied: bool) -> None:
    block, params = block_and_params(n_kv_head=kv_heads)
    config, x = block.self_attn.config, torch.randn(3, 5, 24)
    maxima = input_maxima(block, params, x)
    normed = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * params["input_layernorm.weight"]
    torch.testing.assert_close(maxima["self_attn.q_proj"], normed.abs().flatten(0, 1).amax(0))
    scales = first_scales(params, maxima, OmniOptions(alpha=0.75, tie_rotary=tied), config)
    weight = params["mlp.up_proj.weight"].abs().amax(0)
    torch.testing.assert_close(scales["fc1"], maxima["mlp.up_proj"] ** 0.75 / weight**0.25)
    heads = [h for h in range(4) if h // (4 // kv_heads) == 1]  # those that read the second key head
    channel = torch.tensor([6 * h + 2 for h in heads])
    weight = params["self_attn.o_proj.weight"].abs().amax(0)[channel].max()
    activation = maxima["self_attn.o_proj"][channel].max()
    torch.testing.assert_close(scales["out"][1, 2], activation**0.75 / weight**0.25)
    assert scales["qkt"].shape == (kv_heads, 3 if tied else 6)
    assert (scales["qkt"] == 1).all()


# -- weights on their grids


@pytest.mark.parametrize(
    "scheme",
    [W4, WeightScheme(bits=2, group_size=7), WeightScheme(bits=3, group_size=8, symmetric=True), WeightScheme()],
)
@pytest.mark.parametrize("parts", ["let+lwc", "let", "lwc"])
def test_written_weights_are_those_of_the_quantizer_with_its_gradients(scheme: WeightScheme, parts: str) -> None:
    """The fast way is the plain one: transform, then fake_quantize_weight."""
    block, params = block_and_params(n_kv_head=2, qkv_bias=True)
    config, generator = block.self_attn.config, torch.Generator().manual_seed(3)
    scales = scales_of(config, generator) if "let" in parts else {}
    clipping = {} if scheme.off or "lwc" not in parts else first_logits(params, scheme)
    clipping = {name: (upper - 3, lower - 2) for name, (upper, lower) in clipping.items()}
    learned = Learned(scales, clipping)
    leaves = [*scales.values(), *(logit for pair in clipping.values() for logit in pair)]
    for leaf in leaves:
        leaf.requires_grad_()
    plain = transform(params, scales, config)
    for name in PROJECTIONS:
        weight = f"{name}.weight"
        plain[weight] = fake_quantize_weight(plain[weight], scheme, *clipping.get(name, (None, None)))
    fast = write_block(params, learned, scheme, config)
    assert fast.keys() == plain.keys()
    for name in plain:
        assert torch.equal(fast[name], plain[name]), name
    if not leaves:
        return
    weigh = {name: torch.randn(value.shape, generator=generator) for name, value in plain.items()}
    expected, ours = (
        torch.autograd.grad(torch.stack([(way[name] * weigh[name]).sum() for name in way]).sum(), leaves)
        for way in (plain, fast)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


# -- calibration


class Case(NamedTuple):
    """A calibrated block, and what it was calibrated with."""

    block: Block
    params: dict[str, Tensor]
    x_float: Tensor
    x_quantised: Tensor
    targets: Tensor
    result: OmniResult
    epochs: list[tuple[int, float]]


def calibrated(weights: WeightScheme = W4, options: OmniOptions | None = None, **config: object) -> Case:
    schemes = {
        "activations": {"bits": 4, "salient": {"rate": 0.1, "steps": 2}},
        "cache": {"bits": 4, "query_bits": 4},
        "n_kv_head": 2,
        **config,
    }
    block, params = block_and_params(**schemes)
    for name in PROJECTIONS:
        block.get_buffer(f"{name}.salient")[3] = True
    torch.manual_seed(1)
    x = torch.randn(3, 10, 24)
    read = x + 0.02 * torch.randn_like(x)
    twin, buffers = float_twin(block)
    with torch.no_grad():
        targets = run_block(twin, {**buffers, **params}, x)
    epochs: list[tuple[int, float]] = []
    result = calibrate_block(
        block,
        params,
        x,
        read,
        targets,
        options or OmniOptions(epochs=3),
        weights=weights,
        progress=lambda epoch, loss: epochs.append((epoch, loss)),
    )
    return Case(block, params, x, read, targets, result, epochs)


@pytest.fixture(scope="module")
def case() -> Case:
    """Looked at by several tests, changed by none."""
    return calibrated()


def test_what_is_learnt_beats_rounding_and_is_reported(case: Case) -> None:
    report = case.result.report
    assert report.method == "let+lwc"
    assert report.let_lr == 5e-3
    assert not report.notes
    assert case.epochs == list(enumerate(report.losses, 1))
    assert len(case.epochs) == 3
    assert report.losses[-1] < report.losses[0]
    assert report.loss < 0.9 * report.rtn_loss


def test_the_report_says_what_the_parts_make(case: Case) -> None:
    """The loss of the report is that of the folded parameters with the codes in the place of weights."""
    result = case.result
    written = {**result.params, **{f"{name}.weight": w.dequantize() for name, w in result.weights.items()}}
    twin, buffers = float_twin(case.block)
    with torch.no_grad():
        losses = [mse_loss(run_block(case.block, written, x[None]), y[None]) for x, y in zip(*case[3:5], strict=True)]
        folded = run_block(twin, {**buffers, **result.params}, case.x_float)
    assert float(sum(losses)) / 3 == pytest.approx(result.report.loss, rel=1e-6)
    assert relative(folded, case.targets) <= 1e-5  # so any method of quantising weights may start from here
    assert not any(value.requires_grad for value in written.values())
    assert result.params.keys() == case.params.keys()


def test_equal_inputs_give_equal_results(case: Case) -> None:
    first, second = case.result, calibrated().result
    assert first.report == second.report
    for name in PROJECTIONS:
        assert torch.equal(first.weights[name].codes, second.weights[name].codes)
        assert torch.equal(first.params[f"{name}.weight"], second.params[f"{name}.weight"])


def test_nothing_outside_is_touched(case: Case) -> None:
    """The parameters given do not change, and no gradient or hook stays behind in the block."""
    _, before = block_and_params(n_kv_head=2)
    for name, value in before.items():
        assert torch.equal(case.params[name], value)
    assert all(value.grad is None for value in case.block.parameters())
    assert not any(module._forward_pre_hooks for module in case.block.modules())


@pytest.mark.parametrize(
    ("options", "weights", "method"),
    [
        ({"transformation": False}, W4, "lwc"),
        ({"clipping": False}, W4, "let"),
        ({}, WeightScheme(), "let"),
        ({"transformation": False}, WeightScheme(), "rtn"),
        ({"aug_loss": True}, WeightScheme(bits=3, group_size=7), "let+lwc"),
        ({}, WeightScheme(bits=4, symmetric=True), "let+lwc"),
    ],
)
def test_parts_alone(options: dict[str, bool], weights: WeightScheme, method: str) -> None:
    case = calibrated(weights, OmniOptions(epochs=2, **options))
    result, params = case.result, case.params
    assert result.report.method == method
    assert bool(result.learned.scales) == ("let" in method)
    assert result.weights.keys() == (set() if weights.off else set(PROJECTIONS))
    if method == "rtn":
        assert result.report.loss == result.report.rtn_loss
        assert all(torch.equal(result.params[name], params[name]) for name in params)
    else:
        assert result.report.loss < result.report.rtn_loss
    if weights.group_size:
        assert result.learned.clipping["self_attn.q_proj"][0].shape == (24, 4)


def test_a_rotated_block_has_one_scale_per_channel_for_all_values() -> None:
    case = calibrated(options=OmniOptions(epochs=2), rotation=True)
    assert case.result.learned.scales["out"].shape == (1, 6)
    assert case.result.report.loss < case.result.report.rtn_loss
    twin, buffers = float_twin(case.block)
    with torch.no_grad():
        assert relative(run_block(twin, {**buffers, **case.result.params}, case.x_float), case.targets) <= 1e-5


def test_the_augmented_loss_is_another_one(case: Case) -> None:
    plain = case.result.report
    augmented = calibrated(options=OmniOptions(epochs=1, aug_loss=True)).result.report
    assert augmented.losses[0] > 1.2 * plain.losses[0]
    assert augmented.rtn_loss == plain.rtn_loss


def test_a_loss_that_is_not_finite_is_taken_back_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> dict[str, Tensor]:
        return {**first_scales(*args), "fc1": torch.full((24,), math.inf)}

    monkeypatch.setattr("spiking_lm_spikellm.omni.first_scales", broken)
    result = calibrated(options=OmniOptions(epochs=2)).result
    assert result.report.method == "lwc"
    assert result.report.let_lr == 0
    assert [note.split(":")[0] for note in result.report.notes] == [
        "let+lwc at let_lr 0.005",
        "let+lwc at let_lr 0.0025",
    ]
    assert len(result.report.losses) == 2
    assert result.report.loss < result.report.rtn_loss


def test_in_the_end_weights_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (upper * math.nan, lower) for name, (upper, lower) in first_logits(*args).items()}

    monkeypatch.setattr("spiking_lm_spikellm.omni.first_logits", broken)
    case = calibrated()
    result, params = case.result, case.params
    assert result.report.method == "rtn"
    assert len(result.report.notes) == 3
    assert result.report.losses == ()
    assert not case.epochs
    assert result.report.loss == result.report.rtn_loss
    for name in PROJECTIONS:
        expected = round_to_nearest(params[f"{name}.weight"], W4)
        assert torch.equal(result.weights[name].codes, expected.codes)
        assert torch.equal(result.params[f"{name}.weight"], params[f"{name}.weight"])


def test_bad_requests_are_refused() -> None:
    block, params = block_and_params()
    x = torch.randn(1, 5, 24)
    with pytest.raises(ConfigError, match="ternary"):
        calibrate_block(block, params, x, x, x, OmniOptions(), weights=WeightScheme(type="ternary"))
    packed, _ = block_and_params(weights={"bits": 4})
    with pytest.raises(ConfigError, match="packed"):
        calibrate_block(packed, params, x, x, x, OmniOptions(), weights=W4)
    with pytest.raises(DivergedError, match="not finite before"):
        calibrate_block(block, params, x, x * math.nan, x, OmniOptions(), weights=W4)
    with pytest.raises(ValueError, match="both off"):
        OmniOptions(clipping=False, transformation=False)
