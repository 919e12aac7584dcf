"""Pruning: exact shares, zeros that stay zero, and a pruning run that was stopped goes on bit for bit."""

from __future__ import annotations

import io
import math
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import spiking_lm
from spiking_lm.accounting import connection_sparsity
from spiking_lm.checkpoints import load_checkpoint, load_model
from spiking_lm.errors import InterruptedRunError, RecipeError, UsageError
from spiking_lm.preparation import load_data
from spiking_lm.pruning import Pruner, magnitude_masks, prunable, sparsity_at
from spiking_lm.recipe import load_recipe
from spiking_lm.rundir import RunDir, read_json
from spiking_lm.runs import run_recipe
from spiking_lm.stages import PruneConfig

RECIPE = """\
schema: 1
name: pruned
seed: 5
data: {{type: text, path: {text}}}
model: {{type: spikegpt, n_layer: 2, n_embd: 16, ctx_len: 16, dropout: 0.1}}
train: {{steps: 6, batch_size: 2, seq_len: 16, log_every: 1, eval_tokens: 64, save_every: 4, keep: 9, threads: 1,
         optimizer: {{lr: 1.0e-2, weight_decay: 0.1}}}}
prune: {{sparsity: 0.8, steps: 8, every: 2, ramp: 0.7, parameters: ["blocks.*"]}}
evaluate: {{window: 32, stride: 16, max_tokens: 60, metrics: [perplexity, bits_per_byte]}}
explain: {{tokens: 32}}
"""

matrices = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4).flatmap(
    lambda shapes: st.fixed_dictionaries(
        {
            f"w{i}": st.lists(
                st.one_of(st.integers(-3, 3).map(float), st.floats(-1, 1, width=32)), min_size=a * b, max_size=a * b
            ).map(lambda values, a=a, b=b: torch.tensor(values).reshape(a, b))
            for i, (a, b) in enumerate(shapes)
        }
    )
)
"""Matrices with many equal magnitudes."""

shares = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(weights=matrices, sparsity=shares)
def test_uniform_takes_the_same_share_of_every_matrix(weights: dict[str, torch.Tensor], sparsity: float) -> None:
    masks = magnitude_masks(weights, sparsity, "uniform")
    for name, weight in weights.items():
        assert masks[name].shape == weight.shape
        assert int((~masks[name]).sum()) == round(sparsity * weight.numel())
        assert_no_smaller_one_stays(weight, masks[name])


@given(weights=matrices, sparsity=shares)
def test_global_takes_its_share_of_all_by_one_magnitude(weights: dict[str, torch.Tensor], sparsity: float) -> None:
    masks = magnitude_masks(weights, sparsity, "global")
    everything = torch.cat([weight.flatten() for weight in weights.values()])
    kept = torch.cat([masks[name].flatten() for name in weights])
    assert int((~kept).sum()) == round(sparsity * everything.numel())
    assert_no_smaller_one_stays(everything, kept)


def assert_no_smaller_one_stays(weight: torch.Tensor, kept: torch.Tensor) -> None:
    stays, goes = weight[kept].abs(), weight[~kept].abs()
    assert not len(stays) or not len(goes) or float(goes.max()) <= float(stays.min())


@pytest.mark.parametrize("sparsity", [0.0, 1.0, 1.5, -0.1, math.nan])
def test_a_sparsity_outside_0_and_1_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        magnitude_masks({"w": torch.ones(2, 2)}, sparsity)


@given(steps=st.integers(1, 300), final=shares)
def test_the_sparsity_rises_cubically_to_its_end(steps: int, final: float) -> None:
    values = [sparsity_at(step, steps, final) for step in range(steps + 5)]
    assert values[0] == 0
    assert all(a <= b for a, b in pairwise(values))
    assert set(values[steps:]) == {final}
    if steps % 2 == 0:
        assert sparsity_at(steps // 2, steps, final) == pytest.approx(0.875 * final)


@given(
    steps=st.integers(1, 40),
    ramp=st.floats(0.01, 1),
    every=st.integers(1, 12),
    sparsity=st.floats(0.05, 0.99),
    scope=st.sampled_from(["uniform", "global"]),
    kind=st.sampled_from([torch.optim.AdamW, torch.optim.Adam]),
    seed=st.integers(0, 9),
)
def test_what_was_cut_never_comes_back(
    steps: int, ramp: float, every: int, sparsity: float, scope: Any, kind: Any, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: nn.Parameter(torch.randn(7, n, generator=generator)) for name, n in (("a", 5), ("b", 11))}
    targets = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    optimizer = kind(weights.values(), lr=0.1, weight_decay=0.1)
    config = PruneConfig(sparsity=sparsity, scope=scope, steps=steps, ramp=ramp, every=every)
    pruner = Pruner(weights, config)
    zeros = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    with pruner:
        for step in range(1, steps + 1):
            for name, weight in weights.items():
                ((weight - targets[name]) ** 2).sum().backward()
                assert not weight.grad[zeros[name]].any(), "what was cut takes no part in the gradient's norm"
            optimizer.step()
            optimizer.zero_grad()
            facts = pruner.after_step(step, optimizer)
            for name, weight in weights.items():
                now = weight.detach() == 0
                assert (now | ~zeros[name]).all()
                zeros[name] = now
                assert not any(m[now].any() for m in optimizer.state[weight].values() if m.shape == weight.shape)
    n = {name: weight.numel() for name, weight in weights.items()}
    if scope == "uniform":
        assert {name: int(zero.sum()) for name, zero in zeros.items()} == {
            name: round(sparsity * size) for name, size in n.items()
        }
    gone = sum(int(zero.sum()) for zero in zeros.values())
    assert facts == {"sparsity": pytest.approx(gone / sum(n.values()))}
    if scope == "global":
        assert gone == round(sparsity * sum(n.values()))
    account = pruner.describe()
    assert account["nonzero"] == sum(n.values()) - gone
    assert [row["name"] for row in account["matrices"]] == ["a", "b"]
    for name, weight in weights.items():
        (weight.sum()).backward()
        assert weight.grad[zeros[name]].all(), "after the block the gradient is whole again"


def test_head_and_embedding_are_never_pruned() -> None:
    model = spiking_lm.create_model("spikegpt", vocab_size=11, n_layer=2, n_embd=8, ctx_len=8)
    found = prunable(model)
    parameters = dict(model.named_parameters())
    linears = [op for op in model.graph() if op.kind == "linear"]
    assert list(found) == [op.name for op in linears[:-1]]
    assert all(weight is parameters[f"{model.graph()[name].module}.weight"] for name, weight in found.items())
    first = next(iter(found))
    assert list(prunable(model, [first, "blocks.1.*"])) == [n for n in found if n == first or n.startswith("blocks.1.")]
    for pattern in (linears[-1].name, "blocks.7.*"):
        with pytest.raises(UsageError, match=r"prune\.parameters: .* fits no weight matrix"):
            prunable(model, [first, pattern])
    with pytest.raises(UsageError) as misspelt:
        prunable(model, [first + "s"])
    assert misspelt.value.hint == f"did you mean {first!r}?"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog lay on the rug.\n" * 60, encoding="utf-8")
    path = tmp_path / "pruned.yaml"
    path.write_text(RECIPE.format(text=tmp_path / "text.txt"), encoding="utf-8")
    return path


def run_to_the_end(recipe: Path, out: Path, **options: Any) -> RunDir:
    return run_recipe(recipe, out=out, console=Console(file=io.StringIO()), **options)


def test_a_run_prunes_and_its_later_stages_see_that(recipe_file: Path, tmp_path: Path) -> None:
    run = run_to_the_end(recipe_file, tmp_path / "runs")
    pruning = read_json(run.path / "pruning.json")
    model = load_model(run.path)
    weights = {name: weight.detach() for name, weight in prunable(model, ["blocks.*"]).items()}
    assert {row["name"]: row["nonzero"] for row in pruning["matrices"]} == {
        name: weight.numel() - round(0.8 * weight.numel()) for name, weight in weights.items()
    }
    assert all(int(torch.count_nonzero(weights[row["name"]])) == row["nonzero"] for row in pruning["matrices"])
    assert pruning["sparsity"] == pytest.approx(0.8, abs=0.01)

    assert list(run.manifest["stages"]) == ["train", "prune", "evaluate", "explain"]
    log = [entry for entry in run.metrics() if entry["split"] == "train"]
    assert [entry["step"] for entry in log] == list(range(1, 15))
    risen = [entry.get("sparsity") for entry in log]
    assert risen[:6] == [None] * 6
    assert risen[6] < risen[7], "cuts come after the second, fourth ... step"
    assert all(a <= b for a, b in pairwise(risen[6:]))
    assert risen[-1] == pytest.approx(pruning["sparsity"])
    assert log[6]["lr"] == pytest.approx(1e-2), "the schedule begins again"

    # Before: the trained model; after: the pruned one, which is what evaluate and explain looked at.
    trained, _ = load_checkpoint(run.path / "checkpoints" / "step-000006")
    recipe, data = run.recipe, load_data(run.recipe.data, Console(file=io.StringIO()))
    assert recipe.evaluate is not None
    scores = [spiking_lm.evaluation.evaluate(m, data, recipe.evaluate)["metrics"] for m in (trained, model)]
    assert pruning["before"]["metrics"] == scores[0]
    assert read_json(run.path / "evaluation.json")["metrics"] == scores[1]
    explanation = read_json(run.path / "explanation.json")
    counted = {op["name"]: op["nonzero_weights"] for op in explanation["ops"] if op["name"] in weights}
    assert counted == {row["name"]: row["nonzero"] for row in pruning["matrices"]}
    assert explanation["neurobench"]["connection_sparsity"] == connection_sparsity(model) > 0.4


@pytest.mark.parametrize("stop_after", [1, 5, 8])
def test_a_pruning_that_was_interrupted_goes_on_bit_for_bit(
    recipe_file: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_to_the_end(recipe_file, tmp_path / "whole")
    after_step = Pruner.after_step

    def interrupted(self: Pruner, step: int, optimizer: Any) -> dict[str, float]:
        if step == stop_after:
            signal.raise_signal(signal.SIGINT)
        return after_step(self, step, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(Pruner, "after_step", interrupted)
        if stop_after < 8:
            with pytest.raises(InterruptedRunError, match=f"interrupted after step {6 + stop_after}"):
                run_to_the_end(recipe_file, tmp_path / "stopped")
        else:
            run_to_the_end(recipe_file, tmp_path / "stopped")  # the last step was done already
    torch.manual_seed(99)
    resumed = run_to_the_end(recipe_file, tmp_path / "stopped", resume="auto" if stop_after < 8 else None)
    ends = [load_checkpoint(run.path) for run in (whole, resumed)]
    for (name, a), (_, b) in zip(ends[0][0].state_dict().items(), ends[1][0].state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert str(ends[0][1]["optimizer"]) == str(ends[1][1]["optimizer"])
    for name in ("pruning.json", "evaluation.json"):
        assert read_json(whole.path / name) == read_json(resumed.path / name)
    losses = [[(e["step"], e["loss"]) for e in r.metrics() if e["split"] == "train"] for r in (whole, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("prune.sparsity=1.5", "less than 1, got 1.5"),
        ("prune.sparsity=1", "less than 1, got 1"),
        ("prune.sparsity=0", "greater than 0, got 0"),
        ("prune.sparsity=-0.5", "greater than 0, got -0.5"),
        ("prune.scope=locally", "should be 'uniform' or 'global'"),
        ("train=null", "prune goes on with training, and there is none"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(recipe_file: Path, change: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [change])
    assert words in caught.value.message
    assert "prune" in caught.value.message


def test_a_pattern_that_fits_nothing_is_refused_before_training(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'rnns\.\*' fits no weight matrix"):
        run_recipe(
            recipe_file, {"prune.parameters": ["rnns.*"]}, out=tmp_path / "runs", console=Console(file=io.StringIO())
        )
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))
