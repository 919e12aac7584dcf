"""From a model's graph and state dict to a placed program."""

from __future__ import annotations

import numpy as np

from spiking_lm.graph import LMGraph, Op
from spiking_lm.hardware import LoweringError, Program
from spiking_lm.host import check as check_host
from spiking_lm.host import host_model
from spiking_lm.integers import SpikeProduct
from spiking_lm.interfaces import EGRUDynamics, LIFDynamics, SpikingLanguageModel
from spiking_lm.op_parameters import OpParameters
from spiking_lm_spinnaker2.config import SpiNNaker2Config
from spiking_lm_spinnaker2.integer_program import IntegerProgram, place_products
from spiking_lm_spinnaker2.mapping import index_bytes, product_demand
from spiking_lm_spinnaker2.program import SpiNNaker2Program
from spiking_lm_spinnaker2.weights import U0_8, EGRULayer, Linear, Table

PLACEABLE = (
    "an embedding, layers of event-based gated units, an optional projection and an output head, one after another"
)

REASONS = {
    "norm": "needs the mean of all units of a layer, for which there is no program on the PEs",
    "token_shift": "mixes with the token before, for which there is no program on the PEs",
    "wkv": "keeps exponentially weighted sums, for which there is no program on the PEs",
    "pool": "works on whole texts, a program on single tokens",
}


def lower(model: SpikingLanguageModel, config: SpiNNaker2Config) -> Program:
    """Place ``model`` on SpiNNaker 2, from its ``graph()`` and ``state_dict()`` alone.

    A model with matrices that read spike counts becomes an :class:`IntegerProgram`, one of event-based gated units a
    :class:`SpiNNaker2Program`.

    Raises: LoweringError naming the op, its kind and why it cannot be placed, or what does not fit; ConfigError for PEs
    of an unknown layer.
    """
    graph = model.graph()
    if _of_whole_numbers(graph):
        check(graph, config)
        return IntegerProgram.of(host_model(model), config, model=model.config.model_type)
    table, egru, head = _recognise(graph)
    weights = OpParameters(model, np.float32)
    embedding = Table.build(table.name, weights.of(table, "weight"), int8=config.numerics == "int8")
    layers: list[EGRULayer] = []
    for op in egru:
        layers.append(_layer(op, graph, weights, config, embedding.scale if not layers else 1 / U0_8))
    matrices = [Linear.build(op.name, weights.of(op, "weight"), weights.find(op, "bias"), int8=False) for op in head]
    return SpiNNaker2Program.of(embedding, layers, matrices, config, model=model.config.model_type)


def check(graph: LMGraph, config: SpiNNaker2Config) -> None:
    """Raise LoweringError where a model of ``graph``, whatever its weights, has no place on SpiNNaker 2."""
    if not _of_whole_numbers(graph):
        _recognise(graph)
        return
    check_host(graph)
    demands = []
    for op in graph:
        if isinstance(op.dynamics, SpikeProduct):
            assert op.weight is not None
            groups = -(-op.weight[1] // (op.dynamics.weights.group_size or op.weight[1]))
            demands.append(product_demand(op.name, op.weight, groups, config))
    place_products(demands, config)


def _of_whole_numbers(graph: LMGraph) -> bool:
    """Whether the model has matrices that read spike counts, or could be converted to have them."""
    return any(isinstance(op.dynamics, SpikeProduct) for op in graph)


def _recognise(graph: LMGraph) -> tuple[Op, list[Op], list[Op]]:
    """Return embedding, EGRU layers and output head. Raises LoweringError for a graph of another form."""
    _refuse_foreign([op for op in graph if not _known(op, graph)])
    tables = [op for op in graph if op.kind == "embedding"]
    egru = [op for op in graph if isinstance(op.dynamics, EGRUDynamics)]
    head = [op for op in graph if op.kind == "linear" and not _feeds_egru(op, graph)]
    if len(tables) != 1 or not egru or not head:
        raise LoweringError(
            f"the model has {len(tables)} embeddings, {len(egru)} layers of event-based gated units and {len(head)} "
            "matrices after them",
            hint=f"SpiNNaker 2 takes {PLACEABLE}",
        )
    if tables[0].inputs != ("tokens",):
        raise LoweringError(f"op {tables[0].name!r} (embedding) reads {tables[0].inputs}, not the tokens")
    before = tables[0].name
    for op in egru:
        if len(op.inputs) != 2:
            raise LoweringError(f"op {op.name!r} (neuron) reads {op.inputs}, not an input and a recurrent matrix")
        x, recurrent = (graph[name] for name in op.inputs)
        _expect(x, (before,), ())
        _expect(recurrent, (), (op.name,))
        before = op.name
    for op in head:
        _expect(op, (before,), ())
        before = op.name
    return tables[0], egru, head


def _feeds_egru(op: Op, graph: LMGraph) -> bool:
    return any(isinstance(reader.dynamics, EGRUDynamics) for reader in graph.readers(op.name))


def _known(op: Op, graph: LMGraph) -> bool:
    return op.kind in ("embedding", "linear") or isinstance(op.dynamics, EGRUDynamics)


def _refuse_foreign(foreign: list[Op]) -> None:
    """Name the first op of each kind that cannot be placed, and say why."""
    firsts: dict[str, Op] = {}
    for op in foreign:
        firsts.setdefault(op.kind, op)
    if not firsts:
        return
    reasons = []
    for kind, op in firsts.items():
        reason = REASONS.get(kind, "there is no program for it on the PEs")
        if kind == "neuron":
            binary = isinstance(op.dynamics, LIFDynamics)
            reason = "is a binary neuron, which the native path takes, not this one" if binary else "is another neuron"
        count = sum(other.kind == kind for other in foreign) - 1
        more = f", and {count} more of its kind" if count else ""
        reasons.append(f"op {op.name!r} ({kind}) {reason}{more}")
    raise LoweringError(
        "the model cannot be placed on SpiNNaker 2: " + "; ".join(reasons), hint=f"what can be placed: {PLACEABLE}"
    )


def _expect(op: Op, inputs: tuple[str, ...], recurrent: tuple[str, ...]) -> None:
    if op.kind != "linear" or (op.inputs, op.recurrent) != (inputs, recurrent):
        reads = f"reads {op.inputs}" + (f" and the last {op.recurrent}" if op.recurrent else "")
        expected = f"{inputs}" + (f" and the last {recurrent}" if recurrent else "")
        raise LoweringError(
            f"op {op.name!r} ({op.kind}) {reads}; expected was a matrix that reads {expected}",
            hint=f"SpiNNaker 2 takes {PLACEABLE}",
        )


def _layer(op: Op, graph: LMGraph, weights: OpParameters, config: SpiNNaker2Config, input_scale: float) -> EGRULayer:
    assert isinstance(op.dynamics, EGRUDynamics)
    x, recurrent = (graph[name] for name in op.inputs)
    layer = EGRULayer.build(
        (op.name, x.name, recurrent.name),
        weights.of(x, "weight"),
        weights.of(recurrent, "weight"),
        weights.find(x, "bias"),
        weights.find(recurrent, "bias"),
        np.clip(weights.of(op, "threshold"), 0, 1),  # an optimizer's last step may have left them outside
        zoneout=op.dynamics.zoneout,
        int8=config.numerics == "int8",
        keep_zeros=config.storage == "dense",
        input_scale=input_scale,
    )
    sources = max(layer.n_inputs, layer.n_units)
    if index_bytes(config) == 2 and sources > 1 << 16:
        raise LoweringError(
            f"{op.name}: {sources} sources are more than an index of 2 bytes tells apart", hint="index_bytes=4"
        )
    return layer
