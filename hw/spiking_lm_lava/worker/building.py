"""From the record of a network to Lava processes. Runs in the worker, where Lava can be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.proc.dense.process import DelayDense, Dense
from lava.proc.graded.process import GradedReluVec, GradedVec, InvSqrt, NormVecDelay
from lava.proc.lif.process import LIF, LIFRefractory, LIFReset, TernaryLIF
from lava.proc.prodneuron.process import ProdNeuron
from lava.proc.rf.process import RF
from lava.proc.sdn.process import ActivationMode, Delta, Sigma, SigmaDelta
from lava.proc.sparse.process import Sparse
from lava.utils.weightutils import SignMode
from lava_cell.process import CellProcess  # type: ignore[import-not-found]
from lava_file_probe.process import FileProbe  # type: ignore[import-not-found]
from lava_file_sink.process import FileSink  # type: ignore[import-not-found]
from lava_file_source.process import FileSource  # type: ignore[import-not-found]
from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

Node = dict[str, Any]
"""Fields and arrays of a node, and ``path``, its file, of a source or a sink."""


def _synapse(node: Node) -> Any:
    stored: dict[str, Any] = {
        "weight_exp": node["weight_exp"],
        "num_weight_bits": node["num_weight_bits"],
        "num_message_bits": 24 if node["graded"] else 0,  # only whether it is 0 makes a difference
    }
    if node["sign_mode"] != "auto":
        stored["sign_mode"] = SignMode[node["sign_mode"]]
    weights = node["weight"].astype(np.int32)
    if node["form"] == "sparse":
        return Sparse(weights=csr_matrix(weights), **stored)
    if node["form"] == "delay":
        return DelayDense(weights=weights, delays=node["delay"].astype(int), **stored)
    return Dense(weights=weights, **stored)


def _lif(node: Node) -> Any:
    given = {name: node[name] for name in ("du", "dv", "bias_mant", "bias_exp", "u", "v")}
    if node["vth_lo"] is not None:
        return TernaryLIF(shape=_shape(node), vth_hi=node["vth"], vth_lo=node["vth_lo"], **given)
    if node["reset_interval"]:
        resets = {"reset_interval": node["reset_interval"], "reset_offset": node["reset_offset"]}
        return LIFReset(shape=_shape(node), vth=node["vth"], **resets, **given)
    return LIF(shape=_shape(node), vth=node["vth"], **given)


def _float_lif(node: Node) -> Any:
    given = {"du": node["du"], "dv": node["dv"], "vth": node["vth"], "bias_mant": node["bias"]}
    if node["refractory"]:
        return LIFRefractory(shape=_shape(node), refractory_period=node["refractory"], **given)
    return LIF(shape=_shape(node), **given)


def _graded(node: Node) -> Any:
    return (GradedReluVec if node["relu"] else GradedVec)(shape=_shape(node), vth=node["vth"])


def _rf(node: Node) -> Any:
    scales = {"state_exp": node["state_exp"], "decay_bits": node["decay_bits"]}
    process = RF(shape=_shape(node), period=10, alpha=0.1, vth=1, **scales)
    return _with(process, node, "sin_decay", "cos_decay", "vth")


def _delta(node: Node) -> Any:
    scales = {name: node[name] for name in ("spike_exp", "state_exp", "cum_error")}
    return _with(Delta(shape=_shape(node), vth=0, **scales), node, "vth")


def _sigma_delta(node: Node) -> Any:
    scales = {name: node[name] for name in ("spike_exp", "state_exp", "cum_error")}
    mode = ActivationMode.RELU if node["relu"] else ActivationMode.UNIT
    process = SigmaDelta(shape=_shape(node), vth=0, bias=np.zeros(node["size"]), act_mode=mode, **scales)
    return _with(process, node, "vth", "bias")


def _cell(node: Node) -> Any:
    """Any cell; ``initial.NAME`` are its states, and whatever is no vector or number is none of its function's."""
    state = {name.partition(".")[2]: value for name, value in node.items() if name.startswith("initial.")}
    fields = {name: value for name, value in node.items() if isinstance(value, (int, np.ndarray)) and "." not in name}
    states = tuple(state[name].astype(np.int32) for name in node["layout"]["states"])
    return CellProcess(layout=node["layout"], fields=fields, state=state, states=states)


def _with(process: Any, node: Node, *names: str) -> Any:
    """Give variables the values of the node, which are those after the constructor's scaling."""
    for name in names:
        getattr(process, name).init = node[name]
    return process


def _shape(node: Node) -> tuple[int]:
    return (node["size"],)


def _netx(node: Node) -> Any:
    from lava_dl import network  # type: ignore[import-not-found]

    return network(node)


BUILDERS: dict[str, Callable[[Node], Any]] = {
    "source": lambda node: FileSource(shape=_shape(node), path=node["path"]),
    "sink": lambda node: FileSink(shape=_shape(node), path=node["path"]),
    "synapse": _synapse,
    "lif": _lif,
    "rf": _rf,
    "graded": _graded,
    "product": lambda node: ProdNeuron(shape=_shape(node), vth=node["vth"], exp=node["exp"]),
    "normalise": lambda node: NormVecDelay(shape=_shape(node), vth=node["vth"]),
    "inv_sqrt": lambda node: InvSqrt(shape=_shape(node)),
    "sigma": lambda node: Sigma(shape=_shape(node)),
    "delta": _delta,
    "sigma_delta": _sigma_delta,
    "netx": _netx,
    "cell": _cell,
    "float_lif": _float_lif,
    "float_synapse": lambda node: Dense(weights=node["weight"]),
}
"""By the kind of a node; the fields are those of the classes of ``spiking_lm_lava``."""


def build(
    record: dict[str, Any], arrays: dict[str, Any], files: dict[str, str], loihi2: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Return a process of the network, from which Lava finds all others, and the configuration of its runs.

    ``files`` has the path of each source and sink, and of each state to watch, ``"node.state"``. ``loihi2`` says where
    the chip is; without it, Lava simulates one.
    """
    processes: dict[str, Any] = {}
    joints: dict[str, Any] = {}
    """Ports that stand for those of sources and sinks, where a chip is in between."""
    layouts = {node["name"]: node.get("layout") for node in record["nodes"]}

    def port(node: str, of: str, as_called: str, name: str) -> Any:
        """Return a port or a state; those of cells are numbered."""
        layout = layouts[node]
        return getattr(processes[node], name if layout is None else f"{as_called}{list(layout[of]).index(name)}")

    for node in record["nodes"]:
        name = node["name"]
        mine = {key.partition(".")[2]: array for key, array in arrays.items() if key.partition(".")[0] == name}
        fields = {key: array.astype(np.int64) if array.dtype.kind == "i" else array for key, array in mine.items()}
        processes[name] = BUILDERS["cell" if "layout" in node else node["kind"]](
            {**node, **fields, "path": files.get(name)}
        )
    configured = Loihi2SimCfg(select_tag="fixed_pt")
    if loihi2 is not None:
        from loihi2 import configuration, off_chip, onto_chip  # type: ignore[import-not-found]

        configured = configuration(loihi2)
        for node in record["nodes"]:
            if node["kind"] == "source":
                joints[f"{node['name']}.s_out"] = onto_chip(processes[node["name"]].s_out)
            elif node["kind"] == "sink":
                joints[f"{node['name']}.a_in"] = off_chip(processes[node["name"]].a_in)
    for edge in record["edges"]:
        source, out = edge["source"].split(".")
        target, into = edge["target"].split(".")
        start = joints[edge["source"]] if edge["source"] in joints else port(source, "sends", "out", out)
        start.connect(joints[edge["target"]] if edge["target"] in joints else port(target, "reads", "in", into))
    for name, path in files.items():
        if "." in name:
            node_name, state = name.split(".")
            variable = port(node_name, "states", "state", state)
            FileProbe(shape=variable.shape, path=path).state.connect_var(variable)
    real = any(node["kind"].startswith("float_") for node in record["nodes"])
    first = next(iter(processes.values()))
    return first, Loihi2SimCfg(select_tag="floating_pt") if real else configured
