"""Who offers what: a plugin's record, its registered records, and what both need from this environment."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pluggy

from spiking_lm.errors import MissingExtraError, PluginError, SpikingLMError, did_you_mean
from spiking_lm.records import Record

OWN_DISTRIBUTION = "spiking-lm"

Status = Literal["active", "unavailable", "blocked", "failed", "incompatible"]


@dataclass
class PluginRecord:
    """One plugin as ``spiking-lm plugins`` shows it."""

    name: str
    distribution: str | None = None
    version: str | None = None
    api: int | None = None
    """The ``SPIKING_LM_API`` that the plugin declares."""
    status: Status = "active"
    hooks: list[str] = field(default_factory=list)
    error: str | None = None
    """Why it is not active, or what is wrong with an active one."""
    hint: str | None = None
    provides: dict[str, list[str]] = field(default_factory=dict)
    """Kind -> names registered. Kept when the plugin is unavailable, empty when it failed."""
    target: str = ""
    """The entry point's value, ``"package.module"`` or ``"package.module:object"``."""
    seconds: float = 0.0
    """Time to import it and to call its hooks."""

    @property
    def first_party(self) -> bool:
        """True for the plugins of the spiking-lm distribution itself."""
        return canonical(self.distribution or "") == OWN_DISTRIBUTION

    @property
    def origin(self) -> str:
        """The distribution and its version, for messages."""
        return " ".join(filter(None, [self.distribution, self.version])) or "registered by hand"

    def remark(self, error: str | None, hint: str | None) -> None:
        """Add a remark without hiding an earlier one."""
        self.error = "; ".join(filter(None, [self.error, error])) or None
        self.hint = "; ".join(filter(None, [self.hint, hint])) or None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form; ``error`` is called ``reason`` there."""
        values = {"reason" if item.name == "error" else item.name: getattr(self, item.name) for item in fields(self)}
        return {**values, "seconds": round(self.seconds, 4)}


@dataclass(frozen=True)
class Registered:
    """A record together with the plugin that offered it."""

    spec: Any
    """The :class:`~spiking_lm.records.Record`; its class follows from the kind."""
    plugin: PluginRecord

    def missing(self) -> str | None:
        """Say what the record's targets need and this environment lacks, or None; imports nothing."""
        return " and ".join(unmet(self.spec)) or None

    def load(self, name: str) -> Any:
        """Import and return the target in the record's field ``name``.

        Raises: MissingExtraError when an optional dependency is absent, PluginError when the target is broken.
        """
        target: str | None = getattr(self.spec, name)
        what = f"{self.spec.kind.removesuffix('s')} {self.spec.name!r}"
        if target is None:
            raise PluginError(f"{what} has no {name}", hint=f"plugin {self.plugin.name!r} does not offer it")
        lacks = self.missing()
        if lacks:
            raise self._cannot_be_used(what, lacks)
        module_name, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except SpikingLMError:
            raise
        except (Exception, SystemExit) as err:
            lost = top_level(err.name or "") if isinstance(err, ImportError) else ""
            if self.spec.extra and lost not in {"", "spiking_lm", top_level(module_name)}:
                raise self._cannot_be_used(what, str(err)) from err
            near = None
            if isinstance(err, AttributeError) and module_name in sys.modules:
                near = did_you_mean(attribute, dir(sys.modules[module_name]))
            fault = f"this is a fault of plugin {self.plugin.name!r} ({self.plugin.origin})"
            raise PluginError(
                f"{what}: cannot load its {name} {target!r}: {describe(err)}", hint=f"{near} {fault}" if near else fault
            ) from err

    def _cannot_be_used(self, what: str, why: str) -> SpikingLMError:
        hint = install_hint(self.spec, self.plugin)
        if self.spec.extra is None:
            return PluginError(f"{what} cannot be used here: {why}", hint=hint)
        error = MissingExtraError(what, self.spec.extra, detail=why)
        error.hint = hint
        return error


def unmet(spec: Record) -> list[str]:
    """Say which of ``spec.requires`` this environment does not meet, without importing any of them."""
    lacks = [
        f"the module {need!r} is not installed"
        for need in spec.requires
        if not _is_python(need) and not installed(need)
    ]
    running = ".".join(map(str, sys.version_info[:3]))
    return [*lacks, *(f"Python {need} is needed and this is {running}" for need in _wrong_pythons(spec))]


def install_hint(spec: Record, plugin: PluginRecord) -> str:
    """Return the command, or else the advice, that makes a record's targets usable."""
    pythons = _wrong_pythons(spec)
    if pythons:  # pip would skip the extra's requirement without a word
        return f"use an environment with Python {pythons[0]}"
    if spec.extra:
        return f"pip install '{plugin.distribution or OWN_DISTRIBUTION}[{spec.extra}]'"
    return "install what provides " + ", ".join(
        repr(need) for need in spec.requires if not _is_python(need) and not installed(need)
    )


def installed(module: str) -> bool:
    """Tell whether a module's top-level package can be found, without importing it."""
    try:
        return importlib.util.find_spec(top_level(module)) is not None
    except ValueError:  # already imported, but made by hand and so without a spec
        return sys.modules.get(top_level(module)) is not None


def describe(err: BaseException) -> str:
    """Say in one line what a plugin raised and where."""
    if isinstance(err, SystemExit):
        text = f"it called sys.exit({'' if err.code is None else repr(err.code)})"
    else:
        text = ": ".join(filter(None, [type(err).__name__, " ".join(str(err).split())[:400]]))
    frames = [frame for frame in traceback.extract_tb(err.__traceback__) if not frame.filename.startswith(_MACHINERY)]
    if frames and not isinstance(err, SyntaxError):  # a SyntaxError names its own place
        text += f" ({frames[-1].filename}, line {frames[-1].lineno})"
    return text


def canonical(distribution: str) -> str:
    """Return a distribution's name in the one spelling in which names are compared."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def top_level(module: str) -> str:
    """Return the top-level package of a dotted name or target."""
    return re.split(r"[.:]", module)[0]


_MACHINERY = (
    "<",
    __file__,
    str(Path(__file__).with_name("registry.py")),
    importlib.__file__,
    importlib.metadata.__file__,
    str(Path(pluggy.__file__).parent),
)
"""Beginnings of the names of files between us and a plugin, which say nothing of where it went wrong."""


def _is_python(need: str) -> bool:
    """True for a requirement on the interpreter, e.g. ``"python<3.11"``."""
    return need.startswith("python") and not need.isidentifier()


def _wrong_pythons(spec: Record) -> list[str]:
    wanted = [need.removeprefix("python").strip() for need in spec.requires if _is_python(need)]
    if not wanted:
        return []
    from packaging.specifiers import SpecifierSet

    running = ".".join(map(str, sys.version_info[:3]))
    return [need for need in wanted if not SpecifierSet(need).contains(running, prereleases=True)]
