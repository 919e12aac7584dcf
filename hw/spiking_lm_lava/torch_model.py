"""The int8 model in torch: the same integers as a program's, by code that shares nothing with its cells.

It runs a graph of tokens, batched over streams, token after token: no steps, no delays, no ``valid``. So that a program
equals it says of the cells that two implementations agree, and of the pipeline that everything that meets is of one
token. Numbers are float64 that hold integers, below 2^53 and therefore exact.

To add a cell: decorate with :func:`arithmetic` a function that takes the node and returns its step, from a dict of
tensors ``(B, ..)``, begun as the node's ``initial()`` without latches, and from what arrived at its in-ports but
``valid``, each ``(B, size)``, to a tuple of what it sends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spiking_lm_lava.cell import EGRU, VALID, Affine, Cell
from spiking_lm_lava.pipeline import TokenGraph
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.program import LOGITS, Parts

Step = Callable[..., tuple[Tensor, ...]]

ARITHMETIC: dict[type[Process], Callable[[Any], Step]] = {}
"""By class of node, what makes its step."""


@dataclass
class TokenState:
    """What a model remembers: the states of its nodes, and what was sent along looped wires."""

    nodes: dict[str, dict[str, Tensor]]
    last: dict[str, Tensor] = field(default_factory=dict)


def arithmetic(kind: type[Process]) -> Callable[[Callable[[Any], Step]], Callable[[Any], Step]]:
    """Register what makes the step of a class of nodes."""

    def register(make: Callable[[Any], Step]) -> Callable[[Any], Step]:
        ARITHMETIC[kind] = make
        return make

    return register


class TokenModel:
    """A graph of tokens in torch."""

    def __init__(self, graph: TokenGraph) -> None:
        from spiking_lm_lava import torch_spikegpt  # noqa: F401  (here, for it registers with this module)

        self.graph = graph
        self.order = [node for node in graph.ordered() if not isinstance(node, Source)]
        self.steps = {node.name: ARITHMETIC[type(node)](node) for node in self.order if not isinstance(node, Sink)}
        sends = {node.name: node.sends for node in graph.nodes}
        self.arriving: dict[str, list[list[tuple[str, bool]]]] = {}
        for node in self.order:
            ports: list[list[tuple[str, bool]]] = []
            for port in node.reads:
                if port == VALID:
                    continue
                found = [w for w in graph.wires_to(node.name) if (w.target.partition(".")[2] or node.reads[0]) == port]
                full = [(*wire.source.partition("."), wire.looped) for wire in found]
                ports.append([(f"{name}.{out or sends[name][0]}", looped) for name, _, out, looped in full])
            self.arriving[node.name] = ports
        self.looped = {port for ports in self.arriving.values() for wires in ports for port, looped in wires if looped}

    def initial(self, batch: int) -> TokenState:
        """Return the state before the first token."""
        held: dict[str, dict[str, Tensor]] = {}
        for node in self.order:
            given = {} if not isinstance(node, Cell) else node.initial()
            latches = node.latches if isinstance(node, Cell) else {}
            held[node.name] = {
                name: torch.from_numpy(np.asarray(value)).double().expand(batch, *np.shape(value))
                for name, value in given.items()
                if name not in latches
            }
        ports = {f"{node.name}.{port}": node.port_size(port) for node in self.graph.nodes for port in node.sends}
        zeros = {port: torch.zeros(batch, ports[port], dtype=torch.float64) for port in self.looped}
        return TokenState(held, zeros)

    def step(self, rows: dict[str, Tensor], state: TokenState) -> dict[str, Tensor]:
        """Feed one token of each stream: by source ``(B, size)``. Changes ``state``; returns by sink what arrived."""
        sent = {f"{name}.s_out": given for name, given in rows.items()}
        sinks: dict[str, Tensor] = {}
        for node in self.order:
            arrived = [
                torch.stack([state.last[port] if looped else sent[port] for port, looped in wires]).sum(0)
                for wires in self.arriving[node.name]
            ]
            if isinstance(node, Sink):
                sinks[node.name] = arrived[0]
                continue
            results = self.steps[node.name](state.nodes[node.name], *arrived)
            sent.update({f"{node.name}.{port}": value for port, value in zip(node.sends, results, strict=True)})
        state.last = {port: sent[port] for port in self.looped}
        return sinks


class Int8Model:
    """The quantised language model of a program, in torch."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.model = parts, TokenModel(parts.graph)
        self.tables = {name: torch.from_numpy(table.astype(np.float64)) for name, table in parts.tables.items()}

    def sums(self, tokens: Tensor, state: TokenState) -> Tensor:
        """Feed ``tokens (B,)``; return what arrives at the sink, (B, V)."""
        return self.model.step({name: table[tokens] for name, table in self.tables.items()}, state)[LOGITS]

    def __call__(self, tokens: NDArray[Any], state: TokenState | None = None) -> NDArray[np.float32]:
        """Return the logits ``(B, S, V)`` of ``tokens (B, S)``, going on from ``state``, which changes."""
        ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))
        now = self.model.initial(len(ids)) if state is None else state
        with torch.no_grad():
            found = [self._logits(self.sums(column, now)) for column in ids.unbind(1)]
        logits: NDArray[np.float32] = torch.stack(found, 1).numpy()
        return logits

    def generate(self, tokens: NDArray[Any], count: int) -> NDArray[np.int64]:
        """Return the ``count`` tokens that greedily follow each row of ``tokens (B, S)``: (B, count)."""
        state = self.model.initial(len(tokens))
        found = [self(tokens, state)[:, -1].argmax(-1)]
        while len(found) < count:
            found.append(self(found[-1][:, None], state)[:, -1].argmax(-1))
        return np.stack(found, 1)

    def _logits(self, sums: Tensor) -> Tensor:
        return (sums * torch.from_numpy(self.parts.scale) + torch.from_numpy(self.parts.bias)).float()


# -- arithmetic --------------------------------------------------------------------------------------------------------


def tensor(values: Any) -> Tensor:
    """Return whole numbers as float64."""
    return torch.from_numpy(np.array(values, np.float64))


def times(x: Tensor, mantissa: Tensor, shift: Tensor) -> Tensor:
    """Return ``x * mantissa / 2^shift``, to nearest, halves up: exact, for the product has at most 46 bits."""
    return torch.floor(x * mantissa * torch.exp2(-shift) + 0.5)


def halved(x: Tensor, bits: int) -> Tensor:
    """Return ``x / 2^bits``, to nearest, halves up."""
    return torch.floor(x * 2.0**-bits + 0.5)


_ENTRIES = torch.floor(torch.sigmoid(torch.arange(257, dtype=torch.float64) / 16) * 2**15 + 0.5)


def logistic(x: Tensor) -> Tensor:
    """Return the sigmoid, Q15 of Q12: lines between values that are 1/16 apart, mirrored at 0."""
    size = x.abs().clamp(max=16 * 4096 - 1)
    left = torch.floor(size / 256)
    at = left.long()
    value = _ENTRIES[at] + halved((_ENTRIES[at + 1] - _ENTRIES[at]) * (size - 256 * left), 8)
    return torch.where(x < 0, 2**15 - value, value)


@arithmetic(Synapse)
def _synapse(node: Synapse) -> Step:
    weight = tensor(node.prepared.T)
    if node.form == "delay":
        raise TypeError(f"synapse {node.name!r} has delays, of which a graph of tokens has none")

    def step(state: dict[str, Tensor], s: Tensor) -> tuple[Tensor, ...]:
        sums = (s if node.graded else (s != 0).double()) @ weight
        return (torch.floor(sums * 2.0**node.weight_exp),)

    return step


@arithmetic(Affine)
def _affine(node: Affine) -> Step:
    mantissa, shift, bias = map(tensor, (node.mantissa, node.shift, node.bias))
    return lambda state, a: ((times(a, mantissa, shift) + bias).clamp(-node.limit, node.limit),)


@arithmetic(EGRU)
def _egru(node: EGRU) -> Step:
    of_x = tuple(map(tensor, (node.x_mantissa, node.x_shift)))
    of_q = tuple(map(tensor, (node.q_mantissa, node.q_shift)))
    x_bias, q_bias, threshold = map(tensor, (node.x_bias, node.q_bias, node.threshold))

    def step(state: dict[str, Tensor], x: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        a_z, a_r, a_g = (times(x, *of_x) + x_bias).chunk(3, -1)
        q_z, q_r, q_g = (times(q, *of_q) + q_bias).chunk(3, -1)
        z, r = logistic(a_z + q_z), logistic(a_r + q_r)
        g = 2 * logistic(2 * (a_g + halved(r * q_g, 15))) - 2**15
        held = state["c"]
        mixed = halved(z * held + (2**15 - z) * (g * 32), 15)
        c = held + halved((mixed - held) * node.keep, 15)
        fires = c > threshold
        state["c"] = c - fires * threshold
        return (fires * halved(c, 20 - node.event_bits),)

    return step
