"""YAML as data only: small files, plain types, no surprise.

On top of ``yaml.safe_load`` this refuses duplicate keys, tags other than those of plain data, aliases that multiply
(a few lines that expand to gigabytes) and files over 1 MiB; ``1e-3`` is a number, and a date is text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from spiking_lm.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
"""Keys and values, an alias counting for everything it stands for."""

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's floats and without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != _TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises: RecipeError naming the file, the line where one is at fault, and what to do.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder", hint="name the recipe file in it") from None
    except OSError as error:
        raise RecipeError(
            f"cannot read {path}: {error.strerror}", hint="'spiking-lm recipes ls' lists recipes"
        ) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than 1 MiB", hint="a recipe is a page of text; is this the right file?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}, line {line}: not UTF-8 text", hint="save the file as UTF-8") from None
    value = parse(text, where=str(path))
    if not isinstance(value, dict):
        kind = "empty" if value is None else f"a {type(value).__name__}"
        raise RecipeError(f"{path}: the top level is {kind}", hint="a recipe is a mapping: lines of 'key: value'")
    return value


def parse(text: str, *, where: str) -> Any:
    """Parse one YAML document; ``where`` begins the message of a RecipeError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, where)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        problem = error.problem or error.context or "cannot be parsed"
        hint = "indent with spaces, not with tabs" if "\\t" in problem else None
        raise RecipeError(f"{place}: {problem}", hint=hint) from None
    except yaml.reader.ReaderError as error:
        raise RecipeError(
            f"{where}: character {error.character!r} at position {error.position} is not allowed"
        ) from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply") from None
    except ValueError as error:  # e.g. an integer of five thousand digits
        raise RecipeError(f"{where}: {error}") from None


def dump(value: dict[str, Any]) -> str:
    """Write plain data as YAML that :func:`parse` reads back unchanged."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _check(root: yaml.Node, where: str) -> None:
    """Refuse foreign tags, duplicate keys and multiplying aliases, before anything is constructed."""
    todo, visited = [root], 0
    while todo:
        node = todo.pop()
        visited += 1
        place = f"{where}, line {node.start_mark.line + 1}"
        if visited > MAX_NODES:
            raise RecipeError(
                f"{where}: more than {MAX_NODES:,} values, aliases expanded",
                hint="write out what the aliases (*name) stand for, or drop them",
            )
        if node.tag not in _PLAIN_TAGS:
            raise RecipeError(
                f"{place}: the tag {node.tag.replace(_TAG, '!!')!r} is refused",
                hint="a recipe is data only: mappings, lists, text, numbers, true, false and null",
            )
        if isinstance(node, yaml.SequenceNode):
            todo.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TAG + "str", _TAG + "merge"):
                    written = f" {key.value}" if isinstance(key, yaml.ScalarNode) else ""
                    raise RecipeError(f"{where}, line {line}: the key{written} is not text", hint="quote it")
                if key.value in seen:
                    raise RecipeError(
                        f"{where}, line {line}: {key.value!r} is already given in line {seen[key.value]}",
                        hint="keep one of the two",
                    )
                seen[key.value] = line
                todo += [key, value]
