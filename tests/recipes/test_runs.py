"""Run directories: what is in them, and that a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spiking_lm
from spiking_lm import training
from spiking_lm.checkpoints import load_model
from spiking_lm.errors import DataError, DivergedError, InterruptedRunError, RecipeError, UnknownNameError, UsageError
from spiking_lm.manifest import describe_environment, git_revision, plain
from spiking_lm.recipe import load_recipe
from spiking_lm.rundir import RunDir, read_metrics
from spiking_lm.runs import plan, run_recipe

TRAIN_ONLY = {"evaluate": None, "generate": None, "explain": None}


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_model(run.path).state_dict()


def without_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in ("elapsed_s", "tokens_per_s")} for entry in entries]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make training stop as Ctrl-C does, in the middle of a given step; 0 lets it run."""
    original = training._backward

    def arm(step: int) -> None:
        def backward(model: Any, objective: Any, config: Any, index: int, **options: Any) -> Any:
            if index + 1 == step:
                os.kill(os.getpid(), 2)
            return original(model, objective, config, index, **options)

        monkeypatch.setattr(training, "_backward", backward if step else original)

    return arm


def test_a_run_leaves_everything_behind(tiny: Path) -> None:
    run = spiking_lm.run_recipe(tiny)
    assert run.path.parent == Path("runs/tests/tiny")
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", run.path.name)
    assert (run.path.parent / "latest").read_text().strip() == run.path.name
    assert RunDir.open(run.path.parent).path == run.path
    assert run.status == "complete"
    assert run.recipe == load_recipe(tiny)

    steps = [(entry["split"], entry["step"]) for entry in run.metrics()]
    assert steps == [("train", s) for s in (1, 2, 4, 6)] + [("valid", 6)] + [("train", s) for s in (8, 10, 12)] + [
        ("valid", 12)
    ]
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-000008", "step-000012"]

    evaluation = json.loads((run.path / "evaluation.json").read_text())
    assert 0 < evaluation["metrics"]["bits_per_byte"] < 9
    assert (run.path / "samples.txt").read_text(encoding="utf-8").startswith("the ")
    assert json.loads((run.path / "explanation.json").read_text())["tokens"] == 64
    log = (run.path / "log.txt").read_text()
    assert "train: complete" in log
    assert log.rstrip().endswith("complete")


def test_the_manifest_says_what_the_run_was_made_of(tiny: Path) -> None:
    manifest = run_recipe(tiny, TRAIN_ONLY).manifest
    assert manifest["recipe"] == "tests/tiny"
    assert manifest["seed"] == 3
    assert manifest["status"] == "complete"
    assert manifest["started"] <= manifest["ended"]
    assert list(manifest["stages"]) == ["train"]
    assert manifest["stages"]["train"]["seconds"] > 0
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["data"]["sha256"])
    assert manifest["data"]["splits"]["train"]["tokens"] > 1000
    assert manifest["model"]["type"] == "spikegpt"
    assert manifest["model"]["parameters"] == sum(t.numel() for t in weights(RunDir.open("runs/tests/tiny")).values())
    assert {"python", "spiking-lm", "torch", "numpy"} <= manifest["versions"].keys()
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    plugins = {record["name"]: record for record in manifest["plugins"]}
    assert plugins["spikegpt"]["distribution"] == "spiking-lm"
    assert plugins["core"]["status"] == "active"
    assert manifest["command"]
    assert manifest["hardware"]["cores"] == os.cpu_count()
    assert manifest["hardware"]["cpu"]


def test_two_runs_of_one_seed_are_the_same_run(tiny: Path) -> None:
    first, second = run_recipe(tiny, TRAIN_ONLY), run_recipe(tiny, TRAIN_ONLY)
    assert first.path != second.path
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))
    other = run_recipe(tiny, {**TRAIN_ONLY, "seed": 4})
    assert any(not torch.equal(a, b) for a, b in zip(weights(first).values(), weights(other).values(), strict=True))


# -- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tiny: Path, stop_after: Any, step: int) -> None:
    whole = run_recipe(tiny)
    stop_after(step)
    with pytest.raises(InterruptedRunError) as caught:
        run_recipe(tiny, out="other")
    run = RunDir.open("other/tests/tiny")
    assert run.status == "interrupted"
    assert caught.value.exit_code == 130
    assert run.resume_command in (caught.value.hint or "")
    stop_after(0)
    again = run_recipe(None, resume=run.path)
    assert again.path == run.path
    assert again.status == "complete"
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(again).values(), strict=True))
    log_steps = {1, 2, 4, 6, 8, 10, 12}  # resuming logs the step it begins with as well
    kept = [entry for entry in without_times(again.metrics()) if entry["step"] in log_steps]
    assert kept == without_times(whole.metrics())
    for name in ("evaluation.json", "samples.txt", "explanation.json"):
        assert (again.path / name).read_text() == (whole.path / name).read_text()


def test_a_killed_run_goes_on_and_its_torn_line_is_forgotten(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_recipe(tiny, TRAIN_ONLY)
    code = f"""
import os
from spiking_lm import training
original = training._backward
def backward(model, objective, config, index, **options):
    if index == 9:
        path = next(__import__("pathlib").Path("killed").glob("tests/tiny/2*/metrics.jsonl"))
        with open(path, "a") as file:
            file.write('{{"split": "train", "st')
        os.kill(os.getpid(), 9)
    return original(model, objective, config, index, **options)
training._backward = backward
from spiking_lm.runs import run_recipe
run_recipe({str(tiny)!r}, {TRAIN_ONLY!r}, out="killed")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    run = RunDir.open("killed/tests/tiny")
    assert run.status == "running"
    assert run.metrics()[-1]["step"] == 8
    again = run_recipe(tiny, TRAIN_ONLY, out="killed", resume="auto")
    assert again.path == run.path
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(again).values(), strict=True))
    assert [entry["step"] for entry in again.metrics() if entry["split"] == "valid"] == [6, 12]


def test_a_stage_that_is_complete_is_not_repeated(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spiking_lm import generation

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generation, "sample_text", fail)
        with pytest.raises(InterruptedRunError, match="interrupted"):
            run_recipe(tiny)
    run = RunDir.open("runs/tests/tiny")
    assert list(run.manifest["stages"]) == ["train", "evaluate"]
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("it trained again"))
    before = (run.path / "evaluation.json").stat().st_mtime_ns
    assert run_recipe(None, resume=run.path).status == "complete"
    assert (run.path / "evaluation.json").stat().st_mtime_ns == before
    assert list(run.manifest["stages"]) == ["train", "evaluate", "generate", "explain"]


def test_a_rotten_checkpoint_is_passed_over_and_its_steps_are_trained_again(
    tiny: Path, stop_after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_recipe(tiny, TRAIN_ONLY)
    again = run_recipe(tiny, {**TRAIN_ONLY, "generate": {"max_new_tokens": 5}})
    again.update_manifest(status="interrupted", stages={"train": again.manifest["stages"]["train"]})
    path = again.path / "checkpoints" / "step-000012" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    capsys.readouterr()
    resumed = run_recipe(None, resume=again.path)
    assert "passed over the checkpoint" in capsys.readouterr().err.replace("\n", " ")
    log = (resumed.path / "log.txt").read_text()
    assert "passed over the checkpoint" in log
    assert "the trained model is lost; training again from step 8" in log
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    assert list(resumed.manifest["stages"]) == ["train", "generate"]
    assert len(resumed.manifest["resumed"]) == 1


def test_auto_takes_only_an_unfinished_run_of_the_same_recipe(tiny: Path, stop_after: Any) -> None:
    first = run_recipe(tiny, TRAIN_ONLY, resume="auto")
    stop_after(3)
    with pytest.raises(InterruptedRunError):
        run_recipe(tiny, TRAIN_ONLY, resume="auto")
    stop_after(0)
    stopped = RunDir.open("runs/tests/tiny")
    assert stopped.path != first.path
    other = run_recipe(tiny, {**TRAIN_ONLY, "seed": 9}, resume="auto")
    assert other.path not in (first.path, stopped.path)
    assert run_recipe(tiny, TRAIN_ONLY, resume="auto").path == stopped.path


def test_a_complete_run_is_left_alone(tiny: Path) -> None:
    run = run_recipe(tiny, TRAIN_ONLY)
    before = run.manifest
    assert run_recipe(None, resume=run.path).manifest == before


def test_changed_data_stops_a_resumed_run(tiny: Path, stop_after: Any) -> None:
    stop_after(5)
    with pytest.raises(InterruptedRunError):
        run_recipe(tiny)
    stop_after(0)
    with open("text.txt", "a", encoding="utf-8") as file:
        file.write("one line more")
    with pytest.raises(DataError, match="the data is not what the run began with"):
        run_recipe(None, resume="runs/tests/tiny")


def test_a_run_in_another_process_is_not_disturbed(tiny: Path, stop_after: Any) -> None:
    stop_after(5)
    with pytest.raises(InterruptedRunError):
        run_recipe(tiny, TRAIN_ONLY)
    stop_after(0)
    run = RunDir.open("runs/tests/tiny")
    with run.lock():
        with pytest.raises(UsageError, match="another process"):
            run_recipe(None, resume=run.path)
        assert run_recipe(tiny, TRAIN_ONLY, resume="auto").path != run.path
    assert run_recipe(None, resume=run.path).status == "complete"


def test_a_resumed_run_keeps_its_recipe(tiny: Path, stop_after: Any) -> None:
    stop_after(5)
    with pytest.raises(InterruptedRunError):
        run_recipe(tiny, TRAIN_ONLY)
    with pytest.raises(UsageError, match="keeps its own recipe"):
        run_recipe(None, {"train.steps": 99}, resume="runs/tests/tiny")
    with pytest.raises(UsageError, match=r"is a run of 'tests/tiny', not of 'spikegpt/quickstart'"):
        run_recipe("spikegpt/quickstart", resume="runs/tests/tiny")
    with pytest.raises(UsageError, match="no recipe was given"):
        run_recipe(None)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a run: it has no recipe\.yaml"):
        RunDir.open(tmp_path)
    (tmp_path / "recipe.yaml").write_text("schema: 1")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*manifest\.json"):
        RunDir.open(tmp_path)


# -- failures ---------------------------------------------------------------------------------------------------------


def test_what_cannot_begin_leaves_no_folder(tiny: Path) -> None:
    missing = {"type": "text", "path": "nowhere.txt", "tokenizer": {"type": "byte"}}
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        run_recipe(tiny, {"data": missing})
    assert not Path("runs").exists()


def test_a_run_that_fails_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_backward", lambda *_, **__: (float("nan"), 1))
    with pytest.raises(DivergedError):
        run_recipe(tiny)
    run = RunDir.open("runs/tests/tiny")
    assert run.status == "failed"
    assert "loss nan" in run.manifest["error"]

    monkeypatch.setattr(training, "_backward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_recipe(tiny)
    run = RunDir.open("runs/tests/tiny")
    assert run.manifest["error"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in (run.path / "log.txt").read_text()


def test_a_wrong_recipe_leaves_no_run_behind(tiny: Path) -> None:
    for override, error in (
        ({"train.steps": 0}, RecipeError),
        ({"evaluate.metrics": ["bits_per_bite"]}, UnknownNameError),
        ({"model.type": "nothing"}, UnknownNameError),
    ):
        with pytest.raises(error):
            run_recipe(tiny, override)
    assert not Path("runs").exists()


def test_a_size_that_the_data_contradicts_is_an_error(tiny: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.vocab_size is 300, but the byte tokenizer has 256"):
        run_recipe(tiny, {"model.vocab_size": 300})
    assert run_recipe(tiny, {"model.vocab_size": 256, **TRAIN_ONLY}).status == "complete"


def test_classes_come_from_the_labels(tmp_path: Path, tiny: Path) -> None:
    rows = "".join(f"{label}\t{text}\n" for label, text in [("cat", "it purrs"), ("dog", "it barks")] * 30)
    Path("pets.tsv").write_text("label\ttext\n" + rows, encoding="utf-8")
    data = {"data.type": "tsv", "data.path": "pets.tsv"}
    run = run_recipe(tiny, {**data, "generate": None, "explain": None})
    assert load_model(run.path).config.num_classes == 2
    assert "accuracy" in json.loads((run.path / "evaluation.json").read_text())["metrics"]
    with pytest.raises(RecipeError, match=r"model\.num_classes is 3, but the set of labels has 2"):
        run_recipe(tiny, {**data, "model.num_classes": 3})


# -- the small parts --------------------------------------------------------------------------------------------------


def test_a_plan_changes_nothing(tiny: Path) -> None:
    before = sorted(p.name for p in Path().iterdir())
    facts = plan(load_recipe(tiny))
    assert sorted(p.name for p in Path().iterdir()) == before
    assert facts["tokens_per_step"] == 2 * 16
    assert facts["parameters"] > 1000
    assert facts["data"]["splits"]["train"]["tokens"] > 1000
    assert 0 < facts["epochs"] < 1


def test_metrics_survive_a_torn_line(tiny: Path) -> None:
    run = RunDir.create(load_recipe(tiny), Path("runs"))
    run.append_metrics({"step": 1, "loss": float("nan")})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo\xc3')
    assert run.metrics() == [{"step": 1, "loss": None}]
    run.append_metrics({"step": 3})
    assert [entry["step"] for entry in run.metrics()] == [1, 3]
    run.rewind_metrics(1)
    assert [entry["step"] for entry in run.metrics()] == [1]
    (run.path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"line 2: not JSON"):
        run.metrics()
    assert read_metrics(run.path / "no such file") == []


def test_a_run_is_accepted_where_a_path_is(tiny: Path) -> None:
    run = RunDir.create(load_recipe(tiny), Path("runs"))
    assert os.fspath(run) == str(run.path)
    assert Path(run) == run.path


def test_the_git_revision_and_its_dirt_are_noted(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout

    assert git_revision(tmp_path) is None
    git("init", "-q")
    assert git_revision(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD").strip()
    assert git_revision(tmp_path) == {"revision": head, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == {"revision": head, "dirty": True}


def test_the_environment_is_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKING_LM_KERNELS", "wkv=torch")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    facts = describe_environment()
    assert facts["environment"]["SPIKING_LM_KERNELS"] == "wkv=torch"
    assert "hidden" not in json.dumps(facts)


def test_plain_turns_everything_into_json() -> None:
    import numpy as np

    value = {
        1: float("inf"),
        "a": (Path("x"), {3, 1}, None, True),
        "n": np.float32(0.5),
        "v": np.arange(3),
        "t": torch.ones(2),
    }
    text = json.dumps(plain(value), allow_nan=False)
    assert json.loads(text) == {
        "1": None,
        "a": ["x", [1, 3], None, True],
        "n": 0.5,
        "v": [0, 1, 2],
        "t": [1.0, 1.0],
    }
