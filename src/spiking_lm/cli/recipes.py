"""``spiking-lm recipes``: what there is to run."""

from __future__ import annotations

from pathlib import Path

import typer

from spiking_lm.cli import new_app

app = new_app("List, show, copy and check recipes.")

_NAME = typer.Argument(..., metavar="RECIPE", help="A recipe's name or its .yaml file.")
_SET = typer.Option([], "--set", metavar="FIELD=VALUE", help="Change a field first. May be repeated.")
_JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command()
def ls(json: bool = _JSON) -> None:
    """List the installed recipes."""
    from spiking_lm.cli._output import console, print_json, table
    from spiking_lm.recipe import recipes

    found = recipes()
    if json:
        print_json(found)
        return
    if not found:
        console.print("no recipe is installed")
        return
    rows = [
        (r.name, r.model, r.data, ", ".join(r.extras), f"cannot be read: {r.error}" if r.error else r.description)
        for r in found
    ]
    columns = ["name", "model", "data", "missing extras", "description"]
    if not any(r.extras for r in found):
        rows, columns = [(*row[:3], row[4]) for row in rows], [*columns[:3], columns[4]]
    table(None, columns, rows)


@app.command()
def show(name: str = _NAME, settings: list[str] = _SET, json: bool = _JSON) -> None:
    """Print a recipe as it would run: extended, overridden, defaults filled in."""
    from spiking_lm.cli._output import print_json
    from spiking_lm.recipe import load_recipe

    recipe = load_recipe(name, settings)
    if json:
        print_json(recipe.model_dump(mode="json", by_alias=True))
    else:
        typer.echo(recipe.to_yaml(), nl=False)


@app.command()
def cp(
    name: str = _NAME,
    file: Path = typer.Argument(..., metavar="FILE", help="Where to; it must not exist yet."),
) -> None:
    """Copy a recipe, comments included, as the start of your own."""
    from spiking_lm.errors import UsageError
    from spiking_lm.files import atomic_write
    from spiking_lm.recipe import find_recipe, load_recipe

    load_recipe(name)
    source = find_recipe(name)
    if file.is_dir():
        file = file / source.name
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{file}: a recipe file ends in .yaml", hint=f"name it {file}.yaml")
    if file.exists():
        raise UsageError(f"{file} exists already", hint="choose another name, or remove it first")
    atomic_write(file, source.read_bytes())
    typer.echo(f"wrote {file}; run it with: spiking-lm run {file}")


@app.command()
def validate(
    names: list[str] = typer.Argument(..., metavar="RECIPE...", help="Names or .yaml files."),
    json: bool = _JSON,
) -> None:
    """Check recipes: every field, name and value. Exit code 2 when one is wrong, 3 when a plugin or extra is missing."""
    from spiking_lm.cli._output import print_json
    from spiking_lm.errors import SpikingLMError
    from spiking_lm.recipe import load_recipe

    results, worst = [], 0
    for name in names:
        try:
            load_recipe(name)
            results.append({"recipe": name, "ok": True, "error": None, "hint": None})
        except SpikingLMError as error:
            worst = max(worst, error.exit_code)
            results.append({"recipe": name, "ok": False, "error": error.message, "hint": error.hint})
    if json:
        print_json(results)
    for result in () if json else results:
        if result["ok"]:
            typer.echo(f"{result['recipe']}: ok")
            continue
        typer.echo(f"{result['recipe']}: wrong\n  {result['error']}", err=True)
        if result["hint"]:
            typer.echo(f"  hint: {result['hint']}", err=True)
    if worst:
        raise typer.Exit(worst)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for an editor that checks YAML while you write."""
    from spiking_lm.cli._output import print_json
    from spiking_lm.recipe import json_schema

    print_json(json_schema())
