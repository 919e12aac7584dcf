"""What the verbs print with: a console that suits its destination, tables, and JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from spiking_lm.manifest import plain

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
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")


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


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested facts as rows of a table; large whole numbers get thousands separators."""
    rows: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", f"{value:,}" if isinstance(value, int) else value))
    return rows
