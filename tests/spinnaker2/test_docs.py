"""docs/spinnaker2.md is true: its example runs, its options exist, its numbers are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from spiking_lm.hardware import Constant
from spiking_lm_spinnaker2 import bench, constants
from spiking_lm_spinnaker2.config import SpiNNaker2Config


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "spinnaker2.md").read_text(encoding="utf-8")


def test_the_example_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(import numpy.*?)```", page, re.DOTALL)[0]
    scope: dict[str, Any] = {}
    exec(compile(code, "docs/spinnaker2.md", "exec"), scope)
    assert scope["result"].logits.shape == (9, 100)
    assert (tmp_path / "program" / "COMPLETE").exists()


def test_every_constant_is_on_the_page(page: str) -> None:
    found = [value for value in vars(constants).values() if isinstance(value, Constant)]
    for point in constants.OPERATING_POINTS.values():
        found += point.constants(mac_array=True)
    assert len(found) > 25
    text = page.replace(",", "")
    for constant in found:
        value = constant.value
        forms = {f"{value:g}", f"{value:.2f}", f"{value:.3f}", f"{value / 1024:g} KiB"}
        assert any(re.search(rf"(?<![\d.]){re.escape(form)}(?![\d.]*\d)", text) for form in forms), constant


def test_every_option_is_on_the_page(page: str) -> None:
    for name in set(SpiNNaker2Config.model_fields) - {"tokens", "operating_point", "schedule"}:
        assert re.search(rf"`{name}[`:]|\b{name}=", page), name


def test_the_published_point_is_that_of_the_benchmark(page: str) -> None:
    details = bench.bench_paper(1).details
    assert f"| {details['kb_per_pe']:.1f} kB |" in page
    assert f"| {details['latency_ms']:.2f} ms |" in page
    assert f"| {details['energy_mj']:.1f} mJ |" in page
    assert f"{details['mean_power_mw']:.0f} mW here" in page
