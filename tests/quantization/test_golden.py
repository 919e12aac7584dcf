"""Grids, values and gradients against the released quantizers' own numbers, OmniQuant's and GPTQ's; ternary steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spiking_lm.quantization import (
    Grid,
    _by_group,
    _FakeQuantize,
    decode,
    encode,
    fake_quantize_weight,
    group_count,
    round_to_nearest,
    ternary_grid,
    ternary_spikes,
    weight_grid,
)
from spiking_lm.schemes import WeightScheme


def _load(shared: Path, name: str) -> dict[str, Tensor]:
    with np.load(shared / "golden" / "spikellm" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind == "f"}


@pytest.fixture(scope="module")
def quantizer(shared: Path) -> dict[str, Tensor]:
    return _load(shared, "quantizer")


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clipped", [False, True], ids=["whole", "clipped"])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_values_and_gradients(
    quantizer: dict[str, Tensor], bits: int, symmetric: bool, group: int | None, clipped: bool
) -> None:
    key = f"w_n{bits}_sym{int(symmetric)}_dz0_g{group or 0}_lwc{int(clipped)}"
    scheme = WeightScheme(bits=bits, symmetric=symmetric, group_size=group)
    w = quantizer["W"].clone().requires_grad_()
    groups = (8, 32 // (group or 32))
    logits = [quantizer[f"{key}_{end}"].view(groups).requires_grad_() for end in ("up", "low")] if clipped else []
    grid = weight_grid(w, scheme, **dict(zip(("upper", "lower"), logits, strict=False)))
    _close(grid.scale, quantizer[f"{key}_scale"].view(groups))
    assert torch.equal(grid.zero, quantizer[f"{key}_zp"].view(groups))
    values = fake_quantize_weight(w, scheme, *logits)
    _close(values, quantizer[f"{key}_y"])
    assert torch.equal(decode(encode(w, grid, scheme), grid, scheme), values)
    if bits == 4:
        (values * quantizer["W_cot"]).sum().backward()
        for name, tensor in zip(("gW", "gup", "glow"), (w, *logits), strict=False):
            assert tensor.grad is not None
            _close(tensor.grad, quantizer[f"{key}_{name}"].view(tensor.shape))


@pytest.mark.parametrize("clipped", [False, True], ids=["whole", "clipped"])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_that_is_disabled_is_one_in_the_middle(
    quantizer: dict[str, Tensor], bits: int, symmetric: bool, group: int | None, clipped: bool
) -> None:
    """No scheme of ours has it: around zero, the range that an asymmetric scale stands for is cut off at one end."""
    key = f"w_n{bits}_sym{int(symmetric)}_dz1_g{group or 0}_lwc{int(clipped)}"
    scheme = WeightScheme(bits=bits, symmetric=symmetric, group_size=group)
    w = quantizer["W"].clone().requires_grad_()
    groups = (8, 32 // (group or 32))
    logits = [quantizer[f"{key}_{end}"].view(groups).requires_grad_() for end in ("up", "low")] if clipped else []
    scale = weight_grid(w, scheme, **dict(zip(("upper", "lower"), logits, strict=False))).scale
    _close(scale, quantizer[f"{key}_scale"].view(groups))
    assert quantizer[f"{key}_zp"].isnan().all()  # there is none
    grid = Grid(scale, torch.full_like(scale, 2 ** (bits - 1)))
    parts = [_FakeQuantize.apply(*part, 2**bits - 1).flatten(1) for part in _by_group(w, grid, scheme)]
    values = torch.cat(parts, 1)
    _close(values, quantizer[f"{key}_y"])
    _close(decode(encode(w, grid, scheme), grid, scheme), values)
    if bits == 4:
        (values * quantizer["W_cot"]).sum().backward()
        for name, tensor in zip(("gW", "gup", "glow"), (w, *logits), strict=False):
            assert tensor.grad is not None
            _close(tensor.grad, quantizer[f"{key}_{name}"].view(tensor.shape))


def test_default_logits_a_ragged_group_and_ties(quantizer: dict[str, Tensor]) -> None:
    initial = quantizer["w_lwcinit_up"]
    _close(fake_quantize_weight(quantizer["W"], WeightScheme(bits=4), initial, initial), quantizer["w_lwcinit_y"])
    scheme = WeightScheme(bits=4, symmetric=True, group_size=16)
    logits = torch.full((8, group_count(29, 16)), 4.0)
    _close(fake_quantize_weight(quantizer["Wr"], scheme, logits, logits), quantizer["wr_y"])
    assert torch.equal(round_to_nearest(quantizer["half_x"], WeightScheme(bits=4)).dequantize(), quantizer["half_y"])


@pytest.mark.parametrize("case", ["w4", "w4sym", "w3", "w2", "w3act", "w4b8", "w4damp", "w4mse", "tritsym"])
def test_gptq_grids(shared: Path, case: str) -> None:
    golden = _load(shared, "gptq")
    with np.load(shared / "golden" / "spikellm" / "gptq.npz") as file:
        settings: dict[str, Any] = json.loads(str(file["cases"]))[case]
    w = golden["W"]
    if settings.get("trits"):
        scheme = WeightScheme(type="ternary")
        grid = ternary_grid(w, 1, scheme, fit=False)
    else:
        scheme = WeightScheme(bits=settings["bits"], symmetric=settings["sym"])
        grid = weight_grid(w, scheme, with_zero=True, mse=settings.get("mse", False))
        assert torch.equal(grid.zero, golden[f"{case}_zero"])
    _close(grid.scale, golden[f"{case}_scale"])
    _close(decode(encode(w, grid, scheme), grid, scheme), golden[f"{case}_RTN"])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_ternary_steps(shared: Path, steps: int) -> None:
    golden = _load(shared, "derived_gif")
    scheme = WeightScheme(type="ternary")
    grid = ternary_grid(golden["W"], steps, scheme, fit=False)
    _close(grid.scale, golden[f"tern_T{steps}_delta"])
    codes = encode(golden["W"], grid, scheme, steps)
    spikes = ternary_spikes(codes, steps)
    assert torch.equal(spikes.float(), golden[f"tern_T{steps}_spikes"])
    _close(decode(codes, Grid(golden[f"tern_T{steps}_delta"], grid.zero), scheme), golden[f"tern_T{steps}_W"])
    density = float((spikes != 0).float().mean())
    assert density == pytest.approx(float(golden[f"tern_T{steps}_density"]), abs=1e-6)
