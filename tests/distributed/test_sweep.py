"""Sweeps: every combination is a run, what is complete is not repeated, one that fails stops no other; and on Ray."""

from __future__ import annotations

import csv
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spiking_lm import sweep
from spiking_lm.cli import main
from spiking_lm.errors import InterruptedRunError, MissingExtraError, RecipeError, UsageError
from spiking_lm.recipe import load_recipe
from spiking_lm.rundir import RunDir

from .many import GPT, recipe_of


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = recipe_of(tmp_path, "swept", GPT, steps=3)
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**document, "generate": {}}), encoding="utf-8")
    return path


def points(recipe: Path, *over: str) -> dict[str, dict[str, Any]]:
    return {name: change for name, (change, _) in sweep.points(load_recipe(recipe), over).items()}


def test_every_combination_is_a_point(recipe: Path) -> None:
    found = sweep.points(load_recipe(recipe), ["model.n_embd=16,32", "seed=1,2,3"])
    assert list(found)[:2] == ["n_embd-16_seed-1", "n_embd-16_seed-2"]
    assert len(found) == 6
    assert {(one.model["n_embd"], one.seed) for _, one in found.values()} == {
        (n, s) for n in (16, 32) for s in (1, 2, 3)
    }
    assert all(one.generate is None for _, one in found.values()), "a point trains, evaluates and explains"


def test_values_are_yaml_and_names_are_safe(recipe: Path) -> None:
    betas = points(recipe, "train.optimizer.betas=[0.9, 0.95],[0.8, 0.9]")
    assert [change["train.optimizer.betas"] for change in betas.values()] == [[0.9, 0.95], [0.8, 0.9]]
    neurons = points(recipe, "model.neuron.type=lif,norse.lif_box", "train.optimizer.lr=1.0e-3,0.01")
    assert next(iter(neurons)) == "type-lif_lr-0.001"
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for name in betas)
    both = points(recipe, "train.seq_len=8", "evaluate.max_tokens=8", "train.eval_tokens=8")
    assert list(both) == ["seq_len-8_max_tokens-8_eval_tokens-8"]


@pytest.mark.parametrize(
    ("over", "error", "says"),
    [
        ([], UsageError, "nothing was given"),
        (["seed"], UsageError, "write FIELD="),
        (["seed="], UsageError, "write FIELD="),
        (["seed=1", "seed=2"], UsageError, "given twice"),
        (["seed=1,1"], UsageError, "two points are called seed-1"),
        (["train.stepz=1"], RecipeError, "stepz"),
        (["train.steps=0"], RecipeError, "steps"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(
    recipe: Path, tmp_path: Path, over: list[str], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        sweep.sweep(recipe, [], over, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_sweep_of_processes(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two points in processes of their own, of which one fails; then again, when only that one runs."""
    out = tmp_path / "runs"
    text = tmp_path / "text.txt"
    shown = text.read_text(encoding="utf-8")
    command = ["sweep", str(recipe), "--over", f"data.path={text},{tmp_path / 'gone.txt'}", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--jobs", "2", "--format", "json"])
    assert ended.value.code == 1
    result = json.loads(capsys.readouterr().out)
    good, bad = result["points"]
    assert (good["status"], bad["status"]) == ("complete", "failed")
    assert "gone.txt" in bad["error"]
    assert good["metrics"]["loss"] == pytest.approx(RunDir.open(good["run"]).metrics()[-1]["loss"])
    started = RunDir.open(good["run"]).manifest["started"]
    assert RunDir.open(good["run"]).manifest.get("resumed", []) == []

    (tmp_path / "gone.txt").write_text(shown, encoding="utf-8")
    ran: list[str] = []
    real = sweep.run_point
    monkeypatch.setattr(sweep, "run_point", lambda path, threads: ran.append(path) or real(path, threads))
    with pytest.raises(SystemExit) as ended:
        main([*command, "--format", "csv"])
    assert ended.value.code == 0
    assert ran == [bad["run"]]
    assert RunDir.open(good["run"]).manifest["started"] == started
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["status"] for row in rows] == ["complete", "complete"]
    assert (Path(result["folder"]) / "sweep.csv").read_text(encoding="utf-8").count("\n") == 3


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let points be run by a function that only says so."""
    ran: list[str] = []

    def run_point(path: str, threads: int) -> int:
        ran.append(path)
        if path.endswith("seed-2"):
            Path(f"{path}.log").write_text("step 1\nerror: no space left\nhint: free some\n", encoding="utf-8")
            return 1
        run = RunDir(Path(path))
        run.append_metrics({"split": "train", "step": 3, "loss": 2.0, "tokens_per_s": 5.0, "elapsed_s": 1.5})
        run.append_metrics({"split": "valid", "step": 3, "loss": 2.5, "bpb": 3.5, "elapsed_s": 1.5})
        run.update_manifest(status="complete", model={"type": "spikegpt", "parameters": 7})
        return 0

    monkeypatch.setattr(sweep, "run_point", run_point)
    return ran


def test_more_values_repeat_nothing(recipe: Path, tmp_path: Path, finished: list[str]) -> None:
    told: list[str] = []
    first = sweep.sweep(recipe, [], ["seed=1,2"], out=tmp_path, jobs=2, tell=told.append)
    assert "1 of 2" in told[1]
    assert "2 of 2" in told[2]
    again = sweep.sweep(recipe, [], ["seed=1,2,3"], out=tmp_path)
    assert [Path(path).name for path in finished[2:]] == ["seed-2", "seed-3"]
    assert [row["status"] for row in again["points"]] == ["complete", "failed", "complete"]
    assert again["points"][1]["error"] == "no space left"
    assert again["folder"] == first["folder"]
    table = sweep.as_markdown(again).splitlines()
    assert table[0] == "| seed | loss | bpb | parameters | activity | tokens_per_s | seconds | status |"
    assert table[2] == "| 1 | 2.5 | 3.5 | 7 |  | 5 | 1.5 | complete |"
    assert table[3] == "| 2 |  |  |  |  |  |  | no space left |"


def test_ctrl_c_says_how_to_go_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(paths: Any, jobs: int) -> Iterator[tuple[Path, int]]:
        yield paths[0], 0
        raise KeyboardInterrupt

    monkeypatch.setitem(sweep.ENGINES, "local", interrupted)
    with pytest.raises(InterruptedRunError) as caught:
        sweep.sweep(recipe, ["train.steps=2"], ["seed=1,2"], out=tmp_path)
    assert "--set train.steps=2 --over seed=1,2" in str(caught.value.hint)


# -- Ray, by a double that takes nothing but what the documented functions take ----------------------------------------


class Fake:
    """What of Ray is used: init, is_initialized, remote(...)(function).remote(...), wait, get, cancel, shutdown."""

    def __init__(self, lost: str = "") -> None:
        self.lost, self.running, self.cancelled, self.most = lost, False, [], 0
        self.waiting: dict[int, Callable[[], int]] = {}

    def module(self) -> types.ModuleType:
        ray = types.ModuleType("ray")
        errors = types.ModuleType("ray.exceptions")
        errors.RayError = type("RayError", (Exception,), {})  # type: ignore[attr-defined]
        ray.exceptions = errors  # type: ignore[attr-defined]

        def init(*, log_to_driver: bool = True) -> None:
            assert not self.running
            self.running = True

        def remote(*, num_cpus: int, max_retries: int) -> Any:
            assert (num_cpus, max_retries) == (1, 0)
            return lambda function: types.SimpleNamespace(remote=lambda *args: submit(function, args))

        def submit(function: Any, args: tuple[Any, ...]) -> int:
            assert self.running
            assert Path(args[0]).is_absolute()
            number = len(self.waiting) + 1000 * len(self.cancelled) + id(args) % 997
            self.waiting[number] = lambda: function(*args)
            self.most = max(self.most, len(self.waiting))
            return number

        def wait(references: list[int], *, num_returns: int = 1) -> tuple[list[int], list[int]]:
            assert num_returns <= len(references)
            assert set(references) == set(self.waiting)
            return references[-1:], references[:-1]

        def get(reference: int) -> int:
            job = self.waiting.pop(reference)
            code = job()
            if self.lost:
                self.lost = ""
                raise errors.RayError("the node died")
            return code

        def shutdown() -> None:
            self.running = False

        for function in (init, remote, wait, get, shutdown):
            setattr(ray, function.__name__, function)
        ray.is_initialized = lambda: self.running  # type: ignore[attr-defined]
        ray.cancel = self.cancelled.append  # type: ignore[attr-defined]
        return ray


def test_ray_runs_the_same_points(
    recipe: Path, tmp_path: Path, finished: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "ray", fake.module())
    result = sweep.sweep(recipe, [], ["seed=1,2,3,4"], out=tmp_path, engine="ray", jobs=2)
    assert [row["status"] for row in result["points"]] == ["complete", "failed", "complete", "complete"]
    assert (fake.most, fake.running, fake.cancelled) == (2, False, [])
    assert len(finished) == 4


def test_a_node_that_dies_is_a_point_that_failed(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(lost="seed-1")
    monkeypatch.setitem(sys.modules, "ray", fake.module())
    monkeypatch.setattr(sweep, "run_point", lambda path, threads: 0)
    result = sweep.sweep(recipe, [], ["seed=1"], out=tmp_path, engine="ray")
    assert result["points"][0]["error"] == "ended with exit code 1"


def test_ctrl_c_cancels_on_ray(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "ray", fake.module())

    def interrupted(path: str, threads: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_point", interrupted)
    with pytest.raises(InterruptedRunError, match="interrupted"):
        sweep.sweep(recipe, [], ["seed=1,2"], out=tmp_path, engine="ray", jobs=2)
    assert len(fake.cancelled) == 1
    assert not fake.running


def test_without_ray_the_extra_is_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="'ray'"):
        sweep.sweep(recipe, [], ["seed=1"], out=tmp_path, engine="ray")
