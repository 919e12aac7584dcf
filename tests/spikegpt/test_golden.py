"""SpikeGPT against the numbers of its paper's own code: spikes, membranes, logits, gradients and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import spiking_lm
from spiking_lm import kernels
from spiking_lm.stages import OptimizerConfig
from spiking_lm.training import make_optimizer

MODELS = ["tiny", "tiny_ffnpre", "deep8"]


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden" / "spikegpt"


@pytest.fixture(params=["torch", "reference"])
def kernel(request: pytest.FixtureRequest) -> Any:
    with kernels.use(lif_scan=request.param, wkv=request.param):
        yield request.param


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def load(golden: Path, name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    weights = {key: value.to(dtype) for key, value in load_file(golden / f"{name}.weights.safetensors").items()}
    return spiking_lm.import_reference("spikegpt", weights, **config)


def record_neurons(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Collect each neuron's input and its membranes (from the reference scan of the recorded input), batch-first."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for i, block in enumerate(model.blocks):
        for site in block.neurons:

            def hook(module: Any, args: Any, output: Any, key: str = f"{i}.{site}") -> None:
                x = args[0].detach()
                with kernels.use(lif_scan="reference"):
                    _, v = module.dynamics.run(x, None, final_only=False)
                seen[key] = (x, v)

            block.neurons[site].neuron.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward(golden: Path, kernel: str, name: str, dtype: torch.dtype) -> None:
    model = load(golden, name, dtype).eval()
    want = arrays(golden / f"{name}.forward.npz")
    seen = record_neurons(model)
    output = model(torch.from_numpy(want["idx"]), return_spikes=True)
    assert np.array_equal(output.spikes["embedding"].detach().numpy(), want["emb_spikes"])
    for i in range(model.config.n_layer):
        for number, site in ((1, "att"), (2, "ffn")):
            assert np.array_equal(output.spikes[f"blocks.{i}.{site}"].detach().numpy(), want[f"b{i}.s{number}"])
            x, v = seen[f"{i}.{site}"]
            np.testing.assert_allclose(x.numpy(), want[f"b{i}.in{number}"], atol=1e-5, rtol=0)
            np.testing.assert_allclose(v.numpy(), want[f"b{i}.v{number}"], atol=1e-5, rtol=0)
    logits = output.logits.detach().numpy()
    if dtype == torch.float64:
        np.testing.assert_allclose(logits, want["logits_f64"], atol=1e-10, rtol=0)
    else:
        np.testing.assert_allclose(logits, want["logits"], atol=1e-5, rtol=0)
    loss = F.cross_entropy(output.logits.flatten(0, 1), torch.from_numpy(want["targets"]).flatten())
    assert abs(loss.item() - float(want["loss_f64"])) < (1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["wrap", "ce"])
def test_gradients(golden: Path, kernel: str, name: str, kind: str) -> None:
    want = arrays(golden / f"{name}.grads.npz")
    keys = [key for key in want if key.startswith(f"{kind}/")]
    if not keys:
        pytest.skip(f"the golden data of {name} has no {kind!r} gradients")
    model = load(golden, name, l2wrap=kind == "wrap").eval()
    batch = arrays(golden / f"{name}.forward.npz")
    output = model(torch.from_numpy(batch["idx"]))
    loss = F.cross_entropy(output.logits.flatten(0, 1), torch.from_numpy(batch["targets"]).flatten())
    (loss + sum(output.aux_losses.values())).backward()
    grads = spiking_lm.export_reference(model, grads=True)
    assert {f"{kind}/{key}" for key in grads} == set(keys)
    for key, grad in grads.items():
        expected = want[f"{kind}/{key}"]
        np.testing.assert_allclose(
            grad.numpy().reshape(expected.shape),
            expected,
            atol=2e-5 * np.abs(expected).max() + 1e-12,
            rtol=0,
            err_msg=key,
        )


@pytest.mark.parametrize("name", ["tiny", "deep8"])
@pytest.mark.parametrize(
    ("logits", "switches"),
    [
        ("logits_bin_norescale", {}),
        ("logits_bin_rescale6", {"rescale": True}),
        ("logits_rawemb_rescale6", {"rescale": True, "binary_embedding": False}),
    ],
)
def test_token_by_token(golden: Path, kernel: str, name: str, logits: str, switches: dict[str, Any]) -> None:
    model = load(golden, name, **switches).eval()
    want = arrays(golden / f"{name}.rnn.npz")
    state = model.init_state(1)
    with torch.no_grad():
        for t, token in enumerate(want["tokens"]):
            got, state = model.step(torch.tensor([int(token)]), state)
            np.testing.assert_allclose(got[0].numpy(), want[logits][t], atol=1e-5, rtol=0)
            if logits == "logits_bin_rescale6":
                for layer, block in enumerate(state):
                    rows = want["state_bin_rescale6"][t, 5 * layer : 5 * layer + 5]
                    np.testing.assert_allclose(block.ffn_shift[0], rows[0], atol=1e-5)
                    np.testing.assert_allclose(block.att_shift[0], rows[1], atol=1e-5)
                    p, q, o = (tensor[0].double() for tensor in block.wkv)
                    np.testing.assert_allclose((p / q).numpy(), rows[2] / rows[3], atol=1e-5, rtol=1e-4)
                    np.testing.assert_allclose((o + q.log()).numpy(), rows[4] + np.log(rows[3]), atol=1e-5, rtol=1e-5)
                    np.testing.assert_allclose(block.neurons["att"][0], want["v1_bin_rescale6"][t, layer], atol=1e-5)
                    np.testing.assert_allclose(block.neurons["ffn"][0], want["v2_bin_rescale6"][t, layer], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_steps(golden: Path, kernel: str, dtype: torch.dtype) -> None:
    want = arrays(golden / "train_tiny.npz")
    weights = {key: value.to(dtype) for key, value in load_file(golden / "train_tiny.init.safetensors").items()}
    model = spiking_lm.import_reference("spikegpt", weights, l2wrap=True)
    optimizer = make_optimizer(model, OptimizerConfig(type="adam", lr=6e-4, betas=(0.9, 0.99), eps=4e-9))
    for x, y, lr, loss_want, norm_want in zip(
        want["X"], want["Y"], want["lr_used"], want["losses_f64"], want["grad_norm_f64"], strict=True
    ):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        output = model(torch.from_numpy(x))
        loss = F.cross_entropy(output.logits.flatten(0, 1), torch.from_numpy(y).flatten())
        assert abs(loss.item() - loss_want) < 1e-5
        optimizer.zero_grad()
        (loss + sum(output.aux_losses.values())).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert float(norm) == pytest.approx(float(norm_want), rel=1e-4)
        optimizer.step()
    final = load_file(golden / "train_tiny.final.safetensors")
    for key, value in spiking_lm.export_reference(model).items():
        np.testing.assert_allclose(value.numpy(), final[key].numpy(), atol=1e-5, err_msg=key)


def test_initial_time_parameters(golden: Path) -> None:
    torch.manual_seed(0)
    model = spiking_lm.create_model("spikegpt", vocab_size=10, n_layer=4, n_embd=24, ctx_len=16)
    got = spiking_lm.export_reference(model)
    want = arrays(golden / "init_L4_C24.npz")
    checked = 0
    for key in want:
        name = next(name for name in (key, key.replace("/", "."), f"blocks.{key}") if name in got)
        np.testing.assert_allclose(got[name].numpy().reshape(want[key].shape), want[key], atol=1e-6)
        checked += 1
    assert checked >= 4 * 7


def test_sampling_weights(golden: Path) -> None:
    from spiking_lm.generation import sampling_weights

    want = arrays(golden / "sampling.npz")
    for i, (temperature, top_p) in enumerate(want["cases"]):
        logits = torch.from_numpy(want[f"logits{i}"])
        got = sampling_weights(logits, float(temperature), None, float(top_p))
        if top_p == 1.0:
            assert (got > 0).all(), "1.0 cuts nothing here; the reference turns greedy"
        else:
            np.testing.assert_allclose(got.numpy(), want[f"weights{i}"], atol=1e-6)


def test_round_trip(golden: Path) -> None:
    weights = load_file(golden / "tiny_ffnpre.weights.safetensors")
    exported = spiking_lm.export_reference(spiking_lm.import_reference("spikegpt", weights))
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)
