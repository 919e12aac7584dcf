"""Writing a network as a netx file, or saying which node has no form there, and why."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spiking_lm.errors import LoweringError
from spiking_lm.files import atomic_write
from spiking_lm_lava.arithmetic import Int, shift
from spiking_lm_lava.graded import Delta, Sigma, SigmaDelta
from spiking_lm_lava.network import Network
from spiking_lm_lava.netx_format import (
    ATTRIBUTE,
    BIAS_EXP,
    MOST_DELAY,
    NO_OTHERS,
    STATE_EXP,
    NetxSettings,
    netx_synapse,
    open_h5py,
)
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.process import Process, Sink, Source, Synapse


@dataclass(frozen=True)
class _Layer:
    """One layer of a file on its way there."""

    neuron: Process
    synapse: Synapse | None = None
    """None: neurons of the input."""
    again: Synapse | None = None


def write_netx(network: Network, path: str | os.PathLike[str]) -> NetxSettings:
    """Write ``network`` as a ``.net`` file, atomically; return what lava-dl has to be told beside it.

    Raises: LoweringError naming the node that has no form there, and why; MissingExtraError; OSError.
    """
    h5py = open_h5py()
    source, layers, sink = _chain(network)
    settings = _settings(source, layers)
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        names: list[list[str | None]] = []
        groups: list[Any] = []
        if layers[0].synapse is not None:
            first = file.create_group("layer/0")
            _text(first, "type", "input")
            first["shape"] = np.array([source.size])
            groups.append(first)
        graded = settings.graded
        for layer in layers:
            group = file.create_group(f"layer/{len(groups)}")
            groups.append(group)
            _write_layer(group, layer, settings, graded)
            graded = not isinstance(layer.neuron, LIF)
            parts = (layer.synapse, layer.neuron, layer.again)
            names.append([part.name if part is not None else None for part in parts])
        file.attrs[ATTRIBUTE] = json.dumps(
            {"settings": asdict(settings), "source": source.name, "sink": sink.name, "layers": names}
        )
    atomic_write(path, content.getvalue())
    return settings


def _chain(network: Network) -> tuple[Source, list[_Layer], Sink]:
    """Follow the one path from source to sink. Raises: LoweringError naming what is beside it."""
    sources, sinks = network.of_kind(Source), network.of_kind(Sink)
    for ends in (sources, sinks):
        if len(ends) != 1:
            names = ", ".join(repr(node.name) for node in ends)
            raise LoweringError(f"{len(ends)} {ends[0].kind if ends else 'end'}s ({names}): netx has one of each")
    source, sink = sources[0], sinks[0]
    assert isinstance(source, Source)
    assert isinstance(sink, Sink)
    for node in network.nodes:
        if not isinstance(node, (Source, Sink, Synapse, LIF, Delta, Sigma)):
            raise node.error("netx has no such process", NO_OTHERS)
    layers: list[_Layer] = []
    here: Process = source
    while True:
        ahead = [network[name] for name in network.successors(here.name)]
        recurrent = [node for node in ahead if isinstance(node, Synapse) and here is not source]
        again = [node for node in recurrent if [*network.successors(node.name)] == [here.name]]
        if again:
            if layers[-1].synapse is None or len(again) > 1:
                what = "more than one recurrent synapse" if len(again) > 1 else "a recurrent synapse at the input"
                raise here.error(f"it has {what}, and netx no place for it", NO_OTHERS)
            layers[-1] = _Layer(here, layers[-1].synapse, again[0])
            ahead.remove(again[0])
        _arrives_alone(network, here, layers[-1] if layers else None)
        if len(ahead) != 1:
            names = ", ".join(repr(node.name) for node in ahead) or "nothing"
            raise here.error(f"it feeds {names}: in netx every layer feeds the next one alone", NO_OTHERS)
        (following,) = ahead
        if following is sink:
            break
        synapse = None
        if isinstance(following, Synapse):
            synapse = following
            (behind, *others) = [network[name] for name in network.successors(synapse.name)]
            _arrives_alone(network, synapse, None)
            if others or isinstance(behind, (Synapse, Sink)):
                raise synapse.error("it does not feed one layer of neurons alone", "netx ends every layer in neurons")
            following = behind
        elif here is not source:
            raise following.error(f"it reads {here.name!r} without a synapse in between", NO_OTHERS)
        layers.append(_Layer(following, synapse))
        if len(layers) > len(network.nodes):
            raise following.error("it is part of a loop through several layers", NO_OTHERS)
        here = following
    if not layers:
        raise source.error("it feeds the sink: there is no layer to write", NO_OTHERS)
    written = {part.name for layer in layers for part in (layer.neuron, layer.synapse, layer.again) if part is not None}
    for node in network.nodes:
        if node.name not in written and node not in (source, sink):
            raise node.error("it is not on the path from source to sink", NO_OTHERS)
    return source, layers, sink


def _arrives_alone(network: Network, node: Process, layer: _Layer | None) -> None:
    """Refuse a node that reads more than the chain. Raises: LoweringError naming it and what it reads."""
    known = 1 + (layer is not None and layer.again is not None)
    for port in node.reads:
        edges = network.arriving(node.name, port)
        if len(edges) > known:
            names = ", ".join(repr(edge.source.partition(".")[0]) for edge in edges)
            raise node.error(f"it reads {names}: netx has no layer with several inputs and no skip connection")


def _settings(source: Source, layers: list[_Layer]) -> NetxSettings:
    """Return what all layers agree on. Raises: LoweringError naming the first that does not."""
    interval, offset, spike_exp = 0, 0, 6
    lifs = [(k, layer.neuron) for k, layer in enumerate(layers) if isinstance(layer.neuron, LIF)]
    if lifs and lifs[0][1].reset_interval:
        first, node = lifs[0]
        interval = node.reset_interval
        offset = (node.reset_offset - 1 - first) % interval
    for k, node in lifs:
        due = (offset + 1 + k) % interval if interval else 0
        if node.reset_interval != interval or (interval and node.reset_offset % interval != due):
            raise node.error(
                f"it resets every {node.reset_interval} steps, at {node.reset_offset}; netx resets all layers, each a "
                f"step after the one before: here every {interval} steps, at {due}"
            )
    deltas = [layer.neuron for layer in layers if isinstance(layer.neuron, Delta)]
    for delta in deltas:
        spike_exp = deltas[0].spike_exp
        if delta.spike_exp != spike_exp:
            raise delta.error(f"spike_exp is {delta.spike_exp}, and {spike_exp} before it: netx has one for all")
    graded = layers[0].synapse is not None and layers[0].synapse.graded
    return NetxSettings(source.low, source.high, graded, interval, offset, spike_exp)


def _write_layer(group: Any, layer: _Layer, settings: NetxSettings, graded: bool) -> None:
    neuron, synapse, again = layer.neuron, layer.synapse, layer.again
    _text(group, "type", "input" if synapse is None else "dense" if again is None else "dense_rec")
    group["shape"] = np.array([neuron.size])
    if synapse is not None:
        for what, value in _matrices(synapse, again, neuron, graded).items():
            group[what] = value
    words, bias = _neuron(neuron, settings, at_input=synapse is None)
    inside = group.create_group("neuron")
    for key, value in words.items():
        if isinstance(value, str):
            _text(inside, key, value)
        else:
            inside[key] = value
    if synapse is None:
        group["weight"], group["bias"] = 1, 0  # what lava-dl's callers make of values before they send them: nothing
    elif bias.any():
        group["bias"] = bias.astype(np.int32)


def _text(group: Any, name: str, text: str) -> None:
    group.create_dataset(name, (1,), "S10", [text.encode("ascii")])


def _matrices(synapse: Synapse, again: Synapse | None, neuron: Process, graded: bool) -> dict[str, Any]:
    """Return what a file has about the synapses of a layer. Raises: LoweringError naming the one that it cannot be."""
    if graded and not synapse.graded:
        raise synapse.error("it reads only whether there is a spike, and netx sends it payloads", "graded=True")
    weights = whole_weights(synapse)
    found: dict[str, Any] = {"inFeatures": synapse.inputs, "outFeatures": synapse.size, "weight": weights}
    if again is None:
        netx_synapse(synapse.name, weights)
        if synapse.form == "delay":
            if synapse.longest_delay > MOST_DELAY:
                raise synapse.error(f"a delay of {synapse.longest_delay}, and lava-dl clamps those above {MOST_DELAY}")
            found["delay"] = synapse.delay
    else:
        for node in (synapse, again):
            if node.form == "delay":
                raise node.error("delays in a layer with a recurrent synapse: lava-dl forgets its weight exponent")
        if not isinstance(neuron, LIF) and not (graded and again.graded):
            raise again.error("lava-dl reads payloads here only where the input of the layer has them too")
        found["weight_rec"] = whole_weights(again)
        both = np.hstack((weights, found["weight_rec"]))
        netx_synapse(synapse.name, both, columns=slice(None, synapse.inputs))
        netx_synapse(again.name, both, columns=slice(synapse.inputs, None))
    for name in ("weight", "weight_rec"):
        if name in found:
            found[name] = found[name].astype(np.int32)
    return found


def _neuron(node: Process, settings: NetxSettings, *, at_input: bool) -> tuple[dict[str, Any], Int]:
    """Return a file's words for a layer's neurons, and their biases. Raises: LoweringError naming what has none."""
    if isinstance(node, LIF):
        if node.vth_lo is not None:
            raise node.error("it is ternary, which netx does not know")
        if node.u.any() or node.v.any():
            raise node.error("it starts with currents or membranes other than 0, which netx cannot say")
        if (node.bias % (1 << BIAS_EXP)).any() or (at_input and node.bias.any()):
            what = "the neurons of an input have none" if at_input else f"netx counts in {1 << BIAS_EXP}s"
            raise node.error(f"a bias of {int(node.bias[np.argmax(node.bias != 0)])}: {what}")
        bias = node.bias >> BIAS_EXP
        low, high = LIF.limits["bias_mant"]
        if bias.min() < low or bias.max() > high:
            raise node.error(f"a bias of {int(bias[np.argmax(np.abs(bias))])} times {1 << BIAS_EXP}: above 13 bits")
        words = {"type": "CUBA", "iDecay": node.du + 1, "vDecay": node.dv, "vThMant": node.vth}
        return {**words, "refDelay": 1, "gradedSpike": False}, bias
    if isinstance(node, Sigma):
        if at_input:
            raise node.error("netx has sigma neurons behind a synapse alone")
        return {"type": "SDNN", "vThMant": 0, "sigma_output": True}, np.zeros(node.size, np.int64)
    assert isinstance(node, Delta)
    if isinstance(node, SigmaDelta) == at_input:
        raise node.error(f"at {'the input' if at_input else 'a synapse'} netx has {'' if at_input else 'sigma-'}deltas")
    if node.state_exp != STATE_EXP or node.cum_error or (isinstance(node, SigmaDelta) and not node.relu):
        raise node.error(
            f"state_exp {node.state_exp}, cum_error {node.cum_error}, relu {getattr(node, 'relu', True)}: netx has "
            f"{STATE_EXP}, False, True"
        )
    scale = settings.spike_exp + STATE_EXP
    bias = node.bias if isinstance(node, SigmaDelta) else np.zeros(node.size, np.int64)
    for what, value in (("vth", np.array([node.vth])), ("bias", bias)):
        if (value % (1 << scale)).any():
            raise node.error(f"{what} {int(value[np.argmax(value != 0)])} is no multiple of {1 << scale}, netx's unit")
    return {"type": "SDNN", "vThMant": node.vth >> scale}, bias >> scale


def whole_weights(synapse: Synapse) -> Int:
    """Return the integers that a synapse multiplies with. Raises: LoweringError where its exponent leaves a rest."""
    rest = np.argwhere(synapse.prepared % (1 << max(-synapse.weight_exp, 0)))
    if len(rest):
        at = tuple(rest[0].tolist())
        raise synapse.error(
            f"weight {int(synapse.prepared[at])} at {at} with weight_exp {synapse.weight_exp} is no whole number, and "
            "netx has no other",
            "a greater weight_exp, and a threshold that is as much greater",
        )
    return shift(synapse.prepared, synapse.weight_exp)
