"""One block at a time: what is in memory meanwhile, what is shown, and what becomes of a block that goes wrong."""

from __future__ import annotations

import gc
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from spiking_lm.data import TextData, load
from spiking_lm.errors import DivergedError
from spiking_lm_spikellm import omni, pipeline, progress
from spiking_lm_spikellm.conversion_config import SpikeLLMConversion
from spiking_lm_spikellm.model import SpikeLLM
from spiking_lm_spikellm.streams import Walk

EVERYTHING: dict[str, Any] = {
    "weights": {"bits": 4},
    "activations": {"bits": 4, "salient": {"rate": 0.25, "steps": 2}},
    "cache": {"bits": 4, "salient": {"rate": 0.25, "steps": 2}},
    "omni": {"epochs": 2, "clipping": False},
    "gptq": {"follow": 0.5},
    "calibration": {"samples": 4, "window": 32},
}
BLOCKS = 4


@pytest.fixture(scope="module")
def deep(write_llama: Callable[..., SpikeLLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four blocks."""
    folder = tmp_path_factory.mktemp("deep") / "llama"
    write_llama(folder, shards=2, n_layer=BLOCKS)
    return folder


@pytest.fixture(scope="module")
def text(deep: Path) -> TextData:
    file = deep.parent / "text.txt"
    file.write_text("it is a truth universally acknowledged, that the cat sat on the mat.\n" * 60, encoding="utf-8")
    tokenizer = {"type": "file", "path": str(deep / "tokenizer.json")}
    data = load({"type": "text", "path": str(file), "tokenizer": tokenizer})
    assert isinstance(data, TextData)
    return data


def calibrate(folder: Path, text: TextData, work: Path, **options: Any) -> tuple[SpikeLLM, dict[str, Any], str]:
    """Convert; also return what was shown."""
    parsed = SpikeLLMConversion.model_validate({"source": str(folder), **EVERYTHING, **options})
    console = Console(file=io.StringIO(), width=200)
    model, report = pipeline.calibrate(parsed, text, work, seed=0, console=console)
    return model, report, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def whole(deep: Path, text: TextData, tmp_path_factory: pytest.TempPathFactory) -> tuple[SpikeLLM, dict[str, Any], str]:
    """A conversion that nothing disturbed."""
    return calibrate(deep, text, tmp_path_factory.mktemp("whole") / "work")


@pytest.fixture
def held() -> Iterator[Callable[[], int]]:
    """Return the bytes that tensors hold that were made since."""
    gc.freeze()  # what is there already is not looked at, which takes long
    yield _held
    gc.unfreeze()


def _held() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_finished_blocks_are_not_in_memory(
    deep: Path, text: TextData, tmp_path: Path, held: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, before, during = pipeline.Conversion._round, [], []

    def reading(self: Any, index: int) -> dict[str, Tensor]:
        before.append(held())
        return params(self, index)

    def rounding(self: Any, layer: Any, *rest: Any, **more: Any) -> None:
        during.append(held())
        original(self, layer, *rest, **more)

    params = pipeline.Conversion._params
    monkeypatch.setattr(pipeline.Conversion, "_params", reading)
    monkeypatch.setattr(pipeline.Conversion, "_round", rounding)
    calibrate(deep, text, tmp_path / "work", omni=None)
    assert len(before) == BLOCKS
    tokens = EVERYTHING["calibration"]
    windows = 8 * tokens["samples"] * tokens["window"]  # the text itself, as numbers
    assert 0 < max(before) <= windows + 1024
    assert len(set(before[1:])) == 1  # and nothing is added block by block
    per_block = [max(during[7 * block : 7 * block + 7]) for block in range(BLOCKS)]
    assert len(set(per_block[1:])) == 1


def test_a_block_that_was_left_in_its_middle_is_begun_again(
    deep: Path,
    text: TextData,
    whole: tuple[SpikeLLM, dict[str, Any], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish, finished = Walk.finish, []

    def stopping(self: Walk, target: Any) -> None:
        finished.append(target)
        if len(finished) == 3:  # learning has walked through two float blocks, and one is rounded
            target[slice(0, 1)] = torch.full((1, *target.shape[1:]), math.nan)
            raise KeyboardInterrupt
        finish(self, target)

    with monkeypatch.context() as context:
        context.setattr(Walk, "finish", stopping)
        with pytest.raises(KeyboardInterrupt):
            calibrate(deep, text, tmp_path / "work")
    resumed, again, _ = calibrate(deep, text, tmp_path / "work")
    tokens = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(whole[0](tokens).logits, resumed(tokens).logits)
    assert whole[1] == again


def test_blocks_epochs_losses_and_the_time_left_are_shown(whole: tuple[SpikeLLM, dict[str, Any], str]) -> None:
    lines = whole[2].splitlines()
    assert len(lines) == 2 * BLOCKS
    for index in range(BLOCKS):
        assert re.fullmatch(rf"block {index + 1}/{BLOCKS}(, about \d+:\d\d:\d\d left)?", lines[2 * index])
        assert ("left" in lines[2 * index]) == (index > 0)
        assert re.fullmatch(r"  learning, epoch 2, loss [\d.e-]+", lines[2 * index + 1])


def test_the_time_left_is_that_of_the_blocks_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=100)
    with progress.Display(console, 10) as display:
        for index in (4, 5, 6):  # blocks 0 to 3 are of an earlier call
            display.show(index, "reading")
            display.show(index, "learning, epoch 1, loss 3")
            display.show(index, "learning, epoch 2, loss 2")
            display.show(index, "rounding")
            clock[0] += 60
    told = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert told == [
        "block 5/10",
        "  learning, epoch 2, loss 2",
        "block 6/10, about 0:05:00 left",
        "  learning, epoch 2, loss 2",
        "block 7/10, about 0:04:00 left",
        "  learning, epoch 2, loss 2",
    ]


def test_a_terminal_shows_one_line_that_moves() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with progress.Display(console, 10) as display:
        display.show(2, "learning, epoch 1, loss 3.25")
        display.bar.refresh()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2/10" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "learning, epoch 1, loss 3.25" in shown


def test_a_block_whose_learning_fails_is_rounded_as_it_is_and_named(
    deep: Path, text: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = omni.first_scales, []

    def broken(*args: Any) -> dict[str, Tensor]:
        calls.append(args)
        scales = original(*args)
        return {**scales, "fc1": torch.full_like(scales["fc1"], math.inf)} if len(calls) in (3, 4) else scales

    monkeypatch.setattr(omni, "first_scales", broken)
    model, report, _ = calibrate(deep, text, tmp_path / "work")
    assert report["notes"]
    assert {note.split(":")[0].split(".")[2] for note in report["notes"]} == {"2"}  # the third block
    assert {note.split(": ", 1)[1] for note in report["notes"]} == {
        "let at let_lr 0.005: the loss was not finite in epoch 1",
        "let at let_lr 0.0025: the loss was not finite in epoch 1",
    }
    assert len(report["layers"]) == 7 * BLOCKS
    assert all(math.isfinite(layer["error"]) for layer in report["layers"])
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_states_that_are_not_finite_name_the_block(
    deep: Path, text: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Walk.finish

    def overflowing(self: Walk, target: Any) -> None:
        finish(self, target)
        if "00002" in target.path.name:
            target[slice(0, 1)] = torch.full((1, *target.shape[1:]), math.inf)

    monkeypatch.setattr(Walk, "finish", overflowing)
    with pytest.raises(DivergedError, match=r"^block 3: ") as caught:
        calibrate(deep, text, tmp_path / "work", omni=None, gptq={})
    assert caught.value.hint is not None
    assert len(list((tmp_path / "work").glob("block-*"))) == 2
