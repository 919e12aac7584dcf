"""The op ``gif_linear``: fast form and definition, the three views, and the released code's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm import kernels
from spiking_lm.errors import UsageError
from spiking_lm.gif import calibrate_scale, gif_encode, gif_linear, gif_quantize, gif_spikes, gif_substeps, levels
from spiking_lm.schemes import ActivationScheme, SalientChannels

MODES = ("fake", "spike", "binary")
IMPLEMENTATIONS = ("reference", "torch")


def scheme(bits: int = 4, steps: int = 1, **options: Any) -> ActivationScheme:
    return ActivationScheme(bits=bits, salient=SalientChannels(rate=0.1, steps=steps) if steps > 1 else None, **options)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask(seed: int, channels: int, share: float = 0.3) -> Tensor:
    return torch.rand(channels, generator=torch.Generator().manual_seed(seed)) < share


def close(got: Tensor, expected: Any, tolerance: float) -> None:
    """Relative to the largest element: products cancel."""
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    if not expected.numel():
        return
    bound = tolerance * max(1.0, float(expected.abs().max()))
    difference = float((got.to(expected.dtype) - expected).abs().max())
    assert difference <= bound, f"differs by {difference}, allowed {bound}"


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Inputs of every kind that a layer meets: ranges away from zero, constant tokens, silent ones, outliers."""
    steps = draw(st.sampled_from([1, 2, 4, 8]))
    channels = draw(st.sampled_from([1, 2, 7, 33]))
    tokens = draw(st.sampled_from([(), (1,), (3,), (2, 5), (0,)]))
    seed = draw(st.integers(0, 10_000))
    x = normal(seed, *tokens, channels) * draw(st.sampled_from([1.0, 1e-3, 50.0])) + draw(
        st.sampled_from([0.0, 0.0, 9.0, -3.0])
    )
    kind = draw(st.sampled_from(["plain", "constant", "silent", "outlier"]))
    if kind == "constant":
        x = torch.where(normal(seed + 1, *tokens, 1) > 0, x[..., :1].expand_as(x), x)
    elif kind == "silent":
        x = x * 0
    elif kind == "outlier":
        x = torch.cat([x[..., :1] * 300, x[..., 1:]], -1)
    static = draw(st.booleans())
    settings_ = scheme(
        draw(st.integers(2, 8)),
        steps,
        spikes=draw(st.sampled_from(["signed", "unsigned"])),
        scale="static" if static else "dynamic",
    )
    salient = None if steps == 1 or seed % 5 == 0 else mask(seed, channels)
    scale = calibrate_scale(0.7 * x) if static and x.numel() else torch.tensor([-1.0, 2.0]) if static else None
    bias = normal(seed + 3, 5) if draw(st.booleans()) else None
    return {
        "x": x,
        "weight": normal(seed + 2, 5, channels),
        "bias": bias,
        "scheme": settings_,
        "salient": salient,
        "scale": scale,
    }


def run(implementation: str, problem: dict[str, Any], mode: str, dtype: torch.dtype = torch.float64) -> Tensor:
    cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in problem.items()}
    with kernels.use(gif_linear=implementation):
        return gif_linear(**cast, mode=mode)


@settings(max_examples=50)
@given(problem=problems(), mode=st.sampled_from(MODES))
def test_fast_form_equals_its_definition(problem: dict[str, Any], mode: str) -> None:
    close(run("torch", problem, mode), run("reference", problem, mode), 1e-9)


@settings(max_examples=50)
@given(problem=problems())
def test_the_three_views_are_equal(problem: dict[str, Any]) -> None:
    fake, spike, binary = (run("torch", problem, mode) for mode in MODES)
    close(spike, fake, 1e-9)
    close(binary, fake, 1e-9)


@settings(max_examples=50)
@given(problem=problems(), mode=st.sampled_from(MODES))
def test_gradients_of_all_forms_are_those_of_the_definition(problem: dict[str, Any], mode: str) -> None:
    found = []
    for implementation, which in (("reference", "fake"), ("torch", mode)):
        leaves = {k: problem[k].clone().requires_grad_() for k in ("x", "weight", "bias") if problem[k] is not None}
        out = run(implementation, {**problem, **leaves}, which)
        found.append(torch.autograd.grad((out * normal(5, *out.shape)).sum(), list(leaves.values())))
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs, 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_products_large_enough_for_another_library(mode: str) -> None:
    problem = {
        "x": normal(0, 40, 260, dtype=torch.float32),
        "weight": normal(1, 270, 260, dtype=torch.float32),
        "bias": normal(2, 270, dtype=torch.float32),
        "scheme": scheme(3, 2, spikes="unsigned"),
        "salient": mask(3, 260),
        "scale": None,
    }
    expected = run("reference", problem, mode, torch.float32)
    close(run("torch", problem, mode, torch.float32), expected, 1e-5)
    trained = {**problem, "weight": problem["weight"].clone().requires_grad_()}
    close(run("torch", trained, mode, torch.float32).detach(), expected, 1e-5)


@settings(max_examples=60)
@given(problem=problems())
def test_spikes_and_substeps_sum_to_the_codes_and_decode_to_the_values(problem: dict[str, Any]) -> None:
    settings_, salient = problem["scheme"], problem["salient"]
    arguments = problem["x"], settings_, salient, None if problem["scale"] is None else problem["scale"].double()
    counts, most = gif_encode(*arguments), 2**settings_.bits - 1
    assert counts.codes.dtype == torch.int32
    torch.testing.assert_close(counts.decode(), gif_quantize(*arguments), rtol=1e-12, atol=1e-12)
    spikes = gif_spikes(counts, settings_, salient)
    substeps = gif_substeps(spikes, most)
    assert spikes.shape == (1 if salient is None else settings_.salient.steps, *problem["x"].shape)
    assert substeps.shape == (most * len(spikes), *problem["x"].shape)
    assert torch.equal(spikes.sum(0).int(), counts.codes)
    assert torch.equal(substeps.sum(0, dtype=torch.int32), counts.codes)
    allowed = {-1, 0, 1} if settings_.spikes == "signed" else {0, 1}
    assert set(substeps.unique().tolist()) <= allowed
    assert not spikes.numel() or int(spikes.abs().max()) <= most
    if salient is not None:
        assert not spikes[1:, ..., ~salient].any(), "ordinary channels have one step"
    if settings_.spikes == "signed" and problem["scale"] is not None:
        assert not counts.zero.any(), "a static range holds 0"


@settings(max_examples=40)
@given(problem=problems(), shift=st.sampled_from([0.0, 0.37, -1234.5, 3e30, 1e-20]))
def test_constant_tokens_come_back_exactly(problem: dict[str, Any], shift: float) -> None:
    settings_ = problem["scheme"].model_copy(update={"scale": "dynamic"})
    x = torch.full_like(problem["x"], shift, dtype=torch.float32).requires_grad_()
    values = gif_quantize(x, settings_, problem["salient"])
    assert torch.equal(values, x)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize("spikes", ["signed", "unsigned"])
@pytest.mark.parametrize("value", [1e7, 12345.0, 0.37])
def test_tokens_that_hardly_vary_keep_their_values(value: float, spikes: str) -> None:
    """The released code clamps their zero point to 1e4 and returns 0.1 for 0.37."""
    x = torch.nextafter(torch.full((1, 8), value), torch.tensor(torch.inf)).index_fill(1, torch.tensor([2]), value)
    settings_ = scheme(4, 2, spikes=spikes)
    salient = mask(0, 8)
    for values in (gif_quantize(x, settings_, salient), gif_encode(x, settings_, salient).decode()):
        torch.testing.assert_close(values, x, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, mode: str) -> None:
    x, weight, salient = normal(0, 3, 9, dtype=dtype), normal(1, 4, 9, dtype=dtype), mask(2, 9)
    full = gif_linear(x.float(), weight.float(), None, scheme(4, 2), salient, mode=mode)
    half = gif_linear(x, weight, None, scheme(4, 2), salient, mode=mode)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, rtol=2e-2, atol=5e-2)


def test_what_is_not_a_number_is_not_hidden() -> None:
    x = normal(0, 4, 6, dtype=torch.float32)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    for mode in MODES:
        out = gif_linear(x, normal(1, 3, 6, dtype=torch.float32), None, scheme(4, 2), mask(1, 6), mode=mode)
        assert out.isfinite().all(1).tolist() == [True, False, False, True]


def test_sixteen_bits_change_nothing() -> None:
    x, weight = normal(0, 4, 6), normal(1, 3, 6)
    assert gif_quantize(x, ActivationScheme()) is x
    for implementation in IMPLEMENTATIONS:
        with kernels.use(gif_linear=implementation):
            torch.testing.assert_close(gif_linear(x, weight, None, ActivationScheme(), mode="spike"), x @ weight.T)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weight": torch.ones(5, 3)}, "needs weights"),
        ({"bias": torch.ones(4)}, "bias has shape"),
        ({"x": torch.ones(2, 7).long()}, "floating-point"),
        ({"salient": torch.ones(7)}, "must be bool"),
        ({"salient": torch.ones(6, dtype=torch.bool)}, "one per channel"),
        ({"salient": torch.ones(2, 7, dtype=torch.bool)}, "salient must be"),
        ({"scheme": scheme(4), "salient": torch.ones(7, dtype=torch.bool)}, "the scheme of the activations has none"),
        ({"scale": torch.ones(2)}, "a dynamic scale"),
        ({"scheme": scheme(4, scale="static")}, "a static scale"),
        ({"scheme": scheme(4, scale="static"), "scale": torch.ones(3)}, "the least and the greatest"),
        ({"mode": "spikes"}, "mode must be"),
        (
            {"scheme": scheme(4, 2, grid="reference"), "salient": torch.ones(7, dtype=torch.bool), "mode": "spike"},
            "codes reach 31, but 2 steps of at most 15 spikes emit 30",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], says: str) -> None:
    right = {"x": torch.ones(2, 7), "weight": torch.ones(5, 7), "bias": None, "scheme": scheme(4, 2)}
    with pytest.raises(UsageError, match=says):
        gif_linear(**{**right, **arguments})


def test_calibration_widens_the_range_and_keeps_zero_in_it() -> None:
    seen = calibrate_scale(torch.tensor([0.5, 2.0]))
    assert seen.tolist() == [0.0, 2.0]
    assert calibrate_scale(torch.tensor([-3.0, 1.0]), seen).tolist() == [-3.0, 2.0]


# -- the released code's numbers, and our own definition of the exact grid ---------------------------------------------


def _golden(shared: Path, name: str) -> Any:
    return np.load(shared / "golden" / "spikellm" / f"{name}.npz")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_token_quantiser(shared: Path, bits: int, extra: int) -> None:
    data, settings_ = _golden(shared, "quantizer"), scheme(bits, 2**extra, grid="reference", spikes="unsigned")
    x = torch.tensor(data["x"])
    salient = torch.ones(x.shape[-1], dtype=torch.bool) if extra else None
    usual = torch.ones(x.shape[:-1], dtype=torch.bool)
    usual[0, 2] = False  # constant: the released code returns something else
    counts = gif_encode(x, settings_, salient)
    key = f"tok_n{bits}_a{extra}"
    assert torch.equal(
        counts.codes[usual].float() - counts.zero[usual],
        torch.tensor(data[f"{key}_int"])[usual] - torch.tensor(data[f"{key}_zp"])[usual],
    )
    values = gif_quantize(x, settings_, salient)
    torch.testing.assert_close(values[usual], torch.tensor(data[f"{key}_y"])[usual], rtol=1e-6, atol=1e-7)
    assert torch.equal(values[0, 2], x[0, 2])


def test_ties_round_to_even_and_gradients_are_the_released_ones(shared: Path) -> None:
    data = _golden(shared, "quantizer")
    w = torch.tensor(data["W"], requires_grad=True)
    values = gif_quantize(w, scheme(4))
    (gradient,) = torch.autograd.grad((values * torch.tensor(data["W_cot"])).sum(), w)
    torch.testing.assert_close(values.detach(), torch.tensor(data["w_n4_sym0_dz0_g0_lwc0_y"]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, torch.tensor(data["w_n4_sym0_dz0_g0_lwc0_gW"]), rtol=1e-5, atol=1e-6)
    assert torch.equal(gif_quantize(torch.tensor(data["half_x"]), scheme(4)), torch.tensor(data["half_y"]))


@pytest.mark.parametrize("which", ["none", "some", "all"])
@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_released_linear_layer(shared: Path, bits: int, extra: int, which: str) -> None:
    data, key = _golden(shared, "spike_linear"), f"n{bits}_a{extra}_{which}"
    x, weight, bias = (torch.tensor(data[name]) for name in ("x", "W", "b"))
    salient = ~torch.tensor(data[f"{key}_mask_low"]).flatten()
    settings_ = scheme(bits, 2**extra, grid="reference", spikes="unsigned")
    torch.testing.assert_close(
        gif_quantize(x, settings_, salient), torch.tensor(data[f"{key}_xq"]), rtol=1e-6, atol=1e-6
    )
    for implementation in IMPLEMENTATIONS:
        with kernels.use(gif_linear=implementation):
            close(gif_linear(x, weight, bias, settings_, salient), data[f"{key}_out_fake"], 1e-5)
    # Its spikes leave out the greatest codes, which T steps cannot emit; the rest is ours.
    exact = settings_.model_copy(update={"grid": "exact"})
    counts = gif_encode(x, settings_, torch.ones_like(salient))
    emittable = counts._replace(codes=counts.codes.clamp(max=levels(exact, salient=True)))
    spikes = gif_spikes(emittable, exact, salient) * salient
    assert torch.equal(spikes.float(), torch.tensor(data[f"{key}_spikes"]) * salient)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("bits", [2, 4])
def test_exact_grid(shared: Path, bits: int, steps: int) -> None:
    data, key = _golden(shared, "derived_gif"), f"n{bits}_T{steps}"
    x, weight, bias = (torch.tensor(data[name]) for name in ("x", "W", "b"))
    settings_ = scheme(bits, steps, spikes="unsigned")
    everywhere = torch.ones(x.shape[-1], dtype=torch.bool) if steps > 1 else None
    counts = gif_encode(x, settings_, everywhere)
    spikes = gif_spikes(counts, settings_, everywhere)
    assert torch.equal(counts.codes.float(), torch.tensor(data[f"{key}_q"]))
    assert torch.equal(spikes.float(), torch.tensor(data[f"{key}_spikes"]))
    salient = torch.tensor(data["salient"]) if steps > 1 else None
    close(gif_quantize(x, settings_, salient), data[f"{key}_xq"], 1e-6)
    for implementation in IMPLEMENTATIONS:
        for mode in MODES:
            with kernels.use(gif_linear=implementation):
                close(gif_linear(x, weight, bias, settings_, salient, mode=mode), data[f"{key}_out"], 1e-5)
