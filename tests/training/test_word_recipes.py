"""The shipped recipes over words: their settings are the published ones, and they run on files as users have them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spiking_lm.recipe import load_recipe
from spiking_lm.rundir import read_json
from spiking_lm.runs import run_recipe

PUBLISHED: dict[str, dict[str, Any]] = {
    "ptb": {
        "seed": 9612,
        "batch_size": 64,
        "lr": 0.0012,
        "weight_decay": 0.10,
        "dropout_emb": 0.6,
        "passes": 1000,
        "constant": 700,
        "tokens": 929_589,
    },
    "wikitext2": {
        "seed": 913420,
        "batch_size": 128,
        "lr": 0.001,
        "weight_decay": 0.12,
        "dropout_emb": 0.7,
        "passes": 800,
        "constant": 400,
        "tokens": 2_088_628,
    },
}
SMALL = ["model.n_embd=8", "model.n_hidden=12", "train.steps=3", "train.batch_size=2", "train.seq_len=10"]
SMALL += ["train.eval_every=0", "train.eval_tokens=40", "train.log_every=1", "explain.tokens=20", "report=null"]
SMALL += ["generate.max_new_tokens=5"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name: str) -> None:
    recipe, table = load_recipe(f"egru/{name}"), PUBLISHED[name]
    train, model = recipe.train, recipe.model
    assert train is not None
    assert recipe.evaluate is not None
    assert (recipe.seed, train.batch_size, train.seq_len, train.grad_clip) == (
        table["seed"],
        table["batch_size"],
        70,
        0.1,
    )
    assert (train.optimizer.lr, train.optimizer.weight_decay) == (table["lr"], table["weight_decay"])
    assert (train.optimizer.betas, train.sampling, train.jitter) == ((0.0, 0.999), "stream", True)
    assert (model["n_layer"], model["n_embd"], model["n_hidden"]) == (3, 750, 1350)
    dropouts = [model[f"dropout_{kind}"] for kind in ("emb", "words", "forward", "connect", "last")]
    assert dropouts == [table["dropout_emb"], 0.1, 0.25, 0.7, 0.5]
    assert (model["thr_mean"], model["dampening_factor"], model["pseudo_derivative_support"]) == (0.01, 3.6, 3.6)
    assert (model["threshold_lr"], model["state_carry"]) == (0.0, "y_only"), "frozen thresholds, states that begin anew"
    assert (recipe.evaluate.window, recipe.evaluate.protocol, recipe.evaluate.split) == (70, "carried", "test")

    windows = (table["tokens"] // table["batch_size"] - 1) / (0.95 * 69.5 + 0.05 * 34.5)
    assert train.steps == pytest.approx(windows * table["passes"], rel=0.002)
    assert (train.schedule.type, train.schedule.shape, train.schedule.final) == ("wsd", "cosine", 0.0)
    assert train.schedule.decay == pytest.approx(1 - table["constant"] / table["passes"])


def run(name: str, folder: Path, *settings: str) -> dict[str, Any]:
    done = run_recipe(f"egru/{name}", [*SMALL, *settings], out=folder / "runs", console=Console(file=io.StringIO()))
    assert done.status == "complete"
    return read_json(done.path / "evaluation.json")


LINES = [f" the <unk> of no. {i % 7} is {'very ' * (i % 3)}good \n" for i in range(60)]


@pytest.mark.parametrize(("name", "pattern"), [("ptb", "ptb.{}.txt"), ("wikitext2", "wiki.{}.tokens")])
def test_they_run_on_files_as_published(tmp_path: Path, name: str, pattern: str) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / pattern.format(split)).write_text("".join(LINES))
    result = run(name, tmp_path, f"data.path={tmp_path}", "generate.prompt=the")
    assert 1 < result["metrics"]["perplexity"] < 100
    assert "bits_per_byte" not in result["metrics"]
    assert set(result["activity"]["sites"]) == {"rnns.0", "rnns.1", "rnns.2"}
    assert result["baseline_unit"] == "perplexity"
    assert "state carried from each to the next" in result["protocol"]


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("".join(LINES) * 20)
    result = run("pdmix", tmp_path, f"data.path={tmp_path / 'mine.txt'}")
    assert 0 < result["activity"]["mean"] < 1


def test_twins_have_the_same_settings_and_no_activity(tmp_path: Path) -> None:
    small = ["model.n_embd=8", "model.n_hidden=8", "data.tokenizer.min_count=500", "evaluate.max_tokens=100"]
    shared = load_recipe("egru/austen-words").to_yaml().replace("cell: egru", "").partition("data:")[2]
    for cell in ("gru", "lstm"):
        twin = load_recipe(f"egru/austen-words-{cell}")
        assert twin.model["cell"] == cell
        assert twin.to_yaml().replace(f"cell: {cell}", "").partition("data:")[2] == shared
    assert "activity" not in run("austen-words-gru", tmp_path, *small)
    assert "activity" in run("austen-words-sparse", tmp_path, *small)
