"""What a run was made of: versions, plugins, source revision, command line and hardware, as plain data."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spiking_lm import __version__, registry

_DISTRIBUTIONS = (
    "torch",
    "numpy",
    "snntorch",
    "norse",
    "spikingjelly",
    "pydantic",
    "safetensors",
    "tokenizers",
    "triton",
)
_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG")


def describe_environment() -> dict[str, Any]:
    """Return versions, plugins, git revisions, command line, the environment variables that matter, and hardware."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "directory": os.getcwd(),
        "versions": _versions(),
        "plugins": [
            {"name": p.name, "distribution": p.distribution, "version": p.version, "status": p.status}
            for p in registry.plugins()
        ],
        "git": _git_revisions(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in _ENVIRONMENT or name.startswith("SPIKING_LM_")
        },
        "hardware": _hardware(),
    }


def plain(value: Any) -> Any:
    """Return ``value`` in JSON's types: records become objects, paths text, NaN and infinities null."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if hasattr(value, "tolist"):  # an array or a number of numpy or torch
        return plain(value.tolist())
    if isinstance(value, Iterable) and not isinstance(value, (bytes, Path)):
        return [plain(item) for item in value]
    return str(value)


def _versions() -> dict[str, str]:
    installed = {
        name: next(iter(importlib.metadata.distributions(name=name)), None) for name in ("spiking-lm", *_DISTRIBUTIONS)
    }
    found = {name: distribution.version for name, distribution in installed.items() if distribution is not None}
    return {"python": platform.python_version(), "spiking-lm": __version__, **found}


def _git_revisions() -> dict[str, Any]:
    """Describe the repository that we are run in and, when it is another one, that of our own source."""
    found = {"working_directory": git_revision(Path.cwd()), "source": git_revision(Path(__file__).parent)}
    if found["source"] == found["working_directory"]:
        del found["source"]
    return {place: revision for place, revision in found.items() if revision is not None}


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the repository that holds ``folder`` and whether tracked files were changed, or None."""

    def git(*arguments: str) -> str:
        # No optional locks: asking for the state must not disturb someone who is committing.
        finished = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
        return finished.stdout.strip()

    try:
        if not git("ls-files", "--", "."):  # an installed package below a repository that ignores it
            return None
        return {
            "revision": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "accelerators": _accelerators(),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model", "cpu model"):
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _accelerators() -> list[str]:
    torch = sys.modules.get("torch")  # by the time there is a run there is a model, so torch is loaded
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
