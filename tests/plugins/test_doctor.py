"""``spiking-lm doctor``: what is wrong is found, named and given a command, and only real faults fail."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spiking_lm import doctor, registry
from spiking_lm.records import Finding

DOCTOR = """
from spiking_lm import hookimpl
from spiking_lm.records import DoctorSpec, Finding

@hookimpl
def spiking_lm_doctor(register):
    for name in ("board", "nothing", "raising", "exiting", "nonsense"):
        register(DoctorSpec(name=name, function=f"spiking_lm_checks:{name}"))

def board():
    return [Finding("board", "warn", "firmware is old", "update-board"), Finding("clock", "ok", "ticks")]
def nothing():
    return []
def raising():
    raise RuntimeError("no bus")
def exiting():
    raise SystemExit(0)
def nonsense():
    return ["fine"]
"""


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Distributions that seem not to be installed."""
    names: set[str] = set()
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return names


def only(findings: list[Finding], check: str) -> Finding:
    return next(finding for finding in findings if finding.check == check)


@pytest.mark.slow
def test_doctor_shows_everything_and_runs_the_checks_of_plugins(site: Any) -> None:
    site.add("spiking-lm-checks", DOCTOR, plugin="checks", version="1.5")
    site.add("spiking-lm-bad", "1 / 0", plugin="bad")
    done = site.cli("doctor", "--json")
    assert done.returncode == 1, "something failed"
    report = json.loads(done.stdout)
    assert report["ok"] is False
    found = {finding["check"]: finding for finding in report["findings"]}
    assert found["python"]["status"] == "ok"
    assert found["packages"]["status"] == "ok"
    assert found["cpu"]["status"] in {"ok", "warn"}
    assert found["kernel lif_scan"]["status"] == found["kernel wkv"]["status"] == "ok"
    assert "7 embedded files" in found["data"]["message"]
    assert found["plugin core"]["status"] == found["plugin good"]["status"] == found["plugin checks"]["status"] == "ok"
    assert found["plugin bad"]["status"] == "fail"
    assert "SPIKING_LM_BLOCK=bad" in found["plugin bad"]["hint"]
    assert found["board"] == {"check": "board", "status": "warn", "message": "firmware is old", "hint": "update-board"}
    assert found["clock"]["status"] == "ok"
    for name, reason in (("raising", "no bus"), ("exiting", "sys.exit(0)"), ("nonsense", "not a list of Finding")):
        assert found[name]["status"] == "fail"
        assert reason in found[name]["message"]
        assert "spiking-lm-checks" in found[name]["hint"]


@pytest.mark.slow
def test_doctor_is_content_with_a_sound_installation(site: Any) -> None:
    done = site.cli("doctor", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout
    assert "0 failures" in done.stdout.splitlines()[-1]
    assert "fail " not in done.stdout


def test_a_kernel_that_is_asked_for_and_cannot_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKING_LM_KERNELS", "lif_scan=no_such_implementation")
    (finding,) = doctor._guarded("kernels", doctor.check_kernels, culprit=None)
    assert finding.status == "fail"
    assert "no_such_implementation" in finding.message


def test_a_missing_extra_is_a_warning_with_its_command(absent: set[str]) -> None:
    absent |= {"matplotlib"}
    findings = doctor.check_extras()
    assert only(findings, "extra report") == Finding(
        "extra report", "warn", "matplotlib is not installed", "pip install 'spiking-lm[report]'"
    )
    assert only(findings, "extra spikegpt").status == "ok"
    assert all(finding.status != "fail" for finding in findings)


def test_an_extra_that_this_python_cannot_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip skips a requirement whose marker does not hold without a word, so ``pip install`` would be bad advice."""
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: SimpleNamespace(get_all=lambda field: ["old"]))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["chip; python_version < '3' and extra == 'old'"])
    (finding,) = doctor.check_extras()
    assert finding.status == "warn"
    assert "cannot be had in this environment: chip" in finding.message
    assert finding.hint is None


def test_a_missing_or_old_package_of_the_core_fails(absent: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_packages()[0].status == "ok"
    absent |= {"safetensors"}
    (finding,) = doctor.check_packages()
    assert (finding.status, finding.message) == ("fail", "safetensors is not installed")
    absent.clear()
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["pluggy>=999", "numpy; python_version < '3'"])
    (finding,) = doctor.check_packages()
    assert finding.status == "fail"
    assert "pluggy" in finding.message
    assert ">=999 is needed" in finding.message


def test_a_cpu_build_beside_a_gpu_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.14.1+cpu")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.6"])
    assert only(doctor.check_packages(), "gpu").status == "warn"


@pytest.mark.parametrize(("version", "status"), [((3, 10, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "warn")])
def test_python_versions(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], status: str) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert doctor.check_python()[0].status == status


def test_more_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    (finding,) = doctor.check_cpu()
    assert finding.status == "warn"
    assert str(finding.hint).startswith("export OMP_NUM_THREADS=")


@pytest.mark.parametrize(("free", "status"), [(5e7, "fail"), (1e9, "warn"), (1e11, "ok")])
def test_disk_space(monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert doctor.check_disk()[0].status == status


def test_embedded_data_that_is_damaged_or_missing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.check_data()[0].status == "ok"
    copy = tmp_path / "embedded"
    shutil.copytree(doctor.EMBEDDED, copy)
    monkeypatch.setattr(doctor, "EMBEDDED", copy)
    data = bytearray((copy / "austen3.valid.txt.xz").read_bytes())
    data[1000] ^= 1
    (copy / "austen3.valid.txt.xz").write_bytes(data)
    (copy / "authors4.labels.json").unlink()
    (finding,) = doctor.check_data()
    assert finding.status == "fail"
    assert "austen3.valid.txt.xz is damaged" in finding.message
    assert "authors4.labels.json is missing" in finding.message
    assert str(finding.hint).startswith("pip install --force-reinstall")


def test_every_embedded_file_is_in_the_list_of_hashes() -> None:
    listed = {line.split()[1] for line in (doctor.EMBEDDED / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in doctor.EMBEDDED.iterdir()} - {"SHA256SUMS"}


def test_states_of_plugins_become_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[str, Any] = {
        "active": "ok",
        "blocked": "ok",
        "unavailable": "warn",
        "failed": "fail",
        "incompatible": "fail",
    }
    records = [registry.PluginRecord(status, "dist", "1", status=status, hint="h") for status in states]  # type: ignore[arg-type]
    records[0].hint = None
    monkeypatch.setattr(registry, "plugins", lambda: records)
    assert {finding.check.split()[1]: finding.status for finding in doctor.check_plugins()} == states
    records[0].hint = "it takes 3.0 s to load"
    assert doctor.check_plugins()[0].status == "warn", "a slow plugin works, and is pointed out"


def test_the_core_registers_its_own_checks_through_the_hook() -> None:
    assert {"data", "disk", "kernels"} <= set(registry.all("doctor"))
