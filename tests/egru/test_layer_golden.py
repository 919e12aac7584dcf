"""The layer against the released implementation's own outputs and true gradients, by three paths.

The gradients of the released CPU kernel (``gradcpu``) come from an integer ``abs`` and are no reference for anything.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spiking_lm import kernels
from spiking_lm_egru import EGRU, EGRUParameters, EGRUState
from spiking_lm_egru.functional import egru, egru_norse

CASES = (
    "defaults",
    "dropconnect_train",
    "eval_f32",
    "f32",
    "lmlike",
    "support17",
    "y0_batchfirst",
    "zoneout_eval",
    "zoneout_train",
)
PARAMETERS = ("kernel", "recurrent_kernel", "bias", "recurrent_bias", "thr")
OUTPUTS = ("y", "c", "o", "trace")


def _load(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(shared / "golden" / "egru" / f"egru_{name}.npz") as file:
        data = dict(file)
    return data, json.loads(bytes(data["meta_json"]))


def _constants(data: dict[str, Any], meta: dict[str, Any]) -> tuple[float, float, float]:
    """Dampening factor, support, and the zoneout that is an expectation rather than a mask."""
    zoneout = 0.0 if meta["train"] else meta["zoneout"]
    return float(data["sd.dampening_factor"][0]), float(data["sd.pseudo_derivative_support"][0]), zoneout


def _run(path: str, data: dict[str, Any], meta: dict[str, Any], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a case by one of the paths; the masks that were drawn for the golden data are put where ours would be."""
    x = leaves["x"].transpose(0, 1) if meta["batch_first"] else leaves["x"]
    zeros = torch.zeros(x.shape[1], leaves["thr"].numel(), dtype=x.dtype)
    state = EGRUState(zeros, leaves["y0"][0] if "y0" in leaves else zeros, zeros, zeros)
    recurrent = leaves["recurrent_kernel"]
    if "recurrent_kernel_effective" in data:
        recurrent = recurrent * torch.tensor(data["recurrent_kernel_effective"] / data["sd.recurrent_kernel"])
    keep = torch.tensor(data["zoneout_mask"]) if "zoneout_mask" in data else None
    p = EGRUParameters(leaves["thr"], leaves["bias"], leaves["recurrent_bias"], *_constants(data, meta))
    if path == "norse":
        if importlib.util.find_spec("norse") is None:
            pytest.skip("norse is not installed")
        y, after = egru_norse(x, state, leaves["kernel"], recurrent, p, keep=keep)
    else:
        with kernels.use(egru_scan=path):
            y, after = egru(x, state, leaves["kernel"], recurrent, p, keep=keep, return_sequences=True)
    found = {"y": y, "c": after.c, "o": after.o, "trace": after.trace}
    return {name: value.transpose(0, 1) if meta["batch_first"] else value for name, value in found.items()}


@pytest.mark.parametrize("path", ["torch", "reference", "norse"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_loss_and_gradients(shared: Path, name: str, path: str) -> None:
    data, meta = _load(shared, name)
    leaves = {key: torch.tensor(data[f"sd.{key}"]).requires_grad_() for key in PARAMETERS}
    leaves |= {key: torch.tensor(data[key]).requires_grad_() for key in ("x", "y0") if key in data}
    found = _run(path, data, meta, leaves)
    exact = meta["dtype"] == "float64"
    np.testing.assert_array_equal(found["o"].detach().numpy(), data["o"])
    for key in ("y", "c", "trace"):
        np.testing.assert_allclose(found[key].detach().numpy(), data[key], rtol=0, atol=1e-10 if exact else 2e-6)
    if "loss" not in data:
        assert not meta["train"]
        return
    weights = {key: torch.tensor(data[f"cot.{key}"]) for key in OUTPUTS}
    loss = torch.stack([(found[key] * weights[key]).sum() for key in OUTPUTS]).sum()
    np.testing.assert_allclose(loss.item(), data["loss"], rtol=1e-12 if exact else 1e-5)
    tolerance = {"rtol": 0.0, "atol": 1e-10} if exact else {"rtol": 1e-4, "atol": 2e-4}
    for prefix, objective in (("grad", loss), ("grad_yonly", (found["y"] * weights["y"]).sum())):
        checked = 0
        grads = torch.autograd.grad(objective, list(leaves.values()), retain_graph=True)
        for key, grad in zip(leaves, grads, strict=True):
            if f"{prefix}.{key}" in data:
                np.testing.assert_allclose(
                    grad.numpy(), data[f"{prefix}.{key}"], **tolerance, err_msg=f"{prefix}.{key}"
                )
                checked += 1
        assert checked >= 6


@pytest.mark.parametrize("name", ["defaults", "lmlike", "y0_batchfirst", "zoneout_eval", "eval_f32"])
def test_the_module(shared: Path, name: str) -> None:
    """Cases without a random mask, through the module itself and its state."""
    data, meta = _load(shared, name)
    gamma, epsilon, _ = _constants(data, meta)
    layer = EGRU(
        data["x"].shape[-1],
        data["sd.thr"].size,
        batch_first=meta["batch_first"],
        zoneout=meta["zoneout"],
        dampening_factor=gamma,
        pseudo_derivative_support=epsilon,
        state_carry="y_only",
    ).to(torch.tensor(data["x"]).dtype)
    layer.load_state_dict({key: torch.tensor(data[f"sd.{key}"]) for key in PARAMETERS})
    layer.train(meta["train"])
    x = torch.tensor(data["x"])
    batch = x.shape[0 if meta["batch_first"] else 1]
    state = None
    if "y0" in data:  # the released layer knows no other state: what stands in the rest of ours must not matter
        state = EGRUState(*torch.ones(4, batch, layer.hidden_size, dtype=x.dtype))._replace(
            y=torch.tensor(data["y0"][0])
        )
    y, sequences = layer(x, state, return_sequences=True)
    _, last = layer(x, state)
    tolerance = 1e-10 if meta["dtype"] == "float64" else 2e-6
    for key, value in (("y", y), ("c", sequences.c), ("o", sequences.o), ("trace", sequences.trace)):
        np.testing.assert_allclose(value.detach().numpy(), data[key], rtol=0, atol=tolerance)
    for key in OUTPUTS:
        end = data[key][:, -1] if meta["batch_first"] else data[key][-1]
        np.testing.assert_allclose(getattr(last, key).detach().numpy(), end, rtol=0, atol=tolerance)
