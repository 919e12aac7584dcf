"""Networks of LIF neurons as arrays: their definition, and cutting them out of models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import spiking_lm
from spiking_lm.config import ModelConfig
from spiking_lm.errors import ConfigError, DataError, UnknownNameError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.hardware import LoweringError
from spiking_lm.interfaces import EGRUDynamics, LIFDynamics, LMOutput, SpikeSite, SpikingLanguageModel
from spiking_lm.lifnet import LIFEdge, LIFLayer, LIFNet, from_model


class Config(ModelConfig):
    model_type: str = "lif-chain"
    vocab_size: int = 7
    v_reset: float | None = 0.0
    twist: str = ""


class Chain(SpikingLanguageModel):
    """tokens -> embedding -> LIF -> linear -> LIF with recurrent weights -> linear -> logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 5)
        nn.init.normal_(self.hidden.weight)
        self.loop = nn.Parameter(torch.randn(5, 5) / 2)  # (in, out)
        self.head = nn.Linear(5, 7)
        self.first = LIFDynamics(beta=0.5, gain=2.0, threshold=0.75, v_reset=config.v_reset)
        self.second = LIFDynamics(beta=0.875, gain=1.0, threshold=0.5, v_reset=config.v_reset, compare=">")

    def init_state(self, batch_size: int, *, device: object = None, dtype: object = None) -> object:
        return torch.zeros(batch_size, 6), torch.zeros(batch_size, 5), torch.zeros(batch_size, 5)

    def forward(self, tokens, state=None, *, return_spikes=False):  # type: ignore[no-untyped-def]
        v1, v2, last = state or self.init_state(len(tokens))
        a, b = [], []
        for token in tokens.T:
            s1, v1 = self.first.run(self.emb(token)[:, None], v1)
            s2, v2 = self.second.run(self.hidden(s1) + (last @ self.loop)[:, None], v2)
            last = s2[:, 0]
            a.append(s1)
            b.append(s2)
        spikes = {"lif.0": torch.cat(a, 1), "lif.1": torch.cat(b, 1)}
        return LMOutput(self.head(spikes["lif.1"]), (v1, v2, last), spikes if return_spikes else None)

    def spike_sites(self) -> list[SpikeSite]:
        return [SpikeSite("lif.0", "binary"), SpikeSite("lif.1", "binary")]

    def graph(self) -> LMGraph:
        loop = {"weight_t": "loop"}
        ops = [
            Op("emb", "embedding", ("tokens",), "real", 6, module="emb"),
            Op("lif.0", "neuron", ("emb",), "binary", 6, dynamics=self.first),
            Op("hidden", "linear", ("lif.0",), "real", 5, module="hidden", weight=(5, 6)),
            Op("loop", "linear", (), "real", 5, weight=(5, 5), recurrent=("lif.1",), parameters=loop),
            Op("sum", "residual", ("hidden", "loop"), "real", 5),
            Op("lif.1", "neuron", ("sum",), "binary", 5, dynamics=self.second),
            Op("head", "linear", ("lif.1",), "real", 7, module="head", weight=(7, 5)),
        ]
        twist = self.config.twist
        if twist == "norm":
            ops[2:2] = [Op("norm", "norm", ("lif.0",), "real", 6)]
            ops[3] = dataclasses.replace(ops[3], inputs=("norm",))
        if twist == "egru":
            ops[5] = dataclasses.replace(ops[5], emits="graded", dynamics=EGRUDynamics(5))
        if twist == "graded":
            ops[5] = dataclasses.replace(ops[5], emits="graded")
        if twist == "undeclared":
            ops[1] = dataclasses.replace(ops[1], dynamics=None)
        if twist == "direct":
            ops[4] = dataclasses.replace(ops[4], inputs=("hidden", "loop", "lif.0"))
        return LMGraph(tuple(ops))


def test_hand_computed_steps() -> None:
    layer = LIFLayer("h", 2, decay=0.5, threshold=[1.0, 1.0], v_reset=[0.0, -0.5], drift=0.25, compare=">=")
    net = LIFNet(1, (layer,), (LIFEdge("input", "h", [[0.5], [1.0]], [0.25, 0.0]),))
    run = net.run(np.array([[1], [0], [1]]))
    assert run.spikes["h"].tolist() == [[True, True], [False, False], [True, True]]
    # neuron 0: .5+.25+.25 = 1 fires at the threshold -> 0; .5*0+.25+.25 = .5; .25+.25+.75 = 1.25 fires -> 0
    # neuron 1: .25+1 fires -> -.5; -.25+.25 = 0; 0+.25+1 = 1.25 fires
    assert run.membranes["h"].tolist() == [[0.0, -0.5], [0.5, 0.0], [0.0, -0.5]]


def test_soft_reset_strictness_delay_and_synapse() -> None:
    soft = LIFLayer("a", 1, decay=1.0, v_reset=None, compare=">", threshold=1.0)
    late = LIFLayer("b", 1, decay=0.0, threshold=0.25, synapse_decay=0.5, synapse_gain=0.5)
    edges = (LIFEdge("input", "a", [[1.0]]), LIFEdge("a", "b", [[1.0]], delay=2), LIFEdge("b", "b", [[-8.0]], delay=1))
    run = LIFNet(1, (soft, late), edges).run(np.ones((6, 1)))
    assert run.spikes["a"][:, 0].tolist() == [False, True, True, True, True, True]  # 1 is not above 1
    assert run.membranes["a"][:, 0].tolist() == [1.0] * 6
    # i: 0 0 0 .5 (fires), .25+.5-4 ...
    assert run.spikes["b"][:, 0].tolist() == [False, False, False, True, False, False]


def test_batches_run_side_by_side() -> None:
    rng = np.random.default_rng(0)
    layer = LIFLayer("h", 3, decay=0.75, threshold=0.5)
    net = LIFNet(4, (layer,), (LIFEdge("input", "h", np.round(rng.normal(size=(3, 4)) * 8) / 8),))
    x = rng.random((9, 2, 4)) < 0.5
    both, one = net.run(x), net.run(x[:, 1])
    assert np.array_equal(both.spikes["h"][:, 1], one.spikes["h"])
    assert both.spikes["h"].any()


@pytest.mark.parametrize("v_reset", [0.0, None, -0.25])
def test_a_model_cut_out_fires_like_the_model(v_reset: float | None) -> None:
    torch.manual_seed(3)
    model = Chain(Config(v_reset=v_reset))
    tokens = torch.randint(0, 7, (2, 30))
    with torch.no_grad():
        expected = model(tokens, return_spikes=True).spikes
    net = from_model(model, "tokens")
    assert [layer.name for layer in net.layers] == ["lif.0", "lif.1"]
    assert [(edge.source, edge.delay) for edge in net.edges] == [("input", 0), ("lif.0", 0), ("lif.1", 1)]
    got = net.run(np.eye(7)[tokens.T])
    for name in ("lif.0", "lif.1"):
        assert np.array_equal(got.spikes[name].transpose(1, 0, 2), expected[name].numpy() > 0)
        assert 0.05 < expected[name].mean() < 0.95
    tail = from_model(model, "lif.0")
    behind = tail.run(expected["lif.0"].numpy().transpose(1, 0, 2))
    assert np.array_equal(behind.spikes["lif.1"], got.spikes["lif.1"])
    assert tail.input_size == 6


@pytest.mark.parametrize(
    ("twist", "op", "why"),
    [
        ("norm", "norm", "the operation 'norm'"),
        ("egru", "lif.1", "EGRUDynamics"),
        ("graded", "lif.1", "emits graded"),
        ("undeclared", "lif.0", "no dynamics"),
        ("direct", "sum", "'lif.0', which is not a matrix"),
    ],
)
def test_the_first_op_without_a_form_is_named(twist: str, op: str, why: str) -> None:
    with pytest.raises(LoweringError, match=f"op '{op}' has no form.*{why}"):
        from_model(Chain(Config(twist=twist)), "tokens")


def test_sources_and_outputs_are_checked() -> None:
    model = Chain(Config())
    with pytest.raises(UnknownNameError, match=r"lif.7"):
        from_model(model, "lif.7")
    with pytest.raises(UnknownNameError, match="head"):
        from_model(model, "tokens", ["head"])
    with pytest.raises(LoweringError, match=r"op 'emb'.*real values"):
        from_model(model, "emb")
    with pytest.raises(LoweringError, match=r"without passing 'lif.1'"):
        from_model(model, "lif.1", ["lif.0"])


def test_spikegpt_is_refused_by_name() -> None:
    for placement in ("canonical", "spike_input"):
        model = spiking_lm.create_model("spikegpt", vocab_size=11, n_layer=1, n_embd=8, placement=placement)
        with pytest.raises(LoweringError, match=r"op 'blocks\.0\.ln0' has no form"):
            from_model(model, "tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"decay": 1.5}, "decay runs from 1.5"),
        ({"decay": [0.5, 0.5]}, r"decay has shape \(2,\)"),
        ({"threshold": np.nan}, "threshold is not finite"),
        ({"compare": "="}, "compare is '='"),
        ({"synapse_decay": -0.1}, "synapse_decay runs from -0.1"),
    ],
)
def test_layers_are_checked(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LIFLayer(**{"name": "h", "size": 3, "decay": 0.5, **change})


def test_networks_are_checked() -> None:
    a, b = LIFLayer("a", 2, decay=0.5), LIFLayer("b", 3, decay=0.5)
    into_a, into_b = LIFEdge("input", "a", np.ones((2, 4))), LIFEdge("a", "b", np.ones((3, 2)))
    net = LIFNet(4, (a, b), (into_a, into_b))
    assert net.outputs == ("b",)
    assert net == LIFNet(4, (a, b), (into_a, into_b), ("b",))
    assert net != LIFNet(4, (a, b), (into_a, dataclasses.replace(into_b, delay=1)))
    with pytest.raises(ConfigError, match="a -> b: the weight is"):
        LIFNet(4, (a, b), (LIFEdge("a", "b", np.ones((2, 2))),))
    with pytest.raises(ConfigError, match="a -> a: delay 0"):
        LIFNet(4, (a,), (LIFEdge("a", "a", np.ones((2, 2))),))
    with pytest.raises(ConfigError, match="b -> a: delay 0"):
        LIFNet(4, (a, b), (into_a, LIFEdge("b", "a", np.ones((2, 3)))))
    with pytest.raises(ConfigError, match="no layer 'c'"):
        LIFNet(4, (a, b), (LIFEdge("c", "b", np.ones((3, 2))),))
    with pytest.raises(ConfigError, match="one name"):
        LIFNet(4, (a, a), ())
    with pytest.raises(ConfigError, match="leads to the input"):
        LIFNet(4, (a,), (LIFEdge("a", "input", np.ones((4, 2))),))
    with pytest.raises(UnknownNameError, match="'c'"):
        LIFNet(4, (a,), (), ("c",))
    with pytest.raises(DataError, match=r"\(T, ..., 4\)"):
        net.run(np.ones((5, 3)))
    with pytest.raises(DataError, match="not all 0 or 1"):
        net.run(np.full((5, 4), 0.5))
