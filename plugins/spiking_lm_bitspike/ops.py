"""The operations of one token, for accounting and lowering."""

from __future__ import annotations

from typing import Any

from spiking_lm.graph import Op
from spiking_lm_bitspike.config import BitspikeConfig

_NEURON = 3
"""Elementary operations of a neuron in a step: charge, compare, reset."""

_NORM, _GELU, _SOFTMAX = 8, 10, 5
"""Elementary operations per element."""

_AVERAGE = 5
"""Per element and step in ``mode: rate-consistent``: running sum, division, times the step, difference to the last."""


def operations(config: BitspikeConfig) -> list[Op]:
    """List the operations in order.

    The embedding and its norm run once; matrices and neurons in every spike step; and so do norms, softmax and GELU,
    unless ``mode: sequential`` lets them wait for the last one.
    """
    listed: list[Op] = []
    size, inner, steps = config.n_embd, config.n_hidden, config.steps
    averaged = _AVERAGE if config.mode == "rate-consistent" else 0
    waits = 1 if config.mode == "sequential" else steps
    context = (config.ctx_len + 1) / 2 if config.causal else config.ctx_len

    def add(name: str, kind: Any, inputs: tuple[str, ...], n: int = size, emits: Any = "real", **more: Any) -> str:
        listed.append(Op(name, kind, inputs, emits, n, **{"steps": steps, **more}))
        return name

    def linear(name: str, source: str, n_out: int, n_in: int) -> str:
        return add(name, "linear", (source,), n_out, module=f"chain.{name}", weight=(n_out, n_in))

    def neuron(name: str, sources: tuple[str, ...], n: int = size) -> str:
        module = f"neurons.{name.replace('.', '_')}"
        return add(name, "neuron", sources, n, "binary", module=module, other_ops=_NEURON * n)

    add("embed", "embedding", ("tokens",), module="embed", steps=1)
    tables = 1 + bool(config.token_types)
    add("places", "residual", ("embed",), other_ops=tables * size, steps=1)
    charged: tuple[str, ...] = (add("norm", "norm", ("places",), module="norm", other_ops=_NORM * size, steps=1),)
    if config.feedback:
        last = f"blocks.{config.n_layer - 1}.output"
        weight = (size, size)
        charged += (add("feedback", "linear", (), module="chain.feedback", weight=weight, recurrent=(last,)),)
    x = neuron("input", charged)
    for i in range(config.n_layer):
        p = f"blocks.{i}"
        keys = neuron(f"{p}.keys", (linear(f"{p}.key", x, size, size),))
        values = neuron(f"{p}.values", (linear(f"{p}.value", x, size, size),))
        query = linear(f"{p}.query", x, size, size)
        # With the spikes of one step the two products add; with rates they multiply.
        products = context * size * (2 if config.mode == "released" else 4)
        cost = round(products + context * _SOFTMAX * config.n_head) + 3 * averaged * size
        attention = add(f"{p}.attention", "elementwise", (query, keys, values), other_ops=cost, steps=waits)
        spikes = neuron(f"{p}.context", (attention,))
        for matrix, norm, what in (("mix", "mix_norm", "mixed"), ("down", "down_norm", "output")):
            width = size if matrix == "mix" else inner
            arrived = linear(f"{p}.{matrix}", spikes, size, width)
            added = add(f"{p}.add_{what}", "residual", (arrived, x), other_ops=size)
            cost = (_NORM + averaged) * size
            normed = add(f"{p}.{norm}", "norm", (added,), module=f"chain.{p}.{norm}", other_ops=cost, steps=waits)
            x = neuron(f"{p}.{what}", (normed,))
            if matrix == "mix":
                up = linear(f"{p}.up", x, inner, size)
                cost = (_GELU + averaged) * inner
                gelu = add(f"{p}.gelu", "elementwise", (up,), inner, other_ops=cost, steps=waits)
                spikes = neuron(f"{p}.inner", (gelu,), inner)
    rates = add("rates", "pool", (x,), other_ops=size)
    if config.causal:
        vocab = config.vocab_size
        add("head", "linear", (rates,), vocab, module="head", weight=(vocab, size), steps=1)
    return listed
