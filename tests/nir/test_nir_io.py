"""NIR: networks go out and come back; what has no form is refused by name."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_lm.errors import DataError, MissingExtraError, UsageError
from spiking_lm.interfaces import LIFDynamics
from spiking_lm.lifnet import LIFEdge, LIFLayer, LIFNet
from spiking_lm.nir_io import NIRUnsupportedError, from_nir, neuron_to_nir, to_nir

from .networks import networks, spikes

nir = pytest.importorskip("nir")


def small() -> LIFNet:
    layers = (LIFLayer("a", 3, decay=0.75), LIFLayer("b", 2, decay=0.5))
    edges = (LIFEdge("input", "a", np.ones((3, 4))), LIFEdge("a", "b", np.ones((2, 3)), np.zeros(2)))
    return LIFNet(4, layers, edges)


@settings(max_examples=60)
@given(networks(synapses=True), st.sampled_from([1e-3, 1.0, 3.7e-5]))
def test_a_network_comes_back_from_a_file_bit_for_bit(tmp_path_factory, net: LIFNet, dt: float) -> None:
    path = tmp_path_factory.mktemp("nir") / "net.nir"
    to_nir(net, path, dt=dt)
    back = from_nir(path)
    assert back == net
    ran, again = net.run(spikes(net)), back.run(spikes(net))
    for layer in net.layers:
        assert np.array_equal(ran.spikes[layer.name], again.spikes[layer.name])
        assert np.array_equal(ran.membranes[layer.name], again.membranes[layer.name])


@settings(max_examples=25)
@given(networks(synapses=True, exact=True))
def test_exponential_time_constants_come_back_too(net: LIFNet) -> None:
    graph = to_nir(net, dt=1e-3, integrator="exponential")
    assert from_nir(graph) == net
    assert from_nir(graph, dt=1e-3, integrator="exponential") == net


@settings(max_examples=25)
@given(networks(synapses=True, exact=True))
def test_the_written_graph_passes_the_type_checks_of_nir(tmp_path_factory, net: LIFNet) -> None:
    reached = {edge.source for edge in net.edges if edge.source != edge.target} | set(net.outputs)
    path = tmp_path_factory.mktemp("nir") / "net.nir"
    to_nir(net, path)
    if all(layer.name in reached for layer in net.layers):
        graph = nir.read(path)  # infers and checks all shapes
        assert set(graph.inputs) == {"input"}
        assert len(graph.outputs) == len(net.outputs)


def test_parameters_mean_what_nir_says() -> None:
    """One step of dt of NIR's equation, by Euler and in closed form, equals one step of the network."""
    dt, tau, r, leak, x, v = 0.002, 0.016, 3.0, 0.4, 0.7, 0.25
    node = nir.LIF(*(np.full(1, value) for value in (tau, r, leak, 9.0)))
    nodes = {"in": nir.Input([1]), "w": nir.Linear(np.full((1, 1), x)), "n": node, "out": nir.Output([1])}
    graph = nir.NIRGraph(nodes, [("in", "w"), ("w", "n"), ("n", "out")])
    expected = {
        "euler": v + dt / tau * (leak - v + r * x),
        "exponential": (leak + r * x) + (v - leak - r * x) * np.exp(-dt / tau),
    }
    for integrator, after in expected.items():
        net = from_nir(graph, dt=dt, integrator=integrator)
        assert net["n"].v_init == np.float32(leak)  # rests at its leak potential
        at_v = dataclasses.replace(net, layers=(dataclasses.replace(net["n"], v_init=np.full(1, v)),))
        assert at_v.run(np.ones((1, 1))).membranes["n"][0, 0] == pytest.approx(after, rel=1e-6)
        assert net["n"].compare == ">"
    cuba = nir.CubaLIF(*(np.full(1, value) for value in (0.004, tau, r, leak, 9.0)), w_in=np.full(1, 2.0))
    net = from_nir(nir.NIRGraph({**nodes, "n": cuba}, graph.edges), dt=dt)
    current = 0.002 / 0.004 * 2.0 * x
    assert net.run(np.ones((1, 1))).membranes["n"][0, 0] == pytest.approx(leak + dt / tau * r * current, rel=1e-6)
    integrator_neuron = nir.IF(np.full(1, r), np.full(1, 9.0))
    net = from_nir(nir.NIRGraph({**nodes, "n": integrator_neuron}, graph.edges), dt=dt)
    assert net.run(np.ones((2, 1))).membranes["n"][:, 0] == pytest.approx([r * x, 2 * r * x])


def test_one_neuron_goes_out_with_its_parameters() -> None:
    lif = neuron_to_nir(LIFDynamics(beta=0.75, gain=0.5, threshold=2.0, v_reset=-1.0), 3, dt=0.001)
    assert isinstance(lif, nir.LIF)
    assert lif.tau.tolist() == [0.004] * 3
    assert lif.r.tolist() == [2.0] * 3
    assert lif.v_leak.tolist() == lif.v_reset.tolist() == [-1.0] * 3
    assert lif.v_threshold.tolist() == [2.0] * 3
    assert lif.metadata["compare"] == ">="
    assert lif.metadata["reset"] == "zero"
    assert lif.metadata["v_init"].tolist() == [0.0] * 3  # our membranes start at 0, not at the leak potential
    slow = neuron_to_nir(LIFDynamics(beta=0.75, gain=0.5, threshold=2.0), 1, dt=0.001, integrator="exponential")
    assert slow.tau == pytest.approx(-0.001 / np.log(0.75))
    assert "v_init" not in slow.metadata
    perfect = neuron_to_nir(LIFDynamics(beta=1.0, gain=0.5, threshold=2.0, v_reset=None, compare=">"), 2)
    assert isinstance(perfect, nir.IF)
    assert perfect.r.tolist() == [0.5, 0.5]
    assert perfect.metadata["reset"] == "subtract"
    assert perfect.metadata["compare"] == ">"


def test_files_without_our_metadata_need_a_dt(tmp_path: Path) -> None:
    graph = to_nir(small(), dt=0.001)
    bare = nir.NIRGraph(graph.nodes, graph.edges)
    for node in bare.nodes.values():
        node.metadata = {}
    nir.write(tmp_path / "bare.nir", bare)
    with pytest.raises(UsageError, match="time step"):
        from_nir(tmp_path / "bare.nir")
    net = from_nir(tmp_path / "bare.nir", dt=0.001)
    assert [layer.compare for layer in net.layers] == [">", ">"]
    strict = tuple(dataclasses.replace(layer, compare=">") for layer in small().layers)
    assert net == dataclasses.replace(small(), layers=strict)
    assert from_nir(tmp_path / "bare.nir", dt=0.0005)["a"].decay[0] == 0.875


def test_loops_without_our_metadata_take_one_step() -> None:
    ones = np.ones(2)
    lif = {name: nir.LIF(ones * 0.002, ones, ones * 0, ones) for name in "ab"}
    nodes = {"x": nir.Input([1]), "y": nir.Output([2]), "wait": nir.Delay(ones * 0.002), **lif}
    nodes |= {name: nir.Linear(np.eye(2)) for name in ("ab_", "ba_", "bb_")} | {"xa_": nir.Linear(np.ones((2, 1)))}
    links = [("x", "xa_"), ("xa_", "a"), ("a", "ab_"), ("ab_", "b"), ("b", "ba_"), ("ba_", "a"), ("b", "y")]
    links += [("b", "wait"), ("wait", "bb_"), ("bb_", "b")]
    net = from_nir(nir.NIRGraph(nodes, links), dt=0.001)
    assert {str(edge): edge.delay for edge in net.edges} == {"input -> a": 0, "a -> b": 0, "b -> a": 1, "b -> b": 3}


def refused(nodes: dict, links: list, match: str, error: type = NIRUnsupportedError) -> None:
    with pytest.raises(error, match=match):
        from_nir(nir.NIRGraph(nodes, links, type_check=False), dt=0.001)


def test_nodes_without_a_form_are_named() -> None:
    one = np.ones(2)
    lif = nir.LIF(one * 0.002, one, one * 0, one)
    chain = [("x", "w"), ("w", "n"), ("n", "y")]
    nodes = {"x": nir.Input([2]), "w": nir.Linear(np.eye(2)), "n": lif, "y": nir.Output([2])}
    assert from_nir(nir.NIRGraph(nodes, chain), dt=0.001).input_size == 2
    conv = nir.Conv2d((4, 4), np.ones((1, 1, 2, 2)), 1, 0, 1, 1, np.zeros(1))
    refused({**nodes, "w": conv}, chain, "node 'w' is a Conv2d")
    refused({**nodes, "n": nir.LI(one, one, one)}, chain, "node 'n' is a LI")
    refused({**nodes, "n": nir.NIRGraph(dict(nodes), list(chain))}, chain, "node 'n' is a NIRGraph")
    refused({**nodes, "x2": nir.Input([2])}, chain, "2 inputs")
    refused(nodes, [("x", "n"), ("n", "y")], "'x' -> 'n': Input into LIF")
    refused({**nodes, "w2": nir.Linear(np.eye(2))}, [*chain, ("w", "w2")], "'w' -> 'w2': Linear into Linear")
    refused({**nodes, "m": lif}, chain, "'m' cannot be reached")
    refused({**nodes, "w": nir.Linear(np.ones((3, 2)))}, chain, r"node 'n' has shape \(2,\)")
    refused({**nodes, "w": nir.Linear(np.ones((2, 2, 2)))}, chain, r"'w': its weight has shape \(2, 2, 2\)")
    refused({**nodes, "r": nir.Linear(np.ones((2, 3)))}, [*chain, ("n", "r"), ("r", "n")], "'n' has 2 neurons")
    refused({**nodes, "n": nir.LIF(one * 1e-4, one, one, one)}, chain, "node 'n': with dt 0.001")
    refused({**nodes, "n": nir.LIF(one * 0, one, one, one)}, chain, "node 'n': with dt 0.001")
    refused({**nodes, "w": nir.Linear(np.full((2, 2), np.nan))}, chain, "not finite")
    refused(nodes, [*chain, ("n", "y")], "there twice")
    refused(nodes, [*chain, ("n", "z")], "'z', which is no node")
    half = nir.Delay(one * 0.0005)
    refused({**nodes, "d": half}, [("x", "d"), ("d", "w"), *chain[1:]], "node 'd': delays of .0.5. steps")
    loop = [("x", "w"), ("d", "e"), ("e", "d"), ("d", "w"), *chain[1:]]
    refused({**nodes, "d": nir.Delay(one * 0), "e": nir.Delay(one * 0)}, loop, "node '[de]': delays")


def test_layers_without_a_form_are_named() -> None:
    def export(**parameters: object) -> None:
        net = small()
        layer = LIFLayer(**{"name": "a", "size": 3, "decay": 0.5, **parameters})
        to_nir(dataclasses.replace(net, layers=(layer, net.layers[1])), integrator="exponential")

    with pytest.raises(NIRUnsupportedError, match="layer 'a': neurons that do not leak"):
        export(decay=[0.5, 1.0, 1.0])
    with pytest.raises(NIRUnsupportedError, match="layer 'a': neurons that do not leak"):
        export(decay=1.0, drift=0.5)
    with pytest.raises(NIRUnsupportedError, match="layer 'a': a decay of 0"):
        export(decay=0.0)
    with pytest.raises(NIRUnsupportedError, match="layer 'a': a synapse whose current"):
        export(synapse_decay=1.0)
    lost = dataclasses.replace(small(), layers=(LIFLayer("a", 3, decay=1e-30), small().layers[1]))
    with pytest.raises(NIRUnsupportedError, match="does not come back"):
        to_nir(lost)


def test_bad_files_and_arguments(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        from_nir(tmp_path / "none.nir")
    (tmp_path / "text.nir").write_text("hello")
    with pytest.raises(DataError, match=r"text.nir: not a NIR file"):
        from_nir(tmp_path / "text.nir")
    to_nir(small(), tmp_path / "net.nir")
    content = (tmp_path / "net.nir").read_bytes()
    (tmp_path / "cut.nir").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut.nir: not a NIR file"):
        from_nir(tmp_path / "cut.nir")
    nir.write(tmp_path / "node.nir", to_nir(small()).nodes["a"])
    with pytest.raises(DataError, match=r"node.nir: not a NIR file"):
        from_nir(tmp_path / "node.nir")
    for dt in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="dt is"):
            to_nir(small(), dt=dt)
    with pytest.raises(UsageError, match="no integrator 'rk4'"):
        to_nir(small(), integrator="rk4")  # type: ignore[arg-type]


def test_without_nir_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(MissingExtraError, match="extra 'nir'") as caught:
        to_nir(small())
    assert caught.value.hint == "pip install 'spiking-lm[nir]'"


def test_names_that_would_clash_are_kept_apart() -> None:
    layers = tuple(LIFLayer(name, 1, decay=0.5) for name in ("a.b", "a_b", "output", "größe"))
    edges = tuple(LIFEdge("input", layer.name, [[1.0]]) for layer in layers)
    net = LIFNet(1, layers, edges, ("a_b", "a.b"))
    graph = to_nir(net)
    assert from_nir(graph) == net
    assert not any("." in name or "/" in name for name in graph.nodes)


def test_metadata_of_strangers_is_no_obstacle() -> None:
    graph = to_nir(small())
    graph.nodes["a"].metadata |= {"compare": "?", "colour": "red"}
    assert from_nir(graph)["a"].compare == ">"
    assert SimpleNamespace(**graph.metadata).integrator == "euler"
