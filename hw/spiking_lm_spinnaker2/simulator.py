"""Computing a placed model token by token as the PEs would, and counting what each of them does (numpy only).

fp32 sums a gate in the order of its CSR row: the columns of W, then those of R, one after the other in float32. Adding
what comes from one active source after the other gives the same bits, since the skipped terms are zero; so both kernels
share one arithmetic and differ in what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.constants import K_IN, K_NNZ, MLA_ACCUMULATOR_BITS, MLA_COLUMNS, MLA_UTILISATION
from spiking_lm_spinnaker2.mapping import PEMap, Placed
from spiking_lm_spinnaker2.weights import S0_15, U0_8, Array, EGRULayer, Linear, Parts

LayerState = tuple[Array, Array]
"""(c, y) of one layer, each (H,): float32, or int16 in s0.15 and uint8 in u0.8."""

ROWS_AT_ONCE = 64
"""Tokens whose logits are computed together."""


@dataclass
class StageCounts:
    """What one stage on PEs did for each token of a run."""

    name: str
    macs: NDArray[np.int64]
    """(S, PEs): multiply-accumulates."""
    useful: int
    """Of them, those whose input was not zero."""
    events_in: NDArray[np.int64]
    """(S,): non-zero values that every PE of the stage received."""
    packets: NDArray[np.int64]
    """(S,): packets sent; one reaches any number of PEs."""
    cycles: NDArray[np.float64]
    """(S, PEs): predicted cycles."""
    mla_macs: int = 0
    overflows: int = 0
    """Sums beyond the accumulator of the MAC array."""
    beside: bool = False
    """It works on a token at the same time as the stage before it."""


@dataclass
class Trace:
    """What all stages did, and what crossed between host and chip."""

    stages: list[StageCounts] = field(default_factory=list)
    host_packets: int = 0
    """Packets that the host sent into the chip."""
    boundary_bytes: int = 0


class EGRUSimulator:
    """One EGRU layer on its PEs: the arithmetic of a step, and the weights that each source meets on each PE."""

    def __init__(self, layer: EGRULayer, placed: Placed, config: SpiNNaker2Config) -> None:
        self.layer, self.config = layer, config
        self.int8 = layer.input.scales is not None
        units, w, r = layer.n_units, layer.input, layer.recurrent
        # Sums of a unit. fp32: z, r, candidate from the input, candidate from the units. int8 keeps the two matrices
        # apart, whose scales differ: z, r, g from the input, z, r, g from the units.
        shift = np.array([3, 3, 3] if self.int8 else [0, 0, 1]) * units
        w_rows, r_rows = w.rows, r.rows
        sources = np.concatenate([w.columns.astype(np.int64), r.columns + np.int64(layer.n_inputs)])
        targets = np.concatenate([w_rows, r_rows + shift[r_rows // units]])
        order = np.argsort(sources, kind="stable")
        self.targets = targets[order].astype(np.intp)
        values = np.concatenate([w.values, r.values])[order]
        self.values = values.astype(np.int32) if self.int8 else values
        self.fan_out = np.bincount(sources, minlength=layer.n_inputs + units)
        self.sums = (6 if self.int8 else 4) * units
        pe = placed.pe_of_unit[np.concatenate([w_rows, r_rows]) % units]
        met = np.bincount(sources * placed.n_pes + pe, minlength=len(self.fan_out) * placed.n_pes)
        self.met = met.reshape(-1, placed.n_pes)
        """(sources, PEs): stored weights that a source meets on a PE."""
        self.units_of_pe = np.diff(placed.bounds)
        self.overflows = 0

    def initial(self) -> LayerState:
        """Return the state before the first token."""
        units = self.layer.n_units
        if self.int8:
            return np.zeros(units, np.int16), np.zeros(units, np.uint8)
        return np.zeros(units, np.float32), np.zeros(units, np.float32)

    def run(self, x: Array, state: LayerState) -> tuple[Array, LayerState, StageCounts]:
        """Run ``x (S, I)`` from ``state``; return the events ``(S, H)``, the next state, and what was counted."""
        c, y = state
        events = np.empty((len(x), self.layer.n_units), y.dtype)
        inputs = x.astype(np.int32 if self.int8 else np.float32, copy=False)
        self.overflows = 0
        for t, x_t in enumerate(inputs):
            sums = np.zeros(self.sums, inputs.dtype)
            source = np.concatenate([x_t, y], dtype=inputs.dtype)
            np.add.at(sums, self.targets, self.values * np.repeat(source, self.fan_out))
            c, y = self._update(sums, c)
            events[t] = y
        before = np.concatenate([state[1][None], events])[: len(x)]
        active = np.concatenate([x != 0, before != 0], axis=1)
        return events, (c, y), self._count(active, events)

    def _update(self, sums: Array, c: Array) -> LayerState:
        """Compute gates, candidate, state and event from the sums of a token."""
        layer, units = self.layer, self.layer.n_units
        if self.int8:
            if self.config.on_mac_array:
                self.overflows += int((np.abs(sums) >= 1 << (int(MLA_ACCUMULATOR_BITS.value) - 1)).sum())
            parts = sums.astype(np.float32).reshape(6, units)
            from_x = parts[:3] * (_scales(layer.input.scales) * np.float32(layer.input_scale)).reshape(3, units)
            from_y = parts[3:] * (_scales(layer.recurrent.scales) * np.float32(1 / U0_8)).reshape(3, units)
            z, r = from_x[:2] + from_y[:2] + layer.bias[:2]
            a, q = from_x[2] + layer.bias[2], from_y[2] + layer.bias[3]
            old = c.astype(np.float32) / np.float32(S0_15)
        else:
            z, r, a, q = sums.reshape(4, units) + layer.bias
            old = c
        z, r = _sigmoid(z), _sigmoid(r)
        p = z * old + (np.float32(1) - z) * _tanh(a + r * q)
        if layer.zoneout:
            p = np.float32(layer.zoneout) * old + np.float32(1 - layer.zoneout) * p
        if not self.int8:
            fired = p > layer.threshold
            return p - fired * layer.threshold, p * fired
        held = np.clip(np.rint(p * S0_15), -S0_15, S0_15 - 1).astype(np.int32)
        fired = held > layer.threshold
        half = S0_15 // U0_8 // 2
        value = np.minimum((held + half) // (2 * half), U0_8 - 1)
        return (held - fired * layer.threshold).astype(np.int16), (value * fired).astype(np.uint8)

    def _count(self, active: NDArray[np.bool_], events: Array) -> StageCounts:
        tokens = len(active)
        # A float32 product is exact here: a PE holds far less than 2**24 weights.
        touched = (active.astype(np.float32) @ self.met.astype(np.float32)).astype(np.int64)
        stored = np.broadcast_to(self.met.sum(0), touched.shape)
        macs = touched if self.config.kernel == "event" else stored
        events_in = active.sum(1)
        mla = self.config.on_mac_array
        if mla:
            one = mac_array_cycles(3 * self.units_of_pe, self.layer.n_inputs + self.layer.n_units)
            cycles = np.broadcast_to(one, touched.shape).astype(np.float64)
        else:
            cycles = processor_cycles(macs, events_in, self.config)
        return StageCounts(
            self.layer.name,
            macs,
            int(touched.sum()),
            events_in,
            (events != 0).sum(1),
            cycles,
            mla_macs=int(macs.sum()) if mla else 0,
            overflows=self.overflows if tokens else 0,
        )


def _scales(scales: NDArray[np.float32] | None) -> NDArray[np.float32]:
    assert scales is not None
    return scales


def _sigmoid(a: Array) -> Array:
    """Compute in float64 and round once: the same bits wherever numpy's float32 functions differ."""
    return (0.5 + 0.5 * np.tanh(0.5 * a.astype(np.float64))).astype(np.float32)


def _tanh(a: Array) -> Array:
    return np.tanh(a.astype(np.float64)).astype(np.float32)


def processor_cycles(
    macs: NDArray[np.int64], events_in: NDArray[np.int64], config: SpiNNaker2Config
) -> NDArray[np.float64]:
    """Return the cycles of the PEs' processors, (S, PEs); the row kernel's fitted constant includes its events."""
    cycles: NDArray[np.float64] = K_NNZ.value * macs.astype(np.float64)
    if config.kernel == "event":
        cycles = cycles + K_IN.value * events_in[:, None]
    return cycles


def mac_array_cycles(outputs: NDArray[np.int64], inputs: int) -> NDArray[np.float64]:
    """Return the cycles of the MAC arrays for one token: tiles of 16 outputs, an input a cycle, utilisation 17 %."""
    cycles: NDArray[np.float64] = np.ceil(outputs / MLA_COLUMNS.value) * inputs * 100 / MLA_UTILISATION.value
    return cycles


# -- output head -------------------------------------------------------------------------------------------------------


def linear(layer: Linear, x: Array, scale: float | None) -> NDArray[np.float32]:
    """Compute a dense layer of ``x (S, in)``: float32, or whole numbers that stand for multiples of ``scale``.

    With int8 weights, real inputs are quantised on arrival, each token by its largest value; sums are exact.
    """
    if layer.scales is None:
        real = x if scale is None else x.astype(np.float32) * np.float32(scale)
        return np.asarray(real @ layer.weight.T + layer.bias, np.float32)
    outputs = np.empty((len(x), len(layer.weight)), np.float32)
    weight = layer.weight.T.astype(np.float64)
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        whole, step = quantise_tokens(x[rows]) if scale is None else (x[rows], np.float32(scale))
        sums = (whole.astype(np.float64) @ weight).astype(np.float32)
        outputs[rows] = sums * (layer.scales * step) + layer.bias
    return outputs


def quantise_tokens(x: Array) -> tuple[Array, Array]:
    """Quantise each token's values to -127 .. 127 by the largest; return whole numbers and scales ``(S, 1)``."""
    scales = (np.abs(x).max(1, keepdims=True) / 127).astype(np.float32)
    scales[scales == 0] = 1
    return np.rint(x / scales), scales


def count_linear(layer: Linear, x: Array, y: Array, placed: Placed, config: SpiNNaker2Config) -> StageCounts:
    """Count what a dense layer on PEs did for ``x (S, in)`` and ``y (S, out)``."""
    outputs, inputs = np.diff(placed.bounds), x.shape[1]
    events_in = (x != 0).sum(1)
    useful = events_in[:, None] * outputs
    macs = useful if config.kernel == "event" else np.full(useful.shape, outputs * inputs)
    mla = layer.scales is not None and config.kernel == "row"
    if mla:
        cycles = np.broadcast_to(mac_array_cycles(outputs, inputs), macs.shape)
    else:
        cycles = processor_cycles(macs, events_in, config)
    packets = (y != 0).sum(1)
    return StageCounts(
        layer.name, macs, int(useful.sum()), events_in, packets, cycles, mla_macs=int(macs.sum()) if mla else 0
    )


def count_lookup(name: str, tokens: Array, x: Array, placed: Placed, config: SpiNNaker2Config) -> StageCounts:
    """Count what an embedding on PEs did: one of them reads and sends a row, at the cost of as many weights."""
    sends = np.zeros((len(tokens), placed.n_pes), np.int64)
    sends[np.arange(len(tokens)), placed.pe_of_unit[tokens]] = x.shape[1]
    one = np.ones(len(tokens), np.int64)
    return StageCounts(name, np.zeros_like(sends), 0, one, (x != 0).sum(1), processor_cycles(sends, one, config))


# -- the whole model ---------------------------------------------------------------------------------------------------


class Simulator:
    """A placed language model."""

    def __init__(self, parts: Parts, pe_map: PEMap, config: SpiNNaker2Config) -> None:
        self.parts, self.pe_map, self.config = parts, pe_map, config
        self.layers = [EGRUSimulator(layer, pe_map[layer.name], config) for layer in parts.layers]

    def initial(self) -> list[LayerState]:
        """Return the state before the first token."""
        return [layer.initial() for layer in self.layers]

    def run(
        self, tokens: NDArray[np.int64], state: list[LayerState]
    ) -> tuple[NDArray[np.float32], list[LayerState], Trace]:
        """Run ``tokens (S,)`` from ``state``; return ``logits (S, V)``, the next state, and what was counted."""
        table, config, trace = self.parts.embedding, self.config, Trace()
        x: Any = table.rows[tokens]
        placed = self.pe_map.get(table.name)
        if placed is None:
            trace.host_packets = int((x != 0).sum())
        else:
            trace.host_packets = len(tokens)
            trace.stages.append(count_lookup(table.name, tokens, x, placed, config))
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, now, counts = layer.run(x, before)
            after.append(now)
            trace.stages.append(counts)
        scale = 1 / U0_8 if config.numerics == "int8" else None
        for head in self.parts.head:
            y = linear(head, x, scale)
            placed = self.pe_map.get(head.name)
            if placed is not None:
                trace.stages.append(count_linear(head, x, y, placed, config))
            x, scale = y, None
        sent = trace.stages[-1].packets  # what leaves the last stage on PEs goes to the host
        trace.boundary_bytes = 8 * (trace.host_packets + int(sent.sum()))
        return x, after, trace


def summarise(trace: Trace, tokens: int, config: SpiNNaker2Config, hertz: float) -> dict[str, Any]:
    """Return the counters of a run as plain data: totals, and per stage and per PE."""
    tick = None if config.tick_us is None else config.tick_us * 1e-6 * hertz
    stages: list[dict[str, Any]] = []
    step, path = -1, np.zeros(0)
    for counts in trace.stages:
        slowest = counts.cycles.max(1)  # over the PEs, per token
        before = path.sum() if counts.beside else 0.0
        path = np.maximum(path, slowest) if counts.beside else slowest
        step += not counts.beside
        stages.append(
            {
                "op": counts.name,
                "step": step,
                "events_in": int(counts.events_in.sum()),
                "packets": int(counts.packets.sum()),
                "macs": int(counts.macs.sum()),
                "useful_macs": counts.useful,
                "mla_macs": counts.mla_macs,
                "busy_cycles": float(counts.cycles.sum()),
                "slowest_cycles": float(slowest.max(initial=0)),
                "stage_cycles": float(path.sum() - before),
                "overruns": 0 if tick is None else int((slowest > tick).sum()),
                "accumulator_overflows": counts.overflows,
                "macs_per_pe": counts.macs.sum(0).tolist(),
                "cycles_per_pe": counts.cycles.sum(0).tolist(),
            }
        )
    return {
        "tokens": tokens,
        "host_packets": trace.host_packets,
        "boundary_bytes": trace.boundary_bytes,
        "stages": stages,
    }
