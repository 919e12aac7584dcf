"""The benchmarks run, and compare what they say they compare."""

from __future__ import annotations

import pytest

from spiking_lm_spikelm import bench


def test_both_figures_are_ratios_of_what_was_timed() -> None:
    pytest.importorskip("snntorch")
    neuron = bench.neuron(1, batch_size=1, tokens=8, size=16)
    train = bench.train(1, batch_size=1, tokens=4)
    for row in (neuron, train):
        ms = row.details["ms"]
        assert row.value == pytest.approx(ms["snnTorch"] / ms["elastic"])
    assert (neuron.target, train.target) == (2.0, 3.0)
    assert "dense" in train.details["ms"]
