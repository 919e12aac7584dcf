"""The elastic neuron against the golden data of the released code: spikes, gradients and amplitudes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spiking_lm import create_neuron, kernels
from spiking_lm_spikelm.embedding import QuantizedEmbedding
from spiking_lm_spikelm.neuron import Elastic

CASES = (
    *("T1_f32", "T1_f64", "T2_f32", "T2_f64", "T4_f32", "T4_f64", "k1.0_f64", "k2.0_f64", "k3.0_f64"),
    *("laplace_f64", "offset_f64", "fixedalpha_f64", "zeros_f32", "big_f64", "tiny_f32", "binary_bits1_f64"),
    "ties_f64",
)


def golden(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = shared / "golden" / "spikelm_bitspike"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def close(got: Tensor, expected: Tensor, what: str) -> None:
    rtol, atol = (1e-9, 1e-10) if expected.dtype == torch.float64 else (1e-4, 1e-5)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_neuron(shared: Path, name: str, implementation: str) -> None:
    meta, case = golden(shared, f"a_neuron_{name}")
    neuron = create_neuron("elastic", steps=meta["T"], k=meta["k"], bits=meta["input_bits"]).to(case["x"].dtype)
    assert isinstance(neuron, Elastic)
    if not bool((case["alpha_before"] == 1).all()):
        neuron.set_amplitudes(case["alpha_before"])
    x = case["x"].requires_grad_()
    with kernels.use(elastic_scan=implementation):
        spikes = neuron.fire(x)
        again, _ = neuron.eval()(x.flatten(1, 2).transpose(0, 1))
    (spikes * case["grad_out"]).sum().backward()
    torch.testing.assert_close(spikes.sign(), case["spikes"].sign(), rtol=0, atol=0)
    close(spikes, case["spikes"], "spikes")
    close(neuron.alpha, case["alpha_after"], "amplitudes")
    assert x.grad is not None
    close(x.grad, case["grad_x"], "gradient")
    torch.testing.assert_close(again.transpose(0, 1).reshape(x.shape), spikes, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("bits", [1, 2])
def test_learned_amplitude(shared: Path, bits: int, implementation: str) -> None:
    _, case = golden(shared, f"a_lsq_bits{bits}")
    neuron = create_neuron("elastic", steps=1, bits=bits, learn_alpha=True).double()
    assert isinstance(neuron, Elastic)
    neuron.set_amplitudes(case["alpha"])
    x = case["x"].requires_grad_()
    with kernels.use(elastic_scan=implementation):
        spikes = neuron.fire(x[None])[0]
        (spikes * case["grad_out"]).sum().backward()
    close(spikes, case["spikes"], "spikes")
    assert x.grad is not None
    close(x.grad, case["grad_x"], "gradient")
    assert neuron.alpha.grad is not None
    close(neuron.alpha.grad, case["grad_alpha"], "gradient of the amplitude")


@pytest.mark.parametrize(("bits", "precision"), [(1, "binary"), (2, "ternary")])
def test_quantised_embedding(shared: Path, bits: int, precision: Any) -> None:
    _, case = golden(shared, f"a_qembed_bits{bits}")
    layer = QuantizedEmbedding(*case["weight"].shape, precision)
    layer.weight.data = case["weight"]
    torch.testing.assert_close(layer.effective_weight(), case["quantised_table"], rtol=1e-5, atol=1e-7)
    y = layer(case["ids"])
    (y * case["grad_out"]).sum().backward()
    close(y, case["y"], "rows")
    assert layer.weight.grad is not None
    close(layer.weight.grad, case["grad_weight"], "gradient")
    assert torch.equal(y.sign(), case["y"].sign())
