"""Populations, projections and networks, with every argument checked."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

_LIF = {"threshold", "alpha_decay", "i_offset", "v_init", "v_reset", "reset"}
MODELS: dict[str, set[str] | None] = {
    "spike_list": None,
    "lif": _LIF,
    "lif_no_delay": _LIF,
    "lif_curr_exp": _LIF | {"exc_decay", "inh_decay", "t_refrac"},
    "lif_curr_exp_no_delay": _LIF | {"exc_decay", "inh_decay", "t_refrac"},
}
RESETS = ("reset_by_subtraction", "reset_to_v_reset")
RECORDINGS = {"spikes", "v", "v_last", "time_done", "n_packets"}
SYNAPSE_MEMORY = 44 * 1024


def integer(value: Any, what: str, low: int, high: int) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{what} is {value!r}, not an integer")
    if not low <= value <= high:
        raise ValueError(f"{what} is {value}, not in {low} to {high}")
    return int(value)


class Population:
    def __init__(self, size: int, neuron_model: str, params: dict, name: str = "", record: list | None = None) -> None:
        self.size = integer(size, "size", 1, 10**9)
        if neuron_model not in MODELS:
            raise ValueError(f"no neuron model {neuron_model!r}")
        if not isinstance(params, dict):
            raise TypeError("params is a dictionary")
        record = ["spikes"] if record is None else record
        if not isinstance(record, list) or not set(record) <= RECORDINGS:
            raise ValueError(f"cannot record {record!r}")
        self.neuron_model, self.params, self.name, self.record = neuron_model, params, name, record
        self.max_atoms_per_core = 250
        self.spikes: dict[int, list[int]] | None = None

    def set_max_atoms_per_core(self, max_atoms_per_core: int) -> None:
        self.max_atoms_per_core = integer(max_atoms_per_core, "max_atoms_per_core", 1, 250)

    def get_spikes(self) -> dict[int, list[int]]:
        if "spikes" not in self.record:
            raise RuntimeError(f"{self.name}: spikes were not recorded")
        if self.spikes is None:
            raise RuntimeError(f"{self.name}: nothing has run")
        return self.spikes

    def float32(self, key: str, default: float) -> np.ndarray:
        value = np.asarray(self.params.get(key, default))
        if value.dtype.kind not in "fiu" or value.shape not in ((), (self.size,)) or not np.isfinite(value).all():
            raise ValueError(f"{self.name}: {key} is {value!r}: a number, or one for each of {self.size} neurons")
        return np.broadcast_to(value.astype(np.float32), self.size)

    def validate(self) -> None:
        if self.neuron_model == "spike_list":
            for neuron, times in self.params.items():
                integer(neuron, "source neuron", 0, self.size - 1)
                checked = [integer(time, "spike time", 0, 2**31) for time in times]
                if checked != sorted(set(checked)):
                    raise ValueError(f"{self.name}: spike times {times} of neuron {neuron}")
            return
        known = MODELS[self.neuron_model] or set()
        if set(self.params) - known:
            raise ValueError(f"{self.name}: {self.neuron_model} has no parameters {set(self.params) - known}")
        for key in known - {"reset"}:
            self.float32(key, 0.0)
        for key in ("threshold", "alpha_decay", "reset"):
            if key not in self.params:
                raise ValueError(f"{self.name}: {key} is missing")
        if self.params["reset"] not in RESETS:
            raise ValueError(f"{self.name}: no reset {self.params['reset']!r}")


class Projection:
    def __init__(self, pre: Population, post: Population, connections: Any) -> None:
        if not isinstance(pre, Population) or not isinstance(post, Population):
            raise TypeError("a projection joins two populations")
        if post.neuron_model == "spike_list":
            raise ValueError("a spike list receives nothing")
        weight, delay = (127, 0) if post.neuron_model.endswith("no_delay") else (15, 7)
        self.pre, self.post = pre, post
        self.connections = []
        for row in connections:
            if len(row) != 4:
                raise ValueError(f"a connection is [pre, post, weight, delay], not {row!r}")
            self.connections.append(
                (
                    integer(row[0], "pre", 0, pre.size - 1),
                    integer(row[1], "post", 0, post.size - 1),
                    integer(row[2], f"weight into {post.neuron_model}", -weight, weight),
                    integer(row[3], f"delay into {post.neuron_model}", 0, delay),
                )
            )
        if not self.connections:
            raise ValueError("a projection without connections")


class Network:
    def __init__(self, name: str = "") -> None:
        self.name = name
        self.populations: list[Population] = []
        self.projections: list[Projection] = []

    def add(self, *things: Any) -> None:
        for thing in things:
            if isinstance(thing, Population):
                self.populations.append(thing)
            elif isinstance(thing, Projection):
                self.projections.append(thing)
            else:
                raise TypeError(f"cannot add a {type(thing).__name__}")

    def reset(self) -> None:
        for population in self.populations:
            population.spikes = None

    def validate(self) -> None:
        for population in self.populations:
            population.validate()
        if len({id(population) for population in self.populations}) != len(self.populations):
            raise ValueError("a population was added twice")
        for projection in self.projections:
            if projection.pre not in self.populations or projection.post not in self.populations:
                raise ValueError("a projection between populations that were not added")
        for population in self.populations:
            if population.neuron_model != "spike_list":
                self._check_memory(population)

    def _check_memory(self, population: Population) -> None:
        """Four bytes for every synapse and for every source neuron, on each of the population's cores."""
        into = [projection for projection in self.projections if projection.post is population]
        used: dict[int, int] = {}
        for projection in into:
            for _, post, _, _ in projection.connections:
                core = post // population.max_atoms_per_core
                used[core] = used.get(core, 0) + 4
        rows = 4 * sum(projection.pre.size for projection in into)
        for core, size in used.items():
            if size + rows > SYNAPSE_MEMORY:
                raise MemoryError(f"{population.name}: core {core} needs {size + rows} bytes")

    def cores(self) -> int:
        return sum(-(-population.size // population.max_atoms_per_core) for population in self.populations)
