"""NIR graphs become networks, by the documented rules and formulas."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import nir
import numpy as np

from spinnaker2 import snn


class IntegratorMethod(str, Enum):
    FORWARD = "Forward-Euler"
    EXPONENTIAL = "Exponential-Euler"


class ResetMethod(str, Enum):
    SUBTRACT = "subtract"
    ZERO = "zero"


@dataclass
class ConversionConfig:
    dt: float = 1.0
    output_record: list[str] = field(default_factory=lambda: ["spikes"])
    conn_delay: int = 1
    scale_weights: bool = False
    integrator: IntegratorMethod = IntegratorMethod.EXPONENTIAL
    reset: ResetMethod = ResetMethod.SUBTRACT


def from_nir(graph: nir.NIRGraph, config: ConversionConfig):  # type: ignore[no-untyped-def]
    populations: dict[str, snn.Population] = {}
    scales: dict[str, float] = {}
    inputs, outputs = [], []
    into = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    for name, node in graph.nodes.items():
        if isinstance(node, nir.Input):
            populations[name] = snn.Population(int(np.prod(node.input_type["input"])), "spike_list", {}, name)
            inputs.append(populations[name])
        elif isinstance(node, (nir.LIF, nir.IF)):
            weights = [graph.nodes[a] for a in into[name]]
            biases = [np.asarray(w.bias) for w in weights if isinstance(w, nir.Affine)]
            scale = 127 / max(np.abs(w.weight).max() for w in weights) if config.scale_weights else 1.0
            shown = any(isinstance(graph.nodes[b], nir.Output) for a, b in graph.edges if a == name)
            populations[name] = snn.Population(
                int(node.v_threshold.size),
                "lif_no_delay",
                _parameters(node, biases[-1] if biases else np.zeros(1), scale, config),
                name,
                list(config.output_record) if shown else [],
            )
            scales[name] = scale
            outputs += [populations[name]] if shown else []
        elif not isinstance(node, (nir.Linear, nir.Affine, nir.Output)):
            raise NotImplementedError(type(node).__name__)
    network = snn.Network("nir")
    network.add(*populations.values())
    for a, b in graph.edges:
        if b not in populations:
            if not isinstance(graph.nodes[b], (nir.Output, nir.Linear, nir.Affine)):
                raise ValueError(f"edge {a} -> {b}")
            continue
        (source,) = into[a]
        weight = np.rint(graph.nodes[a].weight * scales[b]).astype(int)
        rows = [[int(i), int(j), int(weight[j, i]), config.conn_delay] for j, i in np.argwhere(weight)]
        if rows:
            network.add(snn.Projection(populations[source], populations[b], rows))
    return network, inputs, outputs


def _parameters(node: nir.LIF | nir.IF, bias: np.ndarray, scale: float, config: ConversionConfig) -> dict:
    if isinstance(node, nir.IF):
        decay, taken = np.ones_like(node.r), np.ones_like(node.r)
        leak: np.ndarray | float = 0.0
    else:
        forward = config.integrator == IntegratorMethod.FORWARD
        taken = config.dt / node.tau if forward else 1 - np.exp(-config.dt / node.tau)
        decay, leak = 1 - taken, taken * node.v_leak
    factor = scale / (taken * node.r)
    subtract = config.reset == ResetMethod.SUBTRACT
    return {
        "threshold": node.v_threshold * factor,
        "alpha_decay": decay,
        "i_offset": leak * factor + bias * scale,
        "reset": "reset_by_subtraction" if subtract else "reset_to_v_reset",
    }
