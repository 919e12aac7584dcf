"""``spiking-lm init``: write the skeleton of a plugin or of a recipe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template

import typer

from spiking_lm.cli import new_app
from spiking_lm.cli._output import console
from spiking_lm.errors import UsageError

app = new_app("Write the skeleton of a plugin or of a recipe.")

_SCAFFOLD = Path(__file__).parents[1] / "scaffold"
_PLUGIN_NAME = re.compile(r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")
_RECIPE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")


@app.command()
def plugin(
    name: str = typer.Argument(help="Lower-case letters, digits and single dashes; becomes spiking-lm-NAME."),
    folder: Path = typer.Option(Path(), "--dir", help="Where to make the folder spiking-lm-NAME."),
) -> None:
    """Write a complete package with a neuron of your own, its tests and a README: green at once.

    Nothing is overwritten.
    """
    from spiking_lm import PLUGIN_API, __version__
    from spiking_lm.files import atomic_folder

    _check_plugin_name(name)
    target = folder / f"spiking-lm-{name}"
    if target.exists():
        raise UsageError(f"{target} exists already", hint="choose another name, or another folder with --dir")
    values = {
        "name": name,
        "distribution": f"spiking-lm-{name}",
        "package": f"spiking_lm_{name.replace('-', '_')}",
        "cls": "".join(part.capitalize() for part in name.split("-")) + "Neuron",
        "api": str(PLUGIN_API),
        "version": ".".join(__version__.split(".")[:2]),
    }
    templates = _SCAFFOLD / "plugin"
    with atomic_folder(target) as draft:
        for template in sorted(templates.rglob("*.tmpl")):
            relative = template.relative_to(templates).with_suffix("").as_posix().replace("PACKAGE", values["package"])
            path = draft / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_filled(template, values), encoding="utf-8", newline="\n")
    for path in sorted(item for item in target.rglob("*") if item.is_file()):
        console.print(f"wrote {path}", markup=False)
    _next(f"cd {shlex.quote(str(target))}", "pip install -e '.[test]'", "pytest", "spiking-lm plugins")


@app.command()
def recipe(
    name: str = typer.Argument(help="Letters, digits, - and _; the file is NAME.yaml."),
    folder: Path = typer.Option(Path(), "--dir", help="Where to write it."),
) -> None:
    """Write a small recipe with a comment on every part, ready to run. Nothing is overwritten."""
    from spiking_lm.files import atomic_write

    if not _RECIPE_NAME.match(name) or len(name) > 100:
        raise UsageError(f"bad recipe name {name!r}", hint="use letters, digits, - and _, e.g. my-first-run")
    target = folder / f"{name}.yaml"
    if target.exists():
        raise UsageError(f"{target} exists already", hint="choose another name, or another folder with --dir")
    atomic_write(target, _filled(_SCAFFOLD / "recipe" / "recipe.yaml.tmpl", {"name": name, "file": target.name}))
    console.print(f"wrote {target}", markup=False)
    quoted = shlex.quote(str(target))
    _next(f"spiking-lm recipes validate {quoted}", f"spiking-lm run {quoted}")


def _check_plugin_name(name: str) -> None:
    from spiking_lm import registry

    if name.startswith("spiking-lm"):
        raise UsageError(f"bad plugin name {name!r}", hint="leave out 'spiking-lm-', which is put before it")
    if not _PLUGIN_NAME.match(name) or len(name) > 50:
        hint = "use lower-case letters, digits and single dashes, begin with a letter: e.g. my-neuron"
        raise UsageError(f"bad plugin name {name!r}", hint=hint)
    ours = {record.name for record in registry.plugins() if record.first_party}
    ours |= {neuron for neuron, entry in registry.all("neurons").items() if entry.plugin.first_party}
    if name in ours:
        raise UsageError(f"the name {name!r} is taken by spiking-lm", hint=f"choose another, e.g. my-{name}")


def _filled(template: Path, values: dict[str, str]) -> str:
    return Template(template.read_text(encoding="utf-8")).substitute(values)


def _next(*commands: str) -> None:
    console.print("\nnext:")
    for command in commands:
        console.print(f"  {command}", markup=False)
