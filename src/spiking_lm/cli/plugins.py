"""``spiking-lm plugins``: what is installed, what works, and how to mend the rest."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import typer

from spiking_lm.cli import new_app
from spiking_lm.cli._output import console, print_json, table
from spiking_lm.errors import PluginError, SpikingLMError, UnknownNameError

if TYPE_CHECKING:
    from spiking_lm.registry import PluginManager, PluginRecord

app = new_app("List the plugins, and say what is wrong with those that do not work.")


@app.callback(invoke_without_command=True, no_args_is_help=False)
def plugins(
    context: typer.Context,
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    hook: str | None = typer.Option(None, "--hook", help="Show only plugins with this hook, e.g. models."),
) -> None:
    """List the plugins, and say what is wrong with those that do not work.

    A plugin that fails never stops the others. 'plugins validate NAME --imports' looks closer at one.
    """
    if context.invoked_subcommand is not None:
        return
    from spiking_lm import registry

    records = registry.plugins()
    if hook is not None:
        full = hook if hook.startswith("spiking_lm_") else f"spiking_lm_{hook}"
        if full not in registry.HOOKS:
            raise UnknownNameError("hook", hook, registry.KINDS)
        records = [record for record in records if full in record.hooks]
    if as_json:
        print_json([record.to_dict() for record in records])
        return
    rows = [[record.name, record.version, record.distribution, record.status, _offers(record)] for record in records]
    table(None, ["plugin", "version", "distribution", "status", "offers"], rows)
    for record in records:
        _explain(record)


@app.command()
def validate(
    name: str = typer.Argument(help="The plugin, as 'spiking-lm plugins' calls it."),
    imports: bool = typer.Option(False, "--imports", help="Import every target; this runs the plugin's code."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check one plugin: what it registers, what that needs, and, with --imports, whether the targets are there."""
    from spiking_lm import registry

    manager = registry.manager()
    records = {record.name: record for record in manager.plugins()}
    if name not in records:
        raise UnknownNameError("plugin", name, records)
    record = records[name]
    if record.status in {"failed", "incompatible", "blocked"}:
        raise PluginError(f"plugin {name!r} ({record.origin}) is {record.status}: {record.error}", hint=record.hint)
    if imports and not as_json:
        console.print(f"Importing the targets of {name!r}: this runs the plugin's code.", markup=False)
    findings = _targets(manager, record, imports)
    if as_json:
        print_json({"plugin": record.to_dict(), "targets": findings})
    else:
        rows = [[item["kind"], item["name"], item["target"], item["result"]] for item in findings]
        table(
            f"{record.name} {record.version} ({record.distribution}): {record.status}",
            ["kind", "name", "target", "result"],
            rows,
        )
        _explain(record)
    if any(not item["ok"] for item in findings):
        raise typer.Exit(1)


def _targets(manager: PluginManager, record: PluginRecord, imports: bool) -> list[dict[str, Any]]:
    """Look at every target of a plugin's records; a target whose dependencies are absent is no fault of the plugin."""
    findings = []
    for kind, names in record.provides.items():
        for name in names:
            entry = manager.get(kind, name)
            targets = {field: getattr(entry.spec, field) for field in entry.spec.targets if getattr(entry.spec, field)}
            for field, target in targets.items() or [("", "")]:
                ok, result = True, entry.missing() or "not imported"
                if imports and target and not entry.missing():
                    try:
                        with contextlib.redirect_stdout(sys.stderr):
                            entry.load(field)
                        result = "imported"
                    except SpikingLMError as err:
                        ok, result = False, err.message
                if kind == "recipes":
                    ok = entry.spec.path.is_file()
                    target, result = str(entry.spec.path), "found" if ok else "no such file"
                findings.append(
                    {"kind": kind, "name": name, "field": field, "target": target, "ok": ok, "result": result}
                )
    return findings


def _offers(record: PluginRecord) -> str:
    """Say in a cell what a plugin registers, e.g. ``1 model, 12 recipes``."""
    counts = {kind.removesuffix("s"): len(names) for kind, names in record.provides.items() if names}
    if "doctor" in counts:
        counts["check"] = counts.pop("doctor")
    return ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items())


def _explain(record: PluginRecord) -> None:
    if record.error or record.hint:
        console.print(f"{record.name}: {record.error or record.status}", markup=False)
        if record.hint:
            console.print(f"  hint: {record.hint}", markup=False)
