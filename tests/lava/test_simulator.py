"""The simulator is the reference, sooner; and what range analysis lets pass never leaves its bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lava_nets import int8, networks, normalised, recurrent, rows, three_layers

from spiking_lm.errors import DataError
from spiking_lm_lava import arithmetic, floating, graded, neurons, process
from spiking_lm_lava.arithmetic import STATE_LIMIT, Int
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.process import Sink, Source, Synapse
from spiking_lm_lava.simulator import Run, Simulator, reference


def states(network: Network) -> list[str]:
    return [f"{node.name}.{state}" for node in network.nodes for state in node.states]


def same(a: Run, b: Run) -> None:
    for x, y in ((a.sinks, b.sinks), (a.watched, b.watched)):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)
    assert a.state.t == b.state.t
    for name, state in a.state.nodes.items():
        assert state.keys() == b.state.nodes[name].keys()
        for key, value in state.items():
            np.testing.assert_array_equal(value, b.state.nodes[name][key], err_msg=f"{name}.{key}")


@settings(max_examples=60)
@given(networks(), st.integers(0, 2**31), st.integers(0, 12), st.integers(0, 12))
def test_the_simulator_equals_the_reference_in_one_piece_in_two_and_in_steps(
    network: Network, seed: int, first: int, second: int
) -> None:
    inputs, watch, simulator = rows(network, first + second, seed), states(network), Simulator(network)
    expected = reference(network, inputs, watch=watch)
    same(simulator.run(inputs, watch=watch), expected)

    before = simulator.run({name: x[:first] for name, x in inputs.items()})
    kept = before.state.copy()
    after = simulator.run({name: x[first:] for name, x in inputs.items()}, before.state)
    joined = {name: np.concatenate([before.sinks[name], after.sinks[name]]) for name in after.sinks}
    same(Run(joined, after.state), Run(expected.sinks, expected.state))
    same(Run({}, before.state), Run({}, kept))  # a state that was handed on is not written to

    state = simulator.initial()
    stepped = [simulator.step({name: x[t] for name, x in inputs.items()}, state) for t in range(first + second)]
    for name, whole in expected.sinks.items():
        for row, one in zip(whole, stepped, strict=True):
            np.testing.assert_array_equal(one[name], row)
    same(Run({}, state), Run({}, expected.state))


@settings(max_examples=60)
@given(networks(), st.integers(0, 2**31))
def test_what_is_let_pass_never_wraps_and_stays_within_its_bounds(network: Network, seed: int) -> None:
    def no_wrap(limit: int):  # type: ignore[no-untyped-def]
        def check(x: Int) -> Int:
            assert not x.size or (x.min() > -limit and x.max() < limit)
            return x

        return check

    with pytest.MonkeyPatch.context() as patch:
        for module in (process, neurons, graded):
            patch.setattr(module, "wrap_word", no_wrap(2**31))
        patch.setattr(neurons, "wrap_state", no_wrap(STATE_LIMIT))
        run = reference(network, rows(network, 40, seed), watch=states(network))
    saturating = {f"{name}.{state}" for name, bounds in network.bounds.items() for state in bounds.saturates}
    for name, values in run.watched.items():
        node, _, state = name.partition(".")
        bound = network.bounds[node].states[state]
        assert (values >= bound.low).all(), name
        assert (values <= bound.high).all(), name
        assert np.abs(values).max(initial=0) < STATE_LIMIT
        if name not in saturating:
            assert values.min(initial=0) > 1 - STATE_LIMIT
    for node in network.of_kind(Sink):
        (edge,) = network.arriving(node.name, "a_in")
        source, _, port = edge.source.partition(".")
        bound = network.bounds[source].sends[network[source].sends.index(port)]
        values = run.sinks[node.name]
        assert (values >= bound.low).all(), edge
        assert (values <= bound.high).all(), edge
        assert edge.bits is not None
        low, high = (0, 1) if edge.bits == 0 else (-(1 << edge.bits - 1), (1 << edge.bits - 1) - 1)
        assert values.min(initial=0) >= low
        assert values.max(initial=0) <= high
        if bound.total is not None:
            sums = np.cumsum(values, axis=0)
            assert (sums >= bound.total[0]).all(), edge
            assert (sums <= bound.total[1]).all(), edge


def test_bounds_are_reached_so_that_they_say_something() -> None:
    n = 4
    weight = np.full((1, n), 100)
    network = Network(
        (Source("x", n, 0, 5), Synapse.int8("w", weight, graded=True), LIF("lif", 1, du=200, dv=4096), Sink("s", 1)),
        (Edge("x", "w"), Edge("w", "lif"), Edge("lif", "s")),
    )
    run = reference(network, {"x": np.full((400, n), 5)}, watch=["lif.u"])
    bound = int(network.bounds["lif"].states["u"].high[0])
    assert 0.99 * bound < run.watched["lif.u"].max() <= bound < STATE_LIMIT


def test_neurons_really_fire_in_the_networks_of_these_tests() -> None:
    rng = np.random.default_rng(0)
    for network in (three_layers(64), recurrent()):
        (sink,) = network.of_kind(Sink)
        spikes = Simulator(network).run({"x": rng.integers(0, 2, (60, network["x"].size))}).sinks[sink.name]
        assert 0.01 < spikes.mean() < 0.8


def test_latency_of_a_chain_is_one_step_per_synapse() -> None:
    network = three_layers(16)
    x = np.zeros((6, 16), np.int64)
    silent = Simulator(network).run({"x": x}).sinks["out"]
    assert not silent.any()
    assert network.arrival()["out"] == 3
    assert network.uneven() == {}
    weight = np.full((16, 16), 100)
    loud = Network(
        tuple(Synapse.int8(node.name, weight) if isinstance(node, Synapse) else node for node in network.nodes),
        tuple(Edge(edge.source, edge.target) for edge in network.edges),
    )
    x[0] = 1
    assert [row.any() for row in Simulator(loud).run({"x": x}).sinks["out"]] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


def test_normalisation_gives_vectors_of_one_length() -> None:
    network = normalised()
    x = np.repeat([[1, 2, 3, 4], [-7, 7, 0, 0]], 6, axis=0)
    out = Simulator(network).run({"x": x}).sinks["out"]
    for row in (out[5], out[11]):  # settled: Q12 with an input that counts in Q0, hence 2^18
        assert abs(np.linalg.norm(row) / 2**18 - 1) < 0.02


def test_exact_sums_do_not_depend_on_the_type_that_computes_them() -> None:
    rng = np.random.default_rng(1)
    for high in (1, 15, 250):  # float32 holds the sums of the first only
        n = 300
        network = Network(
            (Source("x", n, -high, high), Synapse.int8("w", int8(rng, 40, n), graded=True), Sink("s", 40)),
            (Edge("x", "w"), Edge("w", "s")),
        )
        x = rng.choice([-high, 0, high], (30, n), p=(0.1, 0.8, 0.1) if high == 15 else (0.4, 0.2, 0.4))
        same(Simulator(network).run({"x": x}), reference(network, {"x": x}))


def test_inputs_that_do_not_fit_are_named() -> None:
    simulator = Simulator(recurrent())
    good = np.zeros((3, 6), np.int64)
    for inputs, words in (
        ({}, "the network's sources are"),
        ({"x": good, "y": good}, "the network's sources are"),
        ({"x": good[0]}, r"takes whole numbers \(T, 6\)"),
        ({"x": good[:, :5]}, r"takes whole numbers \(T, 6\)"),
        ({"x": good.astype(float)}, "float64"),
        ({"x": good + 2}, "declared are 0 to 1"),
    ):
        with pytest.raises(DataError, match=words):
            simulator.run(inputs)
    with pytest.raises(DataError, match=r"no state 'lif\.w'"):
        simulator.run({"x": good}, watch=["lif.w"])


def test_no_steps_give_no_rows_and_the_same_state() -> None:
    network = recurrent()
    run = Simulator(network).run({"x": np.zeros((0, 6), np.int64)}, watch=["lif.v"])
    assert run.sinks["out"].shape == run.watched["lif.v"].shape == (0, 6)
    same(run, reference(network, {"x": np.zeros((0, 6), np.int64)}, watch=["lif.v"]))


def test_the_inverse_root_is_right_to_a_percent_and_never_more_than_declared() -> None:
    x = np.unique(np.geomspace(1, 2**24 - 1, 20000).astype(np.int64))
    y = arithmetic.inv_sqrt(x)
    exact = 2**18 / np.sqrt(x)
    assert (np.abs(y / exact - 1) < 0.04).all()
    assert y.max() == graded.INV_SQRT_MOST
    assert arithmetic.inv_sqrt(np.array([0])) == 0


def test_floating_point_is_for_conformance_alone() -> None:
    nodes = (Source("x", 2), floating.FloatSynapse("w", 2, weight=np.ones((2, 2))), Sink("s", 2))
    with pytest.raises(Exception, match="floating point"):
        Network(nodes, (Edge("x", "w"), Edge("w", "s")))
