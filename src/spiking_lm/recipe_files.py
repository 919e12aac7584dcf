"""Recipes on disk: how one is found by name or path, and laid over the one that it extends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spiking_lm import registry, safeyaml
from spiking_lm.errors import RecipeError, UnknownNameError


def find_recipe(path_or_name: str | Path) -> Path:
    """Return the file of a recipe: a path as it is, a name through the registry."""
    text = str(path_or_name)
    if isinstance(path_or_name, Path) or text.endswith((".yaml", ".yml")):
        return Path(path_or_name)
    try:
        path: Path = registry.get("recipes", text).spec.path
    except UnknownNameError as error:
        if Path(text + ".yaml").is_file():
            error.hint = f"did you mean the file {text + '.yaml'!r}?"
        elif Path(text).exists() or text.startswith((".", "/", "~")):
            error.hint = "a name is looked up among the installed recipes; the name of a file ends in .yaml"
        raise
    return path


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file and, when it extends another, merge it over that one."""
    document = safeyaml.read(path)
    if "extends" not in document:
        return document
    base_name = document.pop("extends")
    where = f"recipe {path}, extends"
    if not isinstance(base_name, str):
        raise RecipeError(f"{where}: expected the name of one recipe, got {base_name!r}")
    if base_name.endswith((".yaml", ".yml")):
        base_path = path.parent / base_name
        if (
            Path(base_name).name != base_name
            or "\\" in base_name
            or base_path.resolve().parent != path.parent.resolve()
        ):
            raise RecipeError(
                f"{where}: {base_name!r} is not a file in the same folder", hint="name an installed recipe"
            )
    else:
        base_path = find_recipe(base_name)
    base = safeyaml.read(base_path)
    if "extends" in base:
        raise RecipeError(
            f"{where}: {base_name!r} itself extends {base['extends']!r}",
            hint="only one level is allowed: extend the original, or copy it",
        )
    return _merge(base, document)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay ``over`` on ``base``, mapping by mapping; a mapping with another ``type`` takes nothing from the base's."""
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and _same_choice(key, below, value):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _same_choice(key: str, below: dict[str, Any], value: dict[str, Any]) -> bool:
    return value.get(choice_of((key,))) in (None, below.get(choice_of((key,))))


def choice_of(path: tuple[str, ...]) -> str:
    """Return the key that chooses: a deployment has no type, it has a backend."""
    return "backend" if path == ("deploy",) else "type"
