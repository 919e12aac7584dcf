"""The verbs explain and report, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import spiking_lm
from spiking_lm.cli import main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return int(exit_.value.code or 0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pytest.importorskip("snntorch")
    torch.manual_seed(0)
    model = spiking_lm.create_model("spikegpt", vocab_size=256, n_layer=2, n_embd=16, ctx_len=32)
    spiking_lm.save_model(model, tmp_path / "model")
    return tmp_path / "model"


def test_explain_prints_tables(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", str(saved), "--tokens", "64") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "In front of no weight matrix" in out
    assert "64 bytes of the embedded corpus austen3 (validation part)" in out
    assert "blocks.*.att.key ×2" in out


def test_explain_full_lists_every_operation(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", str(saved), "--tokens", "64", "--full") == 0
    out = capsys.readouterr().out
    for name in ("blocks.1.att.key", "blocks.0.ln0", "blocks.1.add_ffn"):
        assert name in out
    assert "real + binary" in out


def test_explain_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", str(saved), "--tokens", "64", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 64
    assert found["classes"]["MAC"]["weight_share"] == 1.0
    embedding_and_head, block, outer_norms = 2 * 256 * 16, (13 * 16 + 7 + 4) * 16, 4 * 16
    assert found["neurobench"]["parameter_count"] == embedding_and_head + 2 * block + outer_norms


def test_report_writes_a_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", str(run_dir)) == 0
    assert Path(capsys.readouterr().out.strip()) == run_dir / "report.html"
    assert (run_dir / "report.html").is_file()


def test_report_of_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", str(tmp_path)) == 4
    assert "is not a run" in capsys.readouterr().err
