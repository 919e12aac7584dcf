"""The documented arithmetic of ``lif`` and ``lif_no_delay``, neuron by neuron and spike by spike."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from spinnaker2 import snn


def simulate(network: snn.Network, timesteps: int) -> None:
    timesteps = snn.integer(timesteps, "timesteps", 1, 2**31)
    network.validate()
    targets: dict[int, dict[int, list[tuple[snn.Population, int, int, int]]]] = defaultdict(lambda: defaultdict(list))
    for projection in network.projections:
        for pre, post, weight, delay in projection.connections:
            targets[id(projection.pre)][pre].append((projection.post, post, weight, delay))
    arriving: dict[tuple[int, int], np.ndarray] = {}  # (tick, population) -> sum of weights
    cells = [population for population in network.populations if population.neuron_model != "spike_list"]
    for population in cells:
        if population.neuron_model not in ("lif", "lif_no_delay"):
            raise NotImplementedError(population.neuron_model)
    membranes = {id(population): population.float32("v_init", 0.0).copy() for population in cells}
    for population in network.populations:
        population.spikes = {neuron: [] for neuron in range(population.size)}
    for tick in range(timesteps):
        fired: list[tuple[snn.Population, int]] = []
        for population in network.populations:
            if population.neuron_model == "spike_list":
                fired += [(population, neuron) for neuron, times in population.params.items() if tick in times]
                continue
            current = arriving.pop((tick, id(population)), np.zeros(population.size, np.int64))
            threshold = population.float32("threshold", 0.0)
            v = membranes[id(population)]
            v = population.float32("alpha_decay", 0.0) * v + population.float32("i_offset", 0.0) + current.astype("f4")
            above = v > threshold
            subtract = population.params["reset"] == "reset_by_subtraction"
            after = v - threshold if subtract else population.float32("v_reset", 0.0)
            membranes[id(population)] = np.where(above, after, v)
            fired += [(population, int(neuron)) for neuron in np.flatnonzero(above)]
        for population, neuron in fired:
            assert population.spikes is not None
            population.spikes[neuron].append(tick)
            for post, target, weight, delay in targets[id(population)][neuron]:
                key = (tick + 1 + delay, id(post))
                arriving.setdefault(key, np.zeros(post.size, np.int64))[target] += weight
