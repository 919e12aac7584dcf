"""Every implementation against the golden data: outputs, membranes, states and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spiking_lm import kernels
from spiking_lm.config import SurrogateConfig

IMPLEMENTATIONS = ("reference", "torch", "numba")
DTYPES = (torch.float32, torch.float64)
LIF_CASES = tuple(f"lif_{i:02d}" for i in range(18))
WKV_CASES = ("small", "t1", "long", "masked", "extremek")
SPIKEGPT_LIF = ("ref", "ref_f64", "ref_v0", "detach", "soft", "nodecay_tau4")
SPIKEGPT_WKV = ("basic", "extreme_decay", "extreme_k", "shifted_k", "long", "T1")


def _leaf(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def _close(got: Tensor | None, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    values = np.zeros_like(expected) if got is None else got.detach().numpy()
    np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LIF_CASES)
def test_lif(shared: Path, name: str, implementation: str, dtype: torch.dtype) -> None:
    folder = shared / "golden" / "kernels"
    case = json.loads((folder / "lif_cases.json").read_text())[name]
    data = np.load(folder / f"{name}.npz")
    x, v0 = _leaf(data["x"], dtype), _leaf(data["v0"], dtype)
    with kernels.use(lif_scan=implementation):
        spikes, v = kernels.lif_scan(
            x,
            v0,
            beta=case["beta"],
            gain=case["gain"],
            threshold=case["threshold"],
            v_reset=None if case["reset"] == "soft" else case["v_reset"],
            compare=case["compare"],
            surrogate=SurrogateConfig(name=case["surrogate"], alpha=case["alpha"]),
            detach_reset=case["detach_reset"],
        )
    (spikes * torch.tensor(data["g"], dtype=dtype)).sum().backward()
    np.testing.assert_array_equal(spikes.detach().numpy(), data["spikes"])
    exact = dtype == torch.float64
    _close(v, data["v"], atol=1e-12 if exact else 1e-5)
    tolerance = {"atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-5}
    _close(x.grad, data["gx"], **tolerance)
    _close(v0.grad, data["gv0"], **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", WKV_CASES)
def test_wkv(shared: Path, name: str, implementation: str, dtype: torch.dtype) -> None:
    data = np.load(shared / "golden" / "kernels" / f"wkv_{name}.npz")
    inputs = {key: _leaf(data[key], dtype) for key in ("time_decay", "time_first", "k", "v")}
    with kernels.use(wkv=implementation):
        y, state = kernels.wkv(**inputs)
    (y * torch.tensor(data["gy"], dtype=dtype)).sum().backward()
    exact = dtype == torch.float64
    _close(y, data["y"], atol=1e-12 if exact else 2e-5 * max(1.0, float(abs(data["k"]).max())))
    p, q, o = (s.detach().double().numpy() for s in state)
    _close(torch.tensor(p / q), data["p_T"] / data["q_T"], rtol=1e-11 if exact else 5e-5, atol=1e-12 if exact else 5e-5)
    _close(torch.tensor(o + np.log(q)), data["o_T"] + np.log(data["q_T"]), rtol=1e-12 if exact else 1e-5, atol=1e-4)
    for key, golden in (("time_decay", "g_time_decay"), ("time_first", "g_time_first"), ("k", "gk"), ("v", "gv")):
        relative = 1e-12 if exact else 2e-4 if key == "time_decay" else 5e-5
        _close(inputs[key].grad, data[golden], atol=relative * float(abs(data[golden]).max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SPIKEGPT_LIF)
def test_spikegpt_lif(shared: Path, name: str, implementation: str, dtype: torch.dtype) -> None:
    data = np.load(shared / "golden" / "spikegpt" / f"lif_{name}.npz")
    tau, v_reset = float(data["tau"]), float(data["v_reset"])
    x, v0 = _leaf(data["x"], dtype), _leaf(data["v0"] if "v0" in data else np.zeros(data["x"].shape[1:]), dtype)
    with kernels.use(lif_scan=implementation):
        spikes, v = kernels.lif_scan(
            x,
            v0,
            beta=1 - 1 / tau,
            gain=1 / tau if data["decay_input"] else 1.0,
            threshold=float(data["v_threshold"]),
            v_reset=None if np.isnan(v_reset) else v_reset,
            surrogate=SurrogateConfig(alpha=float(data["alpha"])),
            detach_reset=bool(data["detach_reset"]),
        )
    loss = (spikes * torch.tensor(data["g_spike"], dtype=dtype)).sum()
    if "g_v" in data:
        loss = loss + (v * torch.tensor(data["g_v"], dtype=dtype)).sum()
    loss.backward()
    np.testing.assert_array_equal(spikes.detach().numpy(), data["spikes"])
    exact = name.endswith("f64") and dtype == torch.float64
    _close(v, data["v"], atol=1e-12 if exact else 1e-6)
    _close(x.grad, data["g_x"], atol=1e-12 if exact else 1e-5)
    if "g_v0" in data:
        _close(v0.grad, data["g_v0"], atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_spikegpt_ties_fire(shared: Path, implementation: str, dtype: torch.dtype) -> None:
    data = np.load(shared / "golden" / "spikegpt" / "lif_tie.npz")
    with kernels.use(lif_scan=implementation):
        spikes, v = kernels.lif_scan(torch.tensor(data["x"], dtype=dtype), beta=0.5, gain=0.5, threshold=1.0)
    np.testing.assert_array_equal(spikes.float().numpy(), data["spikes"])
    np.testing.assert_array_equal(v.float().numpy(), data["v"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SPIKEGPT_WKV)
def test_spikegpt_wkv(shared: Path, name: str, implementation: str, dtype: torch.dtype) -> None:
    data = np.load(shared / "golden" / "spikegpt" / f"wkv_{name}.npz")
    inputs = {key: _leaf(data[key], dtype) for key in ("time_decay", "time_first", "k", "v")}
    with kernels.use(wkv=implementation):
        y, _ = kernels.wkv(**inputs)
    (y * torch.tensor(data["gy"], dtype=dtype)).sum().backward()
    got = {"y": y, "g_decay": inputs["time_decay"].grad, "g_first": inputs["time_first"].grad}
    got |= {"g_k": inputs["k"].grad, "g_v": inputs["v"].grad}
    tight = name in ("basic", "extreme_decay", "T1")
    for key, value in got.items():
        golden = data[f"{key}_f64"]
        stored_exactly = golden.dtype == np.float64
        relative = 1e-12 if dtype == torch.float64 and stored_exactly else 1e-6 if tight else 5e-5
        _close(value, golden, atol=relative * float(abs(golden).max()))
