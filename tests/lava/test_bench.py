"""The bench against Lava measures what it says, and says why where there is no Lava."""

from __future__ import annotations

import numpy as np
import pytest

from spiking_lm.bench import measure, select
from spiking_lm.errors import PluginError
from spiking_lm_lava import bench
from spiking_lm_lava.executor import LavaExecutor
from spiking_lm_lava.simulator import Simulator


def test_a_tenth_of_the_neurons_fires() -> None:
    x = (np.random.default_rng(2).random((100, bench.NEURONS)) < bench.FIRING).astype(np.int64)
    spikes = Simulator(bench.network()).run({"x": x}).sinks["out"]
    assert 0.08 < spikes[10:].mean() < 0.12


def test_without_lava_the_rows_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> LavaExecutor:
        raise PluginError("Lava is not set up here", hint="spiking-lm lower --backend lava --setup")

    monkeypatch.setattr(LavaExecutor, "find", staticmethod(missing))
    assert select(["lava-simulator"]) == ["lava-simulator"]
    rows = measure("lava-simulator", 1)
    assert [row.name for row in rows] == list(bench.ROWS)
    for row in rows:
        assert row.value is None
        assert row.passed is None
        assert "not set up here;" in row.note
        assert "--setup" in row.note


def test_with_lava_both_give_the_same_spikes(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        LavaExecutor.find()
    except PluginError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    monkeypatch.setattr(bench, "STEPS", 12)
    stepped, pipelined, start = measure("lava-simulator", 1)
    for row in (stepped, pipelined):
        assert row.value is not None, row.note
        per_step = row.details["ms_per_step"]
        assert row.value == pytest.approx(per_step["lava"] / per_step["simulator"])
        assert row.value > 1
    assert start.value is not None
    assert 0.1 < start.value < 60
    assert (stepped.target, start.target, start.at_most) == (10.0, 6.0, True)


def test_other_spikes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        LavaExecutor.find()
    except PluginError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    monkeypatch.setattr(bench, "STEPS", 12)
    step = Simulator.step
    monkeypatch.setattr(Simulator, "step", lambda *given: {name: 1 - x for name, x in step(*given).items()})
    (row,) = measure("lava-simulator", 1)
    assert row.value is None
    assert "differ in turn 0" in row.note
