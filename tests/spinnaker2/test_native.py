"""The native path: LIF networks as py-spinnaker2 objects, held against a strict stand-in for py-spinnaker2."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from spiking_lm.errors import DataError, PluginError, UsageError
from spiking_lm.hardware import LoweringError
from spiking_lm.lifnet import LIFEdge, LIFLayer, LIFNet, from_model
from spiking_lm_spinnaker2 import native
from spiking_lm_spinnaker2.native import NativeNet, lower, retime, through_nir, write_program

from ..nir.networks import networks, spikes
from ..nir.test_lifnet import Chain, Config

FAKE = Path(__file__).parent / "fake_spinnaker2"

once = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


@pytest.fixture
def spinnaker2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, importable as ``spinnaker2`` during one test."""
    monkeypatch.syspath_prepend(str(FAKE))
    yield importlib.import_module("spinnaker2.snn")
    for name in [name for name in sys.modules if name.split(".")[0] == "spinnaker2"]:
        del sys.modules[name]


def lowered(net: LIFNet) -> NativeNet:
    """Lower a drawn network; those that the chip cannot hold are not this test's business."""
    try:
        return lower(net)
    except LoweringError:
        assume(False)
        raise


def small(**parameters: Any) -> LIFNet:
    rng = np.random.default_rng(1)
    layers = (LIFLayer("a", 5, decay=0.75, **parameters), LIFLayer("b", 3, decay=0.5, **parameters))
    edges = (
        LIFEdge("input", "a", rng.normal(size=(5, 4))),
        LIFEdge("a", "b", rng.normal(size=(3, 5))),
        LIFEdge("a", "a", rng.normal(size=(5, 5)) / 4, delay=1),
    )
    return LIFNet(4, layers, edges, ("a", "b"))


def fan_in(sources: int, neurons: int) -> LIFNet:
    layer = LIFLayer("wide", neurons, decay=0.5)
    return LIFNet(sources, (layer,), (LIFEdge("input", "wide", np.ones((neurons, sources))),))


# Retiming -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(networks(exact=True))
def test_retiming_keeps_every_spike(net: LIFNet) -> None:
    try:
        retimed, lags, notes = retime(net)
    except LoweringError:
        assume(False)
        raise
    assume(not notes)
    assert all(edge.delay >= 1 for edge in retimed.edges)
    late = max(lags.values())
    x = spikes(net)
    padded = np.concatenate([x, np.zeros((late, net.input_size), bool)])
    before, after = net.run(x), retimed.run(padded)
    for layer in net.layers:
        lag = lags[layer.name]
        assert not after.spikes[layer.name][:lag].any()
        assert np.array_equal(after.spikes[layer.name][lag : lag + len(x)], before.spikes[layer.name])


def test_paths_of_unlike_length_get_delays_and_the_model_for_them() -> None:
    net = small()
    skip = dataclasses.replace(net, edges=(*net.edges, LIFEdge("input", "b", np.ones((3, 4)))))
    result = lower(skip)
    assert {str(edge): edge.delay for edge in result.net.edges} == {
        "input -> a": 1,
        "a -> b": 1,
        "a -> a": 1,
        "input -> b": 2,
    }
    assert [(p.name, p.model, p.lag) for p in result.populations] == [("a", "lif_no_delay", 1), ("b", "lif", 2)]
    assert max(np.abs(edge.weight).max() for edge in result.net.into("b")) == 15
    assert max(np.abs(edge.weight).max() for edge in result.net.into("a")) == 127
    assert result.notes == ("layer 'b': its edges have delays, so its weights have 15 steps",)
    assert lower(net).notes == ()


def test_a_loop_that_is_too_fast_is_named() -> None:
    net = small()
    back = LIFEdge("b", "a", np.ones((5, 3)), delay=1)
    with pytest.raises(LoweringError, match=r"the loop (a -> b -> a|b -> a -> b) has less delay than edges"):
        lower(dataclasses.replace(net, edges=(*net.edges, back)))
    slower = dataclasses.replace(net, edges=(*net.edges, dataclasses.replace(back, delay=2)))
    assert {str(edge): edge.delay for edge in lower(slower).net.edges}["b -> a"] == 1


def test_a_delay_beyond_the_synapse_is_named() -> None:
    net = small()
    far = LIFEdge("input", "b", np.ones((3, 4)), delay=7)
    with pytest.raises(LoweringError, match="edge input -> b would take 9 ticks, a synapse holds 8"):
        lower(dataclasses.replace(net, edges=(*net.edges, far)))


def test_waiting_for_input_changes_nothing_where_it_can_be_helped() -> None:
    """A layer two ticks behind has a drift to make up for; the one that fires by itself at once cannot."""
    up = small(drift=0.25)
    retimed, _, notes = retime(up)
    assert retimed["b"].v_init[0] == (-0.25 / 0.5 - 0.25) / 0.5
    assert not notes
    down = small(drift=-0.9, threshold=1.0)
    retimed, _, notes = retime(down)
    assert notes == [
        "layer 'b': 3 of 3 neurons start below their membrane, from which they would fire while they wait for input"
    ]
    alone = (LIFLayer("a", 5, decay=0.0, drift=2.0), LIFLayer("b", 3, decay=0.5))
    with pytest.raises(LoweringError, match="layer 'a' fires by its drift alone"):
        lower(dataclasses.replace(small(), layers=alone))


# Quantising ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(networks())
def test_one_factor_per_layer_scales_everything(net: LIFNet) -> None:
    result = lowered(net)
    lags = {population.name: population.lag for population in result.populations}
    for population in result.populations:
        layer, was = result.net[population.name], retime(net)[0][population.name]
        limit = native.WEIGHT_LIMITS[population.model]
        into = net.into(population.name)
        largest = max(np.abs(was.gain[:, None].astype(float) * edge.weight).max() for edge in into)
        assert population.scale == pytest.approx(limit / largest)
        for edge, quantised in zip(into, result.net.into(population.name), strict=True):
            exact = was.gain[:, None].astype(float) * edge.weight * population.scale
            assert np.array_equal(quantised.weight, np.rint(quantised.weight))
            assert np.abs(quantised.weight - exact).max() <= 0.5 + 1e-9
            assert np.abs(quantised.weight).max() <= limit
            assert quantised.delay == edge.delay + lags[edge.target] - lags.get(edge.source, 0)
        assert layer.drift == pytest.approx(was.drift * population.scale, rel=1e-6, abs=1e-6)
        assert layer.compare == ">"
        at = (was.threshold.astype(float) * population.scale).astype(np.float32)
        assert np.array_equal(layer.threshold, np.nextafter(at, np.float32(-1e9)) if was.compare == ">=" else at)


def test_at_the_threshold_both_kinds_of_comparison_are_kept(spinnaker2: Any) -> None:
    for compare, fires in ((">=", True), (">", False)):
        layer = LIFLayer("n", 1, decay=0.5, threshold=2.0, compare=compare)
        net = LIFNet(2, (layer,), (LIFEdge("input", "n", [[1.0, 1.0]]),))
        result = lower(net).run(np.ones((1, 2)))
        assert result["n"].tolist() == net.run(np.ones((1, 2))).spikes["n"].tolist() == [[fires]]


def test_layers_with_synaptic_currents_are_refused() -> None:
    with pytest.raises(LoweringError, match="layer 'a': synapses with a current"):
        lower(small(synapse_decay=0.5))


def test_cores_hold_what_fits() -> None:
    (wide,) = lower(fan_in(1000, 300)).populations
    assert wide.atoms_per_core == (44 * 1024 - 4000) // 4000
    assert wide.cores == 30
    (narrow,) = lower(fan_in(10, 600)).populations
    assert (narrow.atoms_per_core, narrow.cores) == (250, 3)
    with pytest.raises(LoweringError, match=r"layer 'wide': one neuron with 6000 synapses takes 48000 bytes"):
        lower(fan_in(6000, 2))
    sparse = fan_in(1000, 300)
    mostly_zero = np.where(np.arange(300)[:, None] == np.arange(1000), 1.0, 0.0)
    sparse = dataclasses.replace(sparse, edges=(LIFEdge("input", "wide", mostly_zero),))
    assert lower(sparse).populations[0].atoms_per_core == 250


# Running ------------------------------------------------------------------------------------------------------------


@once
@given(networks())
def test_py_spinnaker2_fires_spike_for_spike_as_the_reference(spinnaker2: Any, net: LIFNet) -> None:
    result = lowered(net)
    x = spikes(net)
    expected, got = result.reference(x), result.run(x)
    assert set(got) == set(net.outputs)
    for name in net.outputs:
        assert np.array_equal(got[name], expected[name])


@once
@given(networks())
def test_both_ways_through_py_spinnaker2_agree(spinnaker2: Any, drawn: LIFNet) -> None:
    order = ["input", *(layer.name for layer in drawn.layers)]
    steps = [order.index(edge.target) - order.index(edge.source) for edge in drawn.edges]
    # Chains and loops of a layer on itself: nothing for which edges would need delays.
    edges = [
        edge if step else dataclasses.replace(edge, delay=1) for edge, step in zip(drawn.edges, steps, strict=True)
    ]
    kept = tuple(edge for edge, step in zip(edges, steps, strict=True) if step in (0, 1))
    net = dataclasses.replace(drawn, edges=kept)
    result = lowered(net)
    network, inputs, outputs = through_nir(result)
    x = spikes(net)
    (source,) = inputs
    source.params = {neuron: np.flatnonzero(x[:, neuron]).tolist() for neuron in range(net.input_size)}
    backend = importlib.import_module("spinnaker2.brian2_sim").Brian2Backend()
    backend.run(network, len(x) + result.ticks_behind)
    ours, populations = result.build(x)
    backend.run(ours, len(x) + result.ticks_behind)
    assert len(outputs) == len(net.outputs)
    by_name = {population.name: population for population in network.populations}
    for name in net.outputs:
        other = by_name[name.replace(".", "_")]
        assert other.get_spikes() == populations[name].get_spikes()
        assert other.max_atoms_per_core == populations[name].max_atoms_per_core


def test_a_rounded_network_still_answers_much_like_the_model(spinnaker2: Any) -> None:
    net = small(threshold=0.75)
    x = spikes(net, 200)
    exact, got = net.run(x).spikes, lower(net).run(x)
    for name in ("a", "b"):
        assert 0.05 < exact[name].mean() < 0.95
        assert (exact[name] == got[name]).mean() > 0.97


def test_a_model_cut_out_runs_as_a_program_for_the_chip(spinnaker2: Any) -> None:
    torch.manual_seed(3)
    model = Chain(Config())
    tokens = torch.randint(0, 7, (1, 60))
    with torch.no_grad():
        fired = model(tokens, return_spikes=True).spikes["lif.1"][0].numpy() > 0
    result = lower(from_model(model, "tokens"))
    one_hot = np.eye(7)[tokens[0]]
    answers = result.run(one_hot)["lif.1"]
    assert np.array_equal(answers, result.reference(one_hot)["lif.1"])
    assert (answers == fired).mean() > 0.95
    assert 0.05 < fired.mean() < 0.95


def test_through_nir_refuses_what_would_be_lost(spinnaker2: Any) -> None:
    net = small()
    skip = dataclasses.replace(net, edges=(*net.edges, LIFEdge("input", "b", np.ones((3, 4)))))
    with pytest.raises(LoweringError, match="layer 'b' has edges with delays"):
        through_nir(lower(skip))


@pytest.mark.parametrize(
    ("executor", "variable", "kind"),
    [("chip", "S2_IP", "SpiNNaker2Chip"), ("board", "STM_IP", "SpiNNcloud48NodeBoard")],
)
def test_machines_are_found_by_argument_or_environment(
    spinnaker2: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, executor: Any, variable: str, kind: str
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_SPINNAKER2_LOG", str(log))
    monkeypatch.setenv(variable, "10.0.0.7")
    net = small()
    x = spikes(net)
    result = lower(net)
    assert np.array_equal(result.run(x, executor)["b"], result.reference(x)["b"])
    result.run(x, executor, address="10.0.0.8")
    monkeypatch.delenv(variable)
    result.run(x, executor)
    lines = log.read_text().split("\n")
    assert lines[:2] == [f"{kind} 10.0.0.7", f"{kind} 10.0.0.8"]
    assert lines[2].startswith(f"{kind} 192.168.")


def test_too_many_cores_and_wrong_arguments_are_refused(spinnaker2: Any) -> None:
    large = lower(fan_in(1000, 1500))
    assert large.cores == 4 + 150
    x = np.zeros((3, 1000))
    with pytest.raises(LoweringError, match="takes 154 cores, a chip has 148"):
        large.run(x, "chip")
    with pytest.raises(UsageError, match="no executor 'loihi'"):
        lower(small()).run(np.zeros((3, 4)), "loihi")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"\(T, ..., 4\)"):
        lower(small()).run(np.zeros((3, 5)))
    with pytest.raises(DataError, match=r"spikes of shape \(3, 2, 4\)"):
        lower(small()).run(np.zeros((3, 2, 4)))


def test_without_py_spinnaker2_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spinnaker2", None)
    result = lower(small())  # needs nothing
    with pytest.raises(PluginError, match="py-spinnaker2 cannot be used") as caught:
        result.run(np.zeros((3, 4)))
    assert "git clone https://gitlab.com/spinnaker2/py-spinnaker2.git" in str(caught.value.hint)


def test_doctor_tells_without_complaining(monkeypatch: pytest.MonkeyPatch, spinnaker2: Any) -> None:
    (there,) = native.check_py_spinnaker2()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (absent,) = native.check_py_spinnaker2()
    assert (there.status, absent.status) == ("ok", "ok")
    assert there.message.startswith("installed")
    assert "git clone" in absent.message


# The program --------------------------------------------------------------------------------------------------------


def run_program(script: Path, *arguments: str, fake: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(FAKE) if fake else "",
        "FAKE_SPINNAKER2_LOG": str(script.parent / "log"),
    }
    return subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_program_runs_and_answers_as_the_reference(tmp_path: Path) -> None:
    net = small(threshold=np.float32(0.7), v_reset=None, compare=">")
    varied = dataclasses.replace(net["a"], threshold=np.linspace(0.5, 1, 5).astype(np.float32))
    result = lower(dataclasses.replace(net, layers=(varied, net["b"])))
    x = spikes(net, 40)
    script, numbers = write_program(result, tmp_path / "net.py", x)
    assert numbers == tmp_path / "net.npz"
    text = script.read_text()
    assert 'neuron_model="lif_no_delay"' in text
    assert '"reset": "reset_by_subtraction"' in text or "'reset_by_subtraction'" in text
    assert '"threshold": data["layer_0_threshold"]' in text
    assert max(map(len, text.split("\n"))) <= 120
    done = run_program(script)
    assert done.returncode == 0, done.stderr
    expected = result.reference(x)
    with np.load(tmp_path / "net.answers.npz") as answers:
        assert set(answers) == {"a", "b"}
        for name in answers:
            assert np.array_equal(answers[name], expected[name])
            assert f"{name}: {expected[name].sum()} spikes of {expected[name].shape[1]} neurons" in done.stdout
    assert run_program(script, "chip", "10.1.1.1").returncode == 0
    assert run_program(script, "board").returncode == 0
    assert (tmp_path / "log").read_text().split("\n")[0] == "SpiNNaker2Chip 10.1.1.1"
    assert "unknown executor 'loihi'" in run_program(script, "loihi").stderr


def test_the_program_is_plain_python_without_spiking_lm(tmp_path: Path) -> None:
    script, _ = write_program(lower(small()), tmp_path / "net.py", spikes(small()))
    imported = [
        line.split()[1] for line in script.read_text().split("\n") if line.strip().startswith(("import ", "from "))
    ]
    assert set(imported) == {"os", "sys", "pathlib", "numpy", "spinnaker2"}
    with pytest.raises(UsageError, match="not the name of a Python program"):
        write_program(lower(small()), tmp_path / "net.txt", spikes(small()))


# The stand-in itself is strict --------------------------------------------------------------------------------------


def test_the_stand_in_refuses_what_the_documentation_does_not_promise(spinnaker2: Any) -> None:
    snn = spinnaker2
    good = {"threshold": 1.0, "alpha_decay": 0.5, "reset": "reset_by_subtraction"}
    source = snn.Population(2, "spike_list", {0: [1]}, "in")
    cell = snn.Population(2, "lif_no_delay", dict(good), "n")
    slow = snn.Population(2, "lif", dict(good), "m")

    def network(*projections: Any, **changes: Any) -> Any:
        params = {key: value for key, value in {**good, **changes}.items() if value is not None}
        net = snn.Network("x")
        net.add(snn.Population(2, "lif", params, "p"), *projections)
        return net

    network().validate()
    for bad in ({"tau": 1.0}, {"reset": None}, {"reset": "zero"}, {"threshold": None}, {"threshold": [1.0, 2.0, 3.0]}):
        with pytest.raises(ValueError, match=r"p: "):
            network(**bad).validate()
    with pytest.raises(ValueError, match="no neuron model"):
        snn.Population(2, "LIF", good)
    with pytest.raises(ValueError, match="cannot record"):
        snn.Population(2, "lif", good, record=["membrane"])
    for post, row in ((cell, [0, 0, 1.0, 0]), (cell, [0, 0, True, 0])):
        with pytest.raises(TypeError, match="not an integer"):
            snn.Projection(source, post, [row])
    rows = [(cell, [0, 0, 128, 0]), (cell, [0, 0, 1, 1]), (slow, [0, 0, 16, 0]), (slow, [0, 0, 1, 8])]
    for post, row in [*rows, (cell, [2, 0, 1, 0]), (cell, [0, 2, 1, 0]), (slow, [0, 0, 1, -1])]:
        with pytest.raises(ValueError, match="not in"):
            snn.Projection(source, post, [row])
    with pytest.raises(ValueError, match="receives nothing"):
        snn.Projection(cell, source, [[0, 0, 1, 0]])
    with pytest.raises(ValueError, match="not added"):
        network(snn.Projection(source, cell, [[0, 0, 1, 0]])).validate()
    with pytest.raises(ValueError, match="not in 1 to 250"):
        cell.set_max_atoms_per_core(251)
    with pytest.raises(RuntimeError, match="nothing has run"):
        cell.get_spikes()
