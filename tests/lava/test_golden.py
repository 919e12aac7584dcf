"""What Lava computed: every golden case, to the integer, and a mismatch is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spiking_lm.errors import DataError
from spiking_lm_lava.cases import read_case
from spiking_lm_lava.conformance import compare, fast, in_steps, main, read_folder

CASES = 33


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden" / "lava"


def test_every_case_is_exact_step_by_step_and_fast(golden: Path) -> None:
    cases = read_folder(golden)
    assert len(cases) == CASES
    wrong = [str(m) for case in cases for run in (in_steps(case), fast(case)) for m in compare(case, run)]
    assert wrong == []
    assert {node.kind for case in cases for node in case.network.nodes} >= {"lif", "rf", "sigma_delta", "normalise"}


def test_the_command_says_how_many_are_exact(golden: Path, tmp_path: Path) -> None:
    for name in ("ternary", "rf"):
        shutil.copy(golden / f"{name}.npz", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "spiking_lm_lava.conformance", str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "2 of 2 exact (model, simulator)\n")


def test_a_mismatch_is_named_with_its_place_and_both_values(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(golden / "lif_binary_mixed.npz") as file:
        arrays = dict(file)
    arrays["v"][4, 17] += 1
    expected = arrays["v"][4, 17]
    np.savez(tmp_path / "changed.npz", **arrays)
    shutil.copy(golden / "rf.npz", tmp_path)
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"model: changed: v[4, 17] is {expected - 1}, expected {expected} (1 differ)"
    assert lines[-1] == "1 of 2 exact (model, simulator)"


def test_floats_are_held_to_their_tolerance(golden: Path, tmp_path: Path) -> None:
    with np.load(golden / "float_lif.npz") as file:
        arrays = dict(file)
    for change, exact in ((5e-13, True), (2e-12, False), (np.nan, False)):
        changed = {**arrays, "u": arrays["u"] + change}
        np.savez(tmp_path / "float.npz", **changed)
        case = read_case(tmp_path / "float.npz")
        assert (compare(case, fast(case)) == []) is exact


def test_what_is_no_case_is_named(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"no \.npz file"):
        read_folder(tmp_path)
    path = tmp_path / "broken.npz"
    with np.load(golden / "rf.npz") as file:
        whole = dict(file)
    lacking = {name: array for name, array in whole.items() if name != "x_imag"}
    strange = {**whole, "meta": np.array(json.dumps({"kind": "conv"}))}
    pickled = {**whole, "x_imag": np.array([{}], dtype=object)}
    for content in (lacking, strange, pickled):
        np.savez(path, **content)
        with pytest.raises(DataError, match=r"broken\.npz: not a case"):
            read_case(path)
    path.write_bytes((golden / "rf.npz").read_bytes()[:900])
    assert main([str(tmp_path)]) == DataError.exit_code
    assert "broken.npz" in capsys.readouterr().err
