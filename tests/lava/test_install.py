"""Finding Lava, setting it up, and the one line that newer Pythons need; none of it needs Lava."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import spiking_lm_lava
from spiking_lm import cli, doctor
from spiking_lm.errors import PluginError, UnknownNameError
from spiking_lm_lava import install

WORKER = Path(spiking_lm_lava.__file__).parent / "worker"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and an environment without Lava."""
    monkeypatch.setenv("SPIKING_LM_CACHE", str(tmp_path))
    monkeypatch.delenv(install.PYTHON_VARIABLE, raising=False)
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "lava-nc":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return tmp_path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that installs nothing and notes what it was asked for; ``fail`` in its name ends it with an error."""
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[command.index("--target") + 2 :])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(install.subprocess, "run", run)
    return asked


def test_without_lava_the_command_that_brings_it_is_named(nowhere: Path) -> None:
    with pytest.raises(PluginError, match="not set up") as caught:
        install.find()
    assert caught.value.hint == "spiking-lm lower --backend lava --setup"
    (finding,) = doctor.diagnose(["lava"])
    assert (finding.status, finding.hint) == ("warn", caught.value.hint)


def test_setup_installs_dependencies_first_then_lava_alone(
    nowhere: Path, pip: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["lower", "--backend", "lava", "--setup"])
    assert left.value.code == 0
    assert pip == [list(install.NEEDS), ["--no-deps", "--ignore-requires-python", "lava-nc==0.10.0"]]
    assert "Installing lava-nc==0.10.0" in capsys.readouterr().err
    found = install.find()
    assert found.command == (sys.executable, "-I", "-S")
    assert found.paths == (install.packages_folder(),)
    assert nowhere in install.packages_folder().parents
    said: list[str] = []
    install.setup(said.append)
    assert len(pip) == 2
    assert "here already" in said[0]


def test_what_another_version_installed_is_installed_again(nowhere: Path, pip: list[list[str]]) -> None:
    install.setup(lambda line: None)
    stamp = install.packages_folder() / install.STAMP
    for content in (json.dumps({"asked": ["lava-nc==0.9"]}), "[]", "{"):
        stamp.write_text(content, encoding="utf-8")
        with pytest.raises(PluginError):
            install.find()
        install.setup(lambda line: None)
        assert install.find().paths


def test_a_failing_pip_leaves_nothing_and_is_quoted(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, words, hint in (
        ("ERROR: No matching distribution found for lava-nc", "No matching distribution", "PIP_INDEX_URL"),
        ("/usr/bin/python: No module named pip", "has no pip", "ensurepip"),
    ):
        broken = subprocess.CompletedProcess([], 1, "", text)
        monkeypatch.setattr(install.subprocess, "run", lambda *a, broken=broken, **b: broken)
        with pytest.raises(PluginError, match=words) as caught:
            install.setup(lambda line: None)
        assert hint in (caught.value.hint or "")
        assert not install.packages_folder().exists()


def test_an_interpreter_that_is_named_is_taken_and_must_be_one(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, pip: list[list[str]]
) -> None:
    install.setup(lambda line: None)
    monkeypatch.setenv(install.PYTHON_VARIABLE, sys.executable)
    assert install.find().command == (sys.executable, "-I")
    monkeypatch.setenv(install.PYTHON_VARIABLE, str(nowhere / "python"))
    with pytest.raises(PluginError, match=r"cannot be executed"):
        install.find()


def test_where_processes_cannot_be_forked_it_is_said(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.os, "name", "nt")
    with pytest.raises(PluginError, match="cannot"):
        install.find()


def test_setup_of_what_has_none_and_checks_that_do_not_exist() -> None:
    with pytest.raises(UnknownNameError, match="unknown setup 'disk'"):
        doctor.prepare("disk", print)
    with pytest.raises(UnknownNameError, match="unknown check 'lawa'") as caught:
        doctor.diagnose(["lawa"])
    assert "'lava'" in (caught.value.hint or "")
    assert {finding.check for finding in doctor.diagnose(["python"])} == {"python"}


def test_lower_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, lacking in ((["--backend", "lava"], "a MODEL"), (["run", "--backend", "lava"], "--out DIR")):
        with pytest.raises(SystemExit) as left:
            cli.main(["lower", *arguments])
        assert left.value.code == 2
        assert f"lower needs {lacking}" in capsys.readouterr().err


def test_dataclasses_of_lava_hash_meanwhile_and_nothing_else_changes() -> None:
    spec = importlib.util.spec_from_file_location("hashes", WORKER / "hashes.py")
    assert spec is not None
    assert spec.loader is not None
    hashes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hashes)
    code = (
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Inner:\n    base: int = 0\n"
        "@dataclass()\nclass Outer:\n    x: Inner = Inner()\n"
    )

    def define(name: str) -> types.ModuleType:
        module = types.ModuleType(name)
        sys.modules[name] = module
        try:
            exec(code, vars(module))
        finally:
            del sys.modules[name]
        return module

    original = dataclasses.dataclass
    with hashes.hashable_dataclasses():
        outer = define("lava.magma.compiler.var_model").Outer
        assert outer() == outer()
        if sys.version_info >= (3, 11):
            assert hash(outer().x) == object.__hash__(outer().x)
            for other in ("lavatory", "numpy.lava"):
                with pytest.raises(ValueError, match="mutable default"):
                    define(other)
    assert dataclasses.dataclass is original


def test_processes_of_ours_are_in_packages_that_do_nothing_when_imported() -> None:
    """To find models, Lava's compiler runs every file beside the one that defines a process."""
    packages = sorted((WORKER / "ends").iterdir())
    assert [package.name for package in packages if package.name != "__pycache__"] == [
        "lava_cell",
        "lava_file_probe",
        "lava_file_sink",
        "lava_file_source",
    ]
    for package in packages:
        files = {path.name: path for path in package.glob("*.py")}
        assert files.keys() == {"__init__.py", "process.py"}
        assert files["__init__.py"].read_bytes() == b""
        for statement in ast.parse(files["process.py"].read_text(encoding="utf-8")).body:
            if isinstance(statement, (ast.Expr, ast.Assign)):
                ast.literal_eval(statement.value)  # a docstring, or constants
            else:
                kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
                assert isinstance(statement, kinds), ast.dump(statement)
