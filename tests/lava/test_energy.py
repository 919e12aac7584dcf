"""Counts are those that stepping through every message of every step gives; prices are published ones or the user's."""

from __future__ import annotations

import re
from collections import Counter as Tally
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lava_nets import networks, recurrent, rows, three_layers

from spiking_lm.hardware import Constant, PlacedOp
from spiking_lm_lava.constants import ENERGIES, LOIHI1, LOIHI2, TIMES, Costs, prices
from spiking_lm_lava.energy import Counter, Counts, spent
from spiking_lm_lava.figures import report_of
from spiking_lm_lava.network import Network
from spiking_lm_lava.partition import Partition, partition
from spiking_lm_lava.process import Delaying, Sink, Source, Synapse
from spiking_lm_lava.simulator import NetworkState, Simulator

SMALL = replace(
    LOIHI2,
    neurons_per_core=Constant("neurons", 2, "", "a test", "assumed"),
    cores_per_chip=Constant("cores", 10, "", "a test", "assumed"),
)
"""Three tiles on a chip, two neurons on a core."""


def core_of(found: Partition, node: str, neuron: int) -> int:
    """Where a neuron is."""
    (core,) = (p.core for p in found.of(node) if p.first <= neuron < p.last)
    return core


def message(
    found: Partition, counts: Counts, on: Tally[tuple[str, int]], port: str, i: int, reached: Tally[int]
) -> None:
    """Send value i of a port to cores, each with its number of synapses."""
    per_chip = int(found.target.cores_per_chip.value)
    name = port.partition(".")[0]
    home = None
    if name in found.populations:
        home = core_of(found, name, i % found.populations[name].size)
    for core, fan in reached.items():
        counts.messages += 1
        on["messages", core] += 1
        counts.synaptic_operations += fan
        on["operations", core] += fan
        if home is None:
            counts.from_host += 1
        elif home // per_chip != core // per_chip:
            counts.between_chips += 1
        else:
            a, b = home % per_chip // 4, core % per_chip // 4
            counts.hops_x += abs(a % 8 - b % 8)
            counts.hops_y += abs(a // 8 - b // 8)


def brute_force(network: Network, found: Partition, inputs: dict[str, np.ndarray]) -> Counts:
    """Step through the network, and follow each message to each synapse that it reaches."""
    counts, now, steps = Counts(), NetworkState.of(network), len(next(iter(inputs.values())))
    neurons = [(name, i) for name, pop in found.populations.items() for i in range(pop.size)]
    for t in range(steps):
        now.t += 1
        sent = {}
        for node in network.nodes:
            if isinstance(node, Delaying):
                sent[f"{node.name}.a_out"] = node.emit(now.nodes[node.name])
        active = set()
        load: Tally[tuple[str, int]] = Tally()

        for name in network.order:
            node = network[name]
            if isinstance(node, Source):
                sent[f"{name}.s_out"] = inputs[name][t]
                continue
            arrived = [sum(sent[edge.source] for edge in network.arriving(name, port)) for port in node.reads]
            for port in node.reads:
                for edge in network.arriving(name, port):
                    values, source = sent[edge.source], network[edge.source.partition(".")[0]]
                    owned = isinstance(source, Synapse) and found.owner[source.name] == name
                    for i in np.flatnonzero(values):
                        if isinstance(node, Sink):
                            counts.to_host += 1
                            continue
                        if isinstance(node, Synapse):
                            owner = found.owner[name]
                            size = found.populations[owner].size
                            reached = np.flatnonzero(node.weight[:, i]) if node.form == "sparse" else range(node.size)
                            message(
                                found,
                                counts,
                                load,
                                edge.source,
                                i,
                                Tally(core_of(found, owner, r % size) for r in reached),
                            )
                        elif not owned:
                            message(found, counts, load, edge.source, i, Tally([core_of(found, name, i % node.size)]))
                        if not isinstance(node, (Synapse, Sink)):
                            active.add((name, i % node.size))
            if isinstance(node, Delaying):
                node.receive(now.nodes[name], *arrived)
            elif not isinstance(node, Sink):
                results = node.step(now.nodes[name], now.t, *arrived)
                sent.update({f"{name}.{port}": value for port, value in zip(node.sends, results, strict=True)})
        for port, values in sent.items():
            name = port.partition(".")[0]
            if name in found.populations:
                active |= {(name, int(i) % found.populations[name].size) for i in np.flatnonzero(values)}
        counts.steps += 1
        counts.active_updates += len(active)
        counts.idle_updates += len(neurons) - len(active)
        on: Tally[int] = Tally(core_of(found, *neuron) for neuron in active)
        counts.core_operations += max((load["operations", core] for core in range(found.cores)), default=0)
        counts.core_messages += max((load["messages", core] for core in range(found.cores)), default=0)
        if found.cores:
            busiest = max(range(found.cores), key=on.__getitem__)
            counts.core_active += on[busiest]
            counts.core_idle += int(found.neurons[busiest]) - on[busiest]
    return counts


@settings(max_examples=30)
@given(networks(), st.integers(0, 2**31), st.integers(1, 8))
def test_counts_are_those_of_every_single_message(network: Network, seed: int, steps: int) -> None:
    inputs = rows(network, steps, seed)
    found = partition(network, SMALL)
    counter = Counter(found)
    Simulator(network).run(inputs, observe=counter.add)
    assert counter.counts == brute_force(network, found, inputs)

    halves, simulator = Counter(found), Simulator(network)
    cut = steps // 2
    before = simulator.run({name: x[:cut] for name, x in inputs.items()}, observe=halves.add)
    simulator.run({name: x[cut:] for name, x in inputs.items()}, before.state, observe=halves.add)
    assert halves.counts == counter.counts


def test_a_loop_on_many_cores_and_chips() -> None:
    network = recurrent(30)
    inputs = {"x": (np.random.default_rng(0).random((20, 30)) < 0.3).astype(np.int64)}
    found = partition(network, SMALL)
    assert (found.cores, found.chips) == (15, 2)
    counter = Counter(found)
    Simulator(network).run(inputs, observe=counter.add)
    assert counter.counts == brute_force(network, found, inputs)
    assert min(vars(replace(counter.counts, hops_y=1)).values()) > 0, "all of it happened"


def counted(steps: int = 50) -> tuple[Partition, Counts]:
    network = three_layers(128)
    found = partition(network, LOIHI1)
    counter = Counter(found)
    x = (np.random.default_rng(0).random((steps, 128)) < 0.2).astype(np.int64)
    Simulator(network).run({"x": x}, observe=counter.add)
    return found, counter.counts


def test_published_prices_of_loihi_1() -> None:
    found, counts = counted()
    result = spent(counts, found, Costs())
    assert result.energy_nj is not None
    assert result.time_ns is not None
    assert result.static_nj is None, "the static power of Loihi 1 is not known"
    assert result.energy_nj["synaptic operations"] == pytest.approx(0.0236 * counts.synaptic_operations)
    assert result.energy_nj["active updates"] == pytest.approx(0.081 * counts.active_updates)
    assert result.energy_nj["idle updates"] == pytest.approx(0.052 * counts.idle_updates)
    assert result.energy_nj["messages"] == pytest.approx(
        1e-3 * (1.7 * counts.messages + 3.0 * counts.hops_x + 4.0 * counts.hops_y)
    )
    tiles = -(-found.cores // 4)
    barrier = 113 + (465 - 113) * (tiles - 1) / 31
    slowest = max(
        3.5 * counts.core_operations, 8.4 * counts.core_active + 5.3 * counts.core_idle, 2.1 * counts.core_messages
    )
    assert result.time_ns == pytest.approx(slowest + 50 * barrier)
    assert {price.grade for price in prices(LOIHI1, Costs()).values()} == {"simulated"}


def test_loihi_2_has_a_price_only_if_the_user_sets_all_of_them() -> None:
    _, counts = counted()
    found = partition(three_layers(128), LOIHI2)
    assert prices(LOIHI2, Costs()) == {}
    assert vars(spent(counts, found, Costs())) == {"energy_nj": None, "time_ns": None, "static_nj": None}
    some = Costs(**dict.fromkeys(ENERGIES[1:], 1.0))
    assert spent(counts, found, some).energy_nj is None
    result = spent(counts, found, Costs(**dict.fromkeys((*ENERGIES, *TIMES), 1.0)))
    assert result.energy_nj is not None
    assert result.time_ns is not None
    assert result.energy_nj["synaptic operations"] == pytest.approx(1e-3 * counts.synaptic_operations)
    assert result.static_nj == pytest.approx(0.232 * result.time_ns)
    own = prices(LOIHI1, Costs(hop_x_pj=9.0))["hop_x_pj"]
    assert (own.value, own.source, own.grade) == (9.0, "set by option", "assumed")


def placed_ops(found: Partition) -> list[PlacedOp]:
    where, size = found.where("n0", "n1", "n2"), found.bytes("n0", "n1", "n2")
    return [
        PlacedOp("layers", "linear", "neuromorphic", where, "int8", 3 * 128 * 128, size),
        PlacedOp("head", "linear", "host", "host", "fp32", 128 * 128, 4 * 128 * 128),
    ]


def test_the_report_on_loihi_1() -> None:
    found, counts = counted()
    operations = {"layers": 3 * 128 * 128, "head": 128 * 128}
    report = report_of(
        model="toy", placement=placed_ops(found), partition=found, operations=operations, counts=counts, tokens=50
    )
    figures = {figure.name: figure for figure in report.figures}
    assert figures["cores"].value == found.cores
    assert figures["weights on neuromorphic cores"].value == figures["operations on neuromorphic cores"].value == 75
    assert figures["synaptic operations per token"].value == counts.synaptic_operations / 50
    result = spent(counts, found, Costs())
    assert result.energy_nj is not None
    energy = figures["dynamic energy per token"]
    assert (energy.value, energy.grade) == (pytest.approx(sum(result.energy_nj.values()) / 50), "simulated")
    assert "static energy per token" not in figures
    assert any("static power of Loihi 1 is not known" in text for text in report.warnings)
    assert any(text.endswith("head") for text in report.warnings)
    again = report_of(
        model="toy",
        placement=placed_ops(found),
        partition=found,
        operations=operations,
        counts=counts.to_dict(),
        tokens=50,
    )
    assert again == report
    assert {constant.source for constant in report.constants if constant.name == "synaptic operation"}


def test_the_report_on_loihi_2_refuses_a_total() -> None:
    _, counts = counted()
    found = partition(three_layers(128), LOIHI2)
    given = {"model": "toy", "placement": placed_ops(found), "partition": found, "operations": {}}
    report = report_of(**given, counts=counts, tokens=50)
    names = {figure.name for figure in report.figures}
    assert "time per token, no less than" in names
    assert not {"dynamic energy per token", "time per token", "static energy per token"} & names
    (refusal,) = [text for text in report.warnings if text.startswith("no energy")]
    assert "never published; set costs.{synaptic_operation_pj, active_update_pj," in refusal
    costs = Costs(**dict.fromkeys((*ENERGIES, *TIMES), 2.0))
    priced = {figure.name: figure for figure in report_of(**given, counts=counts, tokens=50, costs=costs).figures}
    assert priced["dynamic energy per token"].grade == "assumed"
    assert "not in the dynamic energy" in priced["static energy per token"].note
    silent = report_of(**given)
    assert {figure.name for figure in silent.figures} == {
        "cores", "chips", "neurons", "synapse words, fullest core", "use of synapse memory",
        "weights on neuromorphic cores", "weights on the host",
    }  # fmt: skip


def test_the_example_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    page = (Path(__file__).resolve().parents[2] / "docs" / "lava.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    first = page[page.index("```python\nimport numpy") :]
    ours = page[page.index("```python\nfrom spiking_lm_lava.constants") :]
    scope: dict[str, Any] = {}
    for block in (first, ours):
        exec(compile(block[len("```python\n") : block.index("\n```")], "docs/lava.md", "exec"), scope)
    assert scope["placed"].cores == 1
    assert scope["counter"].counts.messages > 0
    assert (tmp_path / "cores.png").stat().st_size > 1000


def test_the_table_of_limits_is_that_of_the_code() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "lava.md").read_text(encoding="utf-8")
    for limit in ("words_per_core", "neurons_per_core", "cores_per_chip"):
        one, other = (f"{getattr(target, limit).value:,.0f}" for target in (LOIHI1, LOIHI2))
        assert re.search(rf"\| {one}\b.* \| {other}\b", page), limit
    for board in (*LOIHI1.boards, *LOIHI2.boards):
        assert f"{board.chips.name.removeprefix('chips of ')} {board.chips.value:,.0f}" in page
