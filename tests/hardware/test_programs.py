"""Programs: what is lowered runs the same after saving, without torch, and every spoilt folder or input is named."""

from __future__ import annotations

import json
import os
import shutil
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
from spiking_lm import load_program, lower, registry, sealed
from spiking_lm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LoweringError,
    PluginError,
    UnknownNameError,
    UsageError,
)
from spiking_lm.hardware import ProgramResult, score
from spiking_lm.report.tables import figure_of

Make = Callable[..., Any]

TOKENS = np.frombuffer(b"the cat sat on the mat", np.uint8)


@pytest.fixture
def folder(tmp_path: Path, toy: Make) -> Path:
    lower(toy(), "toy").save(tmp_path / "program", files={"tokenizer.json": '{"spiking_lm": {"type": "byte"}}'})
    return tmp_path / "program"


def reseal(folder: Path) -> None:
    for name in ("SHA256SUMS", "COMPLETE"):
        (folder / name).unlink()
    sealed._seal(folder)


def edit(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "program.json").read_text())
    (folder / "program.json").write_text(json.dumps(record | changes))
    reseal(folder)


def test_a_program_computes_what_the_model_does(toy: Make) -> None:
    model = toy()
    program = lower(model, "toy", bits=24)
    result = program.run(TOKENS)
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(result.logits, expected, atol=1e-5)
    first = program.run(TOKENS[:9])
    second = program.run(TOKENS[9:], first.state)
    np.testing.assert_array_equal(np.concatenate([first.logits, second.logits]), result.logits)


def test_what_is_saved_comes_back(folder: Path, toy: Make) -> None:
    program = lower(toy(), "toy")
    again = load_program(folder)
    assert sorted(os.listdir(folder)) == [
        "COMPLETE",
        "SHA256SUMS",
        "program.json",
        "tokenizer.json",
        "weights.safetensors",
    ]
    np.testing.assert_array_equal(again.run(TOKENS).logits, program.run(TOKENS).logits)
    assert again.report().to_dict() == program.report().to_dict()
    sealed.verify_folder(folder)


def test_a_saved_program_runs_without_torch(folder: Path) -> None:
    code = f"""
import sys
import numpy as np
import spiking_lm
program = spiking_lm.load_program({str(folder)!r})
result = program.run(np.array([1, 2, 3]))
program.report(result).to_dict()
print(result.logits.shape, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "(3, 256) False", done.stderr


def test_a_report_shows_every_figure_constant_and_warning(toy: Make) -> None:
    program = lower(toy(), "toy", cores=3)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(program.report(program.run(TOKENS)).render())
    text = console.export_text()
    console.file.close()
    for part in ("core 0-2", "mix", "fp32", "events", "simulated", "10 ns", "nobody measured it", "[a toy] energy"):
        assert part in text, part


@pytest.mark.parametrize("name", ["program.json", "weights.safetensors", "tokenizer.json", "SHA256SUMS", "COMPLETE"])
def test_truncated_and_missing_files_are_named(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    for kept in (0, len(good) // 2, len(good) - 1):
        (folder / name).write_bytes(good[:kept])
        with pytest.raises(CheckpointError, match=f"{name} is not what was saved") as caught:
            load_program(folder)
        assert caught.value.exit_code == 4
        assert "lower the model again" in (caught.value.hint or "")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_program(folder)


@pytest.mark.parametrize("name", ["program.json", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x00" * 9, b"[" * 100_000, (1 << 62).to_bytes(8, "little")])
def test_hostile_content_is_refused_even_when_sealed(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    reseal(folder)
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=name):
            load_program(folder, verify=verify)


def test_a_program_of_a_newer_version_is_refused(folder: Path) -> None:
    edit(folder, format=2, spiking_lm="7.0", novelty=True)
    with pytest.raises(
        CheckpointError, match=r"format 2 by spiking-lm 7\.0; this is .* reads up to format 1"
    ) as caught:
        load_program(folder)
    assert caught.value.hint == "pip install --upgrade spiking-lm"


@pytest.mark.parametrize("changes", [{"format": "one"}, {"format": None}, {"backend": None}, {"backend": ["toy"]}])
def test_a_record_without_format_or_backend_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=r"program\.json: the fields 'format' and 'backend'"):
        load_program(folder)


def test_a_record_that_the_backend_cannot_read_is_named(folder: Path) -> None:
    record = json.loads((folder / "program.json").read_text())
    del record["cores"]
    (folder / "program.json").write_text(json.dumps(record))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"not a program of the backend 'toy' \(KeyError: 'cores'\)"):
        load_program(folder)


def test_a_missing_backend_says_what_to_install(folder: Path) -> None:
    previous = registry.set_manager(registry.PluginManager(discover="first-party"))
    try:
        with pytest.raises(PluginError, match="unknown backend 'toy'") as caught:
            load_program(folder)
    finally:
        registry.set_manager(previous)
    assert (caught.value.hint or "").startswith("pip install spiking-lm-toy")
    assert caught.value.exit_code == 3


def test_what_is_no_program_folder_is_said(tmp_path: Path, toy: Make) -> None:
    (tmp_path / "file").write_text("x")
    spiking_lm.save_model(toy(), tmp_path / "model")
    for name, words in (("nowhere", "no such"), ("file", "a file, not"), ("model", "no program.json")):
        with pytest.raises(CheckpointError, match=words) as caught:
            load_program(tmp_path / name)
        assert "spiking-lm lower" in (caught.value.hint or "")


def test_only_a_program_is_replaced(tmp_path: Path, folder: Path, toy: Make) -> None:
    program = lower(toy(seed=1), "toy")
    program.save(folder, files={"run.py": "print('hello')\n"})
    program.save(folder)
    assert not (folder / "run.py").exists()
    np.testing.assert_array_equal(load_program(folder).run(TOKENS).logits, program.run(TOKENS).logits)
    (folder / "thesis.tex").write_text("years of work")
    spiking_lm.save_model(toy(), tmp_path / "model")
    for path in (folder, tmp_path / "model", tmp_path):
        with pytest.raises(UsageError, match="holds other things than a program"):
            program.save(path)
    assert (folder / "thesis.tex").read_text() == "years of work"
    shutil.rmtree(folder)
    folder.write_text("x")
    with pytest.raises(CheckpointError, match="file is in the way"):
        program.save(folder)


@pytest.mark.parametrize("name", ["program.json", "SHA256SUMS", "../out", ".hidden", ""])
def test_a_further_file_needs_a_name_of_its_own(tmp_path: Path, toy: Make, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a file beside a program"):
        lower(toy(), "toy").save(tmp_path / "program", files={name: "x"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.array([0, 256]), "run from 0 to 256, the program knows 0 to 255"),
        (np.array([-1, 3]), "run from -1 to 3"),
        (np.array([[1, 2]]), r"not int64 \(1, 2\)"),
        (np.array([1.0]), "not float64"),
    ],
)
def test_tokens_that_no_program_can_read(toy: Make, tokens: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        lower(toy(), "toy").run(tokens)


def test_lowering_says_what_is_wrong(toy: Make) -> None:
    model = toy()
    with pytest.raises(UnknownNameError, match="unknown backend 'tay'") as unknown:
        lower(model, "tay")
    assert "did you mean 'toy'?" in (unknown.value.hint or "")
    with pytest.raises(ConfigError, match="backend 'toy': unknown field 'core'") as misspelt:
        lower(model, "toy", core=3)
    assert misspelt.value.hint == "did you mean 'cores'?"
    with pytest.raises(ConfigError, match="bits: input should be less than or equal to 24, got 32"):
        lower(model, "toy", bits=32)
    gpt = spiking_lm.create_model("spikegpt", vocab_size=256, n_layer=1, n_embd=8, ctx_len=8)
    with pytest.raises(LoweringError, match=r"the op '.+' \(.+\) has no place on this chip"):
        lower(gpt, "toy")


def test_scores_are_those_of_torch(toy: Make) -> None:
    tokens = np.array([3, 1, 4, 1, 5])
    logits = np.random.default_rng(0).normal(scale=30, size=(4, 256)).astype(np.float32)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(tokens[1:]), reduction="none"
    )
    np.testing.assert_allclose(score(ProgramResult(logits, None), tokens), expected.numpy(), rtol=1e-12)
    with pytest.raises(DataError, match="4 tokens were run"):
        score(ProgramResult(logits, None), tokens[1:])


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (3, "PEs", "3 PEs"),
        (15_920.4, "tokens/s", "15,920 tokens/s"),
        (0.0653, "J", "0.0653 J"),
        (170.2512, "ms", "170.3 ms"),
        (2e12, "", "2e+12"),
        (float("nan"), "ms", "–"),
        (None, "ms", "–"),
    ],
)
def test_figures_are_written_to_be_read(value: Any, unit: str, words: str) -> None:
    assert figure_of(value, unit) == words
