"""docs/nir.md is true: its code runs, from the network to the program for SpiNNaker 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nir")


def test_the_code_of_the_page_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (root / "docs" / "nir.md").read_text(encoding="utf-8")
    known: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, known)
    fake = root / "tests" / "spinnaker2" / "fake_spinnaker2"
    environment = {**os.environ, "PYTHONPATH": str(fake)}
    subprocess.run([sys.executable, "next.py"], env=environment, check=True, timeout=300, capture_output=True)
    with np.load("next.answers.npz") as answers:
        assert np.array_equal(answers["next"], known["expected"])
    assert (known["expected"] == known["fired"]).mean() > 0.99
    assert known["fired"].any(axis=1).mean() > 0.5
