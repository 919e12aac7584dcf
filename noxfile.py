"""The matrix: every supported Python, tested from an editable install and from the wheel. ``make matrix`` runs it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

nox.needs_version = ">=2024.10"
nox.options.sessions = ["lint", "types", "tests", "wheel"]

# pyenv's shims stand before the interpreters that it has installed, and refuse all but the chosen one.
for _bin in sorted(Path.home().glob(".pyenv/versions/3.1[0-3].*/bin")):
    os.environ["PATH"] = os.pathsep.join([str(_bin), os.environ["PATH"]])


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests from an editable install."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Build the sdist, the wheel out of it, and use the installed wheel far from the repository."""
    session.install("build")
    out = Path(session.create_tmp()) / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(out), silent=True)
    (built,) = out.glob("*.whl")
    session.install(f"{built}[all]")
    session.chdir(out)
    session.run("spiking-lm", "plugins")
    session.run("spiking-lm", "recipes", "ls")
    session.run(
        "spiking-lm", "run", "spikegpt/quickstart", "--set", "train.steps=2", "--set", "evaluate.max_tokens=2000"
    )
    session.run("spiking-lm", "doctor", success_codes=[0, 1])


@nox.session
def lint(session: nox.Session) -> None:
    """Check style."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types."""
    session.install("-e", ".[dev]")
    session.run("mypy")
