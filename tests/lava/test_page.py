"""docs/lava.md is true: its example runs, and every process is on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from spiking_lm_lava import install
from spiking_lm_lava.netx import read_netx
from spiking_lm_lava.process import KINDS
from spiking_lm_lava.simulator import Simulator


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "lava.md").read_text(encoding="utf-8")


def test_the_example_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(import numpy.*?)```", page, re.DOTALL)[0]
    scope: dict[str, Any] = {}
    exec(compile(code, "docs/lava.md", "exec"), scope)
    assert 0 < scope["run"].sinks["spikes"].mean() < 1
    assert (tmp_path / "network" / "COMPLETE").exists()


def test_the_example_of_training_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training, nir = re.findall(r"```python\n((?:import torch|from spiking_lm_lava.nir).*?)```", page, re.DOTALL)[:2]
    scope: dict[str, Any] = {}
    exec(compile(training + nir, "docs/lava.md", "exec"), scope)
    assert 0 < float(scope["spikes"].detach().mean()) < 1
    network, row = scope["network"], scope["x"][0].numpy().astype(int)
    for same in (network, read_netx("trained.net"), scope["again"]):
        late = Simulator(same).run({"input": row}).sinks["output"]
        assert (late[2:] == scope["spikes"][0, :-2].detach().numpy()).all()


def test_every_process_is_on_the_page_with_its_ports(page: str) -> None:
    for kind, cls in KINDS.items():
        if not kind.startswith("float_"):
            (row,) = [line for line in page.splitlines() if line.startswith("| `") and f"`{cls.__name__}`" in line]
            for port in (*cls.reads, *cls.sends):
                assert f"`{port}`" in row


def test_the_commands_are_those_of_the_code(page: str) -> None:
    assert install.SETUP_COMMAND in page
    assert install.LAVA_DL_COMMAND in page
    assert install.PYTHON_VARIABLE in page
