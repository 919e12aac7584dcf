"""The stages prune and deploy, the verbs lower and deploy, and what a report says of them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import spiking_lm
from spiking_lm import load_program
from spiking_lm.checkpoints import load_model
from spiking_lm.cli import _guarded
from spiking_lm.deployment import deploy, model_logits
from spiking_lm.errors import ConfigError, RecipeError, UsageError
from spiking_lm.preparation import load_data, sample_tokens
from spiking_lm.pruning import prunable
from spiking_lm.recipe import load_recipe
from spiking_lm.rundir import RunDir, read_json
from spiking_lm.runs import run_recipe

Make = Callable[..., Any]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=150)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A place for the one run that these tests look at: made by the first of them, inside the plugin's fixture."""
    return {"folder": tmp_path_factory.mktemp("deployed")}


@pytest.fixture
def run(finished: dict[str, Any], recipe_file: Path) -> RunDir:
    if "run" not in finished:
        console = quiet()
        finished["run"] = run_recipe(recipe_file, out=finished["folder"], console=console)
        finished["shown"] = console.file.getvalue()  # type: ignore[attr-defined]
    kept: RunDir = finished["run"]
    return kept


def test_matrices_in_modules_and_parameters_are_pruned_but_no_tied_head(toy: Make) -> None:
    for tied in (True, False):
        model = toy(tied=tied)
        assert {name: id(weight) for name, weight in prunable(model).items()} == {
            "mix": id(model.mix.weight),
            "lift": id(model.lift),
        }


def test_the_stages_go_in_their_order(run: RunDir) -> None:
    assert list(run.manifest["stages"]) == ["train", "prune", "evaluate", "explain", "deploy", "report"]


def test_explain_counts_the_zeros_of_every_matrix(run: RunDir) -> None:
    bench = read_json(run.path / "explanation.json")["neurobench"]
    model = load_model(run.path)
    matrices = [model.mix.weight, model.lift, model.head.weight]
    zeros = sum(int((m == 0).sum()) for m in matrices)
    assert bench["connection_sparsity"] == round(zeros / sum(m.numel() for m in matrices), 4)
    assert zeros == 2 * round(0.75 * 144)


def test_the_program_is_compared_with_the_model_on_the_same_tokens(run: RunDir) -> None:
    account = read_json(run.path / "deployment.json")
    model, program = load_model(run.path), load_program(run.path / "program")
    data = load_data(run.recipe.data, quiet())
    tokens = sample_tokens(data, "test", 101)
    assert account["tokens"] == 100
    assert account["options"] == {"tokens": 100, "bits": 8, "cores": 4}
    assert account["split"] == "test"
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:-1])[None]).logits[0]
    nll = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]))
    assert account["model_perplexity"] == pytest.approx(float(nll.exp()), rel=1e-5)
    result = program.run(tokens[:-1])
    nll = torch.nn.functional.cross_entropy(torch.from_numpy(result.logits), torch.from_numpy(tokens[1:]))
    assert account["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-5)
    assert account["perplexity"] != account["model_perplexity"], "8 bits are not float"
    difference = np.abs(result.logits - logits.numpy()).max()
    assert account["largest_difference"] == pytest.approx(float(difference), rel=1e-3)
    assert account["counters"] == result.counters
    assert account["report"] == json.loads(json.dumps(program.report(result).to_dict()))
    same = (result.logits.argmax(-1) == logits.argmax(-1).numpy()).mean()
    assert account["same_guess"] == pytest.approx(float(same))


def test_the_float_model_is_fed_as_one_stream(toy: Make) -> None:
    model = toy()
    tokens = np.arange(600) % 256
    with torch.no_grad():
        whole = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(model_logits(model, tokens), whole, atol=1e-5)


def test_a_pruned_weight_is_zero_in_the_program(run: RunDir) -> None:
    program: Any = load_program(run.path / "program")
    pruning = {row["name"]: row["nonzero"] for row in read_json(run.path / "pruning.json")["matrices"]}
    assert pruning == {"mix": 36, "lift": 36}
    for name, nonzero in pruning.items():
        assert np.count_nonzero(program.tensors[name]) <= nonzero
    assert (run.path / "program" / "tokenizer.json").is_file()


def test_what_was_done_is_shown(run: RunDir, finished: dict[str, Any]) -> None:
    shown = finished["shown"]
    for part in ("Pruned to 75.0 %, uniform", "perplexity of the program", "core 0-3", "nobody measured it"):
        assert part in shown, part


def test_the_page_has_both_sections(run: RunDir) -> None:
    page = (run.path / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", " ", page)
    account, pruning = read_json(run.path / "deployment.json"), read_json(run.path / "pruning.json")
    after = read_json(run.path / "evaluation.json")["metrics"]["perplexity"]
    for part in (
        "What was pruned?",
        "75.0 % of the weights of these matrices are zero: the same share of every matrix goes, over 20 steps",
        f"{pruning['before']['metrics']['perplexity']:.3f}",
        f"{after:.3f}",
        "How does it run on toy?",
        f"{account['perplexity']:.4f}",
        f"{account['model_perplexity']:.4f}",
        "Warning: [a toy] energy is not known",
        "nobody measured it",
        "core 0-3",
    ):
        assert part in text, part


@pytest.mark.parametrize("name", ["pruning.json", "deployment.json"])
def test_a_spoilt_file_is_named_on_the_page(run: RunDir, tmp_path: Path, name: str) -> None:
    from spiking_lm.report import write_report

    (tmp_path / "manifest.json").write_text((run.path / "manifest.json").read_text())
    (tmp_path / name).write_text('{"matrices": 1, "report": 2}')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert f"{name} is not of the form that this version reads" in page


def test_a_lost_pruned_model_is_pruned_again(run: RunDir, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "again"
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000040")
    shutil.rmtree(copy / "program")
    again = RunDir(copy)
    stages = {name: facts for name, facts in run.manifest["stages"].items() if name in ("train", "prune")}
    again.update_manifest(status="running", stages=stages)
    run_recipe(None, resume=copy, console=quiet())
    assert read_json(copy / "pruning.json") == read_json(run.path / "pruning.json")
    new, old = load_model(copy).state_dict(), load_model(run.path).state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert load_program(copy / "program").vocab_size == 256


@pytest.mark.parametrize(
    ("change", "words", "hint"),
    [
        ("deploy.bits=99", "bits: input should be less than or equal to 24, got 99", None),
        ("deploy.bit=9", "unknown field 'bit'", "did you mean 'bits'?"),
        ("deploy.backend=toi", "unknown backend 'toi'", "did you mean 'toy'?"),
        ("deploy.tokens=0", "tokens: input should be greater than 0, got 0", None),
    ],
)
def test_a_wrong_deployment_is_refused_with_the_recipe(
    recipe_file: Path, change: str, words: str, hint: str | None
) -> None:
    with pytest.raises((RecipeError, UsageError)) as caught:
        load_recipe(recipe_file, [change])
    assert words in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_only_texts_are_deployed(recipe_file: Path, tmp_path: Path, toy: Make) -> None:
    recipe = load_recipe(recipe_file)
    data = load_data({"type": "authors4", "tokenizer": {"type": "byte"}}, quiet())
    with pytest.raises(UsageError, match="'authors4' holds examples to classify"):
        deploy(RunDir(tmp_path), recipe, toy(), data)  # type: ignore[arg-type]
    assert not (tmp_path / "program").exists()


def test_lower_and_deploy_on_the_command_line(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "program"
    assert _guarded(["lower", str(run.path), "--backend", "toy", "--out", str(out), "--set", "cores=3"]) == 0
    shown = capsys.readouterr().out
    assert "core 0-2" in shown
    assert f"spiking-lm deploy {out}" in shown
    arguments = ["lower", str(run.path), "--backend", "toy", "--out", str(out), "--set", "bits=4", "--json"]
    assert _guarded(arguments) == 0
    assert json.loads(capsys.readouterr().out)["report"]["placement"][1]["where"] == "core 0-3"

    assert _guarded(["deploy", str(out), "--text", "the cat sat", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["tokens"] == 10
    assert "model_perplexity" not in account
    (tmp_path / "words.txt").write_text("the cat sat on the mat")
    assert _guarded(["deploy", str(out), "--file", str(tmp_path / "words.txt"), "--tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 5
    assert _guarded(["deploy", str(run.path), "--tokens", "33"]) == 0
    assert "33 tokens of the embedded corpus austen3 (validation part)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lower", "{run}", "--backend", "toi", "--out", "{out}"], 2, "did you mean 'toy'?"),
        (["lower", "{run}", "--backend", "toy", "--out", "{out}", "--set", "bit=3"], 2, "did you mean 'bits'?"),
        (["lower", "{run}", "--backend", "toy", "--out", "{out}", "--set", "bits"], 2, "write --set field=value"),
        (["lower", "{run}", "--backend", "toy", "--out", "{run}"], 2, "holds other things than a program"),
        (["deploy", "{out}"], 4, "no such program folder"),
        (["deploy", "{run}/program", "--text", "a", "--file", "b"], 2, "give one of them"),
        (["deploy", "{run}/program", "--text", "a"], 4, "a program needs at least 2"),
        (["deploy", "{run}/program", "--file", "{out}"], 4, "cannot be read"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said(
    run: RunDir, tmp_path: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(run=run.path, out=tmp_path / "out") for argument in arguments]
    assert _guarded(filled) == code
    assert words in capsys.readouterr().err


def test_deploy_never_imports_torch(run: RunDir) -> None:
    code = f"""
import sys
from spiking_lm.cli import _guarded
assert _guarded(["deploy", {str(run.path / "program")!r}, "--tokens", "20"]) == 0
assert _guarded(["deploy", {str(run.path / "program")!r}, "--text", "the cat", "--json"]) == 0
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("False"), done.stdout + done.stderr


def test_a_program_without_a_tokenizer_reads_bytes_or_nothing(
    toy: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spiking_lm.lower(toy(), "toy").save(tmp_path / "bytes")
    assert _guarded(["deploy", str(tmp_path / "bytes"), "--text", "the"]) == 0
    spiking_lm.lower(toy(vocab_size=99), "toy").save(tmp_path / "words")
    assert _guarded(["deploy", str(tmp_path / "words"), "--text", "the"]) == 4
    assert "has no tokenizer.json" in capsys.readouterr().err


def test_options_of_a_backend_are_checked_in_python_too(toy: Make) -> None:
    with pytest.raises(ConfigError, match="cores: input should be greater than 0, got 0"):
        spiking_lm.lower(toy(), "toy", cores=0)
