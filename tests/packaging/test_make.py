"""The Makefile, the CI script and the documents: what a newcomer meets first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def make(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=root, env=environment, capture_output=True, text=True
    )


def test_make_alone_shows_what_there_is(root: Path) -> None:
    shown = make(root).stdout
    for target in ("quickstart", "test", "check", "bench", "matrix", "clean"):
        assert re.search(rf"^  make {target} +\S", shown, re.MULTILINE)


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """A stand-in for python3 that notes what it is asked, and is as old as the file ``old`` says."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
case "$*" in
  --version) echo Python 3.9.18 ;;
  *version_info*) test ! -e {tmp_path}/old ;;
  "-m venv --clear "*)
    mkdir -p {tmp_path}/venv/bin
    for name in python spiking-lm; do cp "$0" {tmp_path}/venv/bin/$name; done ;;
  *pip*no-network*) exit 1 ;;
esac
"""
    )
    python.chmod(0o755)
    return python


def test_an_old_python_is_named_with_the_way_out(root: Path, tmp_path: Path, fake_python: Path) -> None:
    (tmp_path / "old").touch()
    done = make(root, "quickstart", f"PYTHON={fake_python}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert f"needs Python 3.10 or newer; {fake_python} is Python 3.9.18" in done.stdout
    assert "make PYTHON=" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_quickstart_installs_once_and_runs_the_recipe(root: Path, tmp_path: Path, fake_python: Path) -> None:
    settings = (f"PYTHON={fake_python}", f"VENV={tmp_path}/venv")
    first = make(root, "quickstart", *settings)
    assert first.returncode == 0, first.stderr
    assert "Installing spiking-lm" in first.stdout
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[-2:] == [
        "-m pip install -qq --disable-pip-version-check -e .[all]",
        "run spikegpt/quickstart",
    ]
    (tmp_path / "asked").unlink()
    assert make(root, "quickstart", *settings).stdout == ""
    assert (tmp_path / "asked").read_text() == "run spikegpt/quickstart\n"

    assert make(root, "test", *settings).returncode == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[-2:] == ["-m pip install -qq --disable-pip-version-check -e .[dev]", "-m pytest"]

    os.utime(tmp_path / "venv/.installed", (0, 0))  # pyproject.toml has changed since
    time.sleep(0.01)
    assert "Installing spiking-lm" in make(root, "quickstart", *settings).stdout


def test_a_failed_installation_is_said_and_tried_again(root: Path, tmp_path: Path, fake_python: Path) -> None:
    settings = (f"PYTHON={fake_python}", f"VENV={tmp_path}/venv")
    failed = make(root, "install", *settings, "PIP_ARGS=no-network")
    assert failed.returncode != 0
    assert "PIP_ARGS" in failed.stdout
    assert "Installed" not in failed.stdout
    assert "Installed" in make(root, "install", *settings).stdout


def test_ci_does_what_the_documents_say(root: Path) -> None:
    script = root / ".ci/run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert re.findall(r"^make (\w+)$", script.read_text(), re.MULTILINE) == ["quickstart", "check", "test"]


def test_every_page_is_in_the_index(root: Path) -> None:
    index = (root / "docs/index.md").read_text(encoding="utf-8")
    pages = {path.relative_to(root / "docs").as_posix() for path in (root / "docs").rglob("*.md")}
    unlisted = {page for page in pages - {"index.md"} if f"]({page})" not in index and not page.startswith("results")}
    assert not unlisted


@pytest.mark.parametrize("pattern", ["*.md", "docs/**/*.md", "examples/**/*.md"])
def test_links_between_documents_lead_somewhere(root: Path, pattern: str) -> None:
    documents = [p for p in root.glob(pattern) if not {".venv", ".nox"} & set(p.parts)]
    assert documents
    links = []
    for document in documents:
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        links += [(document, target) for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if ":" not in target]
    broken = [f"{where.relative_to(root)}: {target}" for where, target in links if not (where.parent / target).exists()]
    assert not broken
