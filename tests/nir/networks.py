"""Networks of LIF neurons drawn at random, for the tests of NIR and of the native SpiNNaker 2 path."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from spiking_lm.lifnet import INPUT, LIFEdge, LIFLayer, LIFNet


def eighths(rng: np.random.Generator, low: int, high: int, shape: Any) -> np.ndarray:
    """Multiples of 1/8: sums of them are exact, so that the order of additions does not matter."""
    return (rng.integers(low, high + 1, shape) / 8).astype(np.float32)


@st.composite
def networks(draw: Any, *, synapses: bool = False, exact: bool = False, recurrent: bool = True) -> LIFNet:
    """Draw a network. ``exact``: decays, weights and thresholds on a coarse binary grid."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    layers = []
    for position, size in enumerate(sizes):
        leaks = draw(st.booleans())
        synapse: dict[str, Any] = {}
        if synapses and leaks and draw(st.booleans()):
            synapse = {"synapse_decay": rng.choice([0.25, 0.5, 0.75], size), "synapse_gain": eighths(rng, 1, 8, size)}
        if exact:
            decay = rng.choice([0.25, 0.5, 0.75], size)
            gain, drift = eighths(rng, 2, 8, size), eighths(rng, -2, 2, size)
        else:
            decay = np.where(rng.random(size) < 0.2, 0.0, rng.uniform(1e-4, 0.9999, size))
            gain, drift = rng.normal(size=size), rng.normal(size=size) / 8
        reset = {"v_reset": None} if draw(st.booleans()) else {"v_reset": eighths(rng, -4, 0, size)}
        layers.append(
            LIFLayer(
                f"block.{position}.neuron",
                size,
                decay=decay if leaks else np.ones(size),
                gain=gain,
                drift=drift if leaks else np.zeros(size),
                threshold=eighths(rng, 4, 12, size),
                v_init=eighths(rng, -4, 4, size) if draw(st.booleans()) else np.zeros(size),
                compare=draw(st.sampled_from([">", ">="])),
                **reset,
                **synapse,
            )
        )
    n_in = draw(st.integers(1, 4))
    names = [INPUT, *(layer.name for layer in layers)]
    width = dict(zip(names, [n_in, *sizes], strict=True))
    pairs = {(names[i], names[i + 1]): draw(st.integers(0, 1)) for i in range(len(sizes))}
    for _ in range(draw(st.integers(0, 3)) if recurrent else 0):
        source, target = draw(st.sampled_from(names)), draw(st.sampled_from(names[1:]))
        back = names.index(source) >= names.index(target)
        pairs.setdefault((source, target), draw(st.integers(int(back), 3)))
    edges = []
    for (source, target), delay in pairs.items():
        shape = (width[target], width[source])
        weight = eighths(rng, -12, 16, shape) if exact else rng.normal(size=shape)
        bias = eighths(rng, -2, 4, shape[0]) if draw(st.booleans()) else None
        edges.append(LIFEdge(source, target, weight, bias, delay))
    outputs = draw(st.lists(st.sampled_from(names[1:]), unique=True, max_size=2))
    return LIFNet(n_in, tuple(layers), tuple(edges), tuple(outputs))


def spikes(net: LIFNet, steps: int = 24, seed: int = 0, rate: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random((steps, net.input_size)) < rate
