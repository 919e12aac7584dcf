"""From graphs of tokens to networks: what meets is of one token, loops take one step, gaps are nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_lm.errors import LoweringError
from spiking_lm_lava.cell import EGRU, VALID, Affine, Delay
from spiking_lm_lava.executor import LavaExecutor
from spiking_lm_lava.pipeline import Pipeline, TokenGraph, Wire, pipelined
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.simulator import Simulator, reference
from spiking_lm_lava.torch_model import TokenModel
from spiking_lm_lava.worker.cells.fixed import multiplier


def units(name: str, n: int, rng: np.random.Generator) -> EGRU:
    x, q = multiplier(np.full(3 * n, 2.0**-3)), multiplier(np.full(3 * n, 2.0**-5))
    bias, threshold = rng.integers(-2000, 2000, 3 * n), rng.integers(0, 1 << 18, n)
    given = {"x_mantissa": x[0], "x_shift": x[1], "q_mantissa": q[0], "q_shift": q[1]}
    return EGRU(name, n, **given, x_bias=bias, threshold=threshold, event_bits=8)


@st.composite
def graphs(draw: st.DrawFn) -> TokenGraph:
    """Cells of 4 values in a row, each of which reads some of those before it, near or far, straight or by a matrix."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = 4
    nodes: list[Process] = [Source("x", n, -100, 100), Source("other", n, -5, 5)]
    wires: list[Wire] = []
    found = ["x", "other"]
    for i in range(draw(st.integers(1, 5))):
        looped = draw(st.booleans())
        size = 3 * n if looped else n
        for k, source in enumerate(sorted(draw(st.sets(st.sampled_from(found), min_size=1, max_size=3)))):
            if looped or draw(st.booleans()):
                nodes.append(Synapse.int8(f"w{i}-{k}", rng.integers(-128, 128, (size, n)), graded=True))
                wires += [Wire(source, f"w{i}-{k}"), Wire(f"w{i}-{k}", f"c{i}." + ("x_in" if looped else "a_in"))]
            else:
                wires.append(Wire(source, f"c{i}.a_in"))
        if looped:
            nodes += [units(f"c{i}", n, rng), Synapse.int8(f"r{i}", rng.integers(-128, 128, (3 * n, n)), graded=True)]
            wires += [Wire(f"c{i}", f"r{i}"), Wire(f"r{i}", f"c{i}.q_in", looped=True)]
        else:
            nodes.append(Affine(f"c{i}", n, mantissa=rng.integers(-9, 9, n), shift=3, bias=7, limit=200))
        found.append(f"c{i}")
    nodes += [Sink("y", n), Sink("z", n)]
    wires += [Wire(draw(st.sampled_from(found[2:])), "y"), Wire(found[-1], "y"), Wire(found[2], "z")]
    order = rng.permutation(len(nodes))
    return TokenGraph(tuple(nodes[i] for i in order), tuple(dict.fromkeys(wires)))


def in_torch(graph: TokenGraph, rows: dict[str, np.ndarray], streams: int) -> dict[str, np.ndarray]:
    """What the graph gives token after token, all ``streams`` (which lie one after another in ``rows``) at once."""
    model = TokenModel(graph)
    state = model.initial(streams)
    given = {
        name: torch.from_numpy(values.astype(float)).unflatten(0, (streams, -1)).transpose(0, 1)
        for name, values in rows.items()
    }
    steps = [
        model.step({name: values[t] for name, values in given.items()}, state)
        for t in range(len(next(iter(given.values()))))
    ]
    return {name: torch.stack([step[name] for step in steps], 1).flatten(0, 1).numpy() for name in steps[0]}


def feed(pipeline: Pipeline, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows, and steps without a token until all has come out."""
    steps, rest = len(rows["x"]), pipeline.steps
    inputs = {name: np.concatenate([x, np.zeros((rest, x.shape[1]), int)]) for name, x in rows.items()}
    return {**inputs, VALID: np.repeat([1, 0], [steps, rest])[:, None]}


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_a_pipeline_gives_what_its_graph_gives_token_after_token(graph: TokenGraph, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = {"x": rng.integers(-100, 101, (14, 4)), "other": rng.integers(-5, 6, (14, 4))}
    pipeline = pipelined(graph)
    assert not pipeline.network.uneven()
    wanted = in_torch(graph, rows, 1)
    inputs = feed(pipeline, rows)
    found = Simulator(pipeline.network).run(inputs)
    assert all((reference(pipeline.network, inputs).sinks[name] == found.sinks[name]).all() for name in wanted)
    for name, late in pipeline.latency.items():
        assert (found.sinks[name][late : late + 14] == wanted[name]).all()
    # The same in two parts, with the pipeline empty in between.
    first = Simulator(pipeline.network).run(feed(pipeline, {k: v[:5] for k, v in rows.items()}))
    second = Simulator(pipeline.network).run(feed(pipeline, {k: v[5:] for k, v in rows.items()}), first.state)
    for name, late in pipeline.latency.items():
        both = np.concatenate([first.sinks[name][late : late + 5], second.sinks[name][late : late + 9]])
        assert (both == wanted[name]).all()


@settings(max_examples=10, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_streams_of_a_batch_know_nothing_of_each_other(graph: TokenGraph, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = {"x": rng.integers(-100, 101, (12, 4)), "other": rng.integers(-5, 6, (12, 4))}
    batch = in_torch(graph, rows, 2)
    alone = in_torch(graph, {name: values[6:] for name, values in rows.items()}, 1)
    assert all((batch[name][6:] == alone[name]).all() for name in batch)


def a_skip() -> TokenGraph:
    """A short path and one over three matrices, that meet."""
    eye = np.eye(3, dtype=int)
    nodes: list[Process] = [Source("x", 3, -100, 100), *(Synapse.int8(f"w{i}", eye, graded=True) for i in range(3))]
    nodes += [Affine("sum", 3), Sink("y", 3), Sink("early", 3)]
    wires = [Wire("x", "w0"), Wire("w0", "w1"), Wire("w1", "w2"), Wire("w2", "sum.a_in"), Wire("x", "sum.a_in")]
    return TokenGraph(tuple(nodes), (*wires, Wire("w0", "sum.a_in"), Wire("sum", "y"), Wire("w0", "early")))


def test_delays_and_latency_of_a_skip() -> None:
    pipeline = pipelined(a_skip())
    assert pipeline.latency == {"y": 3, "early": 1}
    delays = {node.name: node.steps for node in pipeline.network.nodes if isinstance(node, Delay)}
    assert delays == {"x -3": 3, "w0 -2": 2, "valid -3": 3}
    x = np.arange(15).reshape(5, 3)
    assert (Simulator(pipeline.network).run(feed(pipeline, {"x": x})).sinks["y"][3:] == 3 * x).all()


def test_what_has_no_pipeline_is_refused() -> None:
    eye = np.eye(3, dtype=int)
    cells = [Source("x", 3), Affine("a", 3), Affine("b", 3), Synapse.int8("w", eye, graded=True), Sink("y", 3)]
    ends = [Wire("x", "a.a_in"), Wire("b", "y")]
    with pytest.raises(LoweringError, match="a loop among 'a', 'b', 'w', 'y' has no wire that carries the last token"):
        pipelined(TokenGraph(tuple(cells), (*ends, Wire("a", "b.a_in"), Wire("b", "w"), Wire("w", "a.a_in"))))
    again = Synapse.int8("again", eye, graded=True)
    wires = (*ends, Wire("a", "again"), Wire("again", "b.a_in"), Wire("b", "w"), Wire("w", "a.a_in", looped=True))
    with pytest.raises(LoweringError, match=r"the loop over 'w' to 'a\.a_in' takes 2 steps, and a token has one"):
        pipelined(TokenGraph((*cells, again), wires))
    with pytest.raises(LoweringError, match="there is no node 'c'"):
        TokenGraph(tuple(cells), (Wire("a", "c"),))
    with pytest.raises(LoweringError, match="affine 'b' reads nothing of its token"):
        pipelined(TokenGraph((cells[0], cells[2], cells[4]), (Wire("b", "y"),)))


def test_a_pipeline_in_lava(lava: LavaExecutor) -> None:
    """Delays, cells with and without state, a loop; from the beginning and from a state."""
    rng = np.random.default_rng(2)
    nodes = [
        Source("x", 4, -100, 100),
        Synapse.int8("w", rng.integers(-128, 128, (12, 4)), graded=True),
        units("c", 4, rng),
        Synapse.int8("r", rng.integers(-128, 128, (12, 4)), graded=True),
        Affine("sum", 4, mantissa=3, shift=1, bias=-5),
        Sink("y", 4),
    ]
    wires = [("x", "w"), ("w", "c.x_in"), ("c", "r"), ("c", "sum.a_in"), ("x", "sum.a_in"), ("sum", "y")]
    graph = TokenGraph(tuple(nodes), (*(Wire(a, b) for a, b in wires), Wire("r", "c.q_in", looped=True)))
    pipeline = pipelined(graph)
    x = rng.integers(-100, 101, (20, 4))
    watch = ["c.c", "c.latch_1"]
    inputs = feed(pipeline, {"x": x})
    # A step more, after which nothing is left in the synapse of the loop.
    inputs = {name: np.concatenate([values, 0 * values[:1]]) for name, values in inputs.items()}
    simulated = Simulator(pipeline.network).run(inputs, watch=watch)
    ran = lava.run(pipeline.network, inputs, watch=watch)
    assert (ran.sinks["y"] == simulated.sinks["y"]).all()
    assert all((ran.watched[name] == simulated.watched[name]).all() for name in watch)
    more = lava.run(pipeline.network, inputs, state=simulated.state)
    assert (more.sinks["y"] == Simulator(pipeline.network).run(inputs, simulated.state).sinks["y"]).all()
