"""The counts of explain() against brute force, its laws, and what it refuses."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from spiking_lm.accounting import E_AC, E_MAC, ENERGY_WORDS, connection_sparsity, explain, footprint, sample_tokens
from spiking_lm.config import ModelConfig, NeuronConfig
from spiking_lm.errors import DataError, PluginError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.interfaces import LMOutput, Neuron, SpikeSite, SpikingLanguageModel

VOCAB, WIDTH = 11, 8


class FakeConfig(ModelConfig):
    model_type: ClassVar[str] = "fake"
    vocab_size: int = VOCAB
    ctx_len: int = 6


class Adder(Neuron):
    """An integrator without declared dynamics: it fires and resets when its sum reaches 1."""

    def init_state(self, shape: tuple[int, ...], *, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        total = state + x
        spikes = (total >= 1).to(x.dtype)
        return spikes, total * (1 - spikes)


class Fake(SpikingLanguageModel):
    """emb -> shape(values) -> fc (with bias) -> neuron -> head; the values that fc reads are the test's choice."""

    def __init__(self, values: Callable[[Tensor], Tensor], declared: str, emits: str = "binary") -> None:
        super().__init__()
        self.config = FakeConfig()
        self.values, self.declared, self.emits = values, declared, emits
        self.emb = nn.Embedding(VOCAB, WIDTH)
        self.fc = nn.Linear(WIDTH, 5)
        self.neuron = Adder(NeuronConfig(), size=5)
        self.act = nn.ReLU()
        self.head = nn.Linear(5, VOCAB, bias=False)
        self.unused = nn.Linear(3, 2)
        self.register_buffer("scratch", torch.zeros(3, dtype=torch.int16), persistent=False)

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> Tensor:
        return self.neuron.init_state((batch_size, 5))

    def forward(self, tokens: Tensor, state: Any = None, *, return_spikes: bool = False) -> LMOutput:
        self.fed = self.values(self.emb(tokens))
        spikes, state = self.neuron(self.act(self.fc(self.fed)), state)
        self.fired = spikes
        return LMOutput(self.head(spikes), state, {"neuron": spikes} if return_spikes else None)

    def spike_sites(self) -> list[SpikeSite]:
        return [SpikeSite("neuron", "binary", ("head",))]

    def graph(self) -> LMGraph:
        return LMGraph(
            (
                Op("emb", "embedding", ("tokens",), "real", WIDTH, module="emb"),
                Op("values", "elementwise", ("emb",), self.declared, WIDTH, other_ops=7),  # type: ignore[arg-type]
                Op("fc", "linear", ("values",), "real", 5, module="fc", weight=(5, WIDTH)),
                Op("act", "elementwise", ("fc",), "graded", 5, module="act", other_ops=5),
                Op("neuron", "neuron", ("act",), self.emits, 5, module="neuron", other_ops=15),  # type: ignore[arg-type]
                Op("head", "linear", ("neuron",), "real", VOCAB, module="head", weight=(VOCAB, 5)),
            )
        )


def integers(x: Tensor) -> Tensor:
    return (2 * x).round().clamp(0, 3)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "binary": lambda x: (x > 0).float(),
    "ternary": lambda x: x.sign() * (x.abs() > 0.5),
    "integer": integers,
    "graded": lambda x: x * (x > 0.7),
    "real": lambda x: x,
}


def brute_force(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Effective, dense and accumulated operations, one synapse at a time."""
    effective = dense = additions = 0
    for row in x.reshape(-1, x.shape[-1]).tolist():
        for out_row in weight.tolist():
            for value, w in zip(row, out_row, strict=True):
                dense += 1
                if value != 0 and w != 0:
                    effective += 1
                    additions += int(abs(value))
    return effective, dense, additions


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_equal_brute_force(kind: str) -> None:
    model = Fake(KINDS[kind], kind)
    with torch.no_grad():
        model.fc.weight[torch.rand_like(model.fc.weight) < 0.3] = 0
    tokens = torch.randint(VOCAB, (3, 6))
    found = explain(model, tokens)
    fc, head = (next(op for op in found.ops if op.name == name) for name in ("fc", "head"))
    effective, dense, additions = brute_force(model.fed, model.fc.weight)
    assert fc.seen_input == kind
    assert fc.dense == dense / 18
    assert fc.nonzero_weights == int((model.fc.weight != 0).sum())
    assert fc.input_zeros == pytest.approx(float((model.fed == 0).double().mean()))
    assert fc.op_class == {"binary": "AC", "ternary": "AC", "integer": "integer-AC"}.get(kind, "MAC")
    assert (fc.effective_acs, fc.effective_macs) == (
        (effective / 18, 0) if kind in ("binary", "ternary") else (0, effective / 18)
    )
    assert fc.accumulations == (additions / 18 if kind in ("binary", "ternary", "integer") else 0)
    assert fc.runs_on == ("neuromorphic" if kind in ("binary", "ternary", "integer") else "embedded-core")

    head_effective, head_dense, _ = brute_force(model.fired, model.head.weight)
    assert (head.effective_acs, head.effective_macs, head.dense) == (head_effective / 18, 0, head_dense / 18)

    operations = found.neurobench.synaptic_operations_per_token
    assert operations["Dense"] == (dense + head_dense) / 18
    assert operations["Effective_MACs"] + operations["Effective_ACs"] == pytest.approx(
        (effective + head_effective) / 18
    )
    per_sample = found.neurobench.synaptic_operations_per_sample
    assert per_sample == {name: pytest.approx(6 * n) for name, n in operations.items()}

    twin, built, skipping = found.energy
    assert twin.synaptic_pj == pytest.approx((dense + head_dense) / 18 * E_MAC)
    fc_pj = additions * E_AC if fc.op_class != "MAC" else dense * E_MAC
    assert built.synaptic_pj == pytest.approx((fc_pj + head_effective * E_AC) / 18)
    fc_pj = additions * E_AC if fc.op_class != "MAC" else effective * E_MAC
    assert skipping.synaptic_pj == pytest.approx((fc_pj + head_effective * E_AC) / 18)
    assert built.ratio == pytest.approx(twin.synaptic_pj / built.synaptic_pj)
    assert built.other_pj == pytest.approx((7 + 5 + 15) * E_MAC)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(sorted(KINDS)), pruned=st.floats(0, 1))
def test_effective_never_exceeds_dense(seed: int, kind: str, pruned: float) -> None:
    torch.manual_seed(seed)
    model = Fake(KINDS[kind], "real")
    with torch.no_grad():
        model.fc.weight[torch.rand_like(model.fc.weight) < pruned] = 0
    for op in explain(model, torch.randint(VOCAB, (2, 6))).ops:
        assert 0 <= op.effective_acs + op.effective_macs <= op.dense + 1e-9


def test_input_of_ones_makes_every_nonzero_weight_work() -> None:
    model = Fake(torch.ones_like, "binary")
    with torch.no_grad():
        model.fc.weight[0] = 0
    fc = explain(model, torch.zeros(2, 6, dtype=torch.long)).ops[2]
    assert fc.effective_acs == fc.nonzero_weights == 4 * WIDTH
    assert fc.dense == fc.weights == 5 * WIDTH


def test_zero_input_costs_nothing_and_counts_as_spiking_but_gives_no_credit() -> None:
    tokens = torch.zeros(1, 6, dtype=torch.long)
    fc = explain(Fake(torch.zeros_like, "binary"), tokens).ops[2]
    assert (fc.effective_acs, fc.effective_macs, fc.op_class) == (0, 0, "AC")
    # A real vector that happens to be zero is no evidence of spikes: its class is the declared one.
    assert explain(Fake(torch.zeros_like, "real"), tokens).ops[2].op_class == "MAC"


def test_one_call_with_another_value_makes_that_call_mac() -> None:
    model = Fake(lambda x: torch.where(x[..., :1] > 1e9, x, (x > 0).float()), "real")
    short = explain(model, torch.randint(VOCAB, (1, 6)))
    assert short.ops[2].effective_macs == 0
    model.values = lambda x: torch.cat([(x[:, :-1] > 0).float(), x[:, -1:]], 1)
    spoilt = explain(model, torch.randint(VOCAB, (1, 6)))
    assert spoilt.ops[2].effective_acs == 0
    assert spoilt.ops[2].op_class == "MAC"


def test_static_metrics() -> None:
    model = Fake(KINDS["binary"], "binary")
    with torch.no_grad():
        model.fc.weight[0, :3] = 0
        model.fc.bias.zero_()  # biases are no connections
    found = explain(model, torch.randint(VOCAB, (1, 6))).neurobench
    n_weights = 5 * WIDTH + 5 * VOCAB + 6
    assert found.connection_sparsity == connection_sparsity(model) == round(3 / n_weights, 4)
    n_parameters = VOCAB * WIDTH + 5 * WIDTH + 5 + 5 * VOCAB + 8
    assert found.parameter_count == n_parameters
    assert found.footprint_bytes == footprint(model) == 4 * n_parameters + 3 * 2
    assert connection_sparsity(nn.LayerNorm(3)) == 0.0
    cell = nn.RNNCell(2, 2)
    nn.init.zeros_(cell.bias_ih)  # biases of recurrent layers count
    assert connection_sparsity(cell) == round(2 / 12, 4)


def test_activation_sparsity_pools_spikes_and_relus() -> None:
    model = Fake(KINDS["real"], "real")
    tokens = torch.randint(VOCAB, (2, 6))
    found = explain(model, tokens)
    relu = torch.relu(model.fc(model.fed))
    zeros = int((relu == 0).sum()) + int((model.fired == 0).sum())
    assert found.neurobench.activation_sparsity == zeros / (relu.numel() + model.fired.numel())
    site = found.sites[0]
    assert site.rate == pytest.approx(float(model.fired.mean()))
    channels = model.fired.reshape(-1, 5)
    assert site.silent == float((channels.sum(0) == 0).double().mean())
    assert site.saturated == float((channels.sum(0) == len(channels)).double().mean())
    assert found.spikes_per_token == pytest.approx(float(model.fired.sum()) / 12)


def test_membrane_updates_count_changes_between_steps() -> None:
    model = Fake(KINDS["real"], "real")
    found = explain(model, torch.randint(VOCAB, (2, 6)))
    drive = torch.relu(model.fc(model.fed))
    updates = 0
    for row in drive.detach():
        state, before = torch.zeros(5), None
        for x in row:
            state = state + x
            state = torch.where(state >= 1, torch.zeros(5), state)
            updates += (
                5 if before is None else sum(a != b for a, b in zip(state.tolist(), before.tolist(), strict=True))
            )
            before = state
    assert found.neurobench.membrane_updates_per_sample == updates / 2
    assert found.neurobench.membrane_updates_per_token == updates / 12


@pytest.mark.parametrize(
    ("values", "declared", "emits", "message"),
    [
        ("real", "binary", "binary", "op 'fc' reads binary values"),
        ("ternary", "binary", "binary", "op 'fc' reads binary values .* ternary"),
        ("integer", "ternary", "binary", "op 'fc' reads ternary values .* integer"),
        ("graded", "integer", "binary", "op 'fc' reads integer values .* graded"),
    ],
)
def test_contradicted_declaration_names_the_op(values: str, declared: str, emits: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        explain(Fake(KINDS[values], declared, emits), torch.randint(VOCAB, (2, 6)))


def test_narrower_than_declared_is_fine() -> None:
    assert explain(Fake(KINDS["binary"], "real"), torch.randint(VOCAB, (2, 6))).ops[2].seen_input == "binary"


class Wrong(Fake):
    """A model whose graph does not describe what it does; ``fault`` says how."""

    def __init__(self, fault: str) -> None:
        super().__init__(KINDS["binary"], "binary")
        self.fault = fault
        self.extra = nn.Linear(VOCAB, VOCAB)

    def forward(self, tokens: Tensor, state: Any = None, *, return_spikes: bool = False) -> LMOutput:
        output = super().forward(tokens, state, return_spikes=return_spikes)
        if self.fault == "extra":
            output.logits = self.extra(output.logits)
        if self.fault == "site" and output.spikes:
            output.spikes["other"] = output.spikes["neuron"]
        if self.fault == "spikes" and output.spikes:
            output.spikes["neuron"] = output.spikes["neuron"] - 0.5
        return output

    def graph(self) -> LMGraph:
        ops = {op.name: op for op in super().graph()}
        replace: dict[str, Op] = {
            "missing": Op("head", "linear", ("neuron",), "real", VOCAB, module="nowhere", weight=(VOCAB, 5)),
            "shape": Op("head", "linear", ("neuron",), "real", VOCAB, module="head", weight=(VOCAB, 6)),
            "module": Op("head", "linear", ("neuron",), "real", VOCAB, weight=(VOCAB, 5)),
            "idle": Op("head", "linear", ("neuron",), "real", 2, module="unused", weight=(2, 3)),
        }
        ops["head"] = replace.get(self.fault, ops["head"])
        if self.fault == "feeds":
            ops.pop("head")
        return LMGraph(tuple(ops.values()))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("extra", "leaves out extra, which ran"),
        ("site", "differ in other"),
        ("spikes", "spike site 'neuron' emits binary"),
        ("missing", "module 'nowhere'"),
        ("shape", "'head' declares the weight"),
        ("module", "'head' is linear but names no module"),
        ("idle", "leaves out head|'unused', which was not called"),
        ("feeds", "leaves out head"),
    ],
)
def test_graph_that_does_not_describe_the_model_is_refused(fault: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        explain(Wrong(fault), torch.randint(VOCAB, (2, 6)))


def test_model_is_left_as_it_was() -> None:
    model = Wrong("extra")
    model.act.eval()
    with pytest.raises(PluginError):
        explain(model, torch.randint(VOCAB, (2, 6)))
    assert model.training
    assert not model.act.training
    assert not any(module._forward_hooks for module in model.modules())


def test_groups_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fake(KINDS["integer"], "integer")
    tokens = torch.randint(VOCAB, (4, 6))
    whole = explain(model, tokens)
    monkeypatch.setattr("spiking_lm.watch._TOKENS_PER_CALL", 6)
    assert explain(model, tokens) == whole


def test_long_text_becomes_rows_of_the_context_length() -> None:
    found = explain(Fake(KINDS["binary"], "binary"), torch.randint(VOCAB, (20,)), sample="some text")
    assert (found.samples, found.tokens, found.sample) == (3, 18, "some text")
    assert explain(Fake(KINDS["binary"], "binary"), [1, 2, 3]).tokens == 3


@pytest.mark.parametrize("tokens", [[], [VOCAB], [-1], [[[1]]]])
def test_bad_tokens_are_refused(tokens: Any) -> None:
    with pytest.raises(DataError):
        explain(Fake(KINDS["binary"], "binary"), tokens)


def test_default_sample_says_what_it_is() -> None:
    found = explain(Fake(KINDS["binary"], "binary"))
    assert found.tokens == 510
    assert "512" in found.sample
    assert "austen3" in found.sample or "random" in found.sample


def test_default_sample_goes_through_the_tokenizer() -> None:
    class Pairs:
        def encode(self, text: str) -> list[int]:
            return [len(text[i : i + 2]) for i in range(0, len(text), 2)]

    class Refuses:
        def encode(self, text: str) -> list[int]:
            raise DataError("unknown character")

    ids, words = sample_tokens(9, 20, tokenizer=Pairs())
    assert ids.tolist() == [2] * 20
    assert words == "20 tokens of the embedded corpus austen3 (validation part)"
    ids, words = sample_tokens(9, 20, tokenizer=Refuses())
    assert words == "20 random token ids (seed 0)"
    assert ids.max() < 9
    ids, words = sample_tokens(9, 20)
    assert words == "20 bytes modulo 9 of the embedded corpus austen3 (validation part)"
    assert 0 <= ids.min() <= ids.max() < 9


def test_answer_and_forms() -> None:
    found = explain(Fake(KINDS["binary"], "binary"), torch.randint(VOCAB, (2, 6)))
    assert found.answer.startswith("In front of 2 of 2 weight matrices: spikes drive 100 % of the matrix weights")
    as_json = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert as_json["energy_words"] == ENERGY_WORDS
    assert as_json["classes"]["AC"]["weight_share"] == 1.0
    assert math.isclose(sum(share["dense_share"] for share in as_json["classes"].values()), 1)
    for full in (False, True):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(found.render(full=full))
        text = console.export_text()
        assert found.answer[:40] in text
        assert ENERGY_WORDS in " ".join(text.split())
        assert max(len(line) for line in text.splitlines()) <= 100
        assert "…" not in text
