"""From a model to a program: the same logits as the model, and a clear refusal of what cannot be placed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spiking_lm
from spiking_lm.errors import ConfigError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.hardware import LoweringError, lower
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm_spinnaker2.program import SpiNNaker2Program


def egru(**config: Any) -> SpikingLanguageModel:
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "n_layer": 2, "n_embd": 24, "n_hidden": 32, "thr_mean": 0.05}
    model = spiking_lm.create_model("egru", **{**sizes, **config}).eval()
    with torch.no_grad():
        model.get_parameter("embeddings.weight").mul_(10)  # so that units fire from the start
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.2)
            if name.endswith("kernel"):
                parameter *= torch.rand_like(parameter) > 0.7
    return model


@pytest.mark.parametrize(
    "config",
    [{}, {"projection": True}, {"tie_weights": False}, {"n_layer": 3, "zoneout": 0.1}, {"n_layer": 1}],
)
@pytest.mark.parametrize("kernel", ["row", "event"])
def test_fp32_equals_the_model(config: dict[str, Any], kernel: str) -> None:
    model = egru(**config)
    tokens = torch.randint(40, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(tokens, return_spikes=True)
    program = lower(model, "spinnaker2", kernel=kernel)
    assert isinstance(program, SpiNNaker2Program)
    result = program.run(tokens[0].numpy())
    np.testing.assert_allclose(result.logits, output.logits[0], rtol=0, atol=1e-5)
    events = [int((y != 0).sum()) for y in output.spikes.values()]
    assert all(events)
    counted = [stage["packets"] for stage in result.counters["stages"]]
    assert counted == events, "other events than the model's"
    for (c, y), after in zip(result.state, output.state, strict=True):
        np.testing.assert_allclose(c, after.c[0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(y, after.y[0], rtol=0, atol=1e-6)


def test_a_model_in_training_mode_is_lowered_as_evaluated() -> None:
    model = egru(dropout_emb=0.5, dropout_connect=0.5)
    expected = lower(model, "spinnaker2").run(np.arange(20)).logits
    model.train()
    np.testing.assert_array_equal(lower(model, "spinnaker2").run(np.arange(20)).logits, expected)


def test_zeros_are_not_stored() -> None:
    model = egru()
    program = lower(model, "spinnaker2")
    stored = {op.name: op.weights for op in program.report().placement}
    for layer in (0, 1):
        for op, key in (("input", "kernel"), ("recurrent", "recurrent_kernel")):
            assert stored[f"rnns.{layer}.{op}"] == int((model.get_parameter(f"rnns.{layer}.{key}") != 0).sum())
    dense = lower(model, "spinnaker2", storage="dense").report()
    assert next(op.weights for op in dense.placement if op.name == "rnns.0.input") == 3 * 32 * 24


def test_every_op_of_the_graph_is_placed() -> None:
    model = egru(projection=True)
    placed = {op.name: op.kind for op in lower(model, "spinnaker2").report().placement}
    assert placed == {op.name: op.kind for op in model.graph()}


def test_int8_does_not_depend_on_the_run() -> None:
    model, tokens = egru(), np.arange(40)
    first, again = (lower(model, "spinnaker2", numerics="int8").run(tokens) for _ in range(2))
    np.testing.assert_array_equal(first.logits, again.logits)
    assert first.counters == again.counters


def test_spikegpt_is_refused_by_name() -> None:
    model = spiking_lm.create_model("spikegpt", vocab_size=20, n_layer=1, n_embd=8, ctx_len=8, neuron={"type": "lif"})
    with pytest.raises(LoweringError) as error:
        lower(model, "spinnaker2")
    first = {op.kind: op.name for op in reversed(model.graph().ops)}
    for kind in ("wkv", "norm", "token_shift", "neuron"):
        assert f"'{first[kind]}' ({kind})" in str(error.value)
    assert "exponentially weighted sums" in str(error.value)


def test_a_run_says_so_before_it_trains(tmp_path: Path) -> None:
    small = {"model.type": "spikegpt", "model.n_layer": 1, "model.n_embd": 8, "model.neuron": {"type": "lif"}}
    with pytest.raises(LoweringError, match=r"'blocks\.0\.att\.wkv'"):
        spiking_lm.run_recipe("egru/austen-spinnaker2", small, out=tmp_path)
    (run,) = (tmp_path / "egru" / "austen-spinnaker2").glob("2*")
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_twins_are_refused_by_name(cell: str) -> None:
    with pytest.raises(LoweringError, match=r"'rnns\.0' \(elementwise\).*and 1 more of its kind"):
        lower(egru(cell=cell), "spinnaker2")


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'numerics'"):
        lower(egru(), "spinnaker2", numeric="int8")
    with pytest.raises(ConfigError, match=r"no layer 'rnns\.2'"):
        lower(egru(), "spinnaker2", pes={"rnns.2": 1})


def _swap(model: SpikingLanguageModel, monkeypatch: pytest.MonkeyPatch, name: str, *new: Op) -> None:
    ops = [op for old in model.graph() for op in (new if old.name == name else (old,))]
    monkeypatch.setattr(model, "graph", lambda: LMGraph(tuple(ops)))


def test_other_orders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = egru()
    op = model.graph()["rnns.1.input"]
    _swap(model, monkeypatch, op.name, replace(op, inputs=("embeddings",)))
    with pytest.raises(LoweringError, match=r"'rnns\.1\.input' \(linear\) reads \('embeddings',\); expected"):
        lower(model, "spinnaker2")


def test_foreign_ops_between_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = egru()
    decoder = model.graph()["decoder.decoder"]
    norm = Op("ln_out", "norm", decoder.inputs, "real", 24)
    _swap(model, monkeypatch, decoder.name, norm, replace(decoder, inputs=("ln_out",)))
    with pytest.raises(LoweringError, match=r"'ln_out' \(norm\) needs the mean of all units"):
        lower(model, "spinnaker2")


def test_a_model_without_a_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = egru()
    _swap(model, monkeypatch, "decoder.decoder")
    with pytest.raises(LoweringError, match="2 layers of event-based gated units and 0 matrices after them"):
        lower(model, "spinnaker2")


def test_weights_that_are_not_finite_are_named() -> None:
    model = egru()
    with torch.no_grad():
        model.get_parameter("rnns.1.recurrent_kernel")[3, 4] = torch.nan
    with pytest.raises(LoweringError, match=r"'rnns\.1\.recurrent' \(linear\): its weight 'rnns\.1\.recurrent_kernel'"):
        lower(model, "spinnaker2")


def test_weights_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = egru()
    op = model.graph()["rnns.0"]
    _swap(model, monkeypatch, op.name, replace(op, parameters={}))
    with pytest.raises(LoweringError, match=r"'rnns\.0' \(neuron\): the model's state dict has no threshold"):
        lower(model, "spinnaker2")
