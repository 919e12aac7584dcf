"""What ``spiking-lm doctor`` looks at. Only the kernel check imports torch, and no check changes anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from packaging.requirements import Requirement

from spiking_lm import registry
from spiking_lm.errors import SpikingLMError, UnknownNameError
from spiking_lm.files import sha256_file
from spiking_lm.provenance import OWN_DISTRIBUTION, describe
from spiking_lm.records import Finding

EMBEDDED = Path(__file__).parent / "data" / "embedded"

_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "sve", "bf16")
"""What torch's matrix products make use of."""

_LITTLE_DISK, _NO_DISK = 2e9, 1e8
"""Bytes: a run with its checkpoints and report takes some tens of megabytes, its token files as much as the text."""


def diagnose(names: Collection[str] = ()) -> list[Finding]:
    """Look at the installation, then run every check that plugins registered, or those with ``names`` alone.

    A check that raises is a failure. Raises: UnknownNameError for a name that no check has.
    """
    findings: list[Finding] = []
    own: dict[str, Callable[[], list[Finding]]] = {
        "python": check_python,
        "packages": check_packages,
        "cpu": check_cpu,
        "extras": check_extras,
        "plugins": check_plugins,
    }
    registered = registry.all("doctor")
    for name in names:
        if name not in own and name not in registered:
            raise UnknownNameError("check", name, [*own, *registered])
    for name, check in own.items():
        if not names or name in names:
            findings += _guarded(name, check, culprit=None)
    for name, entry in registered.items():
        if not names or name in names:
            findings += _guarded(name, lambda entry=entry: entry.load("function")(), culprit=entry.plugin)  # type: ignore[misc]
    return findings


def prepare(name: str, say: Callable[[str], None]) -> None:
    """Set up what the check ``name`` looks for, and what no extra can bring; ``say`` is told what happens.

    Raises: UnknownNameError when no check of that name has a setup; what the setup raises.
    """
    able = {name: entry for name, entry in registry.all("doctor").items() if entry.spec.setup is not None}
    if name not in able:
        raise UnknownNameError("setup", name, able)
    able[name].load("setup")(say)


def _guarded(name: str, check: Callable[[], list[Finding]], *, culprit: registry.PluginRecord | None) -> list[Finding]:
    fault = f"report this to the authors of {culprit.distribution}" if culprit else None
    try:
        findings = list(check())
    except SpikingLMError as err:
        return [Finding(name, "fail", err.message, err.hint)]
    except (Exception, SystemExit) as err:
        return [Finding(name, "fail", f"the check itself failed: {describe(err)}", fault)]
    if not all(isinstance(finding, Finding) for finding in findings):
        return [Finding(name, "fail", "the check returned something that is not a list of Finding", fault)]
    return findings


def check_python() -> list[Finding]:
    """Is this a Python that spiking-lm is made for?"""
    running = platform.python_version()
    where = f"{running} ({platform.python_implementation()}, {sys.executable})"
    if sys.version_info >= (3, 14):
        return [Finding("python", "warn", f"{where}: newer than what spiking-lm is tested on", "Python 3.10 to 3.13")]
    return [Finding("python", "ok", where)]


def check_packages() -> list[Finding]:
    """Are the packages that the core depends on installed, and new enough? Looks at metadata only."""
    wrong = [text for need in _requirements() if not need.marker or need.marker.evaluate() for text in _lacks(need)]
    if wrong:
        return [Finding("packages", "fail", "; ".join(wrong), f"pip install --upgrade {OWN_DISTRIBUTION}")]
    torch = importlib.metadata.version("torch")
    findings = [Finding("packages", "ok", f"torch {torch}, and all else that the core needs")]
    if shutil.which("nvidia-smi") and "+cpu" in torch:
        hint = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
        findings.append(Finding("gpu", "warn", f"there is an NVIDIA driver, but torch {torch} is a CPU build", hint))
    return findings


def check_cpu() -> list[Finding]:
    """How many cores may be used, with what instructions and how many threads?"""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _cpu_flags()
    present = [feature for feature in _CPU_FEATURES if feature in flags]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    about = f"{platform.machine()}, {usable} usable cores, {' '.join(present) or 'features unknown'}"
    about += f", OMP_NUM_THREADS={threads}" if threads else ""
    if threads.isdigit() and int(threads) > usable:
        return [Finding("cpu", "warn", f"{about}: more threads than cores", f"export OMP_NUM_THREADS={usable}")]
    if platform.machine() in {"x86_64", "AMD64"} and flags and "avx2" not in flags:
        return [Finding("cpu", "warn", f"{about}: without AVX2 torch is slow")]
    return [Finding("cpu", "ok", about)]


def check_extras() -> list[Finding]:
    """Which optional dependencies are there? A missing one is a warning with the command that installs it."""
    findings = []
    extras = importlib.metadata.metadata(OWN_DISTRIBUTION).get_all("Provides-Extra") or []
    for extra in sorted(set(extras) - {"all", "dev"}):
        needs = [need for need in _requirements() if need.marker and f'extra == "{extra}"' in str(need.marker)]
        name = f"extra {extra}"
        here = [need for need in needs if need.marker and need.marker.evaluate({"extra": extra})]
        lacking = [text for need in here for text in _lacks(need)]
        if len(here) < len(needs):  # pip skips such requirements without a word
            skipped = "; ".join(str(need) for need in needs if need not in here)
            findings.append(Finding(name, "warn", f"cannot be had in this environment: {skipped}"))
        elif lacking:
            findings.append(Finding(name, "warn", "; ".join(lacking), f"pip install '{OWN_DISTRIBUTION}[{extra}]'"))
        else:
            versions = ", ".join(f"{need.name} {importlib.metadata.version(need.name)}" for need in here)
            findings.append(Finding(name, "ok", versions))
    return findings


def check_plugins() -> list[Finding]:
    """Did every plugin load?"""
    findings = []
    for plugin in registry.plugins():
        what = f"{plugin.origin}: {plugin.status}" + (f": {plugin.error}" if plugin.error else "")
        bad = plugin.status in {"failed", "incompatible"}
        worth_a_word = plugin.status == "unavailable" or (plugin.status == "active" and (plugin.error or plugin.hint))
        status = "fail" if bad else "warn" if worth_a_word else "ok"
        findings.append(Finding(f"plugin {plugin.name}", status, what, plugin.hint))  # type: ignore[arg-type]
    return findings


def check_data() -> list[Finding]:
    """Are the embedded corpora complete and unharmed?"""
    hint = f"pip install --force-reinstall --no-deps {OWN_DISTRIBUTION}"
    wrong, lines = [], (EMBEDDED / "SHA256SUMS").read_text(encoding="utf-8").split("\n")
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines if line)}
    for name, digest in expected.items():
        path = EMBEDDED / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif sha256_file(path) != digest:
            wrong.append(f"{name} is damaged")
    if wrong:
        return [Finding("data", "fail", "; ".join(wrong), hint)]
    return [Finding("data", "ok", f"{len(expected)} embedded files, all with the right hash")]


def check_disk() -> list[Finding]:
    """Is there room for a run below the current folder?"""
    free = shutil.disk_usage(Path.cwd()).free
    about = f"{free / 1e9:.1f} GB free below {Path.cwd()}"
    if free < _NO_DISK:
        return [Finding("disk", "fail", about, "free some space, or choose another folder with --out")]
    if free < _LITTLE_DISK:
        return [Finding("disk", "warn", f"{about}: enough for a small run only")]
    return [Finding("disk", "ok", about)]


def check_kernels() -> list[Finding]:
    """Which implementation of each op would run on this machine, and why not the others? Imports torch."""
    import torch

    from spiking_lm.kernels import explain_choice

    x, decay = torch.zeros(2, 1, 4), torch.zeros(4)
    choices = {
        "lif_scan": explain_choice("lif_scan", x, beta=0.5, gain=0.5, threshold=1.0),
        "wkv": explain_choice("wkv", decay, decay, x.transpose(0, 1), x.transpose(0, 1)),
    }
    findings = []
    for op, answers in choices.items():
        chosen = next((name for name, answer in answers if answer is True), None)
        others = "; ".join(
            f"{name}: {'also runs' if answer is True else answer}" for name, answer in answers if name != chosen
        )
        if chosen is None:
            findings.append(Finding(f"kernel {op}", "fail", f"none can run: {others}", "unset SPIKING_LM_KERNELS"))
        else:
            findings.append(
                Finding(f"kernel {op}", "ok", f"{chosen} runs on the CPU" + (f" ({others})" if others else ""))
            )
    return findings


def _requirements() -> Iterator[Requirement]:
    """Yield what the spiking-lm distribution declares to need, extras included."""
    for text in importlib.metadata.requires(OWN_DISTRIBUTION) or []:
        yield Requirement(text)


def _lacks(need: Requirement) -> Iterator[str]:
    """Say what is wrong with the installed version of a requirement, if anything is."""
    try:
        version = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        yield f"{need.name} is not installed"
        return
    if not need.specifier.contains(version, prereleases=True):
        yield f"{need.name} {version} is installed, {need.specifier} is needed"


def _cpu_flags() -> set[str]:
    """Return the instruction sets that the kernel names; empty where there is no /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in {"flags", "Features"}:
                    return set(value.split())
    except OSError:
        pass
    return set()
