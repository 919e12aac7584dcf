"""Cases of conformance: a ``.npz`` file that Lava wrote, as a network, what goes in, and what must come out.

The format is that of the golden files: ``meta``, JSON text, says what was built; every other array has time as its last
axis, column j of Lava's step j + 1; ``u`` and ``v`` are states after the step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import DataError, SpikingLMError
from spiking_lm_lava.floating import FloatLIF, FloatSynapse
from spiking_lm_lava.graded import Delta, GradedVec, InvSqrt, NormVecDelay, ProdNeuron, Sigma, SigmaDelta
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.neurons import LIF, ResonateAndFire
from spiking_lm_lava.process import Process, Sink, Source, Synapse

Array = NDArray[Any]

FLOAT_TOLERANCE = 1e-12
"""Of arrays that are real numbers; whole numbers are equal or not."""


@dataclass(frozen=True)
class Case:
    """One file: a network, its inputs by source ``(T, n)``, and what is expected."""

    name: str
    network: Network
    inputs: dict[str, Array]
    expected: dict[str, tuple[str, Array]]
    """By the array's name in the file: a sink, or a state ``"node.state"``, and its rows ``(T, n)``."""

    @property
    def watch(self) -> list[str]:
        """The states that are expected."""
        return [where for where, _ in self.expected.values() if "." in where]


def read_case(path: Path) -> Case:
    """Read a case. Raises: DataError naming the file that is no case, and what is wrong with it."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        if meta["kind"] not in _BUILDERS:
            raise ValueError(f"kind {meta['kind']!r} is not one of {', '.join(_BUILDERS)}")
        nodes, edges, inputs, expected = _BUILDERS[meta["kind"]](meta, arrays)
        network = Network(tuple(nodes), tuple(Edge(source, target) for source, target in edges), checked=False)
        return Case(
            path.stem,
            network,
            {name: arrays[key].T for name, key in inputs.items()},
            {key: (where, arrays[key].T) for key, where in expected.items()},
        )
    except (SpikingLMError, OSError, KeyError, ValueError, TypeError, EOFError, AttributeError, BadZipFile) as error:
        what = error.message if isinstance(error, SpikingLMError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a case of conformance ({what})") from error


Parts = tuple[list[Process], list[tuple[str, str]], dict[str, str], dict[str, str]]
"""Nodes, edges, source -> array, array -> sink or state."""


def _layer(meta: dict[str, Any], arrays: dict[str, Array]) -> Parts:
    """One layer of LIF neurons behind a matrix, perhaps with a second one from its own spikes."""
    n, n_in, tag = meta["n"], meta["n_in"], meta["tag"]
    nodes: list[Process] = [Source("x", n_in)]
    edges = [("x", "w"), ("w", "neuron"), ("neuron", "s")]
    if tag == "floating_pt":
        nodes += [
            FloatSynapse("w", n, weight=arrays["w"]),
            FloatLIF(
                "neuron", n, meta["du"], meta["dv"], meta["vth"], arrays["bias_mant"], int(meta["refractory"] or 0)
            ),
        ]
    else:
        stored = {"weight_exp": meta["weight_exp"], "num_weight_bits": meta["num_weight_bits"]}
        delays: dict[str, Any] = {"delay": arrays["delays"]} if meta["conn"] == "delay" else {}
        graded = meta["num_message_bits"] > 0
        form, mode = meta["conn"], meta["sign_mode"]
        nodes.append(Synapse("w", n, arrays["w"], sign_mode=mode, graded=graded, form=form, **stored, **delays))
        if meta["recurrent"]:
            ternary = meta["kind"] == "tern"
            nodes.append(Synapse("w_rec", n, arrays["w_rec"], sign_mode="auto", graded=ternary, **stored))
            edges += [("neuron", "w_rec"), ("w_rec", "neuron")]
        zeros = np.zeros(n, np.int64)
        interval, offset = meta["reset"] or (0, 0)
        nodes.append(
            LIF(
                "neuron",
                n,
                du=meta["du"],
                dv=meta["dv"],
                vth=meta["vth"],
                vth_lo=meta["vth_lo"],
                bias_mant=arrays["bias_mant"],
                bias_exp=meta["bias_exp"],
                u=arrays.get("u0", zeros),
                v=arrays.get("v0", zeros),
                reset_interval=interval,
                reset_offset=offset,
            )
        )
    nodes.append(Sink("s", n))
    return nodes, edges, {"x": "x"}, {"s": "s", "u": "neuron.u", "v": "neuron.v"}


def _mlp(meta: dict[str, Any], arrays: dict[str, Array]) -> Parts:
    nodes: list[Process] = [Source("x", meta["sizes"][0])]
    edges: list[tuple[str, str]] = []
    expected: dict[str, str] = {}
    before = "x"
    for i, layer in enumerate(meta["layers"]):
        size = meta["sizes"][i + 1]
        nodes += [
            Synapse(f"w{i}", size, arrays[f"w{i}"], sign_mode=meta["sign_mode"], weight_exp=meta["weight_exp"]),
            LIF(f"n{i}", size, bias_mant=arrays[f"b{i}"], bias_exp=meta["bias_exp"], **layer),
            Sink(f"s{i}", size),
        ]
        edges += [(before, f"w{i}"), (f"w{i}", f"n{i}"), (f"n{i}", f"s{i}")]
        expected |= {f"s{i}": f"s{i}", f"v{i}": f"n{i}.v"}
        before = f"n{i}"
    return nodes, edges, {"x": "x"}, expected


def _graded(meta: dict[str, Any], arrays: dict[str, Array]) -> Parts:
    n, n_in = arrays["w"].shape
    nodes: list[Process] = [
        Source("x", n_in),
        Synapse("w", n, arrays["w"], sign_mode=meta["sign_mode"], weight_exp=meta["weight_exp"], graded=True),
        GradedVec("neuron", n, vth=meta["vth"], relu=meta["kind"] == "gradedrelu"),
        Sink("s", n),
    ]
    return nodes, [("x", "w"), ("w", "neuron"), ("neuron", "s")], {"x": "x"}, {"s": "s"}


def _product(meta: dict[str, Any], arrays: dict[str, Array]) -> Parts:
    n = len(arrays["x1"])
    nodes = [Source("x1", n), Source("x2", n), ProdNeuron("neuron", n, vth=meta["vth"], exp=meta["exp"]), Sink("s", n)]
    edges = [("x1", "neuron.a_in1"), ("x2", "neuron.a_in2"), ("neuron", "s")]
    return nodes, edges, {"x1": "x1", "x2": "x2"}, {"s": "s"}


def _sigma_delta(meta: dict[str, Any], arrays: dict[str, Array]) -> Parts:
    n, n_in = arrays["w"].shape
    shared = {name: meta[name] for name in ("spike_exp", "state_exp", "cum_error")}
    nodes: list[Process] = [
        Source("x", n_in),
        Delta("delta", n_in, vth=meta["vth_delta_var"], **shared),
        Sink("delta_s", n_in),
        Synapse("w", n, arrays["w"], sign_mode="MIXED", weight_exp=meta["weight_exp"], graded=True),
        SigmaDelta("neuron", n, vth=meta["vth_sd_var"], bias=arrays["bias_var"], relu=meta["act"] == "RELU", **shared),
        Sink("s", n),
        Sigma("sigma", n),
        Sink("sigma_out", n),
    ]
    edges = [("x", "delta"), ("delta", "delta_s"), ("delta", "w"), ("w", "neuron")]
    edges += [("neuron", "s"), ("neuron", "sigma"), ("sigma", "sigma_out")]
    states = {f"sd_{name}": f"neuron.{name}" for name in ("sigma", "act", "residue")}
    return nodes, edges, {"x": "x"}, {"delta_s": "delta_s", "s": "s", "sigma_out": "sigma_out", **states}


def _resonators(meta: dict[str, Any], arrays: dict[str, Array]) -> Parts:
    n = len(arrays["x_real"])
    given = {name: meta[name] for name in ("period", "alpha", "vth", "state_exp", "decay_bits")}
    neuron = ResonateAndFire.of("neuron", n, **given)
    if (neuron.sin_decay, neuron.cos_decay) != (meta["sin_decay"], meta["cos_decay"]):
        raise ValueError(f"the decays are {neuron.sin_decay}, {neuron.cos_decay} here")
    nodes = [Source("x_real", n), Source("x_imag", n), neuron, Sink("s", n)]
    edges = [("x_real", "neuron.a_real_in"), ("x_imag", "neuron.a_imag_in"), ("neuron", "s")]
    expected = {"s": "s", "real": "neuron.real", "imag": "neuron.imag"}
    return nodes, edges, {"x_real": "x_real", "x_imag": "x_imag"}, expected


def _norm(meta: dict[str, Any], arrays: dict[str, Array]) -> Parts:
    n = len(arrays["x"])
    ones = np.ones((n, 1), np.int64)
    nodes = [
        Source("x", n),
        NormVecDelay("norm", n),
        Synapse("sum", 1, ones.T, sign_mode="auto", graded=True),
        InvSqrt("root", 1),
        Synapse("spread", n, ones, sign_mode="auto", graded=True),
        Sink("s", n),
        Sink("s2", n),
        Sink("isq", 1),
    ]
    edges = [("x", "norm.a_in1"), ("norm.s2_out", "sum"), ("sum", "root"), ("root", "spread")]
    edges += [("spread", "norm.a_in2"), ("norm.s_out", "s"), ("norm.s2_out", "s2"), ("root", "isq")]
    return nodes, edges, {"x": "x"}, {"s": "s", "s2": "s2", "isq": "isq"}


_BUILDERS: dict[str, Callable[[dict[str, Any], dict[str, Array]], Parts]] = {
    **dict.fromkeys(("lif", "tern", "reset", "refr"), _layer),
    "mlp": _mlp,
    "gradedvec": _graded,
    "gradedrelu": _graded,
    "prod": _product,
    "sdn": _sigma_delta,
    "rf": _resonators,
    "normvec": _norm,
}
