"""The training loop: schedules, resumption to the bit, interruption, divergence, accumulation."""

from __future__ import annotations

import dataclasses
import io
import math
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import spiking_lm
from spiking_lm import data as datasets
from spiking_lm.checkpoints import latest_checkpoint
from spiking_lm.errors import ConfigError, DivergedError, InterruptedRunError, RecipeError
from spiking_lm.preparation import build_model
from spiking_lm.recipe import Recipe, load_recipe
from spiking_lm.rundir import RunDir
from spiking_lm.stages import ScheduleConfig
from spiking_lm.training import learning_rate, train


def tiny_recipe(**train_settings: Any) -> Recipe:
    settings = {"steps": 8, "batch_size": 2, "seq_len": 16, "log_every": 1, "eval_tokens": 64, **train_settings}
    overrides = [f"train.{key}={value}" for key, value in settings.items()]
    overrides += ["model.n_layer=1", "model.n_embd=16", "model.dropout=0.1"]
    return load_recipe("spikegpt/quickstart", overrides)


@pytest.fixture(scope="module")
def text() -> Any:
    return datasets.load({"type": "austen3", "tokenizer": {"type": "byte"}})


def run_training(recipe: Recipe, text: Any, folder: Path, **options: Any) -> tuple[RunDir, Any]:
    run = RunDir.create(recipe, folder)
    console = Console(file=io.StringIO())
    return run, train(run, recipe, build_model(recipe, text), text, console=console, **options)


@given(
    steps=st.integers(1, 500),
    warmup=st.integers(0, 100),
    final=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    shape=st.sampled_from(["linear", "cosine"]),
)
def test_schedule_stays_between_its_ends(steps: int, warmup: int, final: float, kind: str, shape: str) -> None:
    config = ScheduleConfig(type=kind, warmup=warmup, final=final, shape=shape)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert all(a <= b for a, b in pairwise(rates[:warmup])), "warm-up rises"
    falling = rates[warmup:]
    assert all(a >= b - 1e-12 for a, b in pairwise(falling)), "and then it never rises again"
    assert all(rate >= final - 1e-12 for rate in falling)


def test_schedule_is_the_published_one(shared: Path) -> None:
    with np.load(shared / "golden" / "spikegpt" / "train_tiny.npz") as golden:
        wanted = golden["lr_used"]
    config = ScheduleConfig(type="cosine", final=1e-5 / 6e-4)
    got = [6e-4 * learning_rate(step, len(wanted), config) for step in range(len(wanted))]
    np.testing.assert_allclose(got, wanted, atol=1e-12, rtol=0)


def test_a_constant_rate_that_ends_in_a_cosine() -> None:
    config = ScheduleConfig(type="wsd", decay=0.25, shape="cosine")
    rates = [learning_rate(step, 400, config) for step in range(400)]
    assert rates[:301] == [1.0] * 301
    np.testing.assert_allclose(rates[300:], [0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)], atol=1e-12)


def test_resuming_is_the_uninterrupted_run(text: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(save_every=4, precision="bf16")
    run, whole = run_training(recipe, text, tmp_path / "whole")
    half = run.path / "checkpoints" / "step-000004"
    other = RunDir.create(recipe, tmp_path / "resumed")
    torch.manual_seed(12345)  # whatever the state of the process, the checkpoint's holds
    fresh = build_model(recipe, text)
    resumed = train(other, recipe, fresh, text, resume_from=half, console=Console(file=io.StringIO()))
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    ends = [
        [entry["loss"] for entry in r.metrics() if entry["split"] == "train" and entry["step"] > 4]
        for r in (run, other)
    ]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 4


def test_training_learns_and_logs(text: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=60, batch_size=8, seq_len=32, eval_every=30)
    run, _ = run_training(recipe, text, tmp_path)
    entries = run.metrics()
    losses = [entry["loss"] for entry in entries if entry["split"] == "train"]
    scores = [entry for entry in entries if entry["split"] == "valid"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert [score["step"] for score in scores] == [30, 60]
    assert scores[-1]["bpb"] == pytest.approx(scores[-1]["loss"] / math.log(2))
    last = entries[-2]
    assert set(last["rates"]) == {"embedding", "blocks.0.att", "blocks.0.ffn"}
    assert all(0 <= last[kind][site] <= 1 for kind in ("rates", "silent", "saturated") for site in last["rates"])


def test_accumulated_steps_equal_one_large_batch(text: Any, tmp_path: Path) -> None:
    """Two micro-batches have the mean of their gradients."""
    from spiking_lm.objectives import NextToken
    from spiking_lm.training import MicroBatch, _backward
    from spiking_lm.world import World

    recipe = tiny_recipe(accumulate=2, precision="fp32")
    assert recipe.train is not None
    model = build_model(recipe, text).eval()
    objective = NextToken(text, recipe.train, seed=0)
    micro = MicroBatch(model, objective, "fp32")
    loss, tokens = _backward(micro, micro, recipe.train, 3, record=False, world=World())
    together = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert tokens == 2 * 2 * 16
    model.zero_grad()
    parts = [objective.loss(model, index, record=False)[0] for index in (6, 7)]
    (sum(parts) / 2).backward()  # type: ignore[union-attr]
    assert loss == pytest.approx(sum(float(part.detach()) for part in parts) / 2)
    for a, b in zip(together, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_interrupt_saves_and_says_how_to_resume(text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spiking_lm import objectives

    recipe = tiny_recipe(steps=50)
    original = objectives.NextToken.loss

    def interrupt_at_third(self: Any, model: Any, index: int, *, record: bool) -> Any:
        if index == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, model, index, record=record)

    monkeypatch.setattr(objectives.NextToken, "loss", interrupt_at_third)
    run = RunDir.create(recipe, tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError) as caught:
        train(run, recipe, build_model(recipe, text), text, console=Console(file=io.StringIO()))
    assert str(run.path) in str(caught.value.hint)
    saved = latest_checkpoint(run.path)
    assert saved is not None
    assert saved.name == "step-000003"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nan_stops_before_the_weights_are_spoilt(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    from spiking_lm import objectives

    recipe = tiny_recipe(save_every=2)
    original = objectives.NextToken.loss

    def poisoned(self: Any, model: Any, index: int, *, record: bool) -> Any:
        loss, output, count = original(self, model, index, record=record)
        if index == 5:
            if poison == "loss":
                loss = loss * math.nan
            else:
                model.head.weight.register_hook(lambda grad: grad * math.inf)
        return loss, output, count

    monkeypatch.setattr(objectives.NextToken, "loss", poisoned)
    run = RunDir.create(recipe, tmp_path)
    model = build_model(recipe, text)
    with pytest.raises(DivergedError, match="step 6") as caught:
        train(run, recipe, model, text, console=Console(file=io.StringIO()))
    assert "step-000004" in str(caught.value.hint)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_stuck_neurons_are_named(text: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=4, **{"schedule.warmup": 1}).model_copy(
        update={"model": {"type": "spikegpt", "n_layer": 1, "n_embd": 16, "neuron": {"type": "lif", "threshold": 1000}}}
    )
    out = io.StringIO()
    train(
        RunDir.create(recipe, tmp_path), recipe, build_model(recipe, text), text, console=Console(file=out, width=200)
    )
    assert "100% of the channels of blocks.0.att never fire" in out.getvalue()
    assert out.getvalue().count("blocks.0.att never fire") == 1


def test_classifier_learns(tmp_path: Path) -> None:
    overrides = {
        "train.steps": 100,
        "train.batch_size": 16,
        "train.seq_len": 32,
        "train.eval_every": 0,
        "train.optimizer.lr": 0.01,
        "train.precision": "fp32",
        "model.n_layer": 1,
        "model.n_embd": 32,
    }
    recipe = load_recipe("spikegpt/authors4", [f"{key}={value}" for key, value in overrides.items()])
    run, model = run_training(recipe, datasets.load(recipe.data), tmp_path)
    score = run.metrics()[-1]
    assert score["accuracy"] > 0.4, "four balanced classes: guessing reaches 0.25"
    assert model.capabilities >= {"classify"}


def test_threads_are_given_back_and_kept_over_a_stop(text: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    try:
        torch.set_num_threads(2)
        run, _ = run_training(tiny_recipe(steps=2, save_every=1, threads=1), text, tmp_path)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(3)
        again = tiny_recipe(steps=2, threads="null")
        model = build_model(again, text)
        model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
        half = run.path / "checkpoints" / "step-000001"
        train(RunDir.create(again, tmp_path), again, model, text, resume_from=half, console=Console(file=io.StringIO()))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_model_is_made_from_the_seed(text: Any) -> None:
    recipe = tiny_recipe()
    first, second = build_model(recipe, text), build_model(recipe, text)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert isinstance(first, spiking_lm.interfaces.SpikingLanguageModel)


def stream_recipe(**train_settings: Any) -> Recipe:
    return tiny_recipe(sampling="stream", **train_settings)


def test_resuming_a_stream_takes_up_the_carried_state(text: Any, tmp_path: Path) -> None:
    recipe = stream_recipe(save_every=4, jitter="true", accumulate=2)
    run, whole = run_training(recipe, text, tmp_path / "whole")
    half = run.path / "checkpoints" / "step-000004"
    assert recipe.train is not None

    def resume(folder: str) -> tuple[RunDir, Any]:
        other = RunDir.create(recipe, tmp_path / folder)
        torch.manual_seed(12345)
        fresh = build_model(recipe, text)
        return other, train(other, recipe, fresh, text, resume_from=half, console=Console(file=io.StringIO()))

    other, resumed = resume("resumed")
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    logged = [
        [(entry["loss"], entry["lr"]) for entry in r.metrics() if entry["split"] == "train" and entry["step"] > 4]
        for r in (run, other)
    ]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 4

    with pytest.MonkeyPatch.context() as patch:  # and without the carried state it is another run
        patch.setattr("spiking_lm.objectives.NextToken.take_up", lambda *_: None)
        _, forgetful = resume("forgetful")
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), forgetful.parameters(), strict=True))


def test_a_stream_carries_the_state_without_its_graph_and_drops_it_at_the_top(text: Any) -> None:
    from spiking_lm.objectives import NextToken

    short = dataclasses.replace(text, train=dataclasses.replace(text.train, tokens=text.train.tokens[:100]))
    recipe = stream_recipe()
    assert recipe.train is not None
    model = build_model(recipe, text).eval()
    objective = NextToken(short, recipe.train, seed=0)
    columns = torch.from_numpy(short.train.tokens.astype(np.int64)).view(2, 50)
    with torch.no_grad():
        logits = model(columns[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), columns[:, 1:], reduction="none")
    for index, (start, end) in enumerate([(0, 16), (16, 32), (32, 48), (48, 49), (0, 16)]):
        loss, output, count = objective.loss(model, index, record=False)
        torch.testing.assert_close(loss.detach(), expected[:, start:end].mean(), rtol=1e-4, atol=1e-5)
        assert (count, objective.lr_factor(index)) == (2 * (end - start), (end - start) / 16)
        assert output is not None
        assert output.logits.requires_grad
        assert all(not tensor.requires_grad for tensor in objective.carried())
    fresh = NextToken(short, recipe.train, seed=0).loss(model, 0, record=False)[0]
    assert float(loss.detach()) == float(fresh.detach()), "the second pass began with the state of the first"


def test_a_stream_is_validated_in_one_pass(text: Any) -> None:
    from spiking_lm.objectives import NextToken

    recipe = stream_recipe(eval_tokens=40)
    assert recipe.train is not None
    model = build_model(recipe, text).eval()
    tokens = torch.from_numpy(text.valid.tokens[:41].astype(np.int64))[None]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:])
    score = NextToken(text, recipe.train, seed=0).validate(model)
    assert score["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_jitter_needs_a_stream() -> None:
    with pytest.raises(RecipeError, match="jitter is for sampling: stream"):
        tiny_recipe(jitter="true")


def test_labelled_examples_are_no_stream(tmp_path: Path) -> None:
    recipe = load_recipe("spikegpt/authors4", ["train.sampling=stream"])
    with pytest.raises(ConfigError, match="stream is for texts"):
        run_training(recipe, datasets.load(recipe.data), tmp_path)


def test_a_group_may_have_its_own_rate(text: Any, tmp_path: Path) -> None:
    """A factor of 0 freezes a group, another one scales its first Adam step."""
    recipe = tiny_recipe(steps=1, grad_clip="null", **{"schedule.warmup": 0, "optimizer.weight_decay": 0})
    model = build_model(recipe, text)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    by_name = dict(model.named_parameters())
    factors = {"head.weight": 0.0, "emb.weight": 0.25}
    groups = [
        {"params": [p], **({"lr_scale": factors[name]} if name in factors else {})} for name, p in by_name.items()
    ]
    model.parameter_groups = lambda weight_decay: groups  # type: ignore[method-assign]
    train(RunDir.create(recipe, tmp_path), recipe, model, text, console=Console(file=io.StringIO()))
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in by_name.items()}
    lr = recipe.train.optimizer.lr  # type: ignore[union-attr]
    assert moved["head.weight"] == 0
    assert moved["emb.weight"] == pytest.approx(0.25 * lr, rel=0.05)  # float32 weights
    assert max(moved.values()) == pytest.approx(lr, rel=0.05)


def test_words_are_reported_as_perplexity(tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=2).model_copy(
        update={"data": {"type": "austen3", "tokenizer": {"type": "word", "min_count": 50}}}
    )
    run, _ = run_training(recipe, datasets.load(recipe.data), tmp_path)
    for entry in run.metrics():
        assert "bpb" not in entry
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
