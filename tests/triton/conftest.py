"""Triton's kernels are tested in two processes: interpreted in one, compiled for three targets in the other.

Which of both a process does is settled when Triton is imported, by TRITON_INTERPRET. ``test_processes.py`` starts both,
so that plain ``pytest`` runs everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode adds no folder of tests to the path

from triton_aot import TARGETS, Compiled, NoGPU, described


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., list[Compiled]]]:
    """Call a function once per target; return every kernel it would have launched, as Triton compiled it for that call.

    The host code runs as it is, on tensors of the processor: dtypes, strides, sizes and options are what Triton
    specialises on, by its own rules. Only the launch itself is left out, so results are whatever memory held.
    """
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, here = JITFunction.run, NoGPU()
    found: dict[str, Compiled] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        target = TARGETS[here.device]
        found.setdefault(kernel.hash, described(kernel, target, options, tmp_path))
        return kernel

    def call(function: Callable[[], Any], targets: tuple[str, ...] = TARGETS) -> list[Compiled]:
        found.clear()
        for target in targets:
            here.device = TARGETS.index(target)
            monkeypatch.setattr(torch.version, "hip", "6.3" if target.startswith("gfx") else None)
            function()
        return list(found.values())

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    before = driver._active
    driver.set_active(here)
    yield call
    driver._active = before


@pytest.fixture(scope="session")
def child() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a file of tests in a Python process of its own, with environment variables."""

    def run(file: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settled = {"TRITON_INTERPRET", "SPIKING_LM_TRITON_AOT", "SPIKING_LM_KERNELS"}
        env = {name: value for name, value in os.environ.items() if name not in settled}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).parent / file),
        ]
        return subprocess.run(
            command, env={**env, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=900,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    return run
