"""Cells of SpikeGPT: how far each is from the real operation, what it equals to the integer, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spiking_lm import create_neuron
from spiking_lm.errors import LoweringError
from spiking_lm.interfaces import LayerNormDynamics
from spiking_lm.kernels import lif_scan, wkv
from spiking_lm_lava.cell import VALID, Cell
from spiking_lm_lava.cells_spikegpt import (
    GIF,
    WKV,
    Add,
    Centre,
    Gate,
    HoldingLIF,
    InverseRoot,
    Normalise,
    SquaredReLU,
    TokenShift,
)
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.process import State
from spiking_lm_lava.values import Range
from spiking_lm_lava.worker.cells.fixed import ONE, multiplier
from spiking_lm_lava.worker.cells.powers import exp2, inverse_sqrt, reciprocal

Rows = NDArray[Any]

N = 16
SEEDS = st.integers(0, 2**32 - 1)
VALID_RANGE = Range.of(1, 0, 1)


def scaled(factor: Any, prefix: str = "", size: int = N) -> dict[str, Any]:
    mantissa, shift = multiplier(np.broadcast_to(factor, size))
    return {f"{prefix}mantissa": mantissa, f"{prefix}shift": shift}


def run(cell: Cell, *rows: Rows, valid: Rows | None = None, state: State | None = None) -> Rows:
    """Return what a cell sends at its first port, row by row."""
    state = cell.initial() if state is None else state
    valid = np.ones(len(rows[0]), np.int64) if valid is None else valid
    steps = enumerate(zip(*rows, valid[:, None], strict=True))
    return np.stack([cell.step(state, t + 1, *arrived)[0] for t, arrived in steps])


# -- tables ------------------------------------------------------------------------------------------------------------


def test_powers_of_two_are_within_6e_5_of_themselves() -> None:
    x = -np.concatenate([np.arange(1 << 17), np.arange(1 << 17, 12 << 16, 7)])
    mantissa, shift = exp2(x, 16)
    assert (np.abs(mantissa / 2.0 ** (15 + shift) / 2.0 ** (x / 65536) - 1)).max() < 6e-5
    assert (mantissa[0], shift[0]) == (ONE, 0)
    assert exp2(np.array([-(1 << 22)]), 6)[1][0] == 31  # nothing is left


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_reciprocals_and_roots_are_within_1e_4_of_themselves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.concatenate([np.arange(1, 300), 2 ** rng.uniform(0, 24, 2000) // 1, [2**24 - 1]]).astype(np.int64)
    mantissa, shift = reciprocal(x)
    assert np.abs(mantissa / 2.0 ** (15 + shift) * x - 1).max() < 8e-5
    mantissa, shift = inverse_sqrt(x)
    assert np.abs(mantissa / 2.0 ** (15 + shift) * np.sqrt(x) - 1).max() < 1e-4


# -- spiking neurons ---------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 4096), st.integers(0, 1))
def test_the_lif_is_lavas_to_the_integer_and_holds_while_there_is_no_token(seed: int, dv: int, bias: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(300, 700, (60, N)).astype(np.int64)
    cell = HoldingLIF("x", N, dv=dv, vth=1024, bias=bias)
    lava = LIF("x", N, du=4095, dv=dv, vth=1024, bias_mant=np.full(1, bias))
    state, other = cell.initial(), lava.initial()
    valid = rng.integers(0, 2, 60)
    for t in range(60):
        (spikes,) = cell.step(state, t + 1, a[t], valid[t : t + 1])
        if valid[t]:
            (expected,) = lava.step(other, t + 1, a[t])
            assert np.array_equal(spikes, expected)
        assert not spikes.any() or valid[t]
        assert np.array_equal(state["v"], other["v"])


@pytest.mark.parametrize("compare", [">=", ">"])
def test_the_lif_fires_as_spikegpts_does_for_every_current_of_its_format(compare: str) -> None:
    rng = np.random.default_rng(0)
    a = np.round(rng.normal(0.3, 0.6, (400, 64)) * 2**10).astype(np.int64)
    a[0] = 1 << 10  # right at the threshold
    cell = HoldingLIF("x", 64, dv=2048, vth=1 << 10, bias=int(compare == ">="))
    real = torch.from_numpy(a / 2.0**10)[:, None]
    spikes, _ = lif_scan(real, torch.zeros(1, 64), beta=0.5, gain=1.0, threshold=1.0, compare=compare)
    assert np.array_equal(run(cell, a), spikes[:, 0].numpy())


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 15), st.booleans())
def test_the_ladder_counts_as_floor_and_clip_do(seed: int, levels: int, signed: bool) -> None:
    a = np.random.default_rng(seed).integers(-3000, 4000, (50, N))
    v, vth, expected = np.zeros(N, np.int64), 512, []
    for row in a:
        v = v + row
        count = np.where(v >= 0, np.minimum(v // vth, levels), -np.minimum(-v // vth, levels) if signed else 0)
        v = v - count * vth
        expected.append(count)
    assert np.array_equal(run(GIF("x", N, vth=vth, levels=levels, signed=signed), a), np.stack(expected))


def test_the_ladder_is_the_gif_neuron_for_every_current_of_its_format() -> None:
    a = np.random.default_rng(1).integers(-900, 1500, (200, 32))
    neuron = create_neuron("gif", levels=7, threshold=0.5, size=32)
    counts, _ = neuron(torch.from_numpy(a / 2.0**8)[None])
    assert np.array_equal(run(GIF("x", 32, vth=128, levels=7), a), counts[0].numpy())


# -- layer norm --------------------------------------------------------------------------------------------------------


def normed(x: Rows, fraction: int, normal: int = 12) -> Rows:
    """Normalise rows with ``fraction`` bits by the chain of cells, summing between them as the synapses do."""
    size = x.shape[1]
    mean = np.round(x.sum(1, keepdims=True) / size).astype(np.int64)  # a multiplier that is exact for these sizes
    one = np.ones((len(x), 1), np.int64)
    centred, squares = Centre("c", size, before=2, behind=4).step({}, 1, x, np.repeat(mean, size, 1), one)
    bits, held = 10, 2 * (fraction - 2) - 4
    root = InverseRoot("r", 1, **scaled(2.0 ** (bits - held) / size, size=1))
    (inverse,) = root.step({}, 1, squares.sum(1, keepdims=True), one)
    cell = Normalise("n", size, shift=15 + fraction - bits // 2 - normal, most=int(np.ceil(size**0.5 * 2**normal)))
    sent: Rows = cell.step({}, 1, centred, np.repeat(inverse, size, 1), one)[0]
    return sent / 2.0**normal


def test_layer_norm_is_within_0_004_of_the_real_one() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(rng.normal(0, 2, (300, 1)), np.exp(rng.uniform(-0.7, 2, (300, 1))), (300, 128))
    whole = np.round(x * 2**12).astype(np.int64)
    real = torch.nn.functional.layer_norm(torch.from_numpy(x), (128,), eps=LayerNormDynamics(1e-5).eps).numpy()
    found = normed(whole, 12)
    assert np.abs(found - real).max() < 0.004
    assert np.sqrt(np.square(found - real).mean()) < 3e-4


def test_a_constant_row_is_normalised_to_nothing() -> None:
    assert not normed(np.full((3, 64), 5000), 12).any()


# -- time mix ----------------------------------------------------------------------------------------------------------

KEY, VALUE, FINER = 12, 8, 4


def a_wkv(decay: Rows, first: Rows, reach: float = 8.0) -> tuple[WKV, tuple[Range, Range]]:
    """Return a time mix of keys and values with 12 and 8 fraction bits, means with 12, and the ranges of both."""
    size, base = len(decay), 1 / np.log(2)
    most = int(reach * 2**KEY)
    cell = WKV(
        "m",
        size,
        **scaled(base * 2.0 ** (16 - KEY), "k_", size),
        **scaled(np.ones(size), "v_", size),
        decay=np.maximum(np.rint(np.exp(decay) * base * 2**16), 1).astype(np.int64),
        first=np.rint(first * base * 2**16).astype(np.int64),
        fraction=16,
        weight_bits=np.full(size, 8),
        most=np.full(size, 4 << VALUE),
        finer=np.full(size, FINER),
    )
    return cell, (Range.of(size, -most, most), Range.of(size, -4 << VALUE, 4 << VALUE))


def test_the_time_mix_is_within_0_02_of_the_real_one() -> None:
    rng = np.random.default_rng(0)
    size, steps = 48, 400
    decay, first = np.linspace(-4, 3, size), rng.normal(-1, 0.5, size)
    k = np.round(rng.normal(0, 2, (steps, size)) * 2**KEY).astype(np.int64)
    v = np.clip(np.round(rng.normal(0, 0.7, (steps, size)) * 2**VALUE), -4 << VALUE, 4 << VALUE).astype(np.int64)
    cell, (keys, values) = a_wkv(decay, first, 12.0)
    bounds = cell.bounds(keys, values, VALID_RANGE)
    state = cell.initial()
    found = run(cell, k, v, state=state) / 2.0 ** (VALUE + FINER)
    double = [torch.from_numpy(x).double() for x in (decay, first, k / 2.0**KEY, v / 2.0**VALUE)]
    zeros = torch.zeros(1, size, dtype=torch.float64)
    real, _ = wkv(double[0], double[1], double[2][None], double[3][None], (zeros, zeros, zeros - 1e38))
    error = found - real[0].numpy()
    assert np.abs(error).max() < 0.02
    assert np.sqrt(np.square(error).mean()) < 0.003
    for name, held in bounds.states.items():
        assert (state[name] >= held.low).all()
        assert (state[name] <= held.high).all()


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from(["rising", "falling", "alike", "wild"]))
def test_no_text_takes_the_sums_of_the_time_mix_beyond_their_bounds(seed: int, keys: str) -> None:
    rng = np.random.default_rng(seed)
    size, steps = 8, 600
    decay = rng.uniform(-5, 1, size)
    cell, (of_k, of_v) = a_wkv(decay, rng.normal(0, 1, size))
    bounds = cell.bounds(of_k, of_v, VALID_RANGE)
    top = int(of_k.high[0])
    slope = np.exp(decay) * 2**KEY
    ramp = {
        "rising": np.arange(steps)[:, None] * slope - top,
        "falling": top - np.arange(steps)[:, None] * slope,  # as slowly as old weights fade: the sum grows longest
        "alike": np.full((steps, size), top),
        "wild": rng.uniform(-top, top, (steps, size)),
    }[keys]
    k = np.clip(np.rint(ramp), -top, top).astype(np.int64)
    v = np.full((steps, size), 4 << VALUE)
    state, den, num = cell.initial(), 0, 0
    for t in range(steps):
        cell.step(state, t + 1, k[t], v[t], np.ones(1, np.int64))
        den, num = np.maximum(den, state["den"]), np.maximum(num, np.abs(state["num"]))
    assert (den <= bounds.states["den"].high).all()
    assert (num <= bounds.states["num"].high).all()


# -- pointwise ---------------------------------------------------------------------------------------------------------


def test_a_token_shift_is_that_of_the_model_from_the_first_token_on() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-40000, 40000, (30, N))
    gain, bias, mix, weight, offset = rng.normal(size=(5, N))
    real = x / 2.0**12 * weight + offset  # what a layer norm would give
    before = np.concatenate([np.zeros((1, N)), real[:-1]])
    expected = gain * (mix * real + (1 - mix) * before) + bias
    cell = TokenShift(
        "s",
        N,
        **scaled(gain * mix * weight),
        bias=np.rint((gain * mix * offset + bias) * 2**12).astype(np.int64),
        **scaled(gain * (1 - mix) * weight, "held_"),
        held_bias=np.rint(gain * (1 - mix) * offset * 2**12).astype(np.int64),
    )
    assert np.abs(run(cell, x) / 2.0**12 - expected).max() < 2e-3  # 16-bit factors of values up to 30


def test_gate_square_and_sum_are_those_of_the_model() -> None:
    rng = np.random.default_rng(0)
    x, r = rng.integers(-30000, 30000, (200, N)), rng.integers(-30000, 30000, (200, N))
    gate = Gate("g", N, **scaled(2.0**-3), **scaled(0.5, "r_"), bias=np.full(N, 7))
    expected = x / 8 / (1 + np.exp(-r / 8192)) + 7
    assert np.abs(run(gate, x, r) - expected).max() < 1.5
    square = SquaredReLU("q", N, **scaled(1.0, "root_"), **scaled(2.0**-10), most=np.full(N, 200000))
    assert np.abs(run(square, x) - np.minimum(np.maximum(x, 0) ** 2.0 / 1024, 200000)).max() <= 0.5
    added = Add("a", N, **scaled(0.3))
    assert np.abs(run(added, x, r) - (x + 0.3 * r)).max() <= 1  # a factor of 15 bits


# -- laws of all cells -------------------------------------------------------------------------------------------------


def cells() -> dict[str, tuple[Cell, list[Range]]]:
    """Return a cell of every kind with the ranges of what arrives."""
    wide, most = Range.of(N, -60000, 50000), Range.of(N, 0, 70000)
    mix, (k, v) = a_wkv(np.linspace(-3, 2, N), np.zeros(N))
    return {
        "lif": (HoldingLIF("x", N, dv=1024, vth=500), [Range.of(N, -9000, 12000)]),
        "gif": (GIF("x", N, vth=300, levels=5, signed=True), [wide]),
        "centre": (Centre("x", N, before=3, behind=5), [wide, Range.of(N, -2000, 2000)]),
        "root": (InverseRoot("x", 1, **scaled(0.2, size=1), eps=3), [Range.of(1, 0, 900000)]),
        "normalise": (Normalise("x", N, shift=9, most=46341), [wide, Range.of(N, 33000 << 5, (60000 << 5) + 12)]),
        "wkv": (mix, [k, v]),
        "shift": (TokenShift("x", N, **scaled(0.7), **scaled(-0.3, "held_"), held_bias=np.full(N, 50)), [wide]),
        "gate": (
            Gate("x", N, **scaled(-0.7), **scaled(0.1, "r_"), bias=np.full(N, 9), least=np.full(N, -9000)),
            [wide, wide],
        ),
        "square": (SquaredReLU("x", N, **scaled(0.4, "root_"), **scaled(0.01), most=np.full(N, 4000)), [most]),
        "add": (Add("x", N, **scaled(-2.0)), [wide, wide]),
    }


@pytest.mark.parametrize("kind", cells())
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_values_stay_within_bounds_and_steps_without_a_token_change_nothing(kind: str, seed: int) -> None:
    cell, ranges = cells()[kind]
    cell.check()
    rng = np.random.default_rng(seed)
    rows = [rng.integers(r.low, r.high + 1, (25, len(r.low))) for r in ranges]
    for i, r in enumerate(ranges):  # ends too
        rows[i][3], rows[i][4] = r.low, r.high
    bounds = cell.bounds(*ranges, VALID_RANGE)
    state, paused = cell.initial(), cell.initial()
    for t in range(25):
        for _ in range(rng.integers(0, 3)):
            held = dict(paused)
            sent = cell.step(paused, t + 1, *(row[t] * 0 + row[t - 1] for row in rows), np.zeros(1, np.int64))
            assert not any(np.any(x) for x in sent)
            assert all(np.array_equal(paused[name], held[name]) for name in held)
        now = cell.step(state, t + 1, *(row[t] for row in rows), np.ones(1, np.int64))
        again = cell.step(paused, t + 1, *(row[t] for row in rows), np.ones(1, np.int64))
        for value, other, found in zip(now, again, bounds.sends, strict=True):
            assert np.array_equal(value, other)
            assert (value >= found.low).all()
            assert (value <= found.high).all()
        for name, found in bounds.states.items():
            assert (state[name] >= found.low).all()
            assert (state[name] <= found.high).all()
    assert cell.reads[-1] == VALID


def test_what_could_overflow_is_refused_with_the_bound() -> None:
    wide, huge = Range.of(N, -(2**20), 2**20), Range.of(N, -(2**22), 2**22)
    small = Range.of(N, -10, 10)
    mix, (k, v) = a_wkv(np.linspace(-3, 2, N), np.zeros(N))
    for cell, ranges, words in (
        (HoldingLIF("x", N, dv=2048, vth=500), [wide], "a current may reach 1,048,576"),
        (HoldingLIF("x", N, dv=2, vth=500), [Range.of(N, -100000, 0)], "the membrane may reach"),
        (HoldingLIF("x", N, dv=0, vth=500), [small], "nothing bounds the membrane"),
        (Centre("x", N), [wide, small], "what is squared may reach 1,048,586"),
        (Centre("x", N, before=6), [wide, small], "a square may reach"),
        (InverseRoot("x", 1), [Range.of(1, -1, 5)], "which has no root"),
        (InverseRoot("x", 1), [Range.of(1, 0, 2**23)], "rescaled, may reach 8,388,608"),
        (WKV(**{**vars_of(mix), "weight_bits": np.full(N, 15)}), [k, v], "the sum of weights may reach"),
        (mix, [huge, v], "may reach"),
        (WKV(**{**vars_of(mix), "most": np.full(N, 1 << 21)}), [k, v], "the weighted sum of values may reach"),
        (TokenShift("x", N, **scaled(1.5), **scaled(0.9, "held_")), [huge], "a mix may reach"),
        (Gate("x", N, **scaled(3.0), **scaled(1.0, "r_")), [huge, small], "a gated value, rescaled, may reach"),
        (SquaredReLU("x", N, **scaled(1.0, "root_"), **scaled(0.1)), [wide], "what is squared may reach"),
        (Add("x", N, **scaled(1.0)), [huge, huge], "the residual stream may reach 8,388,608"),
    ):
        with pytest.raises(LoweringError, match=words):
            cell.bounds(*ranges, VALID_RANGE)
    with pytest.raises(LoweringError, match="beyond a membrane"):
        GIF("x", N, vth=1 << 20, levels=15).check()
    with pytest.raises(LoweringError, match="decay is 0, and hardware holds 1 to"):
        WKV(**{**vars_of(mix), "decay": np.zeros(N, np.int64)}).check()


def vars_of(cell: Cell) -> dict[str, Any]:
    return {name: value for name, value in vars(cell).items() if not name.startswith("_")}
