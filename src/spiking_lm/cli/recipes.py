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
    rows = []
    for r in found:
        missing = f"needs the extra {', '.join(r.extras)}: " if r.extras else ""
        rows.append((r.name, r.model, r.data, f"cannot be read: {r.error}" if r.error else missing + r.description))
    table(None, ["name", "model", "data", "description"], rows)


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
    from spiking_lm.recipe import load_recipe
    from spiking_lm.recipe_files import find_recipe

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
    """Check recipes: every field, name and value. Exit code 2: one is wrong; 3: a plugin or extra is missing."""
    from spiking_lm.cli._output import print_json
    from spiking_lm.errors import SpikingLMError
    from spiking_lm.recipe import load_recipe

    def problem(name: str) -> SpikingLMError | None:
        try:
            load_recipe(name)
        except SpikingLMError as error:
            return error
        return None

    problems = {name: problem(name) for name in names}
    results = [
        {"recipe": name, "ok": error is None, "error": error and error.message, "hint": error and error.hint}
        for name, error in problems.items()
    ]
    worst = max(error.exit_code if error else 0 for error in problems.values())
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
