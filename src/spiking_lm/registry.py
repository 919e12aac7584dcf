"""Plugins: how they are found, kept apart, and asked for what they offer.

A plugin is an entry point of the group ``spiking_lm`` in any installed distribution. Our own plugins take the same
road; they only come first. Whatever a plugin does wrong while it loads is caught, said in its :class:`PluginRecord`,
and leaves the host and the other plugins alone. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Literal

import pluggy

from spiking_lm import PLUGIN_API, __version__, hookspecs
from spiking_lm.errors import PluginError, SpikingLMError, UnknownNameError, did_you_mean
from spiking_lm.provenance import (
    OWN_DISTRIBUTION,
    PluginRecord,
    Registered,
    Status,
    canonical,
    describe,
    install_hint,
    top_level,
)
from spiking_lm.records import Record

__all__ = [
    "HOOKS",
    "KINDS",
    "PluginManager",
    "PluginRecord",
    "Registered",
    "all",
    "get",
    "manager",
    "plugins",
    "set_manager",
]

GROUP = "spiking_lm"
"""The entry-point group, which is also pluggy's project name and the prefix of every hook."""

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith(f"{GROUP}_"))
KINDS = tuple(hook.removeprefix(f"{GROUP}_") for hook in HOOKS)
"""What can be registered: models, neurons, kernels and so on, one kind per hook."""

SLOW_SECONDS = 1.0
"""A plugin that takes longer than this to import and to answer its hooks is pointed out."""

_ENTRY = re.compile(r"^\w+(\.\w+)*(\s*:\s*\w+(\.\w+)*)?(\s*\[.*\])?$")


class _IncompatibleError(PluginError):
    """A plugin is written for another version of the hooks."""


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
        self._loaded: dict[str, object] = {}
        self._plugins: list[PluginRecord] = []
        self._registered: dict[str, dict[str, Registered]] = {kind: {} for kind in KINDS}
        self._withdrawn: dict[tuple[str, str], PluginRecord] = {}
        self._disputed: dict[tuple[str, str], list[PluginRecord]] = {}
        self._own_names: frozenset[str] = frozenset()
        if discover:
            self._discover(strangers=discover != "first-party")

    @classmethod
    def from_environment(cls) -> PluginManager:
        """Build the manager that SPIKING_LM_PLUGINS, _BLOCK, _NO_PLUGINS, _STRICT and _TRACE ask for."""
        only = os.environ.get("SPIKING_LM_PLUGINS")
        return cls(
            discover="first-party" if _switched_on("SPIKING_LM_NO_PLUGINS") else True,
            only=None if only is None else _names(only),
            block=_names(os.environ.get("SPIKING_LM_BLOCK", "")),
            strict=_switched_on("SPIKING_LM_STRICT"),
            trace=_switched_on("SPIKING_LM_TRACE"),
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
        claimants = self._disputed.get((kind, name))
        if claimants:
            who = " and ".join(f"{plugin.name!r} ({plugin.origin})" for plugin in claimants)
            raise PluginError(f"{_label(kind)} {name!r} is claimed by the plugins {who}", hint=_choose_hint(claimants))
        raise UnknownNameError(_label(kind), name, entries, hint=self._suspects(kind, name))

    def register(
        self, plugin: object, name: str, *, distribution: str | None = None, version: str | None = None
    ) -> PluginRecord:
        """Load a module or object as plugin ``name``; a failure is told in the record (raised when strict)."""
        target = plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__qualname__
        record = PluginRecord(name, distribution, version, target=target)
        self._load(record, plugin)
        return record

    # -- discovery ----------------------------------------------------------------------------------------------------

    def _discover(self, *, strangers: bool) -> None:
        """Load our own plugins, then the strangers', by name; a name that is taken or disputed is not loaded at all."""
        found = list(_entry_points())
        own = [record for record in found if record.first_party]
        if not any(record.name == "core" for record in own):  # a source tree that is on the path but not installed
            own.append(PluginRecord("core", OWN_DISTRIBUTION, __version__, target="spiking_lm.builtin"))
        self._own_names = frozenset(record.name for record in own)
        for record in sorted(own, key=lambda record: (record.name != "core", record.name)):
            self._load_if_wanted(record)
        if not strangers:
            return

        claims: dict[str, list[PluginRecord]] = {}
        for record in sorted(found, key=lambda record: record.distribution or ""):
            if not record.first_party:
                claims.setdefault(record.name, []).append(record)
        for name, rivals in sorted(claims.items()):
            for record in rivals:
                if name in self._own_names:
                    self._end(
                        record,
                        "failed",
                        f"the plugin name {name!r} is taken by {OWN_DISTRIBUTION}",
                        _rename_hint(record),
                    )
                elif len(rivals) > 1:
                    who = " and ".join(rival.origin for rival in rivals)
                    hint = " or ".join(f"pip uninstall {rival.distribution}" for rival in rivals)
                    self._end(record, "failed", f"two distributions claim the plugin name {name!r}: {who}", hint)
                else:
                    self._load_if_wanted(record)
        known = {record.name for record in self._plugins}
        for name in sorted((self._only or frozenset()) - known):
            near = did_you_mean(name, known)
            self._end(PluginRecord(name), "failed", "it was asked for, but no installed distribution offers it", near)

    def _load_if_wanted(self, record: PluginRecord) -> None:
        if record.name in self._block and record.name != "core":
            self._end(record, "blocked", "it is in the block list", "remove it from SPIKING_LM_BLOCK")
        elif self._only is not None and record.name not in self._only and record.name != "core":
            self._end(record, "blocked", "it is not among the plugins asked for", "add it to SPIKING_LM_PLUGINS")
        elif record.error:  # its entry_points.txt could not be read
            self._end(record, "failed", record.error, record.hint)
        else:
            self._load(record)

    # -- one plugin ---------------------------------------------------------------------------------------------------

    def _load(self, record: PluginRecord, plugin: object = None) -> None:
        """Import a plugin, register it, call its hooks, take over its records; any failure stays its own."""
        start = time.perf_counter()
        offered: list[Record] = []
        try:
            # What a plugin prints must not end up in the middle of --json output.
            with contextlib.redirect_stdout(sys.stderr):
                if plugin is None:
                    plugin = _import_entry(record)
                _check_api(record, plugin)
                calls = self._attach(record, plugin)
                for hook in record.hooks:
                    self._call(record, getattr(calls, hook), hook, offered)
            self._adopt(record, offered)
        except (Exception, SystemExit) as err:
            for spec in offered:
                self._withdrawn.setdefault((spec.kind, spec.name), record)
            status: Status = "incompatible" if isinstance(err, _IncompatibleError) else "failed"
            message = err.message if isinstance(err, SpikingLMError) else describe(err)
            hint = err.hint if isinstance(err, SpikingLMError) else _failure_hint(record, err)
            self._end(record, status, message, hint, cause=err)
        else:
            self._loaded[record.name] = plugin
            self._plugins.append(record)
            self._remark(record)
        finally:
            record.seconds = time.perf_counter() - start
            if record.seconds > SLOW_SECONDS:
                record.remark(
                    None, f"it takes {record.seconds:.1f} s to load; only its targets should import a framework"
                )

    def _attach(self, record: PluginRecord, plugin: object) -> pluggy.HookRelay:
        """Hand the plugin to pluggy, refuse what pluggy would let pass or explain badly, and return its hooks.

        Each plugin gets a pluggy manager of its own: none is left half registered when it fails, and an object with an
        odd ``__eq__`` or without a hash disturbs nobody else.
        """
        for name, other in self._loaded.items():
            if other is plugin:
                raise PluginError(
                    f"{record.target!r} is already loaded as plugin {name!r}", hint="keep one of the two entry points"
                )
        if record.name in self._loaded:
            raise PluginError(f"there is already a plugin {record.name!r}", hint="give each plugin its own name")
        for name in HOOKS:
            function = getattr(plugin, name, None)
            if inspect.isroutine(function) and not hasattr(function, f"{GROUP}_impl"):
                raise PluginError(f"{name!r} is not marked as a hook", hint="put @spiking_lm.hookimpl above it")
        pm = pluggy.PluginManager(GROUP)
        pm.add_hookspecs(hookspecs)
        pm.register(plugin, name=record.name)
        callers = pm.get_hookcallers(plugin) or []
        for caller in callers:
            if not caller.has_spec() and any(not impl.optionalhook for impl in caller.get_hookimpls()):
                near = did_you_mean(caller.name, HOOKS)
                raise PluginError(f"unknown hook {caller.name!r}", hint=near or f"the hooks are {', '.join(HOOKS)}")
        implemented = {caller.name for caller in callers}
        record.hooks = [hook for hook in HOOKS if hook in implemented]
        return pm.hook

    def _call(self, record: PluginRecord, call: pluggy.HookCaller, hook: str, offered: list[Record]) -> None:
        """Call one hook of one plugin, collecting what it registers."""
        kind = hook.removeprefix(f"{GROUP}_")
        before = len(offered)

        def register(spec: Record) -> None:
            if not isinstance(spec, Record):
                raise PluginError(
                    f"{hook} registered an object of type {type(spec).__name__!r}, which is not a record",
                    hint="register instances of the classes in spiking_lm.records",
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
        try:
            call(register=register)
        finally:
            if self._trace:
                names = ", ".join(spec.name for spec in offered[before:]) or "nothing"
                spent = 1000 * (time.perf_counter() - start)
                print(f"trace: plugin {record.name}: {hook} registered {names} ({spent:.1f} ms)", file=sys.stderr)

    def _adopt(self, record: PluginRecord, offered: list[Record]) -> None:
        """Enter a plugin's records, all or none; but a name that two strangers claim is refused to both."""
        for spec in offered:
            owner = self._registered[spec.kind].get(spec.name)
            holder = None
            if owner and (owner.plugin.first_party or record.first_party):
                holder = f"plugin {owner.plugin.name!r} ({owner.plugin.origin})"
            elif not record.first_party and (spec.name in self._own_names or _is_verb(spec)):
                holder = OWN_DISTRIBUTION  # also when our own plugin of that name failed or is blocked
            if holder:
                raise PluginError(
                    f"the {_label(spec.kind)} name {spec.name!r} is taken by {holder}", hint=_rename_hint(record)
                )
        for spec in offered:
            key = (spec.kind, spec.name)
            if spec.name in self._registered[spec.kind] or key in self._disputed:
                self._dispute(key, record)
            else:
                self._registered[spec.kind][spec.name] = Registered(spec, record)
                record.provides.setdefault(spec.kind, []).append(spec.name)
        for claimant in {id(plugin): plugin for plugins in self._disputed.values() for plugin in plugins}.values():
            if not any(claimant.provides.values()):
                claimant.status = "failed"  # nothing of it is left

    def _dispute(self, key: tuple[str, str], record: PluginRecord) -> None:
        """Refuse a name to everyone who claims it."""
        kind, name = key
        owner = self._registered[kind].pop(name, None)
        if owner:
            owner.plugin.provides[kind].remove(name)
            self._disputed[key] = [owner.plugin]
        claimants = self._disputed[key]
        claimants.append(record)
        for plugin in claimants if owner else [record]:
            rivals = " and ".join(f"{rival.name!r} ({rival.origin})" for rival in claimants if rival is not plugin)
            error = f"its {_label(kind)} {name!r} is refused, because plugin {rivals} claims the same name"
            plugin.remark(error, _choose_hint(claimants))
            if self._strict:
                raise PluginError(f"plugin {plugin.name!r} ({plugin.origin}): {error}", hint=plugin.hint)

    def _remark(self, record: PluginRecord) -> None:
        """Say what a plugin that loaded well lacks: hooks, or the dependencies of its records."""
        if not record.hooks:
            record.remark("it implements no hook", f"does its entry point, {record.target!r}, name the right module?")
        entries = [entry for kind in KINDS for entry in self._registered[kind].values() if entry.plugin is record]
        needing = [
            entry for entry in entries if entry.spec.targets
        ]  # a recipe is a file and needs nothing to be listed
        lacking = [entry for entry in needing if entry.missing()]
        if not lacking:
            return
        reasons = "; ".join(dict.fromkeys(str(entry.missing()) for entry in lacking))
        hint = "; ".join(dict.fromkeys(install_hint(entry.spec, record) for entry in lacking))
        if len(lacking) == len(needing):
            record.status = "unavailable"
            record.remark(reasons, hint)
        else:
            names = ", ".join(entry.spec.name for entry in lacking)
            record.remark(f"{names} cannot be used here: {reasons}", hint)

    def _end(
        self, record: PluginRecord, status: Status, error: str, hint: str | None, cause: BaseException | None = None
    ) -> None:
        """Enter a plugin that is not active."""
        record.status, record.error, record.hint, record.provides = status, error, hint, {}
        self._plugins.append(record)
        if self._strict and status != "blocked":
            raise PluginError(f"plugin {record.name!r} ({record.origin}): {error}", hint=hint) from cause

    def _suspects(self, kind: str, name: str) -> str | None:
        """Name the plugins that did not load and may have offered ``name``."""
        culprit = self._withdrawn.get((kind, name))
        idle = [plugin for plugin in self._plugins if plugin.status in {"failed", "incompatible", "blocked"}]
        namesakes = [plugin for plugin in idle if plugin.name == re.split(r"[./]", name)[0]]
        broken = [plugin for plugin in idle if plugin.status != "blocked"]
        suspects = [culprit] if culprit else namesakes or broken
        if not suspects:
            return None
        told = "; ".join(f"plugin {plugin.name!r} is {plugin.status}: {plugin.error}" for plugin in suspects[:2])
        verb = "is" if culprit else "may be"
        return f"this one {verb} from a plugin that did not load: {told} (see: spiking-lm plugins)"


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
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except (OSError, UnicodeDecodeError):
            continue  # unreadable, so it cannot be told to be one of ours
        if f"[{GROUP}]" not in text:
            continue
        name, version = _identity(distribution)
        if canonical(name) in seen:  # a second copy further down sys.path is never imported
            continue
        seen.add(canonical(name))
        try:
            points = [point for point in distribution.entry_points if point.group == GROUP]
        except Exception as err:
            error = f"its entry_points.txt is malformed: {err}"
            yield PluginRecord(name, name, version, error=error, hint=f"pip install --force-reinstall {name}")
            continue
        for point in points:
            yield PluginRecord(point.name, name, version, target=point.value)


def _identity(distribution: importlib.metadata.Distribution) -> tuple[str, str | None]:
    """Return name and version; of a half removed installation, Python versions give None or raise."""
    try:
        return distribution.metadata["Name"] or "unknown", distribution.metadata["Version"]
    except Exception:
        return "unknown", None


def _import_entry(record: PluginRecord) -> object:
    if not _ENTRY.match(record.target):
        raise PluginError(
            f"its entry point is {record.target!r}", hint="write it as 'package.module' or 'package.module:object'"
        )
    plugin: object = importlib.metadata.EntryPoint(record.name, record.target, GROUP).load()
    return plugin


def _check_api(record: PluginRecord, plugin: object) -> None:
    declared = getattr(plugin, "SPIKING_LM_API", None)
    record.api = declared if isinstance(declared, int) else None
    if declared is None or declared == PLUGIN_API:
        return
    outdated = OWN_DISTRIBUTION if record.api and record.api > PLUGIN_API else record.distribution or record.name
    raise _IncompatibleError(
        f"it is written for plugin API {declared!r}, and spiking-lm {__version__} has plugin API {PLUGIN_API}",
        hint=f"pip install --upgrade {outdated}",
    )


def _is_verb(spec: Record) -> bool:
    """True when a command has the name of one of our own verbs, which are not registered."""
    if spec.kind != "commands":
        return False
    from spiking_lm.cli import VERBS

    return spec.name in VERBS


def _failure_hint(record: PluginRecord, err: BaseException) -> str:
    block = f"block it: SPIKING_LM_BLOCK={record.name}"
    if isinstance(err, ModuleNotFoundError) and err.name:
        missing = top_level(err.name)
        if missing == top_level(record.target) and record.distribution:
            return f"pip install --force-reinstall {record.distribution}; or {block}"
        return f"install what provides {missing!r}; or {block}"
    return f"see the traceback: SPIKING_LM_STRICT=1 spiking-lm --debug plugins; or {block}"


def _rename_hint(record: PluginRecord) -> str:
    who = record.distribution or record.name
    return f"the authors of {who} must choose another name; until then: pip uninstall {who}"


def _choose_hint(claimants: list[PluginRecord]) -> str:
    return "choose one: " + " or ".join(f"SPIKING_LM_BLOCK={plugin.name}" for plugin in claimants)


def _label(kind: str) -> str:
    return kind.removesuffix("s")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "") not in {"", "0"}
