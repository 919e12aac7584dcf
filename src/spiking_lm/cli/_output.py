"""What the verbs print with: a console that suits its destination, tables, and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_WIDE = 160
"""Columns when nobody watches: a pipe or a log file has no edge to wrap at."""


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    watched = stream is not None and stream.isatty()
    width = None if watched or "COLUMNS" in os.environ else _WIDE
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


console = _console(stderr=False)
"""Standard output. Colour and live displays appear on a terminal only, and never when NO_COLOR is set."""
errors = _console(stderr=True)
"""Standard error, for remarks beside a result that another program may read."""


def print_json(value: Any) -> None:
    """Print ``value`` as JSON on standard output: ASCII, so that any console takes it; not-a-number becomes null."""
    sys.stdout.write(json.dumps(jsonable(value), indent=2) + "\n")


def jsonable(value: Any) -> Any:
    """Return ``value`` in JSON's types: records become objects, paths strings, NaN and infinities null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(jsonable(item) for item in value)
    if isinstance(value, Iterable) and not isinstance(value, (bytes, Path)):
        return [jsonable(item) for item in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        return jsonable(value.item())
    return str(value)


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; cells are shown as they are (brackets are not markup), and numbers are right-aligned."""
    cells = [list(row) for row in rows]
    grid = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(isinstance(row[index], (int, float)) for row in cells)
        grid.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        grid.add_row(*(_cell(value) for value in row))
    console.print(grid)


def _cell(value: Any) -> RenderableType:
    if isinstance(value, Text):
        return value
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    return Text("" if value is None else str(value))
