"""Networks for the tests: random ones of every process, in which nothing can overflow, and some by name."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from spiking_lm.errors import LoweringError
from spiking_lm_lava.graded import Delta, GradedVec, InvSqrt, NormVecDelay, ProdNeuron, Sigma, SigmaDelta
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.neurons import LIF, ResonateAndFire
from spiking_lm_lava.process import Process, Sink, Source, Synapse


def int8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape)


def three_layers(n: int = 512, *, seed: int = 0) -> Network:
    """Three dense layers of int8 weights and LIF neurons, 10 % of which or so fire."""
    rng = np.random.default_rng(seed)
    nodes: list[Process] = [Source("x", n)]
    edges = []
    before = "x"
    for i in range(3):
        nodes += [Synapse.int8(f"w{i}", int8(rng, n, n)), LIF(f"n{i}", n, dv=2048, vth=int(40 * n**0.5))]
        edges += [Edge(before, f"w{i}"), Edge(f"w{i}", f"n{i}")]
        before = f"n{i}"
    return Network((*nodes, Sink("out", n)), (*edges, Edge(before, "out")))


def recurrent(n: int = 6) -> Network:
    """LIF neurons that read a source and themselves."""
    rng = np.random.default_rng(3)
    nodes = (
        Source("x", n),
        Synapse.int8("w", int8(rng, n, n)),
        Synapse.int8("r", int8(rng, n, n)),
        LIF("lif", n, dv=1000, vth=90),
        Sink("out", n),
    )
    return Network(nodes, (Edge("x", "w"), Edge("w", "lif"), Edge("lif", "r"), Edge("r", "lif"), Edge("lif", "out")))


def normalised(n: int = 4) -> Network:
    """A vector divided by the root of the sum of its squares."""
    ones = np.ones((n, 1), np.int64)
    nodes = (
        Source("x", n, -7, 7),
        NormVecDelay("norm", n, vth=0),
        Synapse("sum", 1, ones.T, sign_mode="EXCITATORY", graded=True),
        InvSqrt("root", 1),
        Synapse("spread", n, ones, sign_mode="EXCITATORY", graded=True),
        Sink("out", n),
    )
    edges = [("x", "norm.a_in1"), ("norm.s2_out", "sum"), ("sum", "root"), ("root", "spread")]
    edges += [("spread", "norm.a_in2"), ("norm.s_out", "out")]
    return Network(nodes, tuple(Edge(a, b) for a, b in edges))


class _Builder:
    """Draws processes one after the other, each reading some that are there."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**31)))
        low = draw(st.sampled_from((0, -3, -2000)))
        self.size = draw(st.integers(1, 5))
        self.nodes: list[Process] = [Source("x", self.size, low, draw(st.integers(1, 3000)))]
        self.edges: list[Edge] = []
        self.ends = ["x"]
        """Out-ports of ``size`` values."""

    def build(self) -> Network:
        for i in range(self.draw(st.integers(1, 6))):
            kind = self.draw(st.sampled_from(("synapse", "lif", "graded", "product", "norm", "rf", "delta", "sigma")))
            nodes, edges, end = getattr(self, f"_{kind}")(f"{kind}{i}")
            try:
                Network((*self.nodes, *nodes), (*self.edges, *edges))
            except LoweringError:  # it might overflow, or needs what it does not get
                continue
            self.nodes += nodes
            self.edges += edges
            self.ends.append(end)
        sinks = [Sink(f"out{i}", self.size) for i in range(len(self.ends))]
        outs = [Edge(end, sink.name) for end, sink in zip(self.ends, sinks, strict=True)]
        return Network((*self.nodes, *sinks), (*self.edges, *outs))

    def _any(self) -> str:
        return self.draw(st.sampled_from(self.ends))

    def _synapse(self, name: str):  # type: ignore[no-untyped-def]
        form = self.draw(st.sampled_from(("dense", "sparse", "delay")))
        delay = {"delay": self.rng.integers(0, 4, (self.size, self.size))} if form == "delay" else {}
        exponent, graded = self.draw(st.integers(-7, 2)), self.draw(st.booleans())
        weight = int8(self.rng, self.size, self.size)
        node = Synapse.int8(name, weight, weight_exp=exponent, graded=graded, form=form, **delay)
        return [node], [Edge(self._any(), name)], name

    def _lif(self, name: str):  # type: ignore[no-untyped-def]
        ternary = self.draw(st.booleans())
        node = LIF(
            name,
            self.size,
            du=self.draw(st.sampled_from((0, 10, 700, 4095))),
            dv=self.draw(st.sampled_from((0, 200, 2048, 4096))),
            vth=self.draw(st.sampled_from((0, 5, 400, 131071))),
            vth_lo=self.draw(st.sampled_from((0, -200))) if ternary else None,
            bias_mant=self.rng.integers(-50, 50, self.size),
            bias_exp=self.draw(st.integers(0, 7)),
            v=self.rng.integers(-5000, 5000, self.size),
            reset_interval=0 if ternary else self.draw(st.sampled_from((0, 1, 5))),
        )
        edges = [Edge(self._any(), name)]
        nodes: list[Process] = [node]
        if self.draw(st.booleans()):
            nodes.append(Synapse.int8(f"{name}r", int8(self.rng, self.size, self.size), graded=ternary))
            edges += [Edge(name, f"{name}r"), Edge(f"{name}r", name)]
        return nodes, edges, name

    def _graded(self, name: str):  # type: ignore[no-untyped-def]
        node = GradedVec(name, self.size, vth=self.draw(st.integers(-3, 30)), relu=self.draw(st.booleans()))
        return [node], [Edge(self._any(), name), Edge(self._any(), name)], name

    def _product(self, name: str):  # type: ignore[no-untyped-def]
        node = ProdNeuron(name, self.size, vth=self.draw(st.integers(0, 9)), exp=self.draw(st.integers(0, 12)))
        return [node], [Edge(self._any(), f"{name}.a_in1"), Edge(self._any(), f"{name}.a_in2")], name

    def _norm(self, name: str):  # type: ignore[no-untyped-def]
        node = NormVecDelay(name, self.size, vth=0)
        return [node], [Edge(self._any(), f"{name}.a_in1"), Edge(self._any(), f"{name}.a_in2")], f"{name}.s_out"

    def _rf(self, name: str):  # type: ignore[no-untyped-def]
        node = ResonateAndFire.of(
            name,
            self.size,
            period=self.draw(st.sampled_from((3, 10, 25.5))),
            alpha=self.draw(st.sampled_from((0.07, 0.5))),
            vth=1,
            state_exp=self.draw(st.sampled_from((0, 4))),
        )
        return [node], [Edge(self._any(), f"{name}.a_real_in"), Edge(self._any(), f"{name}.a_imag_in")], name

    def _delta(self, name: str):  # type: ignore[no-untyped-def]
        node = Delta(
            name,
            self.size,
            vth=self.draw(st.integers(0, 40)),
            spike_exp=self.draw(st.integers(0, 2)),
            cum_error=self.draw(st.booleans()),
        )
        return [node], [Edge(self._any(), name)], name

    def _sigma(self, name: str):  # type: ignore[no-untyped-def]
        if self.draw(st.booleans()):
            node: Process = Sigma(name, self.size)
        else:
            bias = self.rng.integers(-9, 9, self.size)
            node = SigmaDelta(name, self.size, vth=self.draw(st.integers(1, 40)), bias=bias)
        delta = Delta(f"{name}d", self.size, vth=self.draw(st.integers(0, 40)))
        weight = Synapse.int8(f"{name}w", int8(self.rng, self.size, self.size), graded=True)
        edges = [Edge(self._any(), delta.name), Edge(delta.name, weight.name), Edge(weight.name, name)]
        return [delta, weight, node], edges, name


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Any network that the checks let pass."""
    return _Builder(draw).build()


def rows(network: Network, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs that reach the ends of what is declared more often than not."""
    rng = np.random.default_rng(seed)
    found = {}
    for node in network.of_kind(Source):
        assert isinstance(node, Source)
        ends = rng.choice([node.low, node.high], (steps, node.size))
        inner = rng.integers(node.low, node.high + 1, (steps, node.size))
        held = np.broadcast_to(rng.choice([node.low, node.high], node.size), (steps, node.size))
        found[node.name] = (ends, inner, held)[seed % 3]
    return found
