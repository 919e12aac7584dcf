"""Small random models, and the definition of a layer that the simulator must equal."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.program import SpiNNaker2Program
from spiking_lm_spinnaker2.weights import U0_8, EGRULayer, Linear, Table

Raw = dict[str, np.ndarray]


def random_raw(rng: np.random.Generator, n_inputs: int, n_units: int, sparsity: float) -> Raw:
    """Return a layer's parameters in the model's layout, (in, 3H), with some weights zero."""
    raw = {
        "kernel": rng.normal(0, n_inputs**-0.5, (n_inputs, 3 * n_units)),
        "recurrent_kernel": rng.normal(0, n_units**-0.5, (n_units, 3 * n_units)),
        "bias": rng.normal(0, 0.3, 3 * n_units),
        "recurrent_bias": rng.normal(0, 0.3, 3 * n_units),
        "thr": rng.uniform(0, 0.4, n_units),
    }
    for name in ("kernel", "recurrent_kernel"):
        raw[name] *= rng.random(raw[name].shape) >= sparsity
    return {name: array.astype(np.float32) for name, array in raw.items()}


def as_layer(raw: Raw, name: str = "rnns.0", **options: Any) -> EGRULayer:
    """Build the layer that holds ``raw``."""
    return EGRULayer.build(
        (name, f"{name}.input", f"{name}.recurrent"),
        raw["kernel"].T,
        raw["recurrent_kernel"].T,
        raw["bias"],
        raw["recurrent_bias"],
        raw["thr"],
        **options,
    )


def definition(
    raw: Raw, x: np.ndarray, c: np.ndarray | float = 0.0, y: np.ndarray | float = 0.0, zoneout: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Run the equations of the layer in float64 on ``x (T, I)``; return the events and the states, (T, H)."""
    raw = {name: array.astype(np.float64) for name, array in raw.items()}
    c, y = (np.zeros_like(raw["thr"]) + start for start in (c, y))
    events, states = [], []
    for x_t in x.astype(np.float64):
        az, ar, ag = np.split(x_t @ raw["kernel"] + raw["bias"], 3)
        qz, qr, qg = np.split(y @ raw["recurrent_kernel"] + raw["recurrent_bias"], 3)
        z, r = 1 / (1 + np.exp(-(az + qz))), 1 / (1 + np.exp(-(ar + qr)))
        p = z * c + (1 - z) * np.tanh(ag + r * qg)
        p = zoneout * c + (1 - zoneout) * p
        fired = p > raw["thr"]
        y, c = p * fired, p - fired * raw["thr"]
        events.append(y)
        states.append(c)
    return np.stack(events), np.stack(states)


def make_program(
    *,
    sizes: tuple[int, ...] = (12, 20, 16),
    vocab_size: int = 30,
    sparsity: float = 0.5,
    seed: int = 0,
    projection: int | None = None,
    zoneout: float = 0.0,
    **options: Any,
) -> tuple[SpiNNaker2Program, np.ndarray, list[Raw], list[Linear]]:
    """Return a random program, and what it was made from: embedding, layers, output head."""
    rng = np.random.default_rng(seed)
    config = SpiNNaker2Config(**options)
    int8 = config.numerics == "int8"
    rows = rng.normal(size=(vocab_size, sizes[0])).astype(np.float32)
    table = Table.build("embeddings", rows, int8=int8)
    raws = [random_raw(rng, *pair, sparsity) for pair in pairwise(sizes)]
    layers = [
        as_layer(
            raw,
            f"rnns.{n}",
            int8=int8,
            zoneout=zoneout,
            keep_zeros=config.storage == "dense",
            input_scale=table.scale if n == 0 else 1 / U0_8,
        )
        for n, raw in enumerate(raws)
    ]
    shapes = {} if projection is None else {"decoder.projection": (projection, sizes[-1])}
    shapes["decoder.decoder"] = (vocab_size, sizes[-1] if projection is None else projection)
    head = [
        Linear.build(name, rng.normal(size=shape), rng.normal(size=shape[0]), int8=False)
        for name, shape in shapes.items()
    ]
    return SpiNNaker2Program.of(table, layers, head, config, model="egru"), rows, raws, head
