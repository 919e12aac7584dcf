"""Networks as NIR graphs: the same integers back, and the same spikes for a reader that knows nothing of processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lava_nets import int8, normalised, recurrent, rows, three_layers

from spiking_lm import nir_io
from spiking_lm.errors import DataError, LoweringError, UsageError
from spiking_lm.nir_io import NIRUnsupportedError
from spiking_lm_lava.graded import GradedVec
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.nir import from_nir, to_nir
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.simulator import Simulator


def same(a: Network, b: Network) -> bool:
    """Whether two networks are written alike, arrays included."""
    (record, arrays), (other, others) = a.to_record(), b.to_record()
    return (
        record == other and arrays.keys() == others.keys() and all(np.array_equal(arrays[k], others[k]) for k in arrays)
    )


@st.composite
def networks(draw: st.DrawFn, *, real: bool = False) -> Network:
    """Layers of LIF neurons with loops, lateral synapses, skips; ``real``: neurons whose arithmetic rounds nothing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    size, high = draw(st.integers(1, 5)), 1 if real else draw(st.sampled_from((1, 60)))
    nodes: list[Process] = [Source("x", size, 0, high)]
    edges: list[Edge] = []
    layers = draw(st.integers(1, 4))
    for k in range(layers):
        decays = ((4095, 0), (4095, 4096)) if real else ((4095, 0), (4095, 700), (900, 4096), (30, 2048))
        du, dv = draw(st.sampled_from(decays))
        most = 0 if real else 9  # a bias above 0 fires before the first row arrives, in Lava alone
        bias = rng.integers(-9, most + 1, size) if dv else np.zeros(size, int)
        exponent = 6 if real else draw(st.integers(0, 7))
        vth = draw(st.integers(0, 150))
        nodes.append(LIF(f"n.{k}".replace(".", " "), size, du=du, dv=dv, vth=vth, bias_mant=bias, bias_exp=exponent))
    names = [node.name for node in nodes]
    for k in range(1, layers + 1):
        into = {k - 1, *draw(st.lists(st.integers(0, layers), max_size=2))}
        for start in sorted(into):
            form = draw(st.sampled_from(("dense", "sparse", "delay")))
            delay = np.broadcast_to(rng.integers(0, 3, size), (size, size)) if form == "delay" else None
            if real and delay is not None:
                delay = np.full((size, size), draw(st.integers(0, 3)))
            name = f"w{start}{k}"
            given_delay = {} if delay is None else {"delay": delay}
            exp = 0 if real else draw(st.integers(-4, 0))
            graded = start == 0 and high > 1
            weight = int8(rng, size, size)
            nodes.append(Synapse.int8(name, weight, form=form, graded=graded, weight_exp=exp, **given_delay))
            edges += [Edge(names[start], name), Edge(name, names[k])]
    sink = Sink("y", size)
    return Network((*nodes, sink), (*edges, Edge(names[-1], "y")))


@settings(max_examples=60)
@given(data=st.data())
def test_a_graph_comes_back_as_the_same_network(data: st.DataObject) -> None:
    try:
        network = data.draw(networks())
    except LoweringError:  # it might overflow
        return
    assert same(from_nir(to_nir(network)), network)


@settings(max_examples=60)
@given(network=networks(real=True), seed=st.integers(0, 9))
def test_other_readers_find_the_same_spikes_where_nothing_is_rounded(network: Network, seed: int) -> None:
    """Delays, loops, biases and units mean the same in a reader of differential equations."""
    other = nir_io.from_nir(to_nir(network))
    x = np.random.default_rng(seed).integers(0, 2, (40, network["x"].size))
    mine = Simulator(network).run({"x": x}).sinks["y"]
    theirs = other.run(x.astype(bool)).spikes[other.outputs[0]]
    late = network.arrival()["y"]
    np.testing.assert_array_equal(mine[late:], theirs[: len(mine) - late])


@pytest.mark.parametrize("make", [recurrent, lambda: three_layers(8)])
def test_a_file_comes_back_as_the_same_network(make: Any, tmp_path: Path) -> None:
    network = make()
    to_nir(network, tmp_path / "n.nir", dt=1e-4)
    again = from_nir(tmp_path / "n.nir")
    assert same(again, network)
    inputs = rows(network, 40, 1)
    np.testing.assert_array_equal(
        Simulator(again).run(inputs).sinks["out"], Simulator(network).run(inputs).sinks["out"]
    )


def test_the_equations_are_those_of_the_documents() -> None:
    nodes = (
        Source("x", 2),
        Synapse.int8("w", np.array([[1, -2], [3, 4]])),
        LIF("n", 2, du=1023, dv=512, vth=7, bias_mant=np.array([0, 3]), bias_exp=6),
        Synapse.int8("again", np.array([[1, 0], [0, 1]])),
        Sink("y", 2),
    )
    edges = [("x", "w"), ("w", "n"), ("n", "again"), ("again", "n"), ("n", "y")]
    graph = to_nir(Network(nodes, tuple(Edge(a, b) for a, b in edges)), dt=1e-3)
    assert sorted(graph.edges) == sorted(edges)
    node, linear = graph.nodes["n"], graph.nodes["w"]
    assert isinstance(node, nir.CubaLIF)
    assert isinstance(linear, nir.Linear)
    np.testing.assert_array_equal(linear.weight, [[1, -2], [3, 4]])
    for name, value in {"tau_syn": 4e-3, "tau_mem": 8e-3, "w_in": 4.0, "r": 8.0, "v_threshold": 7.0}.items():
        np.testing.assert_allclose(getattr(node, name), [value, value])
    np.testing.assert_allclose(node.v_leak, [0, 24])


def neuron(**fields: Any) -> Network:
    nodes = (Source("x", 1), Synapse.int8("w", np.array([[1]])), LIF("n", 1, **{"dv": 9, **fields}), Sink("y", 1))
    return Network(nodes, (Edge("x", "w"), Edge("w", "n"), Edge("n", "y")), checked=False)


def several_delays() -> Network:
    w = Synapse.int8("w", np.array([[1], [1]]), form="delay", delay=np.array([[0], [2]]))
    return Network((Source("x", 1), w, LIF("n", 2), Sink("y", 2)), (Edge("x", "w"), Edge("w", "n"), Edge("n", "y")))


def in_a_row() -> Network:
    nodes = (Source("x", 1), Synapse.int8("a", np.array([[1]])), Synapse.int8("b", np.array([[1]]), graded=True))
    return Network((*nodes, Sink("y", 1)), (Edge("x", "a"), Edge("a", "b"), Edge("b", "y")))


def uneven() -> Network:
    nodes = (Source("x", 1), Synapse.int8("a", np.array([[1]])), LIF("n", 1, dv=9), LIF("m", 1, dv=9), Sink("y", 1))
    edges = [("x", "a"), ("a", "n"), ("n", "m"), ("x", "m"), ("m", "y")]
    return Network(nodes, tuple(Edge(a, b) for a, b in edges))


def shared() -> Network:
    one = np.array([[1]])
    nodes = (Source("x", 1), Synapse.int8("a", one), LIF("n", 1, dv=9), Synapse.int8("b", one), LIF("m", 1, dv=9))
    c = Synapse.int8("c", one, graded=True)
    edges = [("x", "a"), ("a", "n"), ("n", "b"), ("b", "m"), ("n", "c"), ("m", "c"), ("c", "k"), ("k", "y")]
    return Network((*nodes, c, LIF("k", 1, dv=9), Sink("y", 1)), tuple(Edge(a, b) for a, b in edges))


def two_sources() -> Network:
    nodes = (Source("x", 1), Source("z", 1), GradedVec("g", 1), Sink("y", 1))
    return Network(nodes, (Edge("x", "g"), Edge("z", "g"), Edge("g", "y")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_sources, "the network has 2 sources"),
        (normalised, "normalise 'norm': NIR has no such node"),
        (lambda: neuron(vth_lo=-3), "lif 'n': it is ternary"),
        (lambda: neuron(reset_interval=3), "lif 'n': it resets by the clock"),
        (lambda: neuron(v=np.array([1])), "lif 'n': it starts elsewhere than at 0"),
        (lambda: neuron(du=-1), "lif 'n': its current never decays"),
        (lambda: neuron(du=5, dv=0), "lif 'n': its membrane never decays: NIR's IF has no current"),
        (lambda: neuron(dv=0, bias_mant=np.array([1])), "lif 'n': its membrane never decays: NIR's IF has no bias"),
        (several_delays, "synapse 'w': the weights of one input have several delays"),
        (in_a_row, "synapse 'a' feeds synapse 'b'"),
        (uneven, r"edge n\.s_out -> m\.a_in: another path there is shorter"),
        (shared, "synapse 'c' is part of paths of different lengths"),
    ],
)
def test_what_nir_cannot_say_is_refused_by_name(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(NIRUnsupportedError, match=message):
        to_nir(make(), tmp_path / "n.nir")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_was_changed_is_not_taken_for_what_it_was() -> None:
    def changed(change: Any) -> Any:
        graph = to_nir(recurrent())
        change(graph)
        return graph

    def other_weight(graph: Any) -> None:
        graph.nodes["w"].weight = graph.nodes["w"].weight * 1.3

    def other_threshold(graph: Any) -> None:
        graph.nodes["lif"].v_threshold = graph.nodes["lif"].v_threshold + 1

    for change, message in (
        (other_weight, "no whole numbers"),
        (other_threshold, "'v_threshold' of node 'lif' is not what its metadata says"),
        (lambda graph: graph.edges.remove(("lif", "out")), "edge 'lif' -> 'out' is not what"),
        (lambda graph: graph.nodes.pop("r"), "no longer the network that it was: KeyError: 'r'"),
        (lambda graph: graph.metadata.pop("spiking_lm_lava"), "was not written from a network of processes"),
    ):
        with pytest.raises(NIRUnsupportedError, match=message):
            from_nir(changed(change))
    same_weights = changed(lambda graph: graph.nodes["w"].weight.__setitem__((0, 0), 5.0))
    network = from_nir(same_weights)  # whole numbers may be changed
    assert isinstance(network["w"], Synapse)
    assert network["w"].weight[0, 0] == 10


def test_bad_files_and_time_steps_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        from_nir(tmp_path / "n.nir")
    (tmp_path / "n.nir").write_text("nothing")
    with pytest.raises(DataError, match="not a NIR file"):
        from_nir(tmp_path / "n.nir")
    with pytest.raises(UsageError, match="dt is 0"):
        to_nir(recurrent(), dt=0)


def test_without_nir_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['nir'] = None\n"
        "from spiking_lm.errors import MissingExtraError\nfrom spiking_lm_lava.nir import from_nir\n"
        "try: from_nir('x')\nexcept MissingExtraError as error: sys.exit(error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "pip install 'spiking-lm[nir]'"
