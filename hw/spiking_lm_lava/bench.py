"""Our simulator against Lava itself, on the same network and in the same run; and what starting Lava takes."""

from __future__ import annotations

import statistics
import time
from functools import cache

import numpy as np

from spiking_lm.bench import Row
from spiking_lm.errors import PluginError
from spiking_lm_lava.executor import LavaExecutor, LavaSession
from spiking_lm_lava.install import Lava
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.simulator import Simulator

NEURONS, LAYERS, STEPS = 512, 3, 200
FIRING = 0.1
"""Share of the inputs that spike; of the neurons about as many do."""

WHAT = f"{LAYERS} layers of {NEURONS} LIF, int8, {STEPS} steps"
STEPPED, PIPELINED, START = "lava-simulator/stepping", "lava-simulator/pipelined", "lava-simulator/start"
ROWS = {
    STEPPED: f"{WHAT}, one token at a time: Lava's time by the simulator's",
    PIPELINED: f"{WHAT}, all at once: Lava's time by the simulator's",
    START: "Lava in its worker, from starting it to the first step's result",
}


@cache
def network() -> Network:
    """Return dense layers of random weights whose neurons fire as often as their inputs."""
    rng = np.random.default_rng(0)
    nodes: list[Process] = [Source("x", NEURONS)]
    edges = []
    for i in range(LAYERS):
        weight = rng.integers(-128, 128, (NEURONS, NEURONS))
        edges += [Edge(nodes[-1].name, f"w{i}"), Edge(f"w{i}", f"n{i}")]
        nodes += [Synapse.int8(f"w{i}", weight), LIF(f"n{i}", NEURONS, dv=2048, vth=640)]
    edges.append(Edge(nodes[-1].name, "out"))
    return Network((*nodes, Sink("out", NEURONS)), tuple(edges))


def bench_lava(repeats: int) -> list[Row]:
    """Time stepping and pipelined runs by the wall clock, as Lava computes in processes of its own, and its start.

    Both go on from turn to turn from the same state, and must give the same spikes. Without Lava the rows say so.
    """
    try:
        lava = LavaExecutor.find().lava
    except PluginError as error:
        note = str(error).replace("\n", ";")
        return [Row(name, what, None, note=note) for name, what in ROWS.items()]
    rows, firing = _compared(lava, repeats)
    seconds = []
    x = np.zeros((1, NEURONS), np.int64)
    for _ in range(repeats):
        begun = time.perf_counter()
        with LavaSession(lava, network(), 1) as session:
            session.advance({"x": x})
            seconds.append(time.perf_counter() - begun)
    versions = session.result().versions
    start = Row(
        START,
        ROWS[START],
        statistics.median(seconds),
        unit="s",
        target=6.0,
        at_most=True,
        note=f"{LAYERS} layers of {NEURONS}; lava-nc {versions.get('lava-nc')}, Python {versions.get('python')}",
        details={"wall_seconds": seconds, "versions": versions},
    )
    return [_row(name, rows[name], firing) for name in (STEPPED, PIPELINED)] + [start]


def _compared(lava: Lava, repeats: int) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Return the seconds of each turn, by row and by who computed, and the share of the last layer that fired."""
    simulator, rng = Simulator(network()), np.random.default_rng(1)
    state = simulator.initial()
    seconds: dict[str, dict[str, list[float]]] = {name: {"lava": [], "ours": []} for name in (STEPPED, PIPELINED)}
    firing = []
    with LavaSession(lava, network(), 2 * STEPS * (repeats + 1)) as session:
        for turn in range(repeats + 1):  # the first one is not counted
            for name in (STEPPED, PIPELINED):
                x = (rng.random((STEPS, NEURONS)) < FIRING).astype(np.int64)
                begun = time.perf_counter()
                if name == STEPPED:
                    theirs = np.stack([session.advance({"x": row[None]})["out"][0] for row in x])
                else:
                    theirs = session.advance({"x": x})["out"]
                between = time.perf_counter()
                if name == STEPPED:
                    ours = np.stack([simulator.step({"x": row}, state)["out"] for row in x])
                else:
                    run = simulator.run({"x": x}, state)
                    ours, state = run.sinks["out"], run.state
                ended = time.perf_counter()
                if not np.array_equal(theirs, ours):
                    raise PluginError(f"Lava and the simulator differ in turn {turn} of {name}")
                if turn:
                    seconds[name]["lava"].append(between - begun)
                    seconds[name]["ours"].append(ended - between)
                    firing.append(float(ours.mean()))
    return seconds, statistics.mean(firing)


def _row(name: str, seconds: dict[str, list[float]], firing: float) -> Row:
    lava, ours = (1e3 * statistics.median(seconds[who]) / STEPS for who in ("lava", "ours"))
    return Row(
        name,
        ROWS[name],
        lava / ours,
        target=10.0 if name == STEPPED else None,
        note=f"{ours:.3f} ms per step against {lava:.2f} ms, the same spikes; {100 * firing:.0f} % fire",
        details={"ms_per_step": {"lava": lava, "simulator": ours}, "wall_seconds": seconds, "firing": firing},
    )
