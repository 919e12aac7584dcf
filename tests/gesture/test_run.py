"""A gesture recipe as a run: what it writes, how it resumes, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from spiking_lm import data, training
from spiking_lm.checkpoints import load_model
from spiking_lm.cli import _guarded
from spiking_lm.errors import InterruptedRunError, RecipeError
from spiking_lm.recipe import load_recipe, resolve
from spiking_lm.recipe_files import find_recipe
from spiking_lm.rundir import RunDir
from spiking_lm.runs import plan, run_recipe

RECIPE: dict[str, Any] = {
    "schema": 1,
    "name": "tests/gesture",
    "seed": 4,
    "data": {"type": "gestures11", "size": 16, "subjects": 5, "clips": 1, "min_s": 0.3, "max_s": 0.4},
    "model": {"type": "egru-gesture", "n_features": 16, "n_hidden": 16, "dropout": 0.1, "activity_loss": 0.1},
    "train": {"steps": 4, "batch_size": 8, "seq_len": 12, "log_every": 2, "eval_every": 2, "save_every": 2},
    "evaluate": {"window": 12, "batch_size": 4},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file in an otherwise empty working directory; YAML reads JSON."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "gesture.yaml"
    path.write_text(json.dumps(RECIPE))
    return path


def test_a_run_trains_evaluates_and_can_be_scored_again(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_recipe(recipe)
    assert run.status == "complete"
    resolved = run.recipe
    assert "tokenizer" not in resolved.data
    assert "frame_shape" not in resolved.model
    facts = run.manifest["data"]
    assert facts["task"] == "clips"
    assert facts["frame"] == {"shape": [1, 16, 16], "ms": 25.0}
    train = [entry for entry in run.metrics() if entry["split"] == "train"]
    assert [entry["step"] for entry in train] == [1, 2, 4]
    assert all(0 < entry["rates"]["egru"] < 1 for entry in train)
    valid = [entry for entry in run.metrics() if entry["split"] == "valid"]
    assert all({"loss", "accuracy"} <= entry.keys() for entry in valid)

    evaluation = json.loads((run.path / "evaluation.json").read_text())
    assert evaluation["task"] == "classification"
    assert evaluation["protocol"] == "11 examples of the test split, cut at 12 frames"
    assert set(evaluation["metrics"]) == {"accuracy", "macro_f1"}
    model = load_model(run.path)
    clips = data.load(resolved.data)
    assert isinstance(clips, data.ClipData)
    frames, lengths = map(torch.from_numpy, clips.batch(clips.test, 12))
    with torch.no_grad():
        output = model(frames, return_spikes=True)
        guesses = model.classify(frames, lengths).argmax(1)
    true = torch.arange(frames.shape[1]) < lengths[:, None]
    assert evaluation["activity"]["sites"]["egru"] == pytest.approx(
        float((output.spikes["egru"][true] != 0).float().mean()), abs=1e-3
    )
    right = (guesses == torch.tensor([clip.label for clip in clips.test])).float().mean()
    assert evaluation["metrics"]["accuracy"] == pytest.approx(float(right), abs=0.1)

    assert _guarded(["eval", str(run.path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == evaluation["metrics"]
    for verb in ("generate", "explain"):
        assert _guarded([verb, str(run.path)]) == 2
        assert "no text" in capsys.readouterr().err


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_recipe(recipe, {"evaluate": None})
    original = training._backward

    def stopped(model: Any, objective: Any, config: Any, index: int, **options: Any) -> Any:
        if index == 1:
            os.kill(os.getpid(), 2)
        return original(model, objective, config, index, **options)

    monkeypatch.setattr(training, "_backward", stopped)
    with pytest.raises(InterruptedRunError):
        run_recipe(recipe, {"evaluate": None}, out="other")
    monkeypatch.setattr(training, "_backward", original)
    again = run_recipe(None, resume=RunDir.open("other/tests/gesture").path)
    ours, theirs = load_model(again.path).state_dict(), load_model(whole.path).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_report_can_be_written(recipe: Path) -> None:
    run = run_recipe(recipe, {"train.steps": 1, "report": {}})
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "accuracy" in page
    assert "gestures11" in page
    assert "language model" not in page
    assert "tokens: None" not in page


def test_what_clips_cannot_do_is_refused_before_anything_is_loaded(recipe: Path) -> None:
    for stage, values in (("generate", {}), ("explain", {}), ("prune", {"sparsity": 0.5, "steps": 1})):
        with pytest.raises(RecipeError, match=f"{stage}: works on tokens, and the dataset 'gestures11' holds clips"):
            run_recipe(recipe, {stage: values})
    assert not Path("runs").exists()
    with pytest.raises(RecipeError, match="the model 'egru-gesture' reads clips of events, but the dataset 'austen3'"):
        resolve({**RECIPE, "data": {"type": "austen3"}})
    with pytest.raises(RecipeError, match="the model 'spikegpt' reads tokens, but the dataset 'gestures11' holds"):
        resolve({**RECIPE, "model": {"type": "spikegpt"}})
    with pytest.raises(RecipeError, match="clips of events have no tokenizer"):
        resolve({**RECIPE, "data": {**RECIPE["data"], "tokenizer": {"type": "byte"}}})
    with pytest.raises(RecipeError, match="unknown field 'tokenizer'"):
        load_recipe(recipe, ["data.tokenizer.type=byte"])


def test_sizes_that_the_data_contradicts_are_refused(recipe: Path) -> None:
    facts = plan(load_recipe(recipe))
    assert facts["examples_per_step"] == 8
    assert facts["data"]["splits"]["train"]["examples"] == 33
    with pytest.raises(RecipeError, match=r"model\.frame_shape is \[2, 16, 16\], but a frame of the data has \[1, 16"):
        plan(load_recipe(recipe, {"model.frame_shape": [2, 16, 16]}))
    with pytest.raises(RecipeError, match=r"model\.num_classes is 3"):
        plan(load_recipe(recipe, {"model.num_classes": 3}))


@pytest.mark.parametrize("name", ["egru/gesture", "egru/dvs128"])
def test_the_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    assert recipe.name == name
    assert recipe.model["type"] == "egru-gesture"
    assert recipe.train is not None
    assert recipe.evaluate is not None
