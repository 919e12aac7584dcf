"""LIF networks as py-spinnaker2 objects: the road to the chip itself, to a 48-node board, or to its Brian2 back end.

py-spinnaker2 simulates every population tick by tick with ::

    v = alpha_decay v + i_offset + sum of arriving weights;   spike if v > threshold;   then reset

parameters in float32, weights as small integers, and every spike arrives one tick later at the earliest. So a network
is first *retimed* (each layer runs some ticks behind the input, and edges get whole delays of one tick or more, with
the same spikes) and then *quantised*. The result is a :class:`~spiking_lm.lifnet.LIFNet` again, whose ``run`` says
spike for spike what the chip should do. py-spinnaker2 itself is needed only to build and run it.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import DataError, PluginError, UsageError
from spiking_lm.files import atomic_write
from spiking_lm.hardware import LoweringError
from spiking_lm.lifnet import INPUT, LIFEdge, LIFLayer, LIFNet
from spiking_lm.nir_io import node_names, to_nir
from spiking_lm.records import Finding

INSTALL = (
    "git clone https://gitlab.com/spinnaker2/py-spinnaker2.git && pip install -e py-spinnaker2 "
    "(it is not on PyPI; 'pip install brian2' adds its simulator, a chip needs the binaries its README names)"
)

Executor = Literal["brian2", "chip", "board"]

WEIGHT_LIMITS = {"lif_no_delay": 127, "lif": 15}
"""Largest weight in the synapse words of the two models."""
LONGEST_DELAY = 8
"""Ticks in the synapse word of ``lif``, which stores 0 to 7 for 1 to 8; ``lif_no_delay`` always takes 1."""
ATOMS_PER_CORE = 250
"""Most neurons of the lif family on one core."""
CORE_BYTES = 0x1B000 - 0x10000
"""Memory of a core between the data specification and the log, for routing tables and synapses."""
SYNAPSE_BYTES = ROW_BYTES = 4
"""Assumed, on the safe side: the bits of a synapse would fit two bytes, but its stored size is not documented."""
CORES = {"chip": 148, "board": 148 * 48}
"""Cores that py-spinnaker2 can use."""


@dataclass(frozen=True)
class NativePopulation:
    """Where a layer goes: its neuron model, the neurons per core that fit, and its lag behind the input in ticks."""

    name: str
    model: str
    size: int
    atoms_per_core: int
    lag: int
    scale: float
    """Weights, thresholds and membranes are the network's times this."""

    @property
    def cores(self) -> int:
        """How many cores it takes."""
        return -(-self.size // self.atoms_per_core)


@dataclass(frozen=True)
class NativeNet:
    """A network as it would run on SpiNNaker 2."""

    net: LIFNet
    """With integer weights and delays in ticks; its ``run`` is the arithmetic of the chip."""
    populations: tuple[NativePopulation, ...]
    notes: tuple[str, ...] = ()
    """What is not exactly as in the network that was lowered, beyond the rounding of weights."""

    @property
    def cores(self) -> int:
        """All cores, those that send the input included."""
        return -(-self.net.input_size // ATOMS_PER_CORE) + sum(population.cores for population in self.populations)

    @property
    def ticks_behind(self) -> int:
        """How many ticks after the last input the last layer has seen it."""
        return max(population.lag for population in self.populations)

    def reference(self, spikes: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
        """Return what every layer should answer to ``spikes (T, input_size)``: ``(T, N)``, its lag taken off."""
        given = self.net.check_spikes(spikes)
        padded = np.concatenate([given, np.zeros((self.ticks_behind, *given.shape[1:]), np.bool_)])
        return self._aligned(self.net.run(padded).spikes, len(given))

    def build(self, spikes: NDArray[Any]) -> tuple[Any, dict[str, Any]]:
        """Return the ``spinnaker2.snn.Network`` with ``spikes (T, input_size)`` as its input, and its populations.

        Raises: PluginError, with what installs it, where py-spinnaker2 is missing; DataError.
        """
        snn = _spinnaker2("snn")
        given = _one_stream(self.net, spikes)
        populations = {
            INPUT: snn.Population(
                size=self.net.input_size, neuron_model="spike_list", params=_times(given), name=INPUT, record=[]
            )
        }
        for placed in self.populations:
            layer = self.net[placed.name]
            record = ["spikes"] if layer.name in self.net.outputs else []
            population = snn.Population(
                size=layer.size,
                neuron_model=placed.model,
                params={name: _plain(value) for name, value in _parameters(layer).items()},
                name=layer.name,
                record=record,
            )
            population.set_max_atoms_per_core(placed.atoms_per_core)
            populations[layer.name] = population
        projections = [
            snn.Projection(
                pre=populations[edge.source],
                post=populations[edge.target],
                connections=_connections(edge).tolist(),
            )
            for edge in self.net.edges
            if edge.weight.any()
        ]
        network = snn.Network("spiking-lm")
        network.add(*populations.values(), *projections)
        return network, populations

    def run(
        self, spikes: NDArray[Any], executor: Executor = "brian2", *, address: str | None = None, tick: float = 1e-3
    ) -> dict[str, NDArray[np.bool_]]:
        """Run on ``spikes (T, input_size)``; return the spikes of each output layer, ``(T, N)``, its lag taken off.

        ``executor`` is ``"brian2"``, ``"chip"`` or ``"board"`` (48 nodes), the last two at ``address`` (default: the
        environment's S2_IP or STM_IP), with ticks of ``tick`` seconds.

        Raises: PluginError, with what installs it, where py-spinnaker2 is missing; LoweringError for too many cores;
        UsageError, DataError.
        """
        if executor not in ("brian2", *CORES):
            raise UsageError(f"there is no executor {executor!r}", hint="'brian2', 'chip' or 'board'")
        if self.cores > CORES.get(executor, self.cores):
            larger = "executor='board'" if self.cores <= CORES["board"] else "executor='brian2'"
            raise LoweringError(
                f"the network takes {self.cores} cores, a {executor} has {CORES[executor]}", hint=larger
            )
        network, populations = self.build(spikes)
        steps = len(spikes) + self.ticks_behind
        if executor == "brian2":
            _spinnaker2("brian2_sim").Brian2Backend().run(network, steps)
        else:
            hardware = _spinnaker2("hardware")
            kind, key, variable = {
                "chip": (hardware.SpiNNaker2Chip, "eth_ip", "S2_IP"),
                "board": (hardware.SpiNNcloud48NodeBoard, "stm_ip", "STM_IP"),
            }[executor]
            address = address or os.environ.get(variable)
            kind(**({key: address} if address else {})).run(network, steps, sys_tick_in_s=tick)
        fired = {name: np.zeros((steps, self.net.size(name)), np.bool_) for name in self.net.outputs}
        for name, array in fired.items():
            for neuron, times in populations[name].get_spikes().items():
                array[np.asarray(times, np.int64), int(neuron)] = True
        return self._aligned(fired, len(spikes))

    def _aligned(self, fired: dict[str, NDArray[np.bool_]], steps: int) -> dict[str, NDArray[np.bool_]]:
        lags = {population.name: population.lag for population in self.populations}
        return {name: array[lags[name] : lags[name] + steps] for name, array in fired.items()}


def lower(net: LIFNet) -> NativeNet:
    """Retime and quantise ``net`` for py-spinnaker2, and find how many neurons of each layer fit a core.

    Weights become integers of at most 127, or 15 in layers whose edges need delays, by one factor per layer, which also
    multiplies threshold, offset and membrane. Nothing here needs py-spinnaker2.

    Raises: LoweringError naming the layer or edge that has no form there, and why.
    """
    retimed, lags, notes = retime(net)
    layers: list[LIFLayer] = []
    edges: dict[int, LIFEdge] = {}
    populations: list[NativePopulation] = []
    for layer in retimed.layers:
        into = {index: edge for index, edge in enumerate(retimed.edges) if edge.target == layer.name}
        model = "lif_no_delay" if all(edge.delay == 1 for edge in into.values()) else "lif"
        quantised, weights, scale = _quantise(layer, list(into.values()), WEIGHT_LIMITS[model])
        layers.append(quantised)
        edges |= {
            index: replace(edge, weight=weight, bias=None)
            for (index, edge), weight in zip(into.items(), weights, strict=True)
        }
        atoms = _atoms_per_core(layer.name, weights, layer.size)
        populations.append(NativePopulation(layer.name, model, layer.size, atoms, lags[layer.name], scale))
        if model == "lif":
            notes.append(
                f"layer {layer.name!r}: its edges have delays, so its weights have {WEIGHT_LIMITS[model]} steps"
            )
    lowered = replace(retimed, layers=tuple(layers), edges=tuple(edges[index] for index in sorted(edges)))
    return NativeNet(lowered, tuple(populations), tuple(notes))


def retime(net: LIFNet) -> tuple[LIFNet, dict[str, int], list[str]]:
    """Return a network with the same spikes in which every edge takes at least one step, the lags, and remarks.

    Layer by layer, ``spikes(t + lag)`` of the result are ``spikes(t)`` of ``net``. While a layer waits for its first
    input its drift already acts; it starts from the membrane that makes up for that.

    Raises: LoweringError for a loop with less delay than edges, or an edge that would need a longer delay than a
    synapse can hold.
    """
    lags = _lags(net)
    edges = tuple(replace(edge, delay=edge.delay + lags[edge.target] - lags[edge.source]) for edge in net.edges)
    for edge in edges:
        if edge.delay > LONGEST_DELAY:
            raise LoweringError(
                f"edge {edge} would take {edge.delay} ticks, a synapse holds {LONGEST_DELAY} at most",
                hint="shorten the delay, or the longest path between the two layers",
            )
    notes: list[str] = []
    layers = []
    for layer in net.layers:
        if layer.synapse_decay is not None:
            raise LoweringError(
                f"layer {layer.name!r}: synapses with a current of their own",
                hint="in which order 'lif_curr_exp' updates within a tick is not documented, so its spikes could not "
                "be vouched for; spinnaker2.s2_nir reads such a layer from the file that to_nir writes",
            )
        bias = sum((edge.bias for edge in net.into(layer.name) if edge.bias is not None), np.zeros(layer.size))
        folded = replace(layer, drift=(layer.drift + layer.gain * bias).astype(np.float32))
        layers.append(_head_start(folded, lags[layer.name], notes))
    edges = tuple(replace(edge, bias=None) for edge in edges)
    return replace(net, layers=tuple(layers), edges=edges), lags, notes


def through_nir(native: NativeNet, *, dt: float = 1e-3) -> tuple[Any, list[Any], list[Any]]:
    """Return ``(network, inputs, outputs)`` as ``spinnaker2.s2_nir.from_nir`` builds them from the network's NIR graph.

    Weights go in quantised, and what s2_nir does not read (reset, where membranes start, neurons per core) is set
    afterwards, so that both ways give the same populations. ``inputs[0].params`` is to be set to ``{neuron: [ticks]}``.

    Raises: LoweringError naming what would be lost; PluginError, with what installs it; MissingExtraError.
    """
    for population in native.populations:
        if population.model != "lif_no_delay":
            raise LoweringError(f"layer {population.name!r} has edges with delays, which s2_nir does not read")
    s2_nir = _spinnaker2("s2_nir")
    net, order = native.net, [INPUT, *(layer.name for layer in native.net.layers)]
    # s2_nir gives every edge one tick; in a NIR graph only those that lead back take one. Drifts go as biases, which
    # neurons without a leak have too.
    edges, first = [], {layer.name: layer.drift for layer in net.layers}
    for edge in net.edges:
        delay = int(order.index(edge.source) >= order.index(edge.target))
        edges.append(replace(edge, delay=delay, bias=first.pop(edge.target, None)))
    layers = tuple(replace(layer, drift=np.zeros(layer.size, np.float32)) for layer in net.layers)
    as_net = replace(net, layers=layers, edges=tuple(edges))
    config = s2_nir.ConversionConfig(
        dt=dt,
        output_record=["spikes"],
        conn_delay=0,
        scale_weights=False,
        integrator=s2_nir.IntegratorMethod.FORWARD,
        reset=s2_nir.ResetMethod.ZERO,
    )
    network, inputs, outputs = s2_nir.from_nir(to_nir(as_net, dt=dt), config)
    names = node_names(as_net)
    built = {population.name: population for population in network.populations}
    for placed in native.populations:
        population, parameters = built[names[placed.name]], _parameters(net[placed.name])
        population.params |= {key: _plain(parameters[key]) for key in ("v_init", "v_reset", "reset")}
        population.set_max_atoms_per_core(placed.atoms_per_core)
    return network, inputs, outputs


def write_program(native: NativeNet, path: str | os.PathLike[str], spikes: NDArray[Any]) -> tuple[Path, Path]:
    """Write the network as a plain Python program for py-spinnaker2, and its numbers beside it as ``.npz``.

    ``spikes (T, input_size)`` become its input. Returns both paths. Raises: UsageError unless ``path`` ends in ``.py``.
    """
    script = Path(path)
    if not re.fullmatch(r"[\w.-]+\.py", script.name):
        raise UsageError(f"{script}: not the name of a Python program", hint="letters, digits, _ and -, ending in .py")
    arrays: dict[str, NDArray[Any]] = {"spikes": _one_stream(native.net, spikes)}
    text = "\n".join(_program(native, script, arrays)) + "\n"
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    atomic_write(script.with_suffix(".npz"), content.getvalue())
    atomic_write(script, text)
    return script, script.with_suffix(".npz")


def check_py_spinnaker2() -> list[Finding]:
    """Is py-spinnaker2 there? Everything but the chip itself works without it, so its absence is no fault."""
    if importlib.util.find_spec("spinnaker2") is None:
        return [Finding("py-spinnaker2", "ok", f"not installed; to run on a chip or its Brian2 back end: {INSTALL}")]
    return [Finding("py-spinnaker2", "ok", "installed: LIF networks can run on a chip, a board, or Brian2")]


def _spinnaker2(name: str) -> Any:
    try:
        return importlib.import_module(f"spinnaker2.{name}")
    except ImportError as error:
        raise PluginError(f"py-spinnaker2 cannot be used: {error}", hint=INSTALL) from None


def _lags(net: LIFNet) -> dict[str, int]:
    """Return the least lags that leave every edge at least one tick: longest paths, found by relaxation."""
    lags = {INPUT: 0, **{layer.name: 0 for layer in net.layers}}
    through: dict[str, LIFEdge] = {}
    for _ in range(len(lags)):
        late = [edge for edge in net.edges if lags[edge.source] + 1 - edge.delay > lags[edge.target]]
        for edge in late:
            lags[edge.target] = max(lags[edge.target], lags[edge.source] + 1 - edge.delay)
            through[edge.target] = edge
        if not late:
            return lags
    seen: list[str] = []
    name = late[0].target
    while name not in seen:
        seen.append(name)
        name = through[name].source
    loop = [*reversed(seen[seen.index(name) :])]
    raise LoweringError(
        f"the loop {' -> '.join([*loop, loop[0]])} has less delay than edges, and a spike takes a tick per edge",
        hint="give the edge that leads back a longer delay",
    )


def _head_start(layer: LIFLayer, lag: int, notes: list[str]) -> LIFLayer:
    """Return the layer with the membranes from which ``lag`` steps without input lead to its own ``v_init``."""
    decay, drift, threshold = (np.asarray(x, np.float64) for x in (layer.decay, layer.drift, layer.threshold))
    start = np.asarray(layer.v_init, np.float64)
    limit = np.full(layer.size, np.inf)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for _ in range(lag):
            start = np.where(decay > 0, (start - drift) / decay, 0.0)
        if lag:  # from higher up it would fire at once
            limit = np.where(decay > 0, (threshold - drift) / decay - 1e-6 * np.abs(threshold), np.inf)
    lowered, start = start > limit, np.minimum(start, limit)
    early = replace(layer, v_init=np.clip(start, -1e30, 1e30).astype(np.float32))
    waiting = LIFNet(1, (early,), ()).run(np.zeros((lag, 1)))
    if waiting.spikes[layer.name].any():
        raise LoweringError(
            f"layer {layer.name!r} fires by its drift alone before its first input can reach it",
            hint="make its decay larger than 0, or move the drift into a weight from an input that is always on",
        )
    if lowered.any():
        notes.append(
            f"layer {layer.name!r}: {lowered.sum()} of {layer.size} neurons start below their membrane, from which "
            "they would fire while they wait for input"
        )
    return early


def _quantise(layer: LIFLayer, edges: list[LIFEdge], limit: int) -> tuple[LIFLayer, list[NDArray[np.float32]], float]:
    """Return the layer with a gain of 1 and strict thresholds, its weights as integers, and the factor between."""
    weights = [layer.gain.astype(np.float64)[:, None] * edge.weight for edge in edges]
    largest = max((np.abs(weight).max() for weight in weights), default=0.0)
    scale = float(limit / largest) if largest > 0 else 1.0
    scaled = {
        name: (value.astype(np.float64) * scale).astype(np.float32)
        for name in ("threshold", "drift", "v_reset", "v_init")
        if (value := getattr(layer, name)) is not None
    }
    if layer.compare == ">=":  # the chip compares with >
        scaled["threshold"] = np.nextafter(scaled["threshold"], np.float32(-np.inf))
    quantised = replace(layer, gain=np.ones(layer.size, np.float32), compare=">", **scaled)
    return quantised, [np.rint(weight * scale).astype(np.float32) for weight in weights], scale


def _atoms_per_core(name: str, weights: list[NDArray[np.float32]], size: int) -> int:
    """Return the most neurons of a layer whose synapses fit a core, whichever slice of the layer it holds."""
    synapses = sum((np.count_nonzero(weight, axis=1) for weight in weights), np.zeros(size, np.int64))
    rows = ROW_BYTES * sum(weight.shape[1] for weight in weights)
    for atoms in range(min(size, ATOMS_PER_CORE), 0, -1):
        fullest = int(np.add.reduceat(synapses, np.arange(0, size, atoms)).max())
        if SYNAPSE_BYTES * fullest + rows <= CORE_BYTES:
            return atoms
    raise LoweringError(
        f"layer {name!r}: one neuron with {int(synapses.max())} synapses takes "
        f"{SYNAPSE_BYTES * int(synapses.max()) + rows} bytes of a core's {CORE_BYTES}",
        hint="prune it, or split the layers before it",
    )


def _parameters(layer: LIFLayer) -> dict[str, Any]:
    """Return the parameters of ``lif`` and ``lif_no_delay``; vectors are (N,) float32."""
    return {
        "threshold": layer.threshold,
        "alpha_decay": layer.decay,
        "i_offset": layer.drift,
        "v_init": layer.v_init,
        "v_reset": np.zeros(layer.size, np.float32) if layer.v_reset is None else layer.v_reset,
        "reset": "reset_by_subtraction" if layer.v_reset is None else "reset_to_v_reset",
    }


def _plain(value: Any) -> Any:
    """Return a vector of equal numbers as one number."""
    return float(value[0]) if isinstance(value, np.ndarray) and (value == value[0]).all() else value


def _connections(edge: LIFEdge) -> NDArray[np.int32]:
    """Return rows (source, target, weight, delay); a delay is stored as one tick less than it takes."""
    post, pre = np.nonzero(edge.weight)
    weight = edge.weight[post, pre].astype(np.int32)
    return np.stack([pre, post, weight, np.full_like(weight, edge.delay - 1)], axis=1).astype(np.int32)


def _one_stream(net: LIFNet, spikes: NDArray[Any]) -> NDArray[np.bool_]:
    given = net.check_spikes(spikes)
    if given.ndim != 2:
        raise DataError(f"spikes of shape {given.shape}", hint="the chip runs one stream, (T, inputs), at a time")
    return given


def _times(spikes: NDArray[np.bool_]) -> dict[int, list[int]]:
    return {neuron: np.flatnonzero(spikes[:, neuron]).tolist() for neuron in range(spikes.shape[1])}


_HEAD = '''\
"""A network of LIF neurons for SpiNNaker 2, written by spiking-lm.

It needs numpy and py-spinnaker2 (https://gitlab.com/spinnaker2/py-spinnaker2):

    python {name}.py                      with its Brian2 back end
    python {name}.py chip [ADDRESS]       on a chip, at ADDRESS or the environment's S2_IP
    python {name}.py board [ADDRESS]      on a 48-node board, at ADDRESS or STM_IP

{name}.npz holds the input spikes and the synapses. A spike takes one tick per edge, so a layer answers the input
of tick t at tick t + lag. The answers, with the lag taken off, are written to {name}.answers.npz.
"""

import os
import sys
from pathlib import Path

import numpy as np
from spinnaker2 import snn

HERE = Path(__file__).resolve()
data = np.load(HERE.with_suffix(".npz"))
spikes = data["spikes"]  # (tick, neuron)
TICKS = len(spikes) + {behind}
'''

_TAIL = """
executor = sys.argv[1] if len(sys.argv) > 1 else "brian2"
address = sys.argv[2] if len(sys.argv) > 2 else None
if executor == "brian2":
    from spinnaker2 import brian2_sim

    brian2_sim.Brian2Backend().run(network, TICKS)
else:
    from spinnaker2 import hardware

    if executor == "chip":
        address = address or os.environ.get("S2_IP")
        machine = hardware.SpiNNaker2Chip(eth_ip=address) if address else hardware.SpiNNaker2Chip()
    elif executor == "board":
        address = address or os.environ.get("STM_IP")
        machine = hardware.SpiNNcloud48NodeBoard(stm_ip=address) if address else hardware.SpiNNcloud48NodeBoard()
    else:
        sys.exit(f"unknown executor {executor!r}: brian2, chip or board")
    machine.run(network, TICKS, sys_tick_in_s=1e-3)

answers = {}
for name, (population, lag) in outputs.items():
    fired = np.zeros((TICKS, population.size), bool)
    for neuron, times in population.get_spikes().items():
        fired[np.asarray(times, int), neuron] = True
    answers[name] = fired[lag : lag + len(spikes)]
    print(f"{name}: {answers[name].sum()} spikes of {population.size} neurons in {len(spikes)} ticks")
np.savez_compressed(HERE.with_suffix(".answers.npz"), **answers)
"""


def _program(native: NativeNet, script: Path, arrays: dict[str, NDArray[Any]]) -> Iterator[str]:
    """Yield the lines of the program, and put what they load into ``arrays``."""
    net = native.net
    yield _HEAD.format(name=script.stem, behind=native.ticks_behind)
    variables = {INPUT: "source", **{layer.name: f"layer_{position}" for position, layer in enumerate(net.layers)}}
    yield f"# {net.input_size} inputs, which send the spikes given to them."
    yield f"{variables[INPUT]} = snn.Population("
    yield f"    size={net.input_size},"
    yield '    neuron_model="spike_list",'
    yield "    params={neuron: np.flatnonzero(spikes[:, neuron]).tolist() for neuron in range(spikes.shape[1])},"
    yield f'    name="{INPUT}",'
    yield "    record=[],"
    yield ")"
    for placed in native.populations:
        layer, variable = net[placed.name], variables[placed.name]
        yield ""
        yield f"# {layer.size} neurons on {placed.cores} cores, {placed.lag} ticks behind the input."
        yield f"# Membranes, thresholds and weights are the model's times {placed.scale!r}."
        yield f"{variable} = snn.Population("
        yield f"    size={layer.size},"
        yield f'    neuron_model="{placed.model}",'
        yield "    params={"
        for key, value in _parameters(layer).items():
            plain = _plain(value)
            if isinstance(plain, np.ndarray):
                arrays[f"{variable}_{key}"] = plain
                yield f'        "{key}": data["{variable}_{key}"],'
            else:
                yield f'        "{key}": {plain!r},'
        yield "    },"
        yield f"    name={layer.name!r},"
        yield f"    record={['spikes'] if layer.name in net.outputs else []!r},"
        yield ")"
        yield f"{variable}.set_max_atoms_per_core({placed.atoms_per_core})"
    yield ""
    yield "# Rows of synapses: source, target, weight, delay (0 is one tick)."
    yield "projections = []"
    for position, edge in enumerate(net.edges):
        if edge.weight.any():
            key = f"synapses_{position}"
            arrays[key] = _connections(edge)
            ends = f"pre={variables[edge.source]}, post={variables[edge.target]}"
            yield f'projections.append(snn.Projection({ends}, connections=data["{key}"].tolist()))'
    yield ""
    yield 'network = snn.Network("spiking-lm")'
    yield f"network.add({', '.join(variables.values())}, *projections)"
    lags = {placed.name: placed.lag for placed in native.populations}
    listed = ", ".join(f"{name!r}: ({variables[name]}, {lags[name]})" for name in net.outputs)
    yield f"outputs = {{{listed}}}"
    yield _TAIL.rstrip()
