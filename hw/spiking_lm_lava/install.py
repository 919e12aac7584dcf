"""Where Lava is, and how it gets here.

``lava-nc`` 0.10.0 asks for Python 3.10, but one line alone breaks on newer ones, which the worker mends
(:mod:`spiking_lm_lava.worker.hashes`). So on Python 3.10 the extra ``lava`` installs it; on newer Pythons
:func:`setup` first installs what it needs, then ``lava-nc`` without looking at what its metadata asks for, both into a
folder of their own that only the worker sees.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from spiking_lm.data.tokenfile import default_cache_dir
from spiking_lm.errors import PluginError
from spiking_lm.files import atomic_folder
from spiking_lm.records import Finding

LAVA = "lava-nc==0.10.0"
NEEDS = ("numpy>=1.26,<2.4", "scipy>=1.11", "networkx>=2.8", "asteval>=0.9.31")
"""What of its dependencies Lava imports to simulate; scikit-learn it never does. Its InvSqrt fails with numpy 2.4."""

LAVA_DL = "lava-dl==0.6.0"
LAVA_DL_NEEDS = ("h5py>=3.10",)
"""What of its dependencies (3 GB, torch 2.3 among them) lava-dl's netx imports to build a network."""

PYTHON_VARIABLE = "SPIKING_LM_LAVA_PYTHON"
"""An interpreter that has lava-nc: it is taken before all others."""

SETUP_COMMAND = "spiking-lm lower --backend lava --setup"
LAVA_DL_COMMAND = "python -m spiking_lm_lava.netx --setup"
STAMP = "installed.json"


@dataclass(frozen=True)
class Lava:
    """An interpreter that can import Lava, given ``paths``."""

    command: tuple[str, ...]
    paths: tuple[Path, ...]
    origin: str
    """In words."""


def packages_folder(what: str = LAVA) -> Path:
    """Return where :func:`setup` installs Lava for this Python and machine, in the cache folder."""
    tag = f"{sys.implementation.cache_tag}-{sys.platform}-{platform.machine()}"
    return default_cache_dir() / "lava" / f"{what.replace('==', '-')}-{tag}"


def find() -> Lava:
    """Return the Lava to use: the one that ``$SPIKING_LM_LAVA_PYTHON`` has, this environment's, or the one set up.

    Raises: PluginError, with the command that sets it up, where there is none.
    """
    if os.name != "posix":
        raise PluginError("Lava forks its processes, which this system cannot", hint="run it on Linux, or in WSL")
    stated = os.environ.get(PYTHON_VARIABLE)
    if stated:
        if not os.access(stated, os.X_OK):
            raise PluginError(
                f"{PYTHON_VARIABLE} is {stated}, which cannot be executed", hint=f"unset {PYTHON_VARIABLE}"
            )
        return Lava((stated, "-I"), (), f"of {stated}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("lava-nc")
        if importlib.util.find_spec("lava") is not None:
            return Lava((sys.executable, "-I"), (), f"lava-nc {version} of this environment")
    folder = packages_folder()
    if _is_whole(folder, LAVA, NEEDS):
        # Without site packages (-S): nothing of this environment gets in the way of what was installed together.
        return Lava((sys.executable, "-I", "-S"), (folder,), f"{LAVA.replace('==', ' ')} in {folder}")
    raise PluginError("Lava is not set up here", hint=SETUP_COMMAND)


def find_lava_dl() -> Lava:
    """Return a Lava that has lava-dl's netx too. Raises: PluginError, with the command that sets it up."""
    lava = find()
    if os.environ.get(PYTHON_VARIABLE):  # who names an interpreter says what it has
        return lava
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if not lava.paths:
            version = importlib.metadata.version("lava-dl")
            return replace(lava, origin=f"{lava.origin} with lava-dl {version}")
    folder = packages_folder(LAVA_DL)
    if not _is_whole(folder, LAVA_DL, LAVA_DL_NEEDS):
        raise PluginError("lava-dl, which reads netx files into Lava, is not set up here", hint=LAVA_DL_COMMAND)
    return replace(lava, paths=(*lava.paths, folder), origin=f"{lava.origin} with lava-dl in {folder}")


def _is_whole(folder: Path, what: str, needs: tuple[str, ...]) -> bool:
    """Whether a folder holds what this version installs."""
    try:
        return bool(json.loads((folder / STAMP).read_text(encoding="utf-8"))["asked"] == [what, *needs])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def setup(say: Callable[[str], None]) -> None:
    """Install Lava into :func:`packages_folder`, unless it is somewhere already; ``say`` is told what happens.

    Raises: PluginError with the end of pip's output when it fails; nothing is left then.
    """
    try:
        say(f"Lava is here already: {find().origin}")
        return
    except PluginError as error:
        if error.hint != SETUP_COMMAND:
            raise
    folder = packages_folder()
    say(f"Installing {LAVA} and what it needs into {folder} (about 60 MB to download) ...")
    with _whole(folder) as target:
        _pip(target, *NEEDS)
        _pip(target, "--no-deps", "--ignore-requires-python", LAVA)
        _stamp(target, LAVA, NEEDS)


def setup_lava_dl(say: Callable[[str], None]) -> None:
    """Install lava-dl and h5py, without its other dependencies, into a folder that only the worker sees.

    Lava itself has to be there. Raises: PluginError as :func:`setup` does.
    """
    try:
        say(f"lava-dl is here already: {find_lava_dl().origin}")
        return
    except PluginError as error:
        if error.hint != LAVA_DL_COMMAND:
            raise
    folder = packages_folder(LAVA_DL)
    say(f"Installing {LAVA_DL} and h5py into {folder} (about 75 MB to download) ...")
    with _whole(folder) as target:
        _pip(target, "--no-deps", *LAVA_DL_NEEDS)  # numpy is Lava's
        _pip(target, "--no-deps", "--ignore-requires-python", LAVA_DL)
        shutil.rmtree(target / "tests", ignore_errors=True)  # a package of that name, 100 MB, which nothing imports
        _stamp(target, LAVA_DL, LAVA_DL_NEEDS)


def _stamp(target: Path, what: str, needs: tuple[str, ...]) -> None:
    versions = {item.name: item.version for item in importlib.metadata.distributions(path=[str(target)])}
    stamp = {"asked": [what, *needs], "installed": versions}
    (target / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    try:
        with atomic_folder(folder, replace=True) as target:
            yield target
    except OSError as error:
        raise PluginError(
            f"{folder}: cannot be written: {error}", hint="set SPIKING_LM_CACHE to another folder"
        ) from error


def _pip(target: Path, *arguments: str) -> None:
    """Install into ``target``. Raises: PluginError with the end of pip's output."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
    done = subprocess.run(
        [*command, "--target", str(target), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        if any("No module named pip" in line for line in lines):
            raise PluginError("this environment has no pip, which installs Lava", hint="python -m ensurepip")
        tail = "".join(f"\n  | {line}" for line in lines[-8:])
        raise PluginError(
            f"pip could not install {' '.join(arguments)} (exit code {done.returncode}){tail}",
            hint="pip's own settings say where from: PIP_INDEX_URL, PIP_FIND_LINKS, a proxy",
        )


def check() -> list[Finding]:
    """Can networks be run in Lava from here? Runs one neuron in the worker."""
    import time

    import numpy as np

    from spiking_lm_lava.executor import LavaExecutor
    from spiking_lm_lava.network import Edge, Network
    from spiking_lm_lava.neurons import LIF
    from spiking_lm_lava.process import Sink, Source
    from spiking_lm_lava.simulator import Simulator

    try:
        executor = LavaExecutor.find()
    except PluginError as error:
        return [Finding("lava", "warn", f"{error.message}; the simulator needs none", error.hint)]
    nodes = (Source("x", 1), LIF("neuron", 1, dv=0, vth=2), Sink("spikes", 1))
    network, x = Network(nodes, (Edge("x", "neuron"), Edge("neuron", "spikes"))), np.ones((6, 1), np.int64)
    began = time.perf_counter()
    try:
        run = executor.run(network, {"x": x}, timeout=60)
    except PluginError as error:
        return [Finding("lava", "fail", f"{executor.lava.origin}: {error.message}", f"remove it, then {SETUP_COMMAND}")]
    seconds = time.perf_counter() - began
    if not np.array_equal(run.sinks["spikes"], Simulator(network).run({"x": x}).sinks["spikes"]):
        return [Finding("lava", "fail", f"{executor.lava.origin}: computes other spikes than the simulator")]
    python = run.versions.get("python", "?")
    return [Finding("lava", "ok", f"{executor.lava.origin}, Python {python}: one neuron ran in {seconds:.1f} s")]
