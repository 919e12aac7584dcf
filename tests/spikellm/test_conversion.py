"""Whole conversions of tiny Llamas: through a recipe, interrupted, resumed, saved, read back, and what is refused."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import spiking_lm
from spiking_lm.checkpoints import load_model
from spiking_lm.cli import main
from spiking_lm.data import TextData, load
from spiking_lm.errors import DataError, RecipeError
from spiking_lm.recipe import load_recipe
from spiking_lm_spikellm import pipeline, streams
from spiking_lm_spikellm.conversion_config import SpikeLLMConversion
from spiking_lm_spikellm.model import SpikeLLM
from spiking_lm_spikellm.sources import convert, open_source

SALIENT = {"rate": 0.25, "steps": 2}
CALIBRATION = {"samples": 6, "window": 32}

WAYS: dict[str, dict[str, Any]] = {
    "nearest": {"weights": {"bits": 4}, "rounding": "nearest"},
    "gptq": {"weights": {"bits": 4}, "activations": {"bits": 8}},
    "groups": {"weights": {"bits": 3, "group_size": 9}, "activations": {"bits": 6}, "cache": {"bits": 6}},
    "salient": {
        "weights": {"bits": 4},
        "activations": {"bits": 4, "salient": SALIENT},
        "cache": {"bits": 4, "query_bits": 8, "salient": SALIENT},
    },
    "random": {"activations": {"bits": 4, "salient": {**SALIENT, "choice": "random"}}},
    "rotated": {"weights": {"bits": 4}, "activations": {"bits": 4}, "cache": {"bits": 4}, "rotation": True},
    "ternary": {"weights": {"type": "ternary", "group_size": 8, "salient": {"rate": 0.4, "steps": 2}}},
    "omni": {
        "weights": {"bits": 4},
        "activations": {"bits": 4, "salient": SALIENT},
        "omni": {"epochs": 2},
        "rounding": "nearest",
    },
    "transformed": {"weights": {"bits": 4}, "activations": {"bits": 4}, "omni": {"epochs": 2, "clipping": False}},
    "static": {"weights": {"bits": 4}, "activations": {"bits": 6, "scale": "static"}},
    "static, learnt": {
        "weights": {"bits": 4},
        "activations": {"bits": 6, "scale": "static"},
        "omni": {"epochs": 1},
        "rounding": "nearest",
    },
    "following": {"weights": {"bits": 4}, "activations": {"bits": 4, "salient": SALIENT}, "gptq": {"follow": 0.5}},
    "pb_llm": {"rounding": "pb_llm"},
}


@pytest.fixture(scope="module")
def text(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextData:
    """Sentences in the tokens of the tiny Llama."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("it is a truth universally acknowledged, that the cat sat on the mat.\n" * 60, encoding="utf-8")
    tokenizer = {"type": "file", "path": str(llama_folder / "tokenizer.json")}
    data = load({"type": "text", "path": str(file), "tokenizer": tokenizer})
    assert isinstance(data, TextData)
    return data


def calibrate(
    folder: Path, text: TextData, work: Path, *, seed: int = 0, **options: Any
) -> tuple[SpikeLLM, dict[str, Any]]:
    parsed = SpikeLLMConversion.model_validate({"calibration": CALIBRATION, "source": str(folder), **options})
    return pipeline.calibrate(parsed, text, work, seed=seed, console=Console(file=io.StringIO()))


def logits(model: SpikeLLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens).logits
    return result


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", WAYS)
def test_a_converted_model_is_saved_and_read_back_bit_for_bit(
    way: str, llama_folder: Path, text: TextData, tokens: Tensor, tmp_path: Path
) -> None:
    model, report = calibrate(llama_folder, text, tmp_path / "work", **WAYS[way])
    spiking_lm.save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert isinstance(again, SpikeLLM)
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    assert len(report["layers"]) == 14
    assert torch.isfinite(logits(model, tokens)).all()
    # step by step, with a cache, as in one
    state, parts = again.init_state(2), []
    with torch.no_grad():
        for token in tokens.T:
            step, state = again.step(token, state)
            parts.append(step)
    torch.testing.assert_close(torch.stack(parts, 1), logits(again, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotation", [False, True])
def test_with_every_scheme_off_nothing_changes(
    rotation: bool, llama_folder: Path, text: TextData, tokens: Tensor, tmp_path: Path
) -> None:
    model, _ = calibrate(llama_folder, text, tmp_path / "work", rotation=rotation)
    expected = logits(convert(llama_folder).eval(), tokens)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["groups", "salient", "rotated", "ternary"])
def test_calibration_beats_rounding_to_nearest(way: str, llama_folder: Path, text: TextData, tmp_path: Path) -> None:
    _, report = calibrate(llama_folder, text, tmp_path / "work", **WAYS[way])
    errors = [(layer["error"], layer["error_nearest"]) for layer in report["layers"]]
    assert sum(a for a, _ in errors) < 0.9 * sum(b for _, b in errors)
    assert all(layer["bits_per_weight"] > 1 for layer in report["layers"])


@pytest.mark.parametrize("way", ["salient", "omni", "static", "following"])
@pytest.mark.parametrize("reached", [0, 1])
def test_an_interrupted_conversion_goes_on_to_the_same_model(
    way: str,
    reached: int,
    llama_folder: Path,
    text: TextData,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, report = calibrate(llama_folder, text, tmp_path / "whole", **WAYS[way])
    original = pipeline.Conversion._convert
    converted: list[int] = []

    def stopping(self: Any, index: int, show: Callable[..., None]) -> None:
        converted.append(index)
        original(self, index, show)
        if index == reached:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Conversion, "_convert", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama_folder, text, tmp_path / "work", **WAYS[way])
    resumed, again = calibrate(llama_folder, text, tmp_path / "work", **WAYS[way])
    assert converted == [0, 1]
    assert torch.equal(logits(whole, tokens), logits(resumed, tokens))
    assert report == again


def test_other_options_or_text_begin_anew(llama_folder: Path, text: TextData, tokens: Tensor, tmp_path: Path) -> None:
    calibrate(llama_folder, text, tmp_path / "work", **WAYS["salient"])
    other, _ = calibrate(llama_folder, text, tmp_path / "work", seed=1, **WAYS["salient"])
    expected, _ = calibrate(llama_folder, text, tmp_path / "fresh", seed=1, **WAYS["salient"])
    assert torch.equal(logits(other, tokens), logits(expected, tokens))


def test_a_full_disk_is_said_and_finished_blocks_are_kept(
    llama_folder: Path, text: TextData, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = calibrate(llama_folder, text, tmp_path / "whole", **WAYS["salient"])
    original = streams._allocate

    def fill_up(path: Path, size: int) -> None:
        if path.name == "states-00002.f32":
            monkeypatch.setattr(streams.os, "posix_fallocate", full, raising=False)
        original(path, size)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(streams, "_allocate", fill_up)
        with pytest.raises(DataError, match=r"block 2: .*no place for .*No space left"):
            calibrate(llama_folder, text, tmp_path / "work", **WAYS["salient"])
    monkeypatch.undo()
    assert len(list((tmp_path / "work").glob("block-*"))) == 1
    resumed, _ = calibrate(llama_folder, text, tmp_path / "work", **WAYS["salient"])
    assert torch.equal(logits(whole, tokens), logits(resumed, tokens))


def test_a_text_shorter_than_a_window_is_refused(llama_folder: Path, text: TextData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"less than one window of 100,000"):
        calibrate(llama_folder, text, tmp_path, calibration={"samples": 1, "window": 100_000}, **WAYS["salient"])


def test_weights_that_are_not_finite_are_named(
    write_llama: Callable[..., SpikeLLM], text: TextData, tmp_path: Path
) -> None:
    write_llama(tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"block 2: mlp.up_proj.weight of .* is not finite"):
        calibrate(tmp_path / "bad", text, tmp_path / "work", **WAYS["gptq"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"bits": 1}}, "weights.bits"),
        ({"weights": {"bits": 17}}, "weights.bits"),
        ({"activations": {"bits": 4, "salient": {"rate": 0}}}, "activations.salient.rate"),
        ({"activations": {"bits": 4, "salient": {"rate": 1}}}, "activations.salient.rate"),
        ({"rounding": "pb_llm", "weights": {"bits": 4}}, "pb_llm has bits of its own"),
        ({"weights": {"bits": 4}, "omni": {"clipping": True}}, "omni.clipping"),
        ({"weights": {"bitz": 4}}, "unknown field"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], words: str) -> None:
    document = {"schema": 1, "name": "x", "data": {"type": "austen3"}, "convert": {"type": "spikellm", **options}}
    with pytest.raises(RecipeError, match=words):
        spiking_lm.recipe.resolve(document)


# -- through recipe and command line ----------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat, it is a truth.\n" * 200, encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        """\
schema: 1
name: tests/convert
data: {type: text, path: text.txt}
convert:
  type: spikellm
  weights: {bits: 4}
  activations: {bits: 4, salient: {rate: 0.25, steps: 2}}
  cache: {bits: 4}
  calibration: {samples: 4, window: 32}
evaluate: {window: 32, protocol: blocks, max_tokens: 200}
generate: {prompt: "the ", max_new_tokens: 5}
explain: {tokens: 40}
compare:
  variants:
    float: {convert.weights.bits: 16, convert.activations.bits: 16, convert.cache.bits: 16}
    nearest: {convert.rounding: nearest, convert.activations.salient: null}
""",
        encoding="utf-8",
    )
    return path


def test_a_recipe_converts_evaluates_and_compares(recipe_file: Path, llama_folder: Path) -> None:
    run = spiking_lm.run_recipe(recipe_file, {"convert.source": str(llama_folder)})
    assert list(run.manifest["stages"]) == ["convert", "evaluate", "generate", "explain", "compare"]
    assert run.manifest["model"] == {"type": "spikellm", "parameters": run.manifest["model"]["parameters"]}
    assert not (run.path / "conversion").exists()
    compared = json.loads((run.path / "compare.json").read_text())
    assert [one["name"] for one in compared["runs"]] == ["this run", "float", "nearest"]
    assert all(one["metrics"]["perplexity"] > 1 for one in compared["runs"])
    explanation = json.loads((run.path / "explanation.json").read_text())
    assert {op["op_class"] for op in explanation["ops"] if op["name"].endswith("_proj")} == {"integer-AC"}
    assert spiking_lm.run_recipe(None, resume=run.path).status == "complete"


def test_the_command_leaves_a_model_and_goes_on_after_a_stop(
    recipe_file: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        return int(stop.value.code or 0)

    command = ["convert", str(llama_folder), "out", "--to", "spikellm", "--recipe", str(recipe_file)]
    command += ["--set", "compare=null"]
    original = pipeline.Conversion.model
    monkeypatch.setattr(pipeline.Conversion, "model", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(*command) == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(pipeline.Conversion, "model", original)
    monkeypatch.setattr(pipeline.Conversion, "_convert", None)  # every block is done
    assert run(*command) == 0
    runs = [path for path in (tmp_path / "runs/tests/convert").iterdir() if path.is_dir()]
    assert len(runs) == 1
    ours, kept = load_model(tmp_path / "out"), load_model(runs[0])
    assert ours.state_dict().keys() == kept.state_dict().keys()
    assert run("generate", "out", "--prompt", "the", "--max-tokens", "4") == 0


def test_a_recipe_needs_to_know_what_to_convert(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"convert.source is not set") as error:
        spiking_lm.run_recipe(recipe_file)
    assert error.value.hint is not None
    assert "convert.source=" in error.value.hint
    with pytest.raises(RecipeError, match="no such file"):
        spiking_lm.run_recipe(recipe_file, {"convert.source": str(tmp_path / "nothing")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.steps": 3, "train.batch_size": 1}, "convert and train"),
        ({"data.tokenizer.type": "byte"}, "brings its own"),
        ({"model.type": "spikegpt"}, "model"),
    ],
)
def test_what_a_conversion_decides_cannot_be_set(change: dict[str, Any], words: str, recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe_file, change)


def test_a_converter_of_files_is_no_stage() -> None:
    document = {"schema": 1, "name": "x", "data": {"type": "austen3"}, "convert": {"type": "spikegpt"}}
    with pytest.raises(RecipeError, match="no stage in a recipe"):
        spiking_lm.recipe.resolve(document)


def test_the_source_is_only_read(recipe_file: Path, llama_folder: Path) -> None:
    before = open_source(llama_folder).sha256(), sorted(path.name for path in llama_folder.iterdir())
    spiking_lm.run_recipe(recipe_file, {"convert.source": str(llama_folder), "compare": None})
    assert before == (open_source(llama_folder).sha256(), sorted(path.name for path in llama_folder.iterdir()))
