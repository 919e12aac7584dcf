"""Ternary and binary matrices: golden values and gradients, levels, packing, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spiking_lm.errors import CheckpointError, UsageError
from spiking_lm.weights import (
    Precision,
    QuantizedLinear,
    binary_codes,
    binary_weight,
    expect_packed,
    int8_activation,
    pack_weights,
    ternary_codes,
    ternary_weight,
)

FEW: list[Precision] = ["ternary", "binary"]


@pytest.fixture(params=["b_quant_a", "b_quant_b"])
def golden(request: pytest.FixtureRequest, shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden" / "spikelm_bitspike" / f"{request.param}.safetensors")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_ternary_values_and_gradients_are_golden(golden: dict[str, Tensor]) -> None:
    codes, scale = ternary_codes(golden["w"])
    assert torch.equal(codes, golden["ternary_codes"])
    close(scale, golden["ternary_scale"][0])
    close(ternary_weight(golden["w"]), golden["ternary_dequant"])
    # This golden layer reads the 8-bit activations of its paper.
    weight, x = golden["w"].clone().requires_grad_(), golden["x"].clone().requires_grad_()
    y = int8_activation(x) @ ternary_weight(weight).T
    y.backward(golden["ste_grad_out"])
    grad_w, grad_x = weight.grad, x.grad
    assert grad_w is not None
    assert grad_x is not None
    close(y.detach(), golden["ste_y"])
    close(grad_w, golden["ste_grad_w"])
    close(grad_x, golden["ste_grad_x"])


def test_binary_values_and_gradients_are_golden(golden: dict[str, Tensor]) -> None:
    codes, scale = binary_codes(golden["w"])
    assert torch.equal(codes, golden["binary_codes"])
    close(scale, golden["binary_scale"][0])
    close(binary_weight(golden["w"]), golden["binary_dequant"])
    weight = golden["w"].clone().requires_grad_()
    y = golden["x"] @ binary_weight(weight).T
    y.backward(golden["ste_grad_out"])
    assert weight.grad is not None
    close(y.detach(), golden["binary_y"])
    close(weight.grad, golden["binary_ste_grad_w"])


def test_int8_activations_are_golden(golden: dict[str, Tensor]) -> None:
    x = golden["x"].clone().requires_grad_()
    rounded = int8_activation(x)
    close(rounded.detach(), golden["x_int8_dequant"])
    close(rounded.detach() @ ternary_weight(golden["w"]).T, golden["bitlinear_y"])
    rounded.backward(golden["x"])
    assert x.grad is not None
    assert torch.equal(x.grad, golden["x"])


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 17), scale=st.floats(1e-6, 1e6))
def test_a_matrix_has_its_levels_exactly_and_follows_its_scale(
    seed: int, rows: int, columns: int, scale: float
) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for quantise, codes_of, most in ((ternary_weight, ternary_codes, 3), (binary_weight, binary_codes, 2)):
        matrix = quantise(w)
        assert len(matrix.unique()) <= most
        codes = codes_of(w)
        assert torch.equal(codes.codes * codes.scale, matrix)
        if codes.scale > 1e-4 and codes.scale * scale > 1e-4:  # clear of the least scale
            torch.testing.assert_close(codes_of(w * scale).scale, codes.scale * scale)


def test_a_matrix_of_zeros_is_finite() -> None:
    zeros = torch.zeros(3, 4)
    assert torch.equal(ternary_weight(zeros), zeros)
    assert torch.equal(binary_weight(zeros), zeros)


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (128, 96)])
def test_packed_layers_compute_the_same(bits: Precision, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    layer = QuantizedLinear(shape[1], shape[0], bits=bits).to(dtype)
    x = (torch.rand(5, shape[1]) < 0.3).to(dtype)
    y, effective = layer(x), layer.effective_weight().detach()
    layer.pack()
    assert layer.packed
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.weight, effective)
    assert set(dict(layer.named_parameters())) == {"bias"}
    assert torch.equal(copy.deepcopy(layer)(x), y)


@pytest.mark.parametrize(("bits", "least"), [("ternary", 8), ("binary", 14)])
def test_a_packed_layer_is_a_small_file(bits: Precision, least: int, tmp_path: Path) -> None:
    layer = QuantizedLinear(256, 256, bias=False, bits=bits)
    x = torch.randn(3, 256)
    with torch.no_grad():  # packed weights record no gradient either, and so the same product is taken
        y = layer(x)
    save_file(nn.Linear(256, 256, bias=False).half().state_dict(), tmp_path / "fp16.safetensors")
    layer.pack()
    save_file(layer.state_dict(), tmp_path / "packed.safetensors")
    assert (tmp_path / "fp16.safetensors").stat().st_size >= least * (tmp_path / "packed.safetensors").stat().st_size
    fresh = QuantizedLinear(256, 256, bias=False, bits=bits)
    fresh.load_state_dict(load_file(tmp_path / "packed.safetensors"))
    assert fresh.packed
    assert torch.equal(fresh(x), y)


def test_full_layers_are_ordinary_ones() -> None:
    torch.manual_seed(0)
    layer, plain = QuantizedLinear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), plain(x))
    with pytest.raises(UsageError, match="no codes"):
        layer.pack()


def test_models_are_packed_and_loaded_whole() -> None:
    def build(bits: Precision) -> nn.Sequential:
        return nn.Sequential(QuantizedLinear(12, 9, bits=bits), nn.ReLU(), QuantizedLinear(9, 2))

    torch.manual_seed(1)
    model = build("ternary")
    x = torch.randn(4, 12)
    y = model(x)
    assert pack_weights(model) == 1
    assert torch.equal(model(x), y)
    stored = model.state_dict()
    fresh = build("ternary")
    expect_packed(fresh, stored)
    assert fresh.state_dict().keys() == stored.keys()
    fresh.load_state_dict(stored)
    assert torch.equal(fresh(x), y)
    for other in ("binary", "full"):
        with pytest.raises(CheckpointError, match=f"packed ternary weights for a layer of {other} ones"):
            expect_packed(build(other), stored)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", FEW)
def test_training_moves_the_weights_behind_the_levels(bits: Precision) -> None:
    torch.manual_seed(2)
    layer = QuantizedLinear(16, 4, bits=bits)
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    before = layer.effective_weight().detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-10:]) < 0.9 * losses[0]
    assert not torch.equal(layer.effective_weight().sign(), before.sign())
