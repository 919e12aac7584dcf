"""Reading a netx file as the network that lava-dl 0.6.0 makes of it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import DataError, LoweringError, SpikingLMError
from spiking_lm_lava.arithmetic import Int
from spiking_lm_lava.graded import Delta, Sigma, SigmaDelta
from spiking_lm_lava.network import Edge, Network
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


def read_netx(path: str | os.PathLike[str], settings: NetxSettings | None = None) -> Network:
    """Read a ``.net`` file as the network that lava-dl makes of it.

    ``settings`` are what lava-dl is told beside the file; None takes :func:`stated_settings`. Values of sigma-delta
    neurons have no bound that follows from a file (what a message loses to its 6 bits adds up), so that a network of
    those is checked node by node, not as a whole.

    Raises: DataError for what is no such file; LoweringError for layers that have no form here; MissingExtraError.
    """
    with _opened(Path(path)) as file:
        noted = _noted(file)
        stated = settings or NetxSettings(**noted.get("settings", {}))
        return _Reader(Path(path), file["layer"], noted, stated).read()


def stated_settings(path: str | os.PathLike[str]) -> NetxSettings:
    """Return the settings that :func:`write_netx` noted in a file, else the defaults. Raises: DataError."""
    with _opened(Path(path)) as file:
        return NetxSettings(**_noted(file).get("settings", {}))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    h5py = open_h5py()
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except SpikingLMError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a netx file: {type(error).__name__}: {error}") from None


def _noted(file: Any) -> dict[str, Any]:
    """Return what :func:`write_netx` wrote beside the layers; of another's file, nothing."""
    found: dict[str, Any] = json.loads(file.attrs.get(ATTRIBUTE, "{}"))
    return found


class _Reader:
    """One open file."""

    def __init__(self, path: Path, group: Any, noted: dict[str, Any], settings: NetxSettings) -> None:
        self.path, self.group, self.noted, self.settings = path, group, noted, settings

    def read(self) -> Network:
        count, given, graded = len(self.group), 0, self.settings.graded
        nodes: list[Process] = []
        edges: list[Edge] = []
        source_name = self.noted.get("source", "input")
        here, size = source_name, 0
        for i in range(count):
            layer = self.group[str(i)]
            kind = _read_text(layer["type"])
            shape = np.atleast_1d(layer["shape"][()])
            if kind not in ("input", "dense", "dense_rec") or len(shape) != 1:
                raise LoweringError(f"{self.path}: layer {i} is {kind!r} of shape {tuple(shape)}", hint=NO_OTHERS)
            if kind == "input":
                if i:
                    raise LoweringError(f"{self.path}: layer {i} is an input, which only the first can be")
                size = int(shape[0])
                if "neuron" not in layer:
                    continue
            synapse, neuron, again = self._names(given)
            width = int(shape[0])
            if kind != "input":
                ways = self._synapses(layer, synapse, again if kind == "dense_rec" else None, width, graded)
                size = size or ways[0].inputs
                nodes += ways
                edges.append(Edge(here, synapse))
                here = synapse
                if kind == "dense_rec":
                    edges += [Edge(neuron, again), Edge(again, neuron)]
            nodes.append(self._neuron(layer, neuron, width, given, at_input=kind == "input"))
            edges.append(Edge(here, neuron))
            here, given, graded = neuron, given + 1, not isinstance(nodes[-1], LIF)
        sink = self.noted.get("sink", "output")
        nodes = [Source(source_name, size, self.settings.low, self.settings.high), *nodes, Sink(sink, nodes[-1].size)]
        unbounded = any(isinstance(node, (Delta, Sigma)) for node in nodes)
        for node in nodes:
            node.check()
        return Network(tuple(nodes), (*edges, Edge(here, sink)), checked=not unbounded)

    def _names(self, given: int) -> tuple[str, str, str]:
        noted: Sequence[Sequence[str | None]] = self.noted.get("layers", ())
        defaults = (f"synapse{given}", f"neurons{given}", f"recurrent{given}")
        chosen = noted[given] if given < len(noted) else defaults
        first, second, third = (name or default for name, default in zip(chosen, defaults, strict=True))
        return first, second, third

    def _synapses(self, layer: Any, name: str, again: str | None, size: int, graded: bool) -> list[Synapse]:
        if "weight" not in layer or not hasattr(layer["weight"], "shape"):
            raise LoweringError(f"{self.path}: {layer.name} has complex weights, of resonate-and-fire neurons")
        weight = _truncated(layer["weight"][()]).reshape(size, -1)
        if again is None:
            form: dict[str, Any] = {}
            if "delay" in layer:
                form = {"form": "delay", "delay": self._delays(layer, weight.shape)}
            return [netx_synapse(name, weight, graded=graded, **form)]
        if "delay" in layer:
            raise LoweringError(f"{self.path}: {layer.name} has delays and a recurrent synapse", hint=NO_OTHERS)
        both = np.hstack((weight, _truncated(layer["weight_rec"][()]).reshape(size, size)))
        inputs = weight.shape[1]
        first = netx_synapse(name, both, columns=slice(None, inputs), graded=graded)
        return [first, netx_synapse(again, both, columns=slice(inputs, None), graded=graded)]

    def _delays(self, layer: Any, shape: tuple[int, ...]) -> Int:
        """Return one delay per weight: a file has one, one per row, or one per column, in this order of preference."""
        given = _truncated(layer["delay"][()])
        if given.max(initial=0) > MOST_DELAY or given.min(initial=0) < 0:
            raise LoweringError(f"{self.path}: {layer.name} has delays beyond 0 to {MOST_DELAY}")
        if given.ndim == 1 and given.shape[0] == shape[0]:
            given = given[:, None]
        return np.array(np.broadcast_to(given, shape))

    def _neuron(self, layer: Any, name: str, size: int, position: int, *, at_input: bool) -> Process:
        if "neuron" not in layer:
            raise LoweringError(f"{self.path}: {layer.name} has no neurons", hint="export it with them")
        words = layer["neuron"]
        kind = _read_text(words["type"])
        bias = np.zeros(size, np.int64)
        if "bias" in layer and not at_input:
            bias = np.array(np.broadcast_to(_truncated(layer["bias"][()]).reshape(-1), size))
        s = self.settings
        if kind in ("CUBA", "LOIHI"):
            reset: dict[str, Any] = {"reset_interval": s.reset_interval, "reset_offset": s.reset_offset + 1 + position}
            return LIF(
                name,
                size,
                du=int(words["iDecay"][()]) - 1,
                dv=int(words["vDecay"][()]),
                vth=int(words["vThMant"][()]),
                bias_mant=bias,
                bias_exp=BIAS_EXP,
                **(reset if s.reset_interval else {}),
            )
        if kind != "SDNN":
            raise LoweringError(f"{self.path}: {layer.name} has {kind!r} neurons", hint=NO_OTHERS)
        if "sigma_output" in words and not at_input:
            if bias.any():
                raise LoweringError(f"{self.path}: {layer.name} has sigma neurons with biases, which lava-dl has not")
            return Sigma(name, size)
        scale = s.spike_exp + STATE_EXP
        exponents: dict[str, Any] = {"spike_exp": s.spike_exp, "state_exp": STATE_EXP}
        vth = int(words["vThMant"][()]) << scale
        if at_input:
            return Delta(name, size, vth=vth, **exponents)
        return SigmaDelta(name, size, vth=vth, bias=bias << scale, **exponents)


def _read_text(item: Any) -> str:
    value = item[()] if not item.shape else item[0]
    return bytes(value).decode("ascii")


def _truncated(array: NDArray[Any]) -> Int:
    """As lava-dl reads numbers: what is behind the point is cut off."""
    return np.asarray(array).astype(np.int64)
