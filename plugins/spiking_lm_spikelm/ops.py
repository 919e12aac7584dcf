"""The operations of SpikeLM as a graph: what each part of the network does for one token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from spiking_lm.graph import LMGraph, Op
from spiking_lm.interfaces import Neuron, SpikeSite
from spiking_lm_spikelm.config import SpikeLMSizes
from spiking_lm_spikelm.neuron import Elastic

if TYPE_CHECKING:
    from spiking_lm_spikelm.model import Attention, Block, SpikingLinear


def spike_sites(graph: LMGraph) -> list[SpikeSite]:
    """Return the neurons of a graph, with what reads their spikes."""
    return [
        SpikeSite(op.name, cast(Any, op.emits), tuple(reader.name for reader in graph.readers(op.name)))
        for op in graph
        if op.kind == "neuron"
    ]


class Ops:
    """Lists the operations of one token in the order in which they run; each method returns the name of its last op."""

    def __init__(self, model: nn.Module, config: SpikeLMSizes) -> None:
        self.model, self.config = model, config
        self.listed: list[Op] = []

    def graph(self) -> LMGraph:
        """Return what was listed."""
        return LMGraph(tuple(self.listed))

    def add(self, name: str, kind: Any, inputs: tuple[str, ...], n: int, emits: Any = "real", **more: Any) -> str:
        """List any operation that emits ``n`` values."""
        self.listed.append(Op(name, kind, inputs, emits, n, **more))
        return name

    def embedding(self, prefix: str = "") -> str:
        """List the embedding of a token; those with a prefix share their modules with one that has none."""
        size = self.config.n_embd
        x = self.add(f"{prefix}word", "embedding", ("tokens",), size, module="word")
        x = self.add(f"{prefix}embed", "elementwise", (x,), size, other_ops=2 * size)
        return self.norm(f"{prefix}norm", x, module="norm", steps=1)

    def norm(self, name: str, source: str, *, module: str | None = None, steps: int | None = None) -> str:
        """List a LayerNorm; ``module`` is its name in the model where that is another."""
        size, steps = self.config.n_embd, steps or self.config.time_steps
        return self.add(name, "norm", (source,), size, module=module or name, other_ops=8 * size, steps=steps)

    def residual(self, name: str, x: str, added: str) -> str:
        """List a residual addition."""
        size = self.config.n_embd
        return self.add(name, "residual", (x, added), size, other_ops=size, steps=self.config.time_steps)

    def neurons(self, name: str, neuron: Neuron | None, source: str, n: int) -> str:
        """List the neurons of a site, if there are any, and return what the next op reads."""
        if neuron is None:
            return source
        kind = "ternary" if isinstance(neuron, Elastic) else neuron.spike_kind
        return self.add(name, "neuron", (source,), n, kind, other_ops=5 * n, steps=self.config.time_steps)

    def linear(self, name: str, source: str) -> str:
        """List a matrix and the neurons in front of it."""
        layer = cast("SpikingLinear", self.model.get_submodule(name))
        shape = (layer.out_features, layer.in_features)
        source = self.neurons(f"{name}.neuron", layer.neuron, source, layer.in_features)
        held = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        steps = self.config.time_steps
        return self.add(name, "linear", (source,), shape[0], weight=shape, parameters=held, steps=steps)

    def attention(self, name: str, layer: Attention, x: str, source: str, context: float) -> str:
        """List attention of ``x`` to ``source``, of which a token sees ``context`` tokens in the mean."""
        size, steps = self.config.n_embd, self.config.time_steps
        q, k, v = (
            self.linear(f"{name}.{matrix}", read) for matrix, read in (("query", x), ("key", source), ("value", source))
        )
        k = self.neurons(f"{name}.key_neuron", layer.key_neuron, k, size)
        v = self.neurons(f"{name}.value_neuron", layer.value_neuron, v, size)
        cost = round(context * (4 * size + 5 * self.config.n_head))  # two products, and a softmax of 5 operations
        return self.add(name, "elementwise", (q, k, v), size, other_ops=cost, steps=steps)

    def self_attention(self, name: str, block: Block, x: str, context: float) -> str:
        """List the first sub-block of a block."""
        mixed = self.attention(f"{name}.attention", block.attention, x, x, context)
        out = self.linear(f"{name}.output", mixed)
        return self.norm(f"{name}.norm1", self.residual(f"{name}.add_attention", x, out))

    def feed_forward(self, name: str, x: str) -> str:
        """List the last sub-block of a block."""
        inner, steps = self.config.inner, self.config.time_steps
        up = self.linear(f"{name}.up", x)
        up = self.add(f"{name}.gelu", "elementwise", (up,), inner, other_ops=8 * inner, steps=steps)
        down = self.linear(f"{name}.down", up)
        return self.norm(f"{name}.norm2", self.residual(f"{name}.add_feed_forward", x, down))

    def mean(self, x: str) -> str:
        """List the mean over the spike steps."""
        size = self.config.n_embd
        return self.add("mean", "pool", (x,), size, other_ops=size, steps=self.config.time_steps)

    def head(self, x: str) -> str:
        """List the head that predicts words, the word embedding being its last matrix."""
        size, vocab = self.config.n_embd, self.config.vocab_size
        dense = self.add("mlm_head.dense", "linear", (x,), size, module="mlm_head.dense", weight=(size, size))
        x = self.add("mlm_head.norm", "norm", (dense,), size, module="mlm_head.norm", other_ops=9 * size)
        held = {"weight": "word.weight", "bias": "mlm_head.bias"}
        return self.add("mlm_head", "linear", (x,), vocab, weight=(vocab, size), parameters=held)
