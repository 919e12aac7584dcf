"""Real distributions on a path of their own, and a host process that sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

GOOD = """
from spiking_lm import hookimpl
from spiking_lm.records import NeuronSpec

@hookimpl
def spiking_lm_neurons(register):
    register(NeuronSpec(name="good", config="spiking_lm.config:LIFConfig", factory="spiking_lm.neurons:LIF"))
"""

# What a plugin of these tests begins with.
IMPORTS = """
from spiking_lm import hookimpl
from spiking_lm.records import *
"""


class Site:
    """A folder of installed distributions, as pip leaves them, and a host that runs with it on its path."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "site"
        self.path.mkdir()
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.add("spiking-lm-good", GOOD, version="2.5", plugin="good")

    def add(
        self,
        distribution: str,
        source: str,
        *,
        plugin: str,
        version: str = "1.0",
        target: str | None = None,
        entry_points: str | None = None,
    ) -> None:
        """Install a distribution with one package, whose ``__init__`` is ``source``, and one entry point."""
        package = distribution.replace("-", "_")
        (self.path / package).mkdir()
        (self.path / package / "__init__.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = self.path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        default = f"[spiking_lm]\n{plugin} = {target or package}\n"
        (info / "entry_points.txt").write_text(default if entry_points is None else entry_points)

    def python(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python with the site on its path and no SPIKING_LM_ variable but those given."""
        return self._run([sys.executable, *args], self.elsewhere, variables)

    def shell(self, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a command line as a person types it, with this environment's programs first on the path."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return self._run(command, folder, {"PATH": path, "OMP_NUM_THREADS": "1"})

    def _run(
        self, command: str | list[str], folder: Path, variables: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SPIKING_LM_")}
        return subprocess.run(
            command,
            shell=isinstance(command, str),
            env={**kept, "PYTHONPATH": str(self.path), **variables},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def cli(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run ``spiking-lm``."""
        return self.python("-c", "from spiking_lm.cli import main; main()", *args, **variables)

    def plugins(self, **variables: str) -> list[dict[str, Any]]:
        """Return what ``spiking-lm plugins --json`` prints, which must work whatever is installed."""
        done = self.cli("plugins", "--json", **variables)
        assert done.returncode == 0, done.stderr
        records: list[dict[str, Any]] = json.loads(done.stdout)
        return records

    def plugin(self, name: str, **variables: str) -> dict[str, Any]:
        """Return one plugin's entry, having checked that the plugins beside it work."""
        records = self.plugins(**variables)
        status = {record["name"]: record["status"] for record in records if record["distribution"] != name}
        assert status["core"] == "active"
        assert status["good"] == "active"
        return next(record for record in records if record["name"] == name and record["distribution"] != "spiking-lm")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)
