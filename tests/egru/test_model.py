"""The EGRU language model's switches, its twins, its accounting, and its reading of other people's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spiking_lm
from spiking_lm.errors import ConfigError, DataError, UsageError
from spiking_lm.stages import OptimizerConfig
from spiking_lm.training import make_optimizer
from spiking_lm_egru import EGRU, EGRUState
from spiking_lm_egru.config import EGRUConfig
from spiking_lm_egru.reference import from_torch_gru

VOCAB = 17
SMALL = {"vocab_size": VOCAB, "n_layer": 2, "n_embd": 8, "n_hidden": 12}
CELLS = ["egru", "gru", "lstm"]
cells = pytest.mark.parametrize("cell", CELLS)


def make(**config: Any) -> Any:
    torch.manual_seed(0)
    return spiking_lm.create_model("egru", **{**SMALL, **config})


def tokens(batch: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def loss_of(output: Any, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    """31,699,150 parameters for Penn Treebank's 10,000 words, 49,180,928 for WikiText-2's 33,278."""
    model = spiking_lm.create_model("egru", vocab_size=1)
    for words, count in ((10_000, 31_699_150), (33_278, 49_180_928)):
        further = (words - 1) * (750 + 1)  # a row of the shared matrix and a bias for each
        assert sum(p.numel() for p in model.parameters()) + further == count
    matrices = [op for op in model.graph() if op.name.startswith("rnns.") and op.weight is not None]
    assert sum(op.weight[0] * op.weight[1] for op in matrices if op.weight) == 24_165_000


@pytest.mark.parametrize(("projection", "last"), [(False, 8), (True, 12)])
@cells
def test_layer_sizes(cell: str, projection: bool, last: int) -> None:
    model = make(n_layer=3, projection=projection, cell=cell)
    assert [rnn.input_size for rnn in model.rnns] == [8, 12, 12]
    assert [rnn.hidden_size for rnn in model.rnns] == [12, 12, last]
    assert (model.decoder.projection is not None) == projection


def test_tied_weights_are_one_matrix_also_after_loading(tmp_path: Path) -> None:
    model = make()
    assert model.decoder.decoder.weight is model.embeddings.weight
    spiking_lm.save_model(model, tmp_path / "model")
    again: Any = spiking_lm.load_model(tmp_path / "model")
    assert again.decoder.decoder.weight is again.embeddings.weight
    free = make(tie_weights=False)
    assert free.decoder.decoder.weight is not free.embeddings.weight
    assert free.decoder.decoder.weight.abs().max() <= 0.1


def test_the_twin_of_a_model_differs_in_its_cell_alone() -> None:
    egru = make(thr_mean=0.01, state_carry="y_only", activity_penalty=5.0, zoneout=0.1)
    for cell in ("gru", "lstm"):
        twin = spiking_lm.create_model("egru", **{**egru.config.model_dump(), "cell": cell})
        assert twin.spike_sites() == []
        assert twin.train()(tokens()).aux_losses == {}
        assert [op.name for op in twin.graph()] == [op.name for op in egru.graph()]


# -- the twins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "layer"), [("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_twins_are_torchs_own_layers(cell: str, layer: type[nn.RNNBase]) -> None:
    model, ids = make(cell=cell).double().eval(), tokens()
    x = model.embeddings(ids)
    for rnn in model.rnns:
        assert type(rnn) is layer
        x, _ = rnn(x.transpose(0, 1))
        x = x.transpose(0, 1)
    torch.testing.assert_close(model(ids).logits, model.decoder.decoder(x))


@pytest.mark.parametrize(("quirks", "elementwise"), [([], True), (["row_weight_drop"], False)])
@pytest.mark.parametrize(("cell", "step"), [("gru", "gru_cell"), ("lstm", "lstm_cell")])
def test_weight_drop_of_the_twins(
    monkeypatch: pytest.MonkeyPatch, cell: str, step: str, quirks: list[str], elementwise: bool
) -> None:
    model, seen, original = make(cell=cell, dropout_connect=0.5, reference_quirks=quirks), [], getattr(torch, step)

    def spy(*args: Any) -> Any:
        seen.append(args[3])
        return original(*args)

    monkeypatch.setattr(torch, step, spy)
    model(tokens(length=1))
    model.eval()(tokens(length=1))
    for weight, rnn in zip(seen, [*model.rnns, *model.rnns], strict=True):
        kept = weight != 0
        if weight is seen[0] or weight is seen[1]:
            torch.testing.assert_close(weight[kept], 2 * rnn.weight_hh_l0[kept])
            assert 0.2 < kept.double().mean() < 0.8
            whole_rows = (kept.all(1) | ~kept.any(1)).all()
            assert bool(whole_rows) != elementwise
        else:
            assert torch.equal(weight, rnn.weight_hh_l0)


def test_activity_regularisation_of_the_twins() -> None:
    """AWD-LSTM's: the last layer's squared output, and its change from step to step."""
    model, ids = make(cell="gru", alpha=2.0, beta=3.0), tokens()
    output = model(ids, return_spikes=True)
    y = torch.cat([output.arrived["rnns.1.recurrent"][:, 1:], output.state[1].h[:, None]], 1)
    assert output.aux_losses.keys() == {"alpha", "beta"}
    torch.testing.assert_close(output.aux_losses["alpha"], 2 * y.square().mean())
    torch.testing.assert_close(output.aux_losses["beta"], 3 * (y[:, 1:] - y[:, :-1]).square().mean())


# -- dropout -----------------------------------------------------------------------------------------------------------


@cells
@pytest.mark.parametrize("quirks", [[], ["batch_shared_dropout"]])
def test_a_row_drops_the_same_channels_at_every_step(cell: str, quirks: list[str]) -> None:
    model, ids = make(cell=cell, dropout_emb=0.5, reference_quirks=quirks), tokens()
    mask = model(ids, return_spikes=True).arrived["rnns.0.input"] / model.embeddings(ids)
    assert sorted(set(mask.flatten().tolist())) == [0.0, pytest.approx(2.0)]
    along_time, along_rows = mask[:, 1:] - mask[:, :-1], mask[1:] - mask[:-1]
    same, differs = (along_time, along_rows) if not quirks else (along_rows, along_time)
    assert same.abs().max() < 1e-5
    assert differs.abs().max() > 1
    assert torch.equal(model.eval()(ids, return_spikes=True).arrived["rnns.0.input"], model.embeddings(ids))


@pytest.mark.parametrize("place", ["forward", "last"])
def test_where_dropout_stands(place: str) -> None:
    model, ids, read = make(**{f"dropout_{place}": 0.5}), tokens(), []
    model.decoder.decoder.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    output = model(ids, return_spikes=True)
    between = torch.equal(output.arrived["rnns.1.input"], output.spikes["rnns.0"])
    behind = torch.equal(read[0], output.spikes["rnns.1"])
    assert (between, behind) == ((False, True) if place == "forward" else (True, False))


def test_words_drop_out_as_a_whole() -> None:
    model, ids = make(dropout_words=0.5), tokens(4, 40)
    ratio = model(ids, return_spikes=True).arrived["rnns.0.input"] / model.embeddings(ids)
    for word in range(VOCAB):
        values = ratio[ids == word]
        assert (values == 0).all() or torch.allclose(values, torch.tensor(2.0))
    assert 0 < (ratio == 0).double().mean() < 1


def test_drop_connect_and_zoneout_reach_the_layers() -> None:
    layer = make(dropout_connect=0.3, zoneout=0.2, thr_mean=0.5, dampening_factor=0.9).rnns[1]
    assert (layer.dropout, layer.zoneout, layer.thr_mean, layer.dampening_factor) == (0.3, 0.2, 0.5, 0.9)


# -- state -------------------------------------------------------------------------------------------------------------


def test_carrying_events_alone_holds_for_windows_but_not_for_steps() -> None:
    model, ids = make(state_carry="y_only").double().eval(), tokens()
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :6])
        second = model(ids[:, 6:], first.state).logits
        assert (second - whole[:, 6:]).abs().max() > 1e-4
        rest = tuple(EGRUState(*map(torch.zeros_like, layer))._replace(y=layer.y) for layer in first.state)
        full = spiking_lm.create_model("egru", **SMALL).double().eval()
        full.load_state_dict(model.state_dict())
        torch.testing.assert_close(second, full(ids[:, 6:], rest).logits)
        state = first.state
        for position in range(6, ids.shape[1]):
            logits, state = model.step(ids[:, position], state)
            torch.testing.assert_close(logits, whole[:, position])


@pytest.mark.parametrize("shape", [(5,), (2, 0), (1, 2, 3)])
def test_tokens_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="token ids"):
        make()(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_beyond_the_vocabulary_are_named(token: int) -> None:
    model, ids = make(), torch.tensor([[1, token]])
    with pytest.raises(DataError, match=f"the model knows 0 to {VOCAB - 1}"):
        model(ids)
    with pytest.raises(DataError, match=f"the model knows 0 to {VOCAB - 1}"):
        model.step(ids[:, 1], model.init_state(1))


# -- events and thresholds ---------------------------------------------------------------------------------------------


def test_penalties_are_those_of_the_formulas() -> None:
    """Against a scan of the cell, step by step."""
    weights = {"alpha": 0.5, "beta": 2.0, "gamma": 3.0, "activity_penalty": 5.0, "activity_target": 0.1}
    model, ids = make(n_layer=1, n_embd=12, **weights).double(), tokens()
    losses = model(ids).aux_losses
    state, states = model.init_state(len(ids), dtype=torch.float64), []
    model.eval()
    with torch.no_grad():
        for token in ids.T:
            _, state = model.step(token, state)
            states.append(state[0])
    c, o = (torch.stack([getattr(s, name) for s in states]) for name in ("c", "o"))
    after = [(c[t + 1] - c[t])[o[t] == 1] for t in range(len(c) - 1)]
    expected = {
        "alpha": 0.5 * c.mean(),
        "beta": 2 * torch.cat(after).square().mean(),
        "gamma": 3 * o.mean(),
        "activity": 5 * (o.mean() - 0.1).clamp(min=0),
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs() > 0
        torch.testing.assert_close(losses[name].detach(), value)
    assert model(ids).aux_losses == {}, "evaluation is not penalised"


def test_penalties_are_summed_over_the_layers() -> None:
    model, ids = make(gamma=1.0), tokens()
    output = model(ids, return_spikes=True)
    rates = [(spikes != 0).double().mean() for spikes in output.spikes.values()]
    assert output.aux_losses["gamma"].item() == pytest.approx(float(sum(rates)), rel=1e-5)


def test_without_events_no_penalty_is_undefined() -> None:
    model = make(alpha=1.0, beta=1.0, gamma=1.0, activity_penalty=1.0)
    for rnn in model.rnns:
        rnn.thr.data.fill_(1.0)  # a state is always below 1
    losses = model(tokens()).aux_losses
    assert losses["beta"] == losses["gamma"] == losses["activity"] == 0
    assert torch.isfinite(losses["alpha"])


def test_activity_above_the_target_is_driven_down_through_the_thresholds() -> None:
    model, ids = make(thr_mean=0.05, activity_penalty=5.0, activity_target=0.1), tokens(8, 30)
    penalty = model(ids).aux_losses["activity"]
    assert penalty > 0.5
    penalty.backward()
    for rnn in model.rnns:
        assert rnn.thr.grad.mean() < 0, "descending the penalty must raise the thresholds"
    optimizer = torch.optim.Adam([rnn.thr for rnn in model.rnns], lr=0.03)
    for _ in range(30):
        optimizer.zero_grad()
        model(ids).aux_losses["activity"].backward()
        optimizer.step()
    rates = [(s != 0).double().mean() for s in model.eval()(ids, return_spikes=True).spikes.values()]
    assert all(rate < 0.2 for rate in rates), rates


def test_thresholds_stay_between_0_and_1() -> None:
    model, ids = make(), tokens()
    optimizer = torch.optim.Adam([rnn.thr for rnn in model.rnns], lr=2.0)
    with torch.no_grad():
        before = model.eval()(ids).logits
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model(ids), ids).backward()
        for rnn in model.rnns:
            assert 0 <= rnn.thr.min() <= rnn.thr.max() <= 1
        optimizer.step()
    assert any(rnn.thr.min() < 0 or rnn.thr.max() > 1 for rnn in model.rnns), "this test moves none out of range"
    outside = [rnn.thr.detach().clone() for rnn in model.rnns]
    with torch.no_grad():
        logits = model.eval()(ids).logits
        assert all(torch.equal(rnn.thr, thr) for rnn, thr in zip(model.rnns, outside, strict=True))
        for rnn in model.rnns:
            rnn.thr.clamp_(0, 1)
        torch.testing.assert_close(model(ids).logits, logits)
    assert not torch.equal(before, logits)


def test_optimizer_groups() -> None:
    names = {id(p): name for name, p in make().named_parameters()}
    assert len(names) == 12

    def groups(**config: Any) -> list[tuple[set[str], float, float]]:
        model = make(**config)
        own = {id(p): name for name, p in model.named_parameters()}
        return [
            ({own[id(p)] for p in group["params"]}, group["weight_decay"], group.get("lr_scale", 1.0))
            for group in model.parameter_groups(0.1)
        ]

    thresholds = {"rnns.0.thr", "rnns.1.thr"}
    matrices = {"embeddings.weight", *(f"rnns.{i}.{x}kernel" for i in range(2) for x in ("", "recurrent_"))}
    biases = set(names.values()) - matrices - thresholds
    assert groups(threshold_lr=0.5) == [(matrices, 0.1, 1.0), (biases, 0.0, 1.0), (thresholds, 0.0, 0.5)]
    assert groups(threshold_lr=0.0) == [(matrices, 0.1, 1.0), (biases, 0.0, 1.0)]
    assert groups(reference_quirks=["decayed_biases"]) == [(matrices | biases, 0.1, 1.0), (thresholds, 0.0, 1.0)]
    assert [len(params) for params, _, _ in groups(cell="gru")] == [5, 5]


def test_thresholds_learn_at_their_own_rate_or_not_at_all() -> None:
    ids = tokens()
    for factor in (0.0, 0.1, 1.0):
        model = make(threshold_lr=factor)
        optimizer = make_optimizer(model, OptimizerConfig(lr=0.01))
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        before = [rnn.thr.detach().clone() for rnn in model.rnns]
        loss_of(model(ids), ids).backward()
        optimizer.step()
        moved = max(float((rnn.thr.detach() - thr).abs().max()) for rnn, thr in zip(model.rnns, before, strict=True))
        assert moved == pytest.approx(0.01 * factor, rel=0.01)


def test_the_last_word_as_padding_does_not_train_on_what_it_reads() -> None:
    ids = torch.full((1, 4), VOCAB - 1)
    for quirks in ([], ["last_word_as_padding"]):
        model = make(tie_weights=False, reference_quirks=quirks)
        model(ids).logits.square().sum().backward()
        assert bool(model.embeddings.weight.grad.any()) == (not quirks)


# -- accounting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
@cells
def test_where_the_spikes_are(cell: str, projection: bool) -> None:
    model, ids = make(cell=cell, projection=projection), tokens(2, 40)
    explained = spiking_lm.explain(model, ids)
    ops = {op.name: op for op in explained.ops}
    blocks = 4 if cell == "lstm" else 3
    with torch.no_grad():
        output = model.eval()(ids, return_spikes=True)
    for layer, (n_in, n_out) in enumerate(((8, 12), (12, 12 if projection else 8))):
        of_input, of_recurrent = ops[f"rnns.{layer}.input"], ops[f"rnns.{layer}.recurrent"]
        assert of_input.dense == blocks * n_out * n_in
        assert of_recurrent.dense == blocks * n_out * n_out
        assert of_input.op_class == of_recurrent.op_class == "MAC"
        assert of_input.declared_inputs == (("graded",) if layer and cell == "egru" else ("real",))
        assert of_recurrent.declared_inputs == (("graded",) if cell == "egru" else ("real",))
        for op, name in ((of_input, "input"), (of_recurrent, "recurrent")):
            arrived = output.arrived[f"rnns.{layer}.{name}"]
            n_inputs = int(torch.count_nonzero(arrived))
            assert op.effective_macs * ids.numel() == n_inputs * blocks * n_out
            assert op.input_zeros == pytest.approx(1 - n_inputs / arrived.numel())
    sparse = {name for name, op in ops.items() if op.kind == "linear" and (op.input_zeros or 0) > 0.2}
    if cell == "egru":
        head = "decoder.projection" if projection else "decoder.decoder"
        assert sparse == {"rnns.0.recurrent", "rnns.1.input", "rnns.1.recurrent", head}
        assert explained.answer.startswith(f"In front of 4 of {5 + projection} weight matrices, as graded events")
        for site in explained.sites:
            spikes = output.spikes[site.name]
            assert site.rate == pytest.approx(int(torch.count_nonzero(spikes)) / spikes.numel())
    else:
        assert explained.sites == ()
        assert sparse == set()
        assert explained.answer.startswith("Nowhere")


def test_the_recurrent_matrix_reads_the_events_of_the_step_before() -> None:
    model, ids = make().eval(), tokens()
    with torch.no_grad():
        before = model(ids)
        output = model(ids, before.state, return_spikes=True)
    for layer, state in enumerate(before.state):
        y = output.spikes[f"rnns.{layer}"]
        assert torch.equal(output.arrived[f"rnns.{layer}.recurrent"], torch.cat([state.y[:, None], y[:, :-1]], 1))


def test_graph_describes_the_cell_for_backends() -> None:
    model = make(zoneout=0.1)
    graph, weights = model.graph(), model.state_dict()
    for layer in range(2):
        cell = graph[f"rnns.{layer}"]
        assert cell.inputs == (f"rnns.{layer}.input", f"rnns.{layer}.recurrent")
        assert (cell.dynamics.hidden_size, cell.dynamics.zoneout) == (cell.size, 0.1)  # type: ignore[union-attr]
        assert weights[cell.parameters["threshold"]].shape == (cell.size,)
        for name in cell.inputs:
            op = graph[name]
            assert op.weight == tuple(weights[op.parameters["weight_t"]].T.shape)
            assert weights[op.parameters["bias"]].shape == (op.size,)
    assert graph["rnns.0.recurrent"].recurrent == ("rnns.0",)


# -- other people's weights --------------------------------------------------------------------------------------------


@cells
@pytest.mark.parametrize("changes", [{}, {"projection": True, "n_layer": 1}, {"tie_weights": False}])
def test_round_trip(cell: str, changes: dict[str, Any]) -> None:
    model = make(cell=cell, dampening_factor=0.7 if cell == "egru" else 1.0, **changes)  # 0.7 is rounded to float32
    weights = spiking_lm.export_reference(model)
    again = spiking_lm.import_reference("egru", weights)
    assert again.config == model.config.model_copy(
        update={"dampening_factor": again.config.dampening_factor}  # type: ignore[attr-defined]
    )
    assert again.config.dampening_factor == pytest.approx(0.7 if cell == "egru" else 1.0)  # type: ignore[attr-defined]
    assert all(torch.equal(spiking_lm.export_reference(again)[key], value) for key, value in weights.items())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_released_layers_keep_their_constants() -> None:
    weights = spiking_lm.export_reference(make(dampening_factor=3.5, pseudo_derivative_support=1.5))
    assert weights["rnns.1.dampening_factor"].tolist() == [3.5]
    assert weights["rnns.1._max_norm"].tolist() == [-1.0]
    config = spiking_lm.import_reference("egru", weights).config
    assert (config.dampening_factor, config.pseudo_derivative_support) == (3.5, 1.5)  # type: ignore[attr-defined]
    assert spiking_lm.import_reference("egru", weights, dampening_factor=2.0).config.dampening_factor == 2.0  # type: ignore[attr-defined]
    weights["rnns.0.dampening_factor"] += 1
    with pytest.raises(DataError, match="dampening_factor differs between the layers"):
        spiking_lm.import_reference("egru", weights)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_released_baselines_with_dropped_weights(cell: str) -> None:
    """Their wrapper keeps the trained matrix beside the layer, whose own has holes."""
    model = make(cell=cell)
    released = {}
    for key, value in spiking_lm.export_reference(model).items():
        if key.endswith("weight_hh_l0"):
            released[f"{key}_raw"], value = value, value * 0
        released[re.sub(r"^(rnns\.\d\.)", r"\1module.", key)] = value
    again = spiking_lm.import_reference("egru", released)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("rnns.1.recurrent_bias"), "missing: rnns.1.recurrent_bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda w: w.update({"rnns.1.kernel": torch.zeros(5, 24)}), r"rnns.1.kernel: \(5, 24\) instead of \(12, 24\)"),
        (lambda w: w.update({"rnns.0.recurrent_kernel": torch.zeros(7)}), r"\(7,\), not a matrix"),
        (lambda w: w.update({"rnns.0.recurrent_kernel": torch.zeros(12, 30)}), "30 rows of gates for 12 units"),
        (lambda w: w.pop("rnns.0.recurrent_kernel"), "missing: rnns.0.recurrent_kernel"),
        (lambda w: w.pop("embeddings.weight"), "not an EGRU language model"),
    ],
)
def test_wrong_state_dicts_are_named(change: Any, message: str) -> None:
    weights = spiking_lm.export_reference(make())
    change(weights)
    with pytest.raises(DataError, match=message):
        spiking_lm.import_reference("egru", weights)


def test_contradicting_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="n_layer=3 but the tensors say 2"):
        spiking_lm.import_reference("egru", spiking_lm.export_reference(make()), n_layer=3)


def test_a_released_file_is_converted(tmp_path: Path) -> None:
    from spiking_lm.convert import convert

    model = make(dampening_factor=0.5)
    torch.save(spiking_lm.export_reference(model), tmp_path / "released.cpt")
    done = convert(tmp_path / "released.cpt", tmp_path / "model")
    assert (done.model_type, done.equal, done.compared) == ("egru", len(spiking_lm.export_reference(model)), done.equal)


def test_gates_of_torchs_gru() -> None:
    """Where no unit fires, a step of EGRU from (c, y) = (h, h) is a step of GRU."""
    torch.manual_seed(0)
    gru, x, h = nn.GRU(5, 7).double(), torch.randn(3, 5).double(), torch.rand(3, 7).double()
    layer = EGRU(5, 7).double().eval()
    layer.load_state_dict({**from_torch_gru(dict(gru.named_parameters())), "thr": torch.ones(7)})
    zeros = torch.zeros_like(h)
    with torch.no_grad():
        _, state = layer(x[:, None], EGRUState(h, h, zeros, zeros))
        expected, _ = gru(x[None], h[None])
    torch.testing.assert_close(state.c, expected[0])


# -- configuration -----------------------------------------------------------------------------------------------------


def test_typos_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match="n_hiden") as caught:
        make(n_hiden=3)
    assert "did you mean 'n_hidden'?" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="reference_quirks"):
        make(reference_quirks=["integer_abs"])


def test_the_page_lists_every_field(root: Path) -> None:
    page = (root / "docs" / "egru.md").read_text(encoding="utf-8")
    table = page.partition("| key | default |")[2].partition("\n\n")[0]
    keys = re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.splitlines() if row.count("|") > 2))
    assert sorted(keys) == sorted(EGRUConfig.model_fields)
