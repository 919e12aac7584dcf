"""Plugins: how they are found, kept apart, and asked for what they offer.

A plugin is an entry point of the group ``spiking_lm`` in any installed distribution. Our own plugins take the same
road; they only come first. Whatever a plugin does wrong while it loads is caught, said in its :class:`PluginRecord`,
and leaves the host and the other plugins alone. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pluggy

from spiking_lm import PLUGIN_API, __version__, hookspecs
from spiking_lm.errors import MissingExtraError, PluginError, SpikingLMError, UnknownNameError, did_you_mean
from spiking_lm.records import Record

GROUP = "spiking_lm"
"""The entry-point group, which is also pluggy's project name and the prefix of every hook."""

OWN_DISTRIBUTION = "spiking-lm"

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith(f"{GROUP}_"))
KINDS = tuple(hook.removeprefix(f"{GROUP}_") for hook in HOOKS)
"""What can be registered: models, neurons, kernels and so on, one kind per hook."""

SLOW_SECONDS = 1.0
"""A plugin that takes longer than this to import and to answer its hooks is pointed out."""

Status = Literal["active", "unavailable", "blocked", "failed", "incompatible"]

_ENTRY = re.compile(r"^\w+(\.\w+)*(:\w+(\.\w+)*)?(\s*\[.*\])?$")


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
        return _canonical(self.distribution or "") == OWN_DISTRIBUTION

    @property
    def origin(self) -> str:
        """The distribution and its version, for messages."""
        return f"{self.distribution} {self.version}" if self.distribution else "registered by hand"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form; ``error`` is called ``reason`` there."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["reason"] = values.pop("error")
        values["seconds"] = round(self.seconds, 4)
        return values

    def _complain(self, error: str, hint: str | None) -> None:
        """Add a remark without hiding an earlier one."""
        self.error = f"{self.error}; {error}" if self.error else error
        self.hint = f"{self.hint}; {hint}" if self.hint and hint else hint or self.hint


@dataclass(frozen=True)
class Registered:
    """A record together with the plugin that offered it."""

    spec: Any
    """The :class:`~spiking_lm.records.Record`; its class follows from the kind."""
    plugin: PluginRecord

    def missing(self) -> str | None:
        """Say what the record's targets need and this environment lacks, or None; imports nothing."""
        lacks = _unmet(self.spec)
        return " and ".join(lacks) if lacks else None

    def load(self, name: str) -> Any:
        """Import and return the target in the record's field ``name``.

        Raises: MissingExtraError when an optional dependency is absent, PluginError when the target is broken.
        """
        target: str | None = getattr(self.spec, name)
        what = f"{self.spec.kind.removesuffix('s')} {self.spec.name!r}"
        if target is None:
            raise PluginError(f"{what} has no {name}", hint=f"plugin {self.plugin.name!r} does not offer it")
        if self.missing():
            raise self._missing_extra(what, self.missing())
        module_name, _, attribute = target.partition(":")
        try:
            module = importlib.import_module(module_name)
            return getattr(module, attribute)
        except SpikingLMError:
            raise
        except (Exception, SystemExit) as err:
            lost = (getattr(err, "name", None) or "").partition(".")[0]
            if (
                isinstance(err, ImportError)
                and self.spec.extra
                and lost not in {"", module_name.partition(".")[0], GROUP}
            ):
                raise self._missing_extra(what, str(err)) from err
            hint = f"this is a fault of plugin {self.plugin.name!r} ({self.plugin.origin})"
            if isinstance(err, AttributeError) and module_name in sys.modules:
                near = did_you_mean(attribute, dir(sys.modules[module_name]))
                hint = f"{near} {hint}" if near else hint
            raise PluginError(f"{what}: cannot load its {name} {target!r}: {_describe(err)}", hint=hint) from err

    def _missing_extra(self, what: str, detail: str | None) -> SpikingLMError:
        hint = _install_hint(self.spec, self.plugin)
        if self.spec.extra:
            error: SpikingLMError = MissingExtraError(what, self.spec.extra, detail=detail)
            error.hint = hint
            return error
        return PluginError(f"{what} cannot be used here ({detail})", hint=hint)


class PluginManager:
    """Finds plugins, loads each behind a wall, and answers by kind and name.

    Parameters: ``discover`` is True for every installed plugin, ``"first-party"`` for spiking-lm's own, False for none
    (tests, which then :meth:`register` by hand). ``only`` names the plugins to load beside ``core``; ``block`` names
    those not to load. ``strict`` raises the first failure instead of recording it. ``trace`` writes each hook call to
    stderr.
    """

    def __init__(
        self,
        *,
        discover: bool | Literal["first-party"] = True,
        only: Iterable[str] | None = None,
        block: Iterable[str] = (),
        strict: bool = False,
        trace: bool = False,
    ) -> None:
        self._only = None if only is None else frozenset(only)
        self._block = frozenset(block)
        self._strict = strict
        self._trace = trace
        self._pm = pluggy.PluginManager(GROUP)
        self._pm.add_hookspecs(hookspecs)
        self._plugins: list[PluginRecord] = []
        self._registered: dict[str, dict[str, Registered]] = {kind: {} for kind in KINDS}
        self._withdrawn: dict[tuple[str, str], PluginRecord] = {}
        self._disputed: dict[tuple[str, str], list[PluginRecord]] = {}
        self._own_names: frozenset[str] = frozenset()
        if discover:
            self._discover(first_party_only=discover == "first-party")

    @classmethod
    def from_environment(cls, *, discover: bool | Literal["first-party"] = True) -> PluginManager:
        """Build the manager that SPIKING_LM_PLUGINS, _BLOCK, _STRICT and _TRACE ask for."""
        only = os.environ.get("SPIKING_LM_PLUGINS")
        return cls(
            discover=discover,
            only=None if only is None else _names(only),
            block=_names(os.environ.get("SPIKING_LM_BLOCK", "")),
            strict=os.environ.get("SPIKING_LM_STRICT", "") not in {"", "0"},
            trace=os.environ.get("SPIKING_LM_TRACE", "") not in {"", "0"},
        )

    def plugins(self) -> list[PluginRecord]:
        """Return every plugin that was found, whatever became of it: our own first, then by name."""
        return list(self._plugins)

    def all(self, kind: str) -> dict[str, Registered]:
        """Return everything registered of a kind, sorted by name."""
        if kind not in self._registered:
            raise UnknownNameError("kind of record", kind, KINDS)
        return dict(sorted(self._registered[kind].items()))

    def get(self, kind: str, name: str) -> Registered:
        """Return one registered record.

        Raises: UnknownNameError with the nearest name and with the plugins that may have offered it but did not load;
        PluginError when two plugins claim the name.
        """
        entries = self.all(kind)
        if name in entries:
            return entries[name]
        label = kind.removesuffix("s")
        claimants = self._disputed.get((kind, name))
        if claimants:
            who = " and ".join(f"{plugin.name!r} ({plugin.origin})" for plugin in claimants)
            raise PluginError(f"{label} {name!r} is claimed by the plugins {who}", hint=_dispute_hint(claimants))
        raise UnknownNameError(label, name, entries, hint=self._suspects(kind, name))

    def register(
        self, plugin: object, name: str, *, distribution: str | None = None, version: str | None = None
    ) -> PluginRecord:
        """Load a module or object as plugin ``name``; a failure is in the record (or raised when strict)."""
        target = plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__qualname__
        record = PluginRecord(name, distribution, version, target=target)
        self._load(record, plugin)
        return record

    # -- discovery ----------------------------------------------------------------------------------------------------

    def _discover(self, *, first_party_only: bool) -> None:
        found = list(_entry_points())
        own = [record for record in found if record.first_party]
        if not any(record.name == "core" for record in own):  # running from a source tree that is not installed
            own.append(PluginRecord("core", OWN_DISTRIBUTION, __version__, target="spiking_lm.builtin"))
        self._own_names = frozenset(record.name for record in own)
        strangers = [] if first_party_only else [record for record in found if not record.first_party]
        claims: dict[str, list[PluginRecord]] = {}
        for record in strangers:
            claims.setdefault(record.name, []).append(record)

        for record in sorted(own, key=lambda record: (record.name != "core", record.name)):
            self._load_unless_blocked(record)
        for name, rivals in sorted(claims.items()):
            for record in rivals:
                if name in self._own_names:
                    self._fail(
                        record, f"the name {name!r} is taken by a plugin of {OWN_DISTRIBUTION}", _rename_hint(record)
                    )
                elif len(rivals) > 1:
                    who = " and ".join(rival.origin for rival in rivals)
                    self._fail(
                        record, f"two distributions claim the plugin name {name!r}: {who}", _uninstall_hint(rivals)
                    )
                else:
                    self._load_unless_blocked(record)
        known = {record.name for record in self._plugins}
        for name in sorted((self._only or frozenset()) - known):
            if not first_party_only:
                near = did_you_mean(name, known)
                self._fail(
                    PluginRecord(name), "SPIKING_LM_PLUGINS names it, but no installed distribution offers it", near
                )

    def _load_unless_blocked(self, record: PluginRecord) -> None:
        if record.name != "core":
            if record.name in self._block:
                return self._skip(record, "it is in the block list", "remove it from SPIKING_LM_BLOCK")
            if self._only is not None and record.name not in self._only:
                return self._skip(record, "it is not among the plugins asked for", "add it to SPIKING_LM_PLUGINS")
        if record.error:  # its entry_points.txt could not be read
            return self._fail(record, record.error, record.hint)
        return self._load(record)

    # -- one plugin ---------------------------------------------------------------------------------------------------

    def _load(self, record: PluginRecord, plugin: object = None) -> None:
        """Import a plugin, register it with pluggy, call its hooks and take over its records; any failure is its own."""
        start = time.perf_counter()
        offered: list[Record] = []
        try:
            # What a plugin prints must not end up in the middle of --json output.
            with contextlib.redirect_stdout(sys.stderr):
                if plugin is None:
                    plugin = _import_entry(record)
                if not self._check_api(record, plugin):
                    return
                self._attach(record, plugin)
                for hook in record.hooks:
                    self._call(record, plugin, hook, offered)
            self._adopt(record, offered)
        except (Exception, SystemExit) as err:
            if plugin is not None and self._pm.get_plugin(record.name) is plugin:
                self._pm.unregister(plugin)  # a register() that failed leaves the plugin half registered
            for spec in offered:
                self._withdrawn.setdefault((spec.kind, spec.name), record)
            hint = err.hint if isinstance(err, SpikingLMError) else None
            message = err.message if isinstance(err, SpikingLMError) else _describe(err)
            self._fail(record, message, hint or _failure_hint(record, err), cause=err)
        else:
            self._plugins.append(record)
            self._remark(record)
        finally:
            record.seconds = time.perf_counter() - start
            if record.seconds > SLOW_SECONDS:
                record.hint = f"{record.hint}; {_SLOW_HINT}" if record.hint else _SLOW_HINT

    def _check_api(self, record: PluginRecord, plugin: object) -> bool:
        declared = getattr(plugin, "SPIKING_LM_API", None)
        record.api = declared if isinstance(declared, int) else None
        if declared is None or declared == PLUGIN_API:
            return True
        newer = isinstance(declared, int) and declared > PLUGIN_API
        upgrade = OWN_DISTRIBUTION if newer else record.distribution or record.name
        error = f"it is written for plugin API {declared!r}, this is spiking-lm {__version__} with API {PLUGIN_API}"
        self._end(record, "incompatible", error, f"pip install --upgrade {upgrade}")
        return False

    def _attach(self, record: PluginRecord, plugin: object) -> None:
        """Register with pluggy and refuse what it would let pass: an alias, a misspelled or an unmarked hook."""
        for name, other in self._pm.list_name_plugin():
            if other is plugin or name == record.name:
                what = f"{record.target!r} is already loaded as" if other is plugin else "there is already a"
                raise PluginError(f"{what} plugin {name!r}", hint="give each plugin one name and one module of its own")
        self._pm.register(plugin, name=record.name)
        callers = self._pm.get_hookcallers(plugin) or []
        record.hooks = sorted((caller.name for caller in callers if caller.has_spec()), key=_hook_order)
        for caller in callers:
            implementation = next(impl for impl in caller.get_hookimpls() if impl.plugin is plugin)
            if not caller.has_spec() and not implementation.optionalhook:
                near = did_you_mean(caller.name, HOOKS)
                raise PluginError(f"unknown hook {caller.name!r}", hint=near or f"the hooks are {', '.join(HOOKS)}")
        for name, value in vars(plugin).items():
            if name.startswith(f"{GROUP}_") and inspect.isfunction(value) and not hasattr(value, f"{GROUP}_impl"):
                raise PluginError(
                    f"{name!r} looks like a hook but is not marked", hint="put @spiking_lm.hookimpl above it"
                )

    def _call(self, record: PluginRecord, plugin: object, hook: str, offered: list[Record]) -> None:
        """Call one hook of one plugin, collecting what it registers."""
        kind = hook.removeprefix(f"{GROUP}_")
        before = len(offered)

        def register(spec: Record) -> None:
            if not isinstance(spec, Record):
                raise PluginError(
                    f"{hook} registered {type(spec).__name__!r}, which is not a record",
                    hint="register one of the classes of spiking_lm.records",
                )
            if spec.kind != kind:
                raise PluginError(
                    f"{hook} registered the {type(spec).__name__} {spec.name!r}",
                    hint=f"a {type(spec).__name__} belongs in {GROUP}_{spec.kind}",
                )
            if any(spec.kind == other.kind and spec.name == other.name for other in offered):
                raise PluginError(f"{hook} registered {spec.name!r} twice", hint="give each record its own name")
            offered.append(spec)

        start = time.perf_counter()
        others = [other for other in self._pm.get_plugins() if other is not plugin]
        try:
            self._pm.subset_hook_caller(hook, others)(register=register)
        finally:
            if self._trace:
                names = ", ".join(spec.name for spec in offered[before:]) or "nothing"
                spent = 1000 * (time.perf_counter() - start)
                print(f"spiking-lm trace: {record.name}: {hook}: {names} ({spent:.1f} ms)", file=sys.stderr)

    def _adopt(self, record: PluginRecord, offered: list[Record]) -> None:
        """Enter a plugin's records, all or none; a name that two strangers claim belongs to neither."""
        for spec in offered:
            owner = self._registered[spec.kind].get(spec.name)
            reserved = spec.name in self._own_names and not record.first_party
            if reserved or (owner and (owner.plugin.first_party or record.first_party)):
                holder = f"plugin {owner.plugin.name!r} of {owner.plugin.origin}" if owner else OWN_DISTRIBUTION
                label = spec.kind.removesuffix("s")
                raise PluginError(f"the {label} name {spec.name!r} is taken by {holder}", hint=_rename_hint(record))
        for spec in offered:
            key = (spec.kind, spec.name)
            owner = self._registered[spec.kind].get(spec.name)
            if owner or key in self._disputed:
                self._dispute(key, record)
            else:
                self._registered[spec.kind][spec.name] = Registered(spec, record)
                record.provides.setdefault(spec.kind, []).append(spec.name)

    def _dispute(self, key: tuple[str, str], record: PluginRecord) -> None:
        kind, name = key
        owner = self._registered[kind].pop(name, None)
        if owner:
            owner.plugin.provides[kind].remove(name)
            self._disputed[key] = [owner.plugin]
        claimants = self._disputed[key]
        claimants.append(record)
        for plugin in claimants if owner else [record]:
            rivals = " and ".join(f"{other.name!r} ({other.origin})" for other in claimants if other is not plugin)
            plugin._complain(
                f"its {kind.removesuffix('s')} {name!r} is refused, because plugin {rivals} claims the same name",
                _dispute_hint(claimants),
            )

    def _remark(self, record: PluginRecord) -> None:
        """Say what a plugin that loaded well lacks: hooks, or the dependencies of its records."""
        if not record.hooks:
            record._complain(
                "it implements no hook", f"does its entry point name the right module? It is {record.target!r}"
            )
            return
        entries = [entry for kind in KINDS for entry in self._registered[kind].values() if entry.plugin is record]
        needing = [entry for entry in entries if entry.spec.targets]  # a recipe is a file and needs nothing itself
        lacking = [entry for entry in needing if entry.missing()]
        if not lacking:
            return
        details = list(dict.fromkeys(entry.missing() for entry in lacking))
        hint = "; ".join(dict.fromkeys(_install_hint(entry.spec, record) for entry in lacking))
        if len(lacking) == len(needing):
            record.status = "unavailable"
            record._complain("; ".join(str(detail) for detail in details), hint)
        else:
            names = ", ".join(entry.spec.name for entry in lacking)
            record._complain(f"{names} cannot be used here: {'; '.join(str(detail) for detail in details)}", hint)

    # -- outcomes -----------------------------------------------------------------------------------------------------

    def _end(
        self, record: PluginRecord, status: Status, error: str, hint: str | None, cause: BaseException | None = None
    ) -> None:
        record.status, record.error, record.hint, record.provides = status, error, hint, {}
        self._plugins.append(record)
        if self._strict and status in {"failed", "incompatible"}:
            raise PluginError(f"plugin {record.name!r} ({record.origin}): {error}", hint=hint) from cause

    def _fail(self, record: PluginRecord, error: str, hint: str | None, cause: BaseException | None = None) -> None:
        self._end(record, "failed", error, hint, cause)

    def _skip(self, record: PluginRecord, error: str, hint: str) -> None:
        self._end(record, "blocked", error, hint)

    def _suspects(self, kind: str, name: str) -> str | None:
        """Name the plugins that did not load and may have offered ``name``."""
        culprit = self._withdrawn.get((kind, name))
        out = [plugin for plugin in self._plugins if plugin.status in {"failed", "incompatible", "blocked"}]
        stem = re.split(r"[./]", name)[0]
        suspects = [culprit] if culprit else [plugin for plugin in out if plugin.name == stem]
        suspects = suspects or [plugin for plugin in out if plugin.status != "blocked"]
        if not suspects:
            return None
        told = "; ".join(f"plugin {plugin.name!r} is {plugin.status}: {plugin.error}" for plugin in suspects[:2])
        verb = "offers" if culprit else "may offer"
        return f"It {verb} this name and did not load: {told} (see: spiking-lm plugins)"


# -- the default manager ----------------------------------------------------------------------------------------------

_lock = threading.RLock()
_default: PluginManager | None = None
_loading = False


def manager() -> PluginManager:
    """Return the default manager, built from the environment when it is first asked for."""
    global _default, _loading
    with _lock:
        if _default is None:
            if _loading:
                raise PluginError(
                    "the registry was asked for while plugins were being loaded",
                    hint="ask inside the function that needs it, not at import or in a hook",
                )
            _loading = True
            try:
                _default = PluginManager.from_environment()
            finally:
                _loading = False
        return _default


def set_manager(new: PluginManager | None) -> PluginManager | None:
    """Make ``new`` the default manager (None: build it afresh when next needed) and return the one before."""
    global _default
    with _lock:
        previous, _default = _default, new
        return previous


def get(kind: str, name: str) -> Registered:
    """Return one record of the default manager; see :meth:`PluginManager.get`."""
    return manager().get(kind, name)


def all(kind: str) -> dict[str, Registered]:
    """Return everything of a kind in the default manager, sorted by name."""
    return manager().all(kind)


def plugins() -> list[PluginRecord]:
    """Return every plugin that was found, whatever became of it."""
    return manager().plugins()


# -- helpers ----------------------------------------------------------------------------------------------------------


def _entry_points() -> Iterator[PluginRecord]:
    """Yield a record for each entry point of our group.

    Distributions are read one by one: with ``importlib.metadata.entry_points`` a single malformed file anywhere in the
    environment would hide every plugin. Only those that mention the group are parsed, which keeps this fast.
    """
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("entry_points.txt")
        if not text or f"[{GROUP}]" not in text:
            continue
        name = distribution.metadata["Name"] or "unknown"
        if _canonical(name) in seen:  # a second copy further down sys.path is never imported
            continue
        seen.add(_canonical(name))
        version = distribution.metadata["Version"]
        try:
            points = [point for point in distribution.entry_points if point.group == GROUP]
        except Exception as err:
            yield PluginRecord(
                name,
                name,
                version,
                error=f"its entry_points.txt is malformed: {err}",
                hint=f"pip install --force-reinstall {name}",
            )
            continue
        for point in points:
            yield PluginRecord(point.name, name, version, target=point.value)


def _import_entry(record: PluginRecord) -> object:
    if not _ENTRY.match(record.target):
        raise PluginError(
            f"its entry point is {record.target!r}", hint="write it as 'package.module' or 'package.module:object'"
        )
    return importlib.metadata.EntryPoint(record.name, record.target, GROUP).load()


def _unmet(spec: Record) -> list[str]:
    """Say which of ``spec.requires`` this environment does not meet, without importing any of them."""
    lacks = []
    for need in spec.requires:
        if need.startswith("python") and not need.isidentifier():
            from packaging.specifiers import SpecifierSet

            running = ".".join(map(str, sys.version_info[:3]))
            if not SpecifierSet(need.removeprefix("python")).contains(running, prereleases=True):
                lacks.append(f"it needs Python {need.removeprefix('python')}, this is {running}")
        elif not installed(need):
            lacks.append(f"the module {need!r} is not installed")
    return lacks


def installed(module: str) -> bool:
    """Tell whether a module's top-level package can be found, without importing it."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # already imported and without a spec, or None in sys.modules
        return sys.modules.get(module.partition(".")[0]) is not None


def _describe(err: BaseException) -> str:
    """Say in one line what was raised and where."""
    if isinstance(err, SystemExit):
        text = f"it called sys.exit({'' if err.code is None else repr(err.code)})"
    else:
        lines = str(err).strip().splitlines()
        text = (
            f"{type(err).__name__}: {' '.join(line.strip() for line in lines)}"[:400] if lines else type(err).__name__
        )
    frames = [frame for frame in traceback.extract_tb(err.__traceback__) if not _is_machinery(frame.filename)]
    if frames and not isinstance(err, SyntaxError):  # a SyntaxError names its own place
        text += f" ({frames[-1].filename}, line {frames[-1].lineno})"
    return text


def _is_machinery(filename: str) -> bool:
    return filename.startswith("<") or filename in {__file__, importlib.__file__, importlib.metadata.__file__}


def _install_hint(spec: Record, plugin: PluginRecord) -> str:
    wrong_python = next((need for need in spec.requires if need.startswith("python") and not need.isidentifier()), None)
    if wrong_python and any("needs Python" in lack for lack in _unmet(spec)):
        return f"use it from an environment with Python {wrong_python.removeprefix('python')}"
    if spec.extra:
        return f"pip install '{plugin.distribution or OWN_DISTRIBUTION}[{spec.extra}]'"
    return f"install what provides {', '.join(need for need in spec.requires if not installed(need))}"


def _failure_hint(record: PluginRecord, err: BaseException) -> str:
    block = f"block it: SPIKING_LM_BLOCK={record.name}"
    if isinstance(err, ModuleNotFoundError) and err.name:
        package = record.target.partition(":")[0].partition(".")[0]
        missing = err.name.partition(".")[0]
        if missing == package and record.distribution:
            return f"pip install --force-reinstall {record.distribution}; or {block}"
        return f"install what provides {missing!r} (a plugin should import it in its targets only); or {block}"
    return f"see the traceback: SPIKING_LM_STRICT=1 spiking-lm --debug plugins; or {block}"


def _rename_hint(record: PluginRecord) -> str:
    return f"the authors of {record.distribution or record.name} must choose another name, e.g. {_suggest(record)!r}"


def _suggest(record: PluginRecord) -> str:
    stem = _canonical(record.distribution or "my-" + record.name).removeprefix("spiking-lm-")
    return stem if stem != record.name else f"my-{stem}"


def _uninstall_hint(rivals: list[PluginRecord]) -> str:
    return "; or ".join(f"pip uninstall {rival.distribution}" for rival in rivals)


def _dispute_hint(claimants: list[PluginRecord]) -> str:
    return "choose one: " + " or ".join(f"SPIKING_LM_BLOCK={plugin.name}" for plugin in claimants)


_SLOW_HINT = f"it takes over {SLOW_SECONDS:g} s to load: a plugin should import its framework in its targets only"


def _hook_order(name: str) -> int:
    return HOOKS.index(name)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
