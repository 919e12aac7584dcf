"""The published chip point, and the arithmetic of time and energy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import typer
from spinnaker2_toys import make_program
from typer.testing import CliRunner

from spiking_lm.cli.bench import command
from spiking_lm_spinnaker2 import bench
from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.constants import OPERATING_POINTS
from spiking_lm_spinnaker2.energy import Costs, calibrated, costs
from spiking_lm_spinnaker2.mapping import BUDGET, egru_demand, fewest
from spiking_lm_spinnaker2.program import SpiNNaker2Program


def test_the_published_point() -> None:
    row = bench.bench_paper(1)
    details = row.details
    assert details["pes_per_layer"] == [50, 50, 50]
    assert details["kb_per_pe"] == pytest.approx(88.3, rel=0.01)
    assert details["latency_ms"] == pytest.approx(170.25, rel=0.05)
    assert details["energy_mj"] == pytest.approx(65.3, rel=0.05)
    assert 350 < details["mean_power_mw"] < 400
    assert row.passed
    assert row.value == pytest.approx(abs(details["kb_per_pe"] / 88.3 - 1) / 0.01)


def test_the_published_point_is_printed_as_json() -> None:
    app = typer.Typer()
    app.command()(command)
    printed = CliRunner().invoke(app, ["spinnaker2-paper", "--json"])
    assert printed.exit_code == 0, printed.output
    result = json.loads(printed.stdout)
    assert result["pes_per_layer"] == [50, 50, 50]
    assert {"kb_per_pe", "latency_ms", "energy_mj"} < set(result)
    assert result["rows"][0]["name"] == "spinnaker2-paper"


def test_the_published_model_is_what_was_published() -> None:
    program = bench.paper_program()
    shapes = [(layer.n_inputs, layer.n_units) for layer in program.parts.layers]
    assert shapes == [(750, 1350), (1350, 1350), (1350, 750)]
    assert sum(int(layer.unit_weights.sum()) for layer in program.parts.layers) == 1_208_250
    middle = program.parts.layers[1]
    assert set(middle.unit_weights) == {405}
    assert middle.input.row_counts.min() == 67, "every row of a matrix has the same share"
    assert middle.input.row_counts.max() == 68


def test_what_else_would_hold_the_published_model() -> None:
    """Other formats of the same model: fewer PEs if not fixed, and two chips for dense int8."""
    layers = bench.paper_program().parts.layers

    def pes(density: float, **options: Any) -> list[int | None]:
        config = SpiNNaker2Config(**options)
        return [
            fewest(egru_demand(x.name, x.n_inputs, np.full(x.n_units, 3 * (x.n_inputs + x.n_units) * density), config))
            for x in layers
        ]

    assert pes(0.05) == [38, 49, 21]
    dense = pes(1, numerics="int8", storage="dense")
    assert 150 < sum(n for n in dense if n is not None) <= 300
    assert 24.1e6 < sum(3 * (x.n_inputs + x.n_units) * x.n_units for x in layers) < 24.3e6
    assert 24.2e6 / BUDGET > 150


def test_derived_powers_are_the_published_ones() -> None:
    low, high = OPERATING_POINTS["150MHz"], OPERATING_POINTS["300MHz"]
    assert low.sleep.value == pytest.approx(1.054, abs=5e-4)
    assert high.sleep.value == pytest.approx(3.220, abs=5e-4)
    assert low.cycle.value == pytest.approx(8.30, abs=5e-3)
    assert high.cycle.value == pytest.approx(14.98, abs=5e-3)
    assert low.mac.value == pytest.approx(0.517, abs=1e-3)
    assert high.mac.value == pytest.approx(0.725, abs=1e-3)


def run(tokens: int = 6, **options: Any) -> tuple[SpiNNaker2Program, dict[str, Any], Costs]:
    program, *_ = make_program(**options)
    counters = program.run(np.arange(tokens)).counters
    return program, counters, costs(counters, program.pe_map, program.config)


def test_pipelined_time_is_that_of_the_slowest_stage() -> None:
    program, counters, found = run(tokens=6)
    slowest = max(int(layer.unit_weights.sum()) for layer in program.parts.layers)
    assert program.pe_map.n_pes == 2
    assert found.time_ms == pytest.approx(1e3 * (6 + 2 - 1) * 32.4 * slowest / 150e6)
    assert found.token_latency_ms == pytest.approx(1e3 * 2 * 32.4 * slowest / 150e6)
    weights = sum(int(layer.unit_weights.sum()) for layer in program.parts.layers)
    base = 1e-3 * found.time_ms * 235.4
    busy = 1e-9 * 6 * weights * 32.4 * 8.2982
    assert found.energy_mj == pytest.approx(base + busy, rel=1e-4)
    assert found.base_mj == pytest.approx(base)
    assert found.power_mw == pytest.approx(1e3 * found.energy_mj / found.time_ms)
    assert counters["host_packets"] == 6 * 12


def test_sequential_time_is_the_sum_of_the_stages() -> None:
    program, _, found = run(tokens=6, schedule="sequential", operating_point="300MHz", unused_pes="off")
    weights = sum(int(layer.unit_weights.sum()) for layer in program.parts.layers)
    assert found.time_ms == pytest.approx(1e3 * 6 * 32.4 * weights / 300e6)
    assert found.token_latency_ms == pytest.approx(found.time_ms / 6)
    assert found.base_mj == pytest.approx(1e-3 * found.time_ms * (75.2 + 2 * 3.2204), rel=1e-4)


@pytest.mark.parametrize("schedule", ["pipelined", "sequential"])
def test_a_tick_holds_every_stage_and_overruns_are_counted(schedule: str) -> None:
    program, *_ = make_program()
    first, second = (1e6 * 32.4 * int(layer.unit_weights.sum()) / 150e6 for layer in program.parts.layers)
    assert first > second
    program, counters, found = run(tokens=6, tick_us=(first + second) / 2, schedule=schedule)
    ticks = 7 if schedule == "pipelined" else 12
    assert found.time_ms == pytest.approx(1e-3 * ticks * (first + second) / 2)
    assert [stage["overruns"] for stage in counters["stages"]] == [6, 0]
    report = program.report(program.run(np.arange(6)))
    assert any("6 stages took longer than the tick" in warning for warning in report.warnings)
    _, counters, _ = run(tokens=6, tick_us=first + 1e-6, schedule=schedule)
    assert [stage["overruns"] for stage in counters["stages"]] == [0, 0]


def test_packets_and_dram_cost_what_the_user_says() -> None:
    program, counters, free = run()
    _, _, paid = run(e_packet=1000.0, e_dram=50.0)
    packets = counters["host_packets"] + sum(stage["packets"] for stage in counters["stages"])
    assert free.packets_mj == free.dram_mj == 0
    assert paid.packets_mj == pytest.approx(1e-9 * 1000 * packets)
    assert paid.dram_mj == pytest.approx(1e-9 * 50 * counters["boundary_bytes"])
    assert paid.energy_mj == pytest.approx(free.energy_mj + paid.packets_mj + paid.dram_mj)
    assert sum("never published" in warning for warning in program.report().warnings) == 2
    priced, *_ = make_program(e_packet=1.0, e_dram=1.0)
    assert not any("never published" in warning for warning in priced.report().warnings)


def test_the_event_kernel_gains_where_few_units_are_active() -> None:
    """At 32.4 cycles a weight and 100 an event, an event pays when it spares more than three weights on a PE."""
    options = {"sizes": (60, 200, 200), "sparsity": 0.0}
    _, row_counts, row = run(**options)
    _, event_counts, event = run(**options, kernel="event")
    assert event_counts["stages"][1]["macs"] < row_counts["stages"][1]["macs"]
    assert event_counts["stages"][1]["macs"] == row_counts["stages"][1]["useful_macs"]
    assert event.busy_mj < row.busy_mj


def test_mac_arrays_compute_dense_int8() -> None:
    _, counters, found = run(numerics="int8", storage="dense", pes=[2, 2], sizes=(12, 20, 16))
    first = counters["stages"][0]
    assert first["macs"] == first["mla_macs"] == 6 * 3 * 20 * (12 + 20)
    assert first["slowest_cycles"] == pytest.approx(2 * (12 + 20) / 0.17)  # 30 outputs on a PE are two tiles of 16
    macs = sum(stage["mla_macs"] for stage in counters["stages"])
    cycles = sum(stage["busy_cycles"] for stage in counters["stages"])
    assert found.busy_mj == pytest.approx(1e-9 * (macs * 0.51719 + cycles * 8.2982), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"numerics": "int8"},
        {"kernel": "event"},
        {"schedule": "sequential"},
        {"operating_point": "300MHz"},
        {"index_bytes": 2},
        {"storage": "dense"},
    ],
)
def test_what_was_not_published_is_called_a_prediction(options: dict[str, Any]) -> None:
    for given, grade in (({}, "derived"), (options, "assumed")):
        program, *_ = make_program(**given)
        figures = {figure.name: figure for figure in program.report(program.run(np.arange(5))).figures}
        assert calibrated(program.config) == (grade == "derived")
        assert figures["time per token"].grade == figures["energy per token"].grade == grade
        assert ("prediction" in figures["energy per token"].note) == (grade == "assumed")
        assert figures["events per token"].grade == "simulated"


def test_the_simulator_is_timed() -> None:
    row = bench.bench_simulator(1)
    assert row.unit == "tokens/s"
    assert row.value is not None
    assert row.value > 10, "the target of 50 is for a quiet machine"
