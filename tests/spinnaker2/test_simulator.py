"""The simulator computes the definition of the layer, and counts what each PE does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spinnaker2_toys import Raw, as_layer, definition, make_program, random_raw

from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.mapping import egru_demand, place
from spiking_lm_spinnaker2.simulator import EGRUSimulator, LayerState, StageCounts
from spiking_lm_spinnaker2.weights import S0_15, U0_8, EGRULayer

CONFIG = SpiNNaker2Config()

GOLDEN = {
    "egru_eval_f32": 2e-6,
    "egru_f32": 2e-6,
    "egru_defaults": 2e-6,
    "egru_lmlike": 2e-6,
    "egru_support17": 2e-6,
    "egru_y0_batchfirst": 2e-6,
    "egru_zoneout_eval": 2e-6,
}


def simulate(
    layer: EGRULayer, x: np.ndarray, state: LayerState | None = None, **options: Any
) -> tuple[np.ndarray, LayerState, StageCounts]:
    config = SpiNNaker2Config(**options)
    demand = egru_demand(layer.name, layer.n_inputs, layer.unit_weights, config)
    simulator = EGRUSimulator(layer, place([([demand], "pe")], [layer], config).stages[0], config)
    return simulator.run(x, simulator.initial() if state is None else state)


@pytest.mark.parametrize("name", GOLDEN)
def test_fp32_equals_the_released_layer(shared: Path, name: str) -> None:
    data = np.load(shared / "golden" / "egru" / f"{name}.npz")
    meta = json.loads(bytes(data["meta_json"]))
    rows_first = bool(meta.get("batch_first"))
    raw = {key.removeprefix("sd."): data[key] for key in data.files if key.startswith("sd.")}
    layer = as_layer(raw, zoneout=float(meta.get("zoneout") or 0))
    x, y, c, o = (data[key] if rows_first else data[key].swapaxes(0, 1) for key in ("x", "y", "c", "o"))
    for row in range(len(x)):
        before = data["y0"][0, row] if "y0" in data.files else np.zeros(layer.n_units)
        state = (np.zeros(layer.n_units, np.float32), before.astype(np.float32))
        events, (after, last), _ = simulate(layer, x[row].astype(np.float32), state)
        np.testing.assert_array_equal(events != 0, o[row] != 0)
        np.testing.assert_allclose(events, y[row], rtol=0, atol=GOLDEN[name])
        np.testing.assert_allclose(after, c[row][-1], rtol=0, atol=GOLDEN[name])
        assert np.array_equal(last, events[-1])


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("zoneout", [0.0, 0.2])
def test_fp32_equals_the_definition(sparsity: float, zoneout: float) -> None:
    rng = np.random.default_rng(5)
    raw = random_raw(rng, 40, 60, sparsity)
    x = rng.normal(size=(50, 40)).astype(np.float32)
    expected, states = definition(raw, x, zoneout=zoneout)
    events, (c, _), _ = simulate(as_layer(raw, zoneout=zoneout), x)
    assert 0.01 < (expected != 0).mean() < 0.9
    np.testing.assert_array_equal(events != 0, expected != 0)
    np.testing.assert_allclose(events, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(c, states[-1], rtol=0, atol=1e-6)


def test_thresholds_are_held_between_zero_and_one() -> None:
    raw = random_raw(np.random.default_rng(0), 3, 4, 0.0)
    raw["thr"] = np.array([-0.5, 0.25, 1.0, 7.0], np.float32)
    assert as_layer(raw).threshold.tolist() == [0.0, 0.25, 1.0, 1.0]
    assert as_layer(raw, int8=True).threshold.tolist() == [0, S0_15 // 4, S0_15 - 1, S0_15 - 1]


def test_fp32_sums_go_along_the_rows_in_float32() -> None:
    """A PE adds one product after the other; a pairwise or float64 sum would give other bits."""
    rng = np.random.default_rng(1)
    raw = random_raw(rng, 200, 5, 0.3)
    x = (rng.normal(size=200) * 10.0 ** rng.integers(-4, 4, 200)).astype(np.float32)
    y = (rng.random(5) * (rng.random(5) < 0.7)).astype(np.float32)
    layer = as_layer(raw)
    demand = egru_demand(layer.name, layer.n_inputs, layer.unit_weights, CONFIG)
    simulator = EGRUSimulator(layer, place([([demand], "pe")], [layer], CONFIG).stages[0], CONFIG)
    sums = np.zeros(20, np.float32)
    np.add.at(sums, simulator.targets, simulator.values * np.repeat(np.concatenate([x, y]), simulator.fan_out))
    for unit in range(5):
        for block, (gate, reads_x, reads_y) in enumerate([(0, 1, 1), (1, 1, 1), (2, 1, 0), (2, 0, 1)]):
            total = np.float32(0)
            for matrix, values, used in ((layer.input, x, reads_x), (layer.recurrent, y, reads_y)):
                row = slice(*matrix.pointers[gate * 5 + unit : gate * 5 + unit + 2]) if used else slice(0)
                for column, value in zip(matrix.columns[row], matrix.values[row], strict=True):
                    if values[column]:  # the event kernel leaves these out: same bits
                        total += value * values[column]
            assert sums[block * 5 + unit] == total


def int8_definition(raw: Raw, x: np.ndarray, x_scale: float, zoneout: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Compute the int8 numerics with whole numbers and loops, ``x (T, I)`` being multiples of ``x_scale``."""
    f = np.float32
    units = len(raw["thr"])

    def rounded(matrix: np.ndarray) -> tuple[list[list[int]], list[np.float32]]:
        scales = [f(np.abs(row).max() / 127) if row.any() else f(1) for row in matrix]
        return [[round(float(v / s)) for v in row] for row, s in zip(matrix, scales, strict=True)], scales

    w, w_scales = rounded(raw["kernel"].T)
    q, q_scales = rounded(raw["recurrent_kernel"].T)
    thr = [min(round(float(v) * S0_15), S0_15 - 1) for v in raw["thr"]]
    c, y, events, states = [0] * units, [0] * units, [], []
    for x_t in x.tolist():
        next_c, next_y = [], []
        for unit in range(units):
            rows = [unit, units + unit, 2 * units + unit]
            a = [f(sum(v * s for v, s in zip(w[k], x_t, strict=True))) * (w_scales[k] * f(x_scale)) for k in rows]
            b = [f(sum(v * s for v, s in zip(q[k], y, strict=True))) * (q_scales[k] * f(1 / U0_8)) for k in rows]
            bias, recurrent = raw["bias"][rows], raw["recurrent_bias"][rows]
            z, r = (f(0.5 + 0.5 * np.tanh(0.5 * float(a[k] + b[k] + (bias[k] + recurrent[k])))) for k in (0, 1))
            g = f(np.tanh(float((a[2] + bias[2]) + r * (b[2] + recurrent[2]))))
            old = f(c[unit]) / f(S0_15)
            p = z * old + (f(1) - z) * g
            if zoneout:
                p = f(zoneout) * old + f(1 - zoneout) * p
            held = max(-S0_15, min(S0_15 - 1, round(float(p) * S0_15)))
            fired = held > thr[unit]
            next_c.append(held - thr[unit] * fired)
            next_y.append(min((held + 64) // 128, 255) * fired)
        c, y = next_c, next_y
        events.append(y)
        states.append(c)
    return np.array(events), np.array(states)


@pytest.mark.parametrize("zoneout", [0.0, 0.1])
def test_int8_is_exactly_its_definition(zoneout: float) -> None:
    rng = np.random.default_rng(2)
    raw = random_raw(rng, 9, 7, 0.4)
    x = rng.integers(-127, 128, (12, 9))
    expected, states = int8_definition(raw, x, 0.02, zoneout)
    layer = as_layer(raw, int8=True, input_scale=0.02, zoneout=zoneout)
    events, (c, y), _ = simulate(layer, x.astype(np.int8), numerics="int8")
    assert (events.dtype, c.dtype, y.dtype) == (np.uint8, np.int16, np.uint8)
    assert expected.any()
    np.testing.assert_array_equal(events, expected)
    np.testing.assert_array_equal(c, states[-1])


def test_int8_is_near_fp32() -> None:
    exact, *_ = make_program(sizes=(30, 40, 40), seed=3)
    whole, *_ = make_program(sizes=(30, 40, 40), seed=3, numerics="int8")
    tokens = np.arange(30)
    a, b = exact.run(tokens).logits, whole.run(tokens).logits
    assert 0 < np.median(np.abs(a - b)[:3]) < 0.01 * a.std()  # later, a random network has flipped an event
    assert np.abs(a - b).mean() < 0.2 * a.std()


def test_int8_is_deterministic_and_saturates() -> None:
    raw = random_raw(np.random.default_rng(0), 4, 6, 0.0)
    raw["bias"][:6], raw["bias"][12:] = -40, 40  # the state goes to 1, which s0.15 does not have
    raw["thr"][:] = 1
    x = np.full((5, 4), 127, np.int8)
    layer = as_layer(raw, int8=True, input_scale=0.01)
    first, (c, _), _ = simulate(layer, x, numerics="int8")
    again, (d, _), _ = simulate(layer, x, numerics="int8")
    assert c.max() == S0_15 - 1
    assert np.array_equal(first, again)
    assert np.array_equal(c, d)


def test_dense_int8_counts_sums_that_the_mac_array_cannot_hold() -> None:
    raw = random_raw(np.random.default_rng(0), 600, 4, 0.0)
    raw["kernel"][:] = 1
    layer = as_layer(raw, int8=True, keep_zeros=True)
    *_, counts = simulate(layer, np.full((2, 600), 127, np.int8), numerics="int8", storage="dense")
    assert counts.overflows == 2 * 12, "127 * 127 * 600 is more than 2**23"
    *_, counts = simulate(layer, np.full((2, 600), 100, np.int8), numerics="int8", storage="dense")
    assert counts.overflows == 0


@pytest.mark.parametrize("numerics", ["fp32", "int8"])
def test_state_is_carried(numerics: str) -> None:
    program, *_ = make_program(numerics=numerics)
    tokens = np.random.default_rng(0).integers(0, 30, 40)
    whole = program.run(tokens)
    first = program.run(tokens[:17])
    kept = [tuple(array.copy() for array in layer) for layer in first.state]
    second = program.run(tokens[17:], first.state)
    for before, after in zip(kept, first.state, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), "a run changed the state given"
    np.testing.assert_allclose(np.concatenate([first.logits, second.logits]), whole.logits, rtol=0, atol=1e-5)
    for one, other in zip(second.state, whole.state, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("projection", [None, 11])
@pytest.mark.parametrize("where", ["host", "pe"])
def test_the_whole_model_is_computed(projection: int | None, where: str) -> None:
    program, table, raws, head = make_program(projection=projection, embedding=where, decoder=where)
    tokens = np.random.default_rng(3).integers(0, 30, 25)
    x = table[tokens]
    for raw in raws:
        x, _ = definition(raw, x)
    for part in head:
        x = x @ part.weight.T.astype(np.float64) + part.bias
    result = program.run(tokens)
    assert result.logits.dtype == np.float32
    np.testing.assert_allclose(result.logits, x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernel", ["row", "event"])
def test_every_pe_is_counted(kernel: str) -> None:
    program, table, raws, _ = make_program(kernel=kernel, pes=[3, 4], vocab_size=9)
    tokens = np.array([4, 2, 8, 0, 3])
    result = program.run(tokens)
    x = table[tokens]
    for stage, placed, raw in zip(result.counters["stages"], program.pe_map.stages, raws, strict=True):
        y, _ = definition(raw, x)
        before = np.concatenate([np.zeros((1, y.shape[1])), y[:-1]])
        units = y.shape[1]
        macs, useful, slowest = np.zeros(placed.n_pes, int), 0, []
        for t in range(len(tokens)):
            done = np.zeros(placed.n_pes, int)
            for matrix, source in ((raw["kernel"], x[t]), (raw["recurrent_kernel"], before[t])):
                for i, j in zip(*np.nonzero(matrix), strict=True):
                    if kernel == "row" or source[i]:
                        done[placed.pe_of_unit[j % units]] += 1
                    useful += bool(source[i])
            events = int((x[t] != 0).sum() + (before[t] != 0).sum())
            cycles = 32.4 * done + (100 * events if kernel == "event" else 0)
            slowest.append(cycles.max())
            macs += done
        assert stage["macs_per_pe"] == macs.tolist()
        assert stage["macs"] == macs.sum()
        assert stage["useful_macs"] == useful
        assert stage["events_in"] == (x != 0).sum() + (before != 0).sum()
        assert stage["packets"] == (y != 0).sum()
        assert stage["slowest_cycles"] == pytest.approx(max(slowest))
        assert stage["stage_cycles"] == pytest.approx(sum(slowest))
        x = y
    assert result.counters["host_packets"] == table[tokens].size
    assert result.counters["boundary_bytes"] == 8 * (table[tokens].size + (x != 0).sum())


def test_embedding_and_decoder_on_pes_are_counted() -> None:
    program, *_ = make_program(embedding="pe", decoder="pe", sizes=(12, 20), vocab_size=30)
    result = program.run(np.arange(10))
    table, layer, decoder = result.counters["stages"]
    assert (table["op"], layer["op"], decoder["op"]) == ("embeddings", "rnns.0", "decoder.decoder")
    assert result.counters["host_packets"] == 10, "only token ids come from the host"
    assert table["packets"] == 10 * 12
    assert decoder["macs"] == 10 * 30 * 20
    assert decoder["events_in"] == layer["packets"]
    assert result.counters["boundary_bytes"] == 8 * (10 + 10 * 30)


def test_no_tokens_give_no_logits() -> None:
    program, *_ = make_program()
    result = program.run(np.zeros(0, np.int64))
    assert result.logits.shape == (0, 30)
    assert [figure.name for figure in program.report(result).figures] == ["PEs", "chips", "memory per PE, max"]
