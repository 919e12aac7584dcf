"""Placing: every unit once, the budget kept, as few PEs as can be, and words that help when it does not fit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spinnaker2_toys import as_layer, make_program, random_raw

from spiking_lm.errors import ConfigError
from spiking_lm.hardware import LoweringError
from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.mapping import (
    BUDGET,
    Demand,
    egru_demand,
    evenly,
    fewest,
    linear_demand,
    place,
    table_demand,
)
from spiking_lm_spinnaker2.weights import EGRULayer

sizes = st.lists(st.integers(1, BUDGET - 300), min_size=1, max_size=14)


def slice_bytes(demand: Demand, bounds: list[int]) -> list[int]:
    return [int(demand.unit_bytes[a:b].sum()) + demand.fixed_bytes for a, b in pairwise(bounds)]


def least_maximum(units: list[int], n: int, fixed: int) -> int:
    """Try every way of cutting ``units`` into ``n`` slices (by dynamic programming)."""
    best = {(0, 0): 0}
    for end in range(1, len(units) + 1):
        for k in range(1, min(n, end) + 1):
            ways = [
                max(best[start, k - 1], sum(units[start:end]) + fixed) for start in range(end) if (start, k - 1) in best
            ]
            if ways:
                best[end, k] = min(ways)
    return best[len(units), n]


@given(units=sizes, fixed=st.integers(0, 300), data=st.data())
@settings(max_examples=150)
def test_slices_cover_all_units_evenly_on_the_fewest_pes(units: list[int], fixed: int, data: st.DataObject) -> None:
    demand = Demand("layer", np.array(units), fixed)
    least = fewest(demand)
    assert least is not None
    assert least_maximum(units, least, fixed) <= BUDGET
    assert least == 1 or least_maximum(units, least - 1, fixed) > BUDGET, "one PE fewer would do"
    n = data.draw(st.integers(least, len(units)))
    bounds = evenly(demand, n)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(units), n + 1)
    assert all(a < b for a, b in pairwise(bounds)), "every PE has a unit, every unit one PE"
    assert max(slice_bytes(demand, bounds)) == least_maximum(units, n, fixed)


@given(
    n_inputs=st.integers(1, 60),
    n_units=st.integers(1, 60),
    sparsity=st.floats(0, 1),
    options=st.fixed_dictionaries(
        {
            "numerics": st.sampled_from(["fp32", "int8"]),
            "kernel": st.sampled_from(["row", "event"]),
            "storage": st.sampled_from(["csr", "dense"]),
        }
    ),
)
@settings(max_examples=60)
def test_bytes_are_those_of_the_arrays(n_inputs: int, n_units: int, sparsity: float, options: dict[str, Any]) -> None:
    """The formula against the arrays that a PE would hold, one unit per PE."""
    config = SpiNNaker2Config(**options)
    int8, event, sparse = config.numerics == "int8", config.kernel == "event", config.storage == "csr"
    raw = random_raw(np.random.default_rng(0), n_inputs, n_units, sparsity)
    layer = as_layer(raw, int8=int8, keep_zeros=not sparse)
    demand = egru_demand("layer", n_inputs, layer.unit_weights, config)
    for unit in range(n_units):
        rows = [unit, n_units + unit, 2 * n_units + unit]
        held = [
            (layer.input.values[np.isin(layer.input.rows, rows)], layer.input),
            (layer.recurrent.values[np.isin(layer.recurrent.rows, rows)], layer.recurrent),
        ]
        expected = 256 + 4 * 4  # FIFO, biases
        for values, matrix in held:
            expected += values.nbytes
            if sparse:
                index = np.zeros(len(values), np.int16 if int8 else np.int32)
                pointers = np.zeros((matrix.shape[1] if event else 3) + 1, np.int32)
                expected += index.nbytes + pointers.nbytes
            if int8:
                expected += 3 * 4  # a scale for each gate row
        expected += 2 * (2 if int8 else 4)  # state and threshold
        if event:
            expected += 4 * (6 if int8 else 4)  # sums between events
        assert demand.fixed_bytes + demand.unit_bytes[unit] == expected


def test_index_and_buffer_sizes() -> None:
    weights = np.full(10, 100)
    small = egru_demand("a", 20, weights, SpiNNaker2Config(index_bytes=2))
    large = egru_demand("a", 20, weights, SpiNNaker2Config())
    assert (large.unit_bytes - small.unit_bytes).tolist() == [200] * 10
    wide = egru_demand("a", 5000, weights, SpiNNaker2Config())
    assert wide.fixed_bytes - large.fixed_bytes == 4 * 5010 - 16 * 1024, "inputs beyond the buffer take data memory"
    assert egru_demand("a", 5000, weights, SpiNNaker2Config(kernel="event")).fixed_bytes == 256 + 4 * (5001 + 11)
    assert linear_demand("d", (7, 10), SpiNNaker2Config()).unit_bytes.tolist() == [44] * 7
    assert linear_demand("d", (7, 10), SpiNNaker2Config(numerics="int8")).unit_bytes.tolist() == [18] * 7
    assert table_demand("e", (7, 10), SpiNNaker2Config()).unit_bytes.tolist() == [40] * 7


def uniform(name: str, n_inputs: int, n_units: int, density: float) -> EGRULayer:
    """A layer whose weights are ones; only how many there are matters here."""
    rng = np.random.default_rng(0)
    shape = {"kernel": (n_inputs, 3 * n_units), "recurrent_kernel": (n_units, 3 * n_units)}
    raw = {key: (rng.random(size) < density).astype(np.float32) for key, size in shape.items()}
    raw |= {"bias": np.zeros(3 * n_units), "recurrent_bias": np.zeros(3 * n_units), "thr": np.zeros(n_units)}
    return as_layer(raw, name)


def placed(layers: list[EGRULayer], **options: Any) -> Any:
    config = SpiNNaker2Config(**options)
    return place([([egru_demand(x.name, x.n_inputs, x.unit_weights, config) for x in layers], "pe")], layers, config)


def test_stages_follow_one_another_over_chips() -> None:
    layers = [uniform("rnns.0", 100, 300, 1.0), uniform("rnns.1", 300, 300, 1.0)]
    pe_map = placed(layers, chips=2)
    first, second = pe_map.stages
    assert (first.first, second.first) == (0, first.n_pes)
    assert pe_map.chips == 1
    pe_map = placed(layers, chips=5, pes_per_chip=20)
    first, second = pe_map.stages
    assert (first.n_pes, second.n_pes, pe_map.chips) == (34, 50, 5)
    assert pe_map.where(first) == "chip 0 PEs 0-19, chip 1 PEs 0-13"
    assert pe_map.where(second) == "chip 1 PEs 14-19, chip 2 PEs 0-19, chip 3 PEs 0-19, chip 4 PEs 0-3"
    covered = [pe for stage in pe_map.stages for pe in range(stage.first, stage.first + stage.n_pes)]
    assert covered == list(range(pe_map.n_pes))
    assert pe_map.max_bytes <= BUDGET


def test_too_large_says_which_layer_how_many_bytes_and_what_would_fit() -> None:
    layers = [uniform("rnns.0", 100, 300, 1.0), uniform("rnns.1", 300, 300, 1.0)]
    with pytest.raises(
        LoweringError, match=r"rnns\.1 does not fit: its \d{7} bytes take 50 PEs, of 40 the chip has"
    ) as error:
        placed(layers, pes_per_chip=40)
    hint = error.value.hint
    assert hint is not None
    assert "chips=3" in hint
    sparsity = float(hint.split("a sparsity of ")[1].split(" %")[0]) / 100
    placed(layers, pes_per_chip=40, chips=3)
    thin = [uniform("rnns.0", 100, 300, 1 - sparsity), uniform("rnns.1", 300, 300, 1 - sparsity)]
    assert 39 <= placed(thin, pes_per_chip=42).n_pes <= 42, "random rows differ a little from equal ones"
    with pytest.raises(LoweringError):
        placed(layers, pes_per_chip=40, chips=2)


def test_a_unit_that_no_pe_holds() -> None:
    layer = uniform("rnns.0", 5000, 3, 1.0)
    with pytest.raises(LoweringError, match=r"rnns\.0 does not fit: one of its 3 units takes 12\d{4} bytes") as error:
        placed([layer])
    assert "a sparsity of" in str(error.value.hint)
    assert "int8" in str(error.value.hint)


def test_chosen_pes() -> None:
    program, *_ = make_program(pes=[3, 5])
    assert [stage.n_pes for stage in program.pe_map.stages] == [3, 5]
    program, *_ = make_program(pes={"rnns.1": 2, "decoder.decoder": 4}, decoder="pe")
    assert [(stage.name, stage.n_pes) for stage in program.pe_map.stages] == [
        ("rnns.0", 1),
        ("rnns.1", 2),
        ("decoder.decoder", 4),
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pes": {"rnns.7": 2}}, ConfigError, r"no layer 'rnns\.7'"),
        ({"pes": {"rnn.1": 2}}, ConfigError, r"did you mean 'rnns\.1'"),
        ({"pes": [1, 2, 3]}, ConfigError, "3 numbers for 2 layers"),
        ({"pes": {"decoder.decoder": 2}}, ConfigError, "'decoder.decoder' is on the host"),
        ({"pes": [21, 1]}, ConfigError, "20 units, which cannot be spread over 21 PEs"),
        ({"pes": [10, 10], "pes_per_chip": 19}, LoweringError, r"rnns\.1 does not fit"),
    ],
)
def test_bad_choices_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_program(**options)


def test_too_few_chosen_pes() -> None:
    layer = uniform("rnns.0", 300, 300, 0.5)
    with pytest.raises(
        LoweringError, match=r"rnns\.0 does not fit on 2 PEs: its \d+ bytes take at least \d+ PEs"
    ) as error:
        placed([layer], pes=[2])
    assert "a sparsity of" in str(error.value.hint)


def test_auto_goes_to_pes_when_they_hold_it() -> None:
    shape = {"sizes": (64, 32), "vocab_size": 1000, "embedding": "auto", "decoder": "auto"}
    on_chip, *_ = make_program(**shape)
    assert [stage.name for stage in on_chip.pe_map.stages] == ["embeddings", "rnns.0", "decoder.decoder"]
    partly, *_ = make_program(**shape, pes_per_chip=4)
    assert [stage.name for stage in partly.pe_map.stages] == ["embeddings", "rnns.0"]
    partly, *_ = make_program(**shape, pes_per_chip=3)
    assert [stage.name for stage in partly.pe_map.stages] == ["rnns.0", "decoder.decoder"]
    with pytest.raises(LoweringError, match=r"decoder\.decoder does not fit") as error:
        make_program(**{**shape, "embedding": "pe", "decoder": "pe"}, pes_per_chip=4)
    assert "leaving it on the host" in str(error.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "dense", "index_bytes": 2}, "dense storage has no indices"),
        ({"pes": [0]}, "at least one PE"),
        ({"pes_per_chip": 153}, "less than or equal to 152"),
        ({"numerics": "fp16"}, "numerics"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpiNNaker2Config(**options)
