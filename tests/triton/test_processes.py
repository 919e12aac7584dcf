"""Both kinds of tests of the Triton kernels, each in a process of its own; and the plugin in an ordinary one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from spiking_lm import bench, kernels, registry
from spiking_lm.cli.bench import command
from spiking_lm.errors import KernelUnavailableError, UnknownNameError, UsageError
from spiking_lm_triton import roofline

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

Child = Callable[..., "subprocess.CompletedProcess[str]"]


def _passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout


@needs_triton
@pytest.mark.slow
def test_numerics_interpreted(child: Child) -> None:
    _passed(child("test_numerics.py", TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.slow
def test_compiled_for_three_targets(child: Child) -> None:
    _passed(child("test_aot.py", SPIKING_LM_TRITON_AOT="1"))


def test_listing_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys, spiking_lm_triton\n"
        "from spiking_lm import registry\n"
        "assert 'lif_scan/triton' in registry.manager().all('kernels')\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_plugin_is_active() -> None:
    (record,) = [plugin for plugin in registry.plugins() if plugin.name == "triton"]
    assert record.status == "active"
    assert "lif_scan/triton" in record.provides["kernels"]


def _reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton"
    return "torch sees no GPU" if not torch.cuda.is_available() else "a tensor is on the cpu"


def test_it_is_refused_on_the_processor_with_a_reason() -> None:
    x = torch.ones(3, 4)
    options = {"beta": 0.5, "gain": 0.5, "threshold": 1.0}
    name, answer = kernels.explain_choice("lif_scan", x, **options)[0]
    assert name == "triton", "it has the highest priority"
    assert _reason() in str(answer)
    with kernels.use(lif_scan="triton"), pytest.raises(KernelUnavailableError, match=_reason()):
        kernels.lif_scan(x, **options)
    spikes, _ = kernels.lif_scan(x, **options)
    assert spikes.shape == x.shape


def test_benchmarks_of_gpus_are_apart() -> None:
    on_gpu = bench.select([], "cuda")
    assert "triton/wkv" in on_gpu
    assert not set(on_gpu) & set(bench.select([]))
    assert bench.select(["triton"], "cuda") == on_gpu
    with pytest.raises(UnknownNameError):
        bench.select(["triton/wkv"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_said_that_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import sys; from spiking_lm.cli import main; main(['bench', '--device', sys.argv[1]])"
    done = subprocess.run([sys.executable, "-c", code, "cuda"], capture_output=True, text=True)
    assert done.returncode == KernelUnavailableError.exit_code
    assert "sees no GPU on this machine, so nothing was measured" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="neither cpu nor cuda"):
        command([], [], False, 1, 1, "tpu")


def test_a_measured_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON and Markdown, as on a machine with a GPU."""
    row = bench.Row("triton/wkv/1x2x3", "wkv (1, 2, 3)", 7.0, note="12 µs, torch 84 µs", details={"bytes": 5})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(bench, "measure", lambda name, repeats: [row])
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, ["triton/wkv", "--device", "cuda"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page, data = (tmp_path / f"bench-cuda.{kind}" for kind in ("md", "json"))
    assert "| wkv (1, 2, 3) | 7 x |  |  | 12 µs, torch 84 µs |" in page.read_text()
    assert page.read_text().startswith("a GPU, torch ")
    assert json.loads(data.read_text())["rows"][0]["value"] == 7.0


def test_the_page_has_the_predicted_table(root: Path) -> None:
    page = (root / "docs" / "triton.md").read_text()
    assert roofline.table() in page, "write it anew: python -m spiking_lm_triton.roofline"
    for line in page.splitlines():
        assert "µs" not in line or "predicted" in line.lower(), f"nothing was measured: {line}"


def test_predictions_are_their_greatest_bound() -> None:
    machine = roofline.Machine("made up", 1e12, {"fp32": 1e12, "half": 1e13, "int8": 1e13, "popc": 1e12}, 1e9)
    of_memory = roofline.Work(2 * 10**9, 10**9)
    assert of_memory.bound(machine) == "memory"
    assert of_memory.predicted(machine) == pytest.approx(2e-3 + roofline.LAUNCH)
    of_steps = roofline.Work(1, 1, cycles=10**7)
    assert of_steps.bound(machine) == "steps"
    assert of_steps.predicted(machine) == pytest.approx(1e-2 + roofline.LAUNCH)
    both = of_memory + of_steps
    assert (both.launches, both.bytes, both.cycles) == (2, 2 * 10**9 + 1, 10**7)
    assert roofline.Work(1, 1, launches=9).bound(machine) == "launches"
    assert roofline.Work(1, 10**9, "int8").bounds(machine)["arithmetic"] == pytest.approx(1e-4)
