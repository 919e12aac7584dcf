"""The command line as a user meets it: another process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spiking_lm.cli import _guarded

Run = Callable[..., "subprocess.CompletedProcess[str]"]

COMMAND = [sys.executable, "-c", "from spiking_lm.cli import main; main()"]

RECIPE = """\
schema: 1
name: tiny
data: {{type: text, path: {text}}}
model: {{type: spikegpt, n_layer: 1, n_embd: 16, ctx_len: 32}}
train: {{steps: 4, batch_size: 2, seq_len: 16, log_every: 1, eval_tokens: 64, save_every: 2, threads: 1}}
evaluate: {{window: 32, stride: 16, max_tokens: 100}}
generate: {{prompt: "the ", max_new_tokens: 12}}
"""


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory, interruptible: Callable[[], None] | None) -> Run:
    """Run ``spiking-lm`` with arguments; ``env`` adds variables, ``cwd`` and ``input`` as in subprocess.run."""
    elsewhere = tmp_path_factory.mktemp("cwd")

    def run(
        *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None, input: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            input=input,
            cwd=cwd or elsewhere,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            timeout=120,
            preexec_fn=interruptible,
        )

    return run


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same, in this process: much quicker for verbs that need torch, where nothing depends on the process."""

    def run(*arguments: str, cwd: Path | None = None, input: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        with monkeypatch.context() as patch:
            patch.chdir(cwd or Path.cwd())
            code = _guarded(list(arguments))
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(list(arguments), code, shown.out, shown.err)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its complete run in runs/tiny."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat, and the dog lay on the rug.\n" * 100, encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE.format(text=text), encoding="utf-8")
    assert _guarded(["run", str(folder / "tiny.yaml"), "--out", str(folder / "runs")]) == 0
    return folder
