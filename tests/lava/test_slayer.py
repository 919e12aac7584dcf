"""``slayer.cuba``: lava-dl's own numbers, recorded and live, and the same spikes as a network and as a netx file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slayer_facts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spiking_lm
from spiking_lm import create_neuron
from spiking_lm.errors import ConfigError, LoweringError, PluginError, UsageError
from spiking_lm_lava.install import find_lava_dl
from spiking_lm_lava.lava_dl import run_netx
from spiking_lm_lava.netx import read_netx, write_netx
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.simulator import Simulator
from spiking_lm_lava.slayer import STATE_SCALE, CubaDense, CubaState, SlayerCuba, to_network
from spiking_lm_lava.slayer_config import SlayerCubaConfig

RECORDED = Path(__file__).with_name("slayer_facts.npz")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lava-dl computes here, in a process of its own, and the file that it exports beside it."""
    try:
        paths = find_lava_dl().paths
    except PluginError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    out = tmp_path_factory.mktemp("slayer") / "facts.npz"
    done = subprocess.run(
        [sys.executable, slayer_facts.__file__, str(out), *map(str, paths)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode and "No module named" in done.stderr:
        pytest.skip(f"SLAYER does not import here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(params=["recorded", "live"])
def facts(request: pytest.FixtureRequest) -> Iterator[Any]:
    path = RECORDED if request.param == "recorded" else request.getfixturevalue("live")
    with np.load(path, allow_pickle=False) as found:
        yield found


def weighting(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """As slayer_facts draws it, in its order of axes (batch, neurons, steps)."""
    return torch.tensor(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("form", range(len(slayer_facts.FORMS)))
def test_the_neuron_is_slayers_in_values_and_gradients(facts: Any, form: int) -> None:
    parameters = {"tau_grad": 1.0, "scale_grad": 1.0, **slayer_facts.FORMS[form]}
    neuron = create_neuron("slayer.cuba", **parameters)
    given = torch.tensor(slayer_facts.inputs(form)).requires_grad_()
    x = given.permute(0, 2, 1)
    state, spikes = neuron.init_state((x.shape[0], x.shape[2])), []
    for t in range(x.shape[1]):
        s, state = neuron.step(x[:, t], state)
        spikes.append(s)
        fired = facts[f"{form}.s"][..., t]
        np.testing.assert_array_equal(s.detach().numpy(), fired)
        np.testing.assert_array_equal(state.u.detach().numpy(), facts[f"{form}.u"][..., t])
        np.testing.assert_array_equal(state.v.detach().numpy(), facts[f"{form}.v"][..., t] * (1 - fired))
    made = torch.stack(spikes, -1)
    assert 0 < float(made.detach().mean()) < 1
    (made * weighting(tuple(made.shape), 99)).sum().backward()
    assert given.grad is not None
    expected = facts[f"{form}.gradient"]
    assert np.abs(given.grad.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def trained_layer() -> CubaDense:
    layer = CubaDense(slayer_facts.INPUTS, slayer_facts.NEURONS, config(tau_grad=1.0, scale_grad=1.0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(slayer_facts.weights()))
    return layer


def config(**others: Any) -> SlayerCubaConfig:
    return SlayerCubaConfig(**{**slayer_facts.FORMS[0], **others})


def test_the_layer_is_slayers_dense_block_and_so_is_its_network(facts: Any) -> None:
    """SLAYER's block answers a step later, as the process does."""
    layer, x = trained_layer(), torch.tensor(slayer_facts.spikes_in())
    spikes, _ = layer(x.permute(0, 2, 1))
    late = torch.nn.functional.pad(spikes.permute(0, 2, 1), (1, 0))[..., :-1]
    np.testing.assert_array_equal(late.detach().numpy(), facts["layer.s"])
    (late * weighting(tuple(late.shape), 98)).sum().backward()
    expected = facts["layer.gradient"]
    assert layer.weight.grad is not None
    assert np.abs(layer.weight.grad.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(layer.quantized_weight().detach().numpy() * 64, facts["layer.weight"])
    assert np.abs(facts["layer.weight"]).max() == 256
    simulator = Simulator(to_network([layer]))
    for row, fired in zip(slayer_facts.spikes_in(), facts["layer.s"], strict=True):
        run = simulator.run({"input": row.T.astype(np.int64)})
        np.testing.assert_array_equal(run.sinks["output"].T, fired)


def test_a_file_that_slayer_exports_is_our_network_and_runs_in_lava(live: Path) -> None:
    path = live.with_suffix(".net")
    mine, theirs = Simulator(to_network([trained_layer()])), Simulator(read_netx(path))
    row = slayer_facts.spikes_in()[0].T.astype(np.int64)
    expected = mine.run({"input": row}).sinks["output"]
    np.testing.assert_array_equal(theirs.run({"input": row}).sinks["output"], expected)
    np.testing.assert_array_equal(run_netx(path, row), expected)
    assert expected.any()


def stack() -> list[CubaDense]:
    torch.manual_seed(3)
    fast = SlayerCubaConfig(threshold=1.0, current_decay=1.0, voltage_decay=0.5)
    return [CubaDense(8, 24, fast, gain=3.0), CubaDense(24, 4, fast, gain=3.0)]


def train(layers: list[CubaDense]) -> list[float]:
    """Let output k fire where inputs k and k + 4 do: the losses."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([layer.weight for layer in layers], lr=0.04)
    losses = []
    for _ in range(30):
        x = (torch.rand(16, 8, 8, generator=generator) < 0.5).float()
        y = x
        for layer in layers:
            y, _ = layer(y)
        loss = ((y - x[..., :4] * x[..., 4:]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def trained() -> tuple[list[CubaDense], list[float]]:
    layers = stack()
    return layers, train(layers)


def test_layers_train_and_training_twice_is_alike(trained: tuple[list[CubaDense], list[float]]) -> None:
    layers, losses = trained
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    again = stack()
    assert train(again) == losses
    assert torch.equal(again[0].weight, layers[0].weight)


@pytest.mark.parametrize("where", ["simulator", "file", "lava"])
def test_layers_run_as_they_were_trained(
    trained: tuple[list[CubaDense], list[float]], where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    layers, _ = trained
    x = (torch.rand(1, 50, 8, generator=torch.Generator().manual_seed(7)) < 0.5).float()
    with torch.no_grad():
        y = layers[1](layers[0](x)[0])[0][0]
    assert 0.05 < float(y.mean()) < 0.95
    path, network, row = tmp_path / "trained.net", to_network(layers), x[0].numpy().astype(np.int64)
    write_netx(network, path)
    if where == "lava":
        request.getfixturevalue("live")
        spikes = run_netx(path, row)
    else:
        spikes = Simulator(network if where == "simulator" else read_netx(path)).run({"input": row}).sinks["output"]
    np.testing.assert_array_equal(spikes[2:], y[:-2].numpy())
    assert not spikes[:2].any()


@settings(max_examples=40)
@given(
    du=st.integers(0, 4096),
    dv=st.integers(0, 4096),
    threshold=st.integers(1, 2**17 - 1),
    scale=st.sampled_from((30, 3000)),
    seed=st.integers(0, 2**31),
)
def test_it_computes_what_the_process_does_to_the_end_of_24_bits(
    du: int, dv: int, threshold: int, scale: int, seed: int
) -> None:
    parameters = {"threshold": threshold / 64, "current_decay": du / 4096, "voltage_decay": dv / 4096}
    neuron = create_neuron("slayer.cuba", **parameters)
    process = LIF("n", 5, du=du - 1, dv=dv, vth=threshold)
    a = np.random.default_rng(seed).integers(-scale, scale + 1, (30, 5))
    state, held = neuron.init_state((1, 5), dtype=torch.float64), process.initial()
    for t, row in enumerate(a):
        spikes, state = neuron.step(torch.tensor(row / 64)[None], state)
        (fired,) = process.step(held, t + 1, row)
        np.testing.assert_array_equal(spikes[0].numpy(), fired)
        np.testing.assert_array_equal(state.v[0].numpy() * STATE_SCALE, held["v"])
        np.testing.assert_array_equal(state.u[0].numpy() * STATE_SCALE, held["u"])


def test_a_language_model_trains_with_it_and_counts_its_updates() -> None:
    torch.manual_seed(0)
    neuron = {"type": "slayer.cuba", "threshold": 0.5, "current_decay": 1.0, "voltage_decay": 0.5}
    model = spiking_lm.create_model("spikegpt", vocab_size=16, n_layer=1, n_embd=16, neuron=neuron)
    tokens = (torch.arange(33) * 3 % 16)[None]
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    explanation = spiking_lm.explain(model, tokens[0])
    assert (explanation.neurobench.membrane_updates_per_token or 0) > 0


def test_weights_are_rounded_to_what_8_bits_hold_and_learn_where_they_are_not_cut_off() -> None:
    layer = CubaDense(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1 / 64, 3 / 64, 9.0, -9.0]]))
    quantized = layer.quantized_weight()
    assert quantized.tolist() == [[0.0, 2 / 32, 254 / 64, -4.0]]
    (gradient,) = torch.autograd.grad(quantized.sum(), layer.weight)
    assert gradient.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="a network needs a layer"):
        to_network([])
    with pytest.raises(UsageError, match="layer 1 reads 3 values, and 2 arrive"):
        to_network([CubaDense(4, 2), CubaDense(3, 2)])
    endless = CubaDense(4, 2, SlayerCubaConfig(current_decay=0.0))
    with pytest.raises(LoweringError, match="du = -1 adds up currents without end"):
        to_network([endless])
    neuron = SlayerCuba(SlayerCubaConfig())
    with pytest.raises(UsageError, match=r"slayer.cuba: a state of shape \(1, 4\) for input of shape \(2, 4\)"):
        neuron.step(torch.zeros(2, 4), neuron.init_state((1, 4)))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": 0.01}, "threshold"),
        ({"threshold": 2048.0}, "threshold"),
        ({"current_decay": 1.5}, "current_decay"),
        ({"tau_grad": 0.0}, "tau_grad"),
        ({"voltage_decays": 0.5}, "unknown field 'voltage_decays'"),
    ],
)
def test_parameters_that_hardware_has_not_are_refused(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_neuron("slayer.cuba", **parameters)


def test_what_is_not_finite_is_not_a_silent_membrane() -> None:
    neuron = create_neuron("slayer.cuba")
    spikes, state = neuron.step(torch.tensor([[float("nan"), 1.0]]), neuron.init_state((1, 2)))
    assert isinstance(state, CubaState)
    assert torch.isnan(spikes).tolist() == [[True, False]]
    later, _ = neuron.step(torch.ones(1, 2), state)
    assert torch.isnan(later).tolist() == [[True, False]]


def test_it_is_listed_without_torch_and_without_lava() -> None:
    code = (
        "import sys\nfrom spiking_lm import registry\n"
        "registry.get('neurons', 'slayer.cuba').load('config')\n"
        "assert 'torch' not in sys.modules and 'lava' not in sys.modules\n"
        "import spiking_lm\nspiking_lm.create_neuron('slayer.cuba')\n"
        "assert 'lava' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
