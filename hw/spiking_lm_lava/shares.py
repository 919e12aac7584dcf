"""What drives the matrices of a lowered model: spikes, events with a value, or values that are sent at every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spiking_lm.hardware import Figure
from spiking_lm_lava.pipeline import TokenGraph
from spiking_lm_lava.process import Synapse

if TYPE_CHECKING:
    from spiking_lm_lava.program import LoweredOp

FEEDS = ("binary spikes", "graded events of neurons", "values sent at every token")


def fed_by(graph: TokenGraph, ops: Sequence[LoweredOp]) -> list[Figure]:
    """Return the share of matrix weights, each an operation per token if nothing is skipped, by what feeds them."""
    kind = {node: op.kind for op in ops for node in op.nodes}
    nodes = {node.name: node for node in graph.nodes}
    sources = {wire.target.partition(".")[0]: wire.source.partition(".")[0] for wire in graph.wires}
    counts = dict.fromkeys(FEEDS, 0)
    for op in ops:
        for synapse in (nodes[name] for name in op.nodes if op.kind == "linear"):
            if isinstance(synapse, Synapse):
                spiking = kind.get(sources[synapse.name]) == "neuron"
                counts[FEEDS[(1 if synapse.graded else 0) if spiking else 2]] += op.weights
    every = max(sum(counts.values()), 1)
    return [
        Figure(f"matrix weights fed by {what}", 100 * count / every, "%", "derived", f"{count:,} of {every:,}")
        for what, count in counts.items()
        if count or what == FEEDS[0]
    ]
