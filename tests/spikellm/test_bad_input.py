"""What can be wrong with a source, a request, a disk or a result is said at the command line, and nothing is lost."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spiking_lm import checkpoints, load_model
from spiking_lm import convert as core
from spiking_lm.cli import main
from spiking_lm_spikellm import pipeline, streams

SHARD = "model-00002-of-00003.safetensors"

RECIPE = """\
schema: 1
name: tests/bad
data: {type: text, path: text.txt}
convert:
  type: spikellm
  weights: {bits: 4}
  activations: {bits: 4, salient: {rate: 0.25, steps: 2}}
  cache: {bits: 4}
  calibration: {samples: 4, window: 32}
"""

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a recipe and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "text.txt").write_text("the cat sat on the mat, it is a truth.\n" * 200, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments)``: exit code, and what was said on standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        return int(stop.value.code or 0), " ".join(capsys.readouterr().err.split())

    return run


@pytest.fixture
def convert(run: Run, here: Path) -> Run:
    """``convert(source, *settings, recipe=True)``: as ``run``; the source must come out of it as it was."""

    def content(source: Path) -> dict[str, tuple[bytes, int]]:
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}

    def convert(source: Path, *settings: str, recipe: bool = True) -> tuple[int, str]:
        before = content(source)
        command = ["convert", str(source), "out", "--to", "spikellm", *(["--recipe", "recipe.yaml"] if recipe else [])]
        result = run(*command, *[word for setting in settings for word in ("--set", setting)])
        assert content(source) == before
        assert (here / "out").exists() == (result[0] == 0)
        return result

    return convert


@pytest.fixture
def source(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, which may be spoilt."""
    return Path(shutil.copytree(llama_folder, tmp_path / "source"))


def without(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda source: (source / name).write_bytes((source / name).read_bytes()[:size])


def told(**changes: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        (source / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")

    return change


SPOILT: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a missing shard": (without(SHARD), (SHARD, "no such file", "copy this shard too")),
    "a truncated shard": (cut(SHARD, 5000), (SHARD, "truncated or damaged", "copy the file again")),
    "a missing index": (without("model.safetensors.index.json"), ("neither model.safetensors", "save_pretrained")),
    "a missing configuration": (without("config.json"), ("config.json: no such file",)),
    "half a configuration": (cut("config.json", 40), ("config.json: not readable as JSON", "is the copy complete?")),
    "another architecture": (
        told(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        ("config.json: model_type is 'gpt2' (GPT2LMHeadModel)", "supported are: llama, mistral, qwen2"),
    ),
    "other sizes": (told(hidden_size=32, head_dim=6), ("the configuration says (320, 32)",)),
    "no tokenizer": (without("tokenizer.json"), ("source: no tokenizer.json", "copy the model's there")),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_source_that_cannot_be_used(name: str, source: Path, convert: Run) -> None:
    spoil, words = SPOILT[name]
    spoil(source)
    code, said = convert(source)
    assert code == 4
    assert all(word in said for word in words), said
    assert "this is a bug" not in said


def test_another_architecture_is_named_without_a_recipe_too(source: Path, convert: Run) -> None:
    told(model_type="gpt2", architectures=["GPT2LMHeadModel"])(source)
    code, said = convert(source, recipe=False)
    assert code == 4
    assert "model_type is 'gpt2'" in said


WRONG = {
    "convert.activations.salient.rate=0": (2, "activations.salient.rate: input should be greater than 0, got 0"),
    "convert.activations.salient.rate=1": (2, "activations.salient.rate: input should be less than 1, got 1"),
    "convert.weights={type: ternary, salient: {rate: 1}}": (2, "input should be less than 1"),
    "convert.weights.group_size=0": (2, "weights.group_size: input should be greater than 0, got 0"),
    "convert.weights.bits=1": (2, "weights.bits: input should be greater than or equal to 2, got 1"),
    "convert.calibration.window=100000": (4, "less than one window of 100,000"),
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_request_that_cannot_be_met(setting: str, llama_folder: Path, convert: Run) -> None:
    code, said = convert(llama_folder, setting)
    assert (code, WRONG[setting][1] in said) == (WRONG[setting][0], True), said


def test_a_text_that_is_too_short_is_named(llama_folder: Path, here: Path, convert: Run) -> None:
    (here / "text.txt").write_text("hello", encoding="utf-8")
    code, said = convert(llama_folder)
    assert code == 4
    assert "text.txt has 5 bytes of text" in said


@torch.no_grad()
def test_groups_need_not_divide_the_inputs(llama_folder: Path, here: Path, convert: Run) -> None:
    """576 inputs are no multiple of 128: the last group of a row is a shorter one, not an error."""
    code, _ = convert(llama_folder, "convert.weights.group_size=7")  # of 24 and 40
    assert code == 0
    assert load_model(here / "out").config.weights.group_size == 7  # type: ignore[attr-defined]


@pytest.fixture
def converted(llama_folder: Path, here: Path, convert: Run) -> Path:
    assert convert(llama_folder)[0] == 0
    return here / "out"


def test_a_result_that_is_damaged_is_not_used(converted: Path, run: Run) -> None:
    generate = ("generate", "out", "--prompt", "the", "--max-tokens", "2")
    assert run(*generate)[0] == 0
    for file in sorted(converted.iterdir()):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        for damaged in (bytes(flipped), whole[: len(whole) // 2], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            code, said = run(*generate)
            assert (code, file.name in said) == (4, True), said
            file.write_bytes(whole)
    assert run(*generate)[0] == 0


# -- a disk that is full -----------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_after(times: int, call: Callable[..., Any], fits: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """Let ``call`` succeed so many times with what ``fits``, and then find the disk full."""
    seen: list[Any] = []

    def limited(*arguments: Any) -> Any:
        if fits(*arguments):
            seen.append(arguments)
        return full() if len(seen) > times else call(*arguments)

    return limited


@pytest.mark.parametrize("place", ["block", "states"])
def test_a_disk_that_fills_up_while_converting(
    place: str, llama_folder: Path, here: Path, convert: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        if place == "block":
            is_block = lambda path, _: path.name.startswith("block-")  # noqa: E731
            context.setattr(pipeline, "atomic_write", full_after(1, pipeline.atomic_write, is_block))
        else:  # of a block six files while it is marked and rounded, and what it returns; before, the embedding
            context.setattr(streams.os, "posix_fallocate", full_after(8, lambda *_: None), raising=False)
        code, said = convert(llama_folder)
    assert code == 4
    assert "block 2: " in said
    assert "No space left on device" in said
    assert "finished blocks are kept: make room and give the command again" in said
    (work,) = (here / "runs/tests/bad").glob("*/conversion")
    kept = sorted(path.name for path in work.glob("block-*"))
    assert len(kept) == 1

    blocks: list[int] = []
    original = pipeline.Conversion._convert
    monkeypatch.setattr(
        pipeline.Conversion,
        "_convert",
        lambda self, index, show: (blocks.append(index), original(self, index, show)),
    )
    assert convert(llama_folder)[0] == 0
    assert blocks == [1]
    assert len(list((here / "runs/tests/bad").glob("2*"))) == 1  # the same run


def test_a_disk_that_is_full_when_the_model_is_written(
    llama_folder: Path, here: Path, convert: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(checkpoints, "save_file", full)
        code, said = convert(llama_folder)
    assert code == 4
    assert "cannot be written: [Errno 28] No space left on device" in said
    (work,) = (here / "runs/tests/bad").glob("*/conversion")
    assert len(list(work.glob("block-*"))) == 2
    with monkeypatch.context() as context:
        context.setattr(pipeline.Conversion, "_convert", None)  # no block is done again
        assert convert(llama_folder)[0] == 0


def test_a_disk_that_is_full_when_the_result_is_handed_over(
    llama_folder: Path, here: Path, convert: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoints.save_model

    def refusing(*arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as context:
            context.setattr(checkpoints, "save_file", full)
            return save(*arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(core, "save_model", refusing)
        code, said = convert(llama_folder)
    assert code == 4
    assert "the model is kept in" in said
    with monkeypatch.context() as context:
        context.setattr(pipeline, "calibrate", None)  # nothing is converted again
        assert convert(llama_folder)[0] == 0
    assert len(list((here / "runs/tests/bad").glob("2*"))) == 1


@torch.no_grad()
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_finished_block_that_is_damaged_is_done_again(
    damage: str, llama_folder: Path, here: Path, convert: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(checkpoints, "save_file", full)
        convert(llama_folder)
    (work,) = (here / "runs/tests/bad").glob("*/conversion")
    files = sorted(work.glob("block-*"))
    whole = [file.read_bytes() for file in files]
    spoilt = bytearray(whole[1])
    spoilt[-3] ^= 16
    files[1].write_bytes(bytes(spoilt) if damage == "flipped" else whole[1][:100])
    with monkeypatch.context() as context:
        context.setattr(checkpoints, "save_file", full)
        _, said = convert(llama_folder)
    assert "is damaged: what was converted from there on is done again" in said
    assert [file.read_bytes() for file in sorted(work.glob("block-*"))] == whole
    assert convert(llama_folder)[0] == 0
