"""PB-LLM: released results, the corrected mean, what it stores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spiking_lm.schemes import WeightScheme
from spiking_lm_spikellm.gptq import factorize, gptq
from spiking_lm_spikellm.pbllm import pb_llm
from spiking_lm_spikellm.saliency import SecondMoment


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    with np.load(shared / "golden/spikellm/pbllm.npz") as arrays:
        found: dict[str, Any] = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "cases"}
        found |= {f"{name}_case": case for name, case in json.loads(str(arrays["cases"])).items()}
    return found


WAYS, METRICS, LOW = ("xnor", "xnor_rtn", "sign", "prune"), ("magnitude", "hessian"), (0.5, 0.9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("low_frac", LOW)
def test_as_released(golden: dict[str, Any], way: str, metric: Any, low_frac: float) -> None:
    low, _, alone = way.partition("_")
    name = f"{low}_{metric}_{low_frac}" + (f"_{alone}" if alone else "")
    case = golden[f"{name}_case"]
    hessian = 2 * sum(x.double().T @ x.double() for x in golden["X"]) / len(golden["X"])
    assert isinstance(hessian, Tensor)
    factor = factorize(hessian, act_order=False, damp=case["percdamp"])
    if alone:  # round to nearest: with nothing beside its diagonal, U spreads no error
        factor = replace(factor, upper=torch.diag(factor.upper.diagonal()))
    found = pb_llm(
        golden["W"],
        factor,
        low_frac=low_frac,
        metric=metric,
        low=case["method"],
        group_size=None,
        block=case["blocksize"],
        released_mean=True,
    )
    alive = torch.arange(64) != 7  # the dead input: any weight will do, and ours is zero
    assert torch.equal(found.salient, ~golden[f"{name}_mask_low"])
    same = (found.weight - golden[f"{name}_Q"]).abs()[:, alive] <= 1e-5
    assert float(same.float().mean()) >= 0.99
    if not alone:  # which has no loss there
        assert found.loss == pytest.approx(float(golden[f"{name}_error"]), rel=0.01)
    assert (found.weight[:, 7] == 0).all()


def test_every_released_case_is_among_these(golden: dict[str, Any]) -> None:
    cases = {name.removesuffix("_case") for name in golden if name.endswith("_case")}
    expected = {f"{way.split('_')[0]}_{metric}_{low}" for way in WAYS for metric in METRICS for low in LOW}
    expected |= {f"xnor_{metric}_{low}_rtn" for metric in METRICS for low in LOW}
    assert cases == expected


def problem(seed: int = 0, rows: int = 24, inputs: int = 160) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(500, inputs, generator=rng) @ torch.randn(inputs, inputs, generator=rng) / inputs**0.5
    moment = SecondMoment(inputs)
    moment.update(x * torch.rand(inputs, generator=rng).mul(2).exp2())
    # Weights that are not centred: the released mean, with zeros in it, is then a wrong one.
    return torch.randn(rows, inputs, generator=rng) + 0.5, moment.hessian


def test_the_corrected_mean_is_the_better_one() -> None:
    w, hessian = problem()
    losses = [pb_llm(w, hessian, low_frac=0.8, released_mean=flaw).loss for flaw in (False, True)]
    assert losses[0] < 0.98 * losses[1]


def test_one_bit_weights_have_the_mean_and_distance_of_their_own() -> None:
    w, _ = problem(1)
    found = pb_llm(w, torch.eye(160), low_frac=0.9, metric="magnitude", group_size=160)  # nothing to make up for
    for row, salient, given in zip(found.weight, found.salient, w, strict=True):
        low = given[~salient]
        mean, distance = low.mean(), (low - low.mean()).abs().mean()
        want = torch.where(low > mean, mean + distance, mean - distance)
        torch.testing.assert_close(row[~salient], want, rtol=1e-4, atol=1e-5)
        assert (row[salient] - given[salient]).abs().max() <= (given.max() - given.min()) / 255 / 2 + 1e-6


def test_pruned_weights_have_no_step() -> None:
    w, hessian = problem(5)
    found = pb_llm(w, hessian, low_frac=0.9, low="prune")
    assert found.equal_steps == pytest.approx(8 * float((found.weight != 0).double().mean()), abs=0.02)
    assert found.loss > pb_llm(w, hessian, low_frac=0.9, low="sign").loss > pb_llm(w, hessian, low_frac=0.9).loss


def test_what_is_stored_is_counted() -> None:
    w, hessian = problem(2)
    found = pb_llm(w, hessian, low_frac=0.95)
    assert found.equal_steps == pytest.approx(1.35, abs=0.01)
    grids = 24 * 3 * (3 * 16 + 8)  # ragged: 160 = 64 + 64 + 32
    codes = int(found.salient.sum()) * 8 + int((~found.salient).sum())
    assert found.bits_per_weight == pytest.approx((codes + w.numel() + grids + 160 * 16) / w.numel())
    natural = pb_llm(w, hessian, low_frac=0.95, act_order=False)
    assert natural.bits_per_weight == pytest.approx(found.bits_per_weight - 16 / 24, abs=1e-3)


def test_order_and_shared_factor() -> None:
    w, hessian = problem(3)
    one, other = pb_llm(w, hessian), pb_llm(w, factorize(hessian))
    assert torch.equal(one.weight, other.weight)
    d = (one.weight - w).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    assert one.loss == pytest.approx(float((d @ damped * d).sum()) / 2, rel=1e-4)


def test_ternary_spikes_beat_it_at_equal_steps() -> None:
    w, hessian = problem(4, rows=64)
    scheme = WeightScheme.model_validate({"type": "ternary", "group_size": 64, "salient": {"rate": 0.35, "steps": 2}})
    assert gptq(w - 0.5, hessian, scheme).loss < pb_llm(w - 0.5, hessian).loss
