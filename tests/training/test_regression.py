"""Numbers in place of classes: the data set, the loss, what is measured, and what is refused."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from spiking_lm import data
from spiking_lm.errors import ConfigError, DataError
from spiking_lm.evaluation import Scores, accuracy, correlation, mean_squared_error
from spiking_lm.recipe import load_recipe
from spiking_lm.runs import run_recipe

WORTH = {"good": 1.0, "fine": 0.5, "plain": 0.0, "poor": -0.5, "bad": -1.0}
"""A text's number is the sum over its words."""


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, rows = random.Random(0), ["value\ttext"]
    for _ in range(1500):
        words = rng.choices(list(WORTH), k=rng.randint(2, 6))
        rows.append(f"{sum(map(WORTH.__getitem__, words))}\t{' '.join(words)}")
    path = tmp_path_factory.mktemp("values") / "values.tsv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def document(values: Path, **more: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "tests/values",
        "seed": 1,
        "data": {"type": "values", "path": str(values), "tokenizer": {"type": "word"}},
        "model": {
            "type": "spikelm",
            "n_layer": 1,
            "n_embd": 32,
            "n_head": 2,
            "n_hidden": 32,
            "ctx_len": 8,
            "dropout": 0,
        },
        "train": {"steps": 150, "batch_size": 32, "seq_len": 8, "optimizer": {"lr": 0.01}, **more},
        "evaluate": {"window": 8, "batch_size": 64},
        "report": {},
    }


@pytest.mark.parametrize("model", ["spikelm", "spikegpt"])
def test_a_model_learns_numbers(values: Path, tmp_path: Path, model: str) -> None:
    written = document(values)
    if model == "spikegpt":
        written["model"] = {"type": "spikegpt", "n_layer": 1, "n_embd": 32, "ctx_len": 8, "dropout": 0.0}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(written), encoding="utf-8")
    run = run_recipe(path, out=tmp_path / "runs", console=Console(file=io.StringIO()))
    result = json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))
    assert result["task"] == result["data"]["task"] == "regression"
    assert set(result["metrics"]) == {"mean_squared_error", "pearson", "spearman"}
    assert result["metrics"]["pearson"] > 0.9
    (constant,) = result["baselines"].values()
    assert result["metrics"]["mean_squared_error"] < 0.25 * constant
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "below the same number for all" in page


def test_the_files_of_values_and_what_is_wrong_with_them(values: Path, tmp_path: Path) -> None:
    corpus = data.load({"type": "values", "path": str(values), "tokenizer": {"type": "byte"}})
    assert isinstance(corpus, data.LabelledData)
    assert corpus.regression
    assert len(corpus.train) + len(corpus.valid) + len(corpus.test) == 1500
    assert len({e.text for e in corpus.train} & {e.text for e in corpus.test}) < 20, "copies stay together"
    with pytest.raises(DataError, match=r"none\.tsv: no such file"):
        data.load({"type": "values", "path": str(tmp_path / "none.tsv"), "tokenizer": {"type": "byte"}})
    bad = tmp_path / "bad.tsv"
    for content, message in (
        ("value\ttext\n1.5\tone\nnone\ttwo\n", r"bad\.tsv, line 3: 'none' is not a number"),
        ("value\ttext\ninf\tone\n", r"line 2: 'inf' is not a number"),
        ("label2\ttext\n1\tone\n", "no column 'value'"),
        ("1\tone\n", "no header with the columns value and text"),
    ):
        bad.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            data.load({"type": "values", "path": str(bad), "tokenizer": {"type": "byte"}})


def test_smoothed_numbers_are_refused(values: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document(values, label_smoothing=0.1)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train\.label_smoothing: 'values' has numbers for labels"):
        run_recipe(path, out=tmp_path / "runs", console=Console(file=io.StringIO()))
    assert load_recipe(path).train is not None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=20))
def test_correlations_are_what_their_definitions_say(pairs: list[tuple[int, int]]) -> None:
    target, predicted = np.array(pairs, float).T
    scores = Scores.of_numbers(torch.from_numpy(predicted)[:, None], torch.from_numpy(target))
    found = correlation(scores)
    assert mean_squared_error(scores)["mean_squared_error"] == pytest.approx(np.mean((target - predicted) ** 2))
    assert accuracy(scores) == {}

    def ranks(x: np.ndarray) -> np.ndarray:
        return np.array([np.mean([place for place, value in enumerate(sorted(x)) if value == one]) for one in x])

    for name, a, b in (("pearson", target, predicted), ("spearman", ranks(target), ranks(predicted))):
        constant = len(set(a)) == 1 or len(set(b)) == 1
        expected = 0.0 if constant else float(np.corrcoef(a, b)[0, 1])
        assert math.isclose(found[name], expected, abs_tol=1e-9)
