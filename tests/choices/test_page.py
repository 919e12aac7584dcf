"""docs/evaluation.md is true: its commands are accepted, and its tables name every protocol and layout."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from spiking_lm.cli import _load_verb
from spiking_lm.data.questions import LAYOUTS
from spiking_lm.evaluation import LOGITS_AT_ONCE, SUSPICIOUS_RATIO
from spiking_lm.stages import EvaluateConfig


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_every_command_is_accepted(page: str) -> None:
    commands = re.findall(r"^spiking-lm eval (.+)$", page, re.MULTILINE)
    assert len(commands) > 3
    for command in commands:
        _load_verb("eval").make_context("eval", shlex.split(command))


def test_the_tables_are_complete(page: str) -> None:
    text, choices = page.split("## Multiple choice")
    protocols = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert tuple(protocols) == get_args(EvaluateConfig.model_fields["protocol"].annotation)
    rows = {row.split("|")[1].strip().lower(): row for row in re.findall(r"^\| [A-Z].*$", choices, re.MULTILINE)}
    assert set(rows) == set(LAYOUTS)
    for task, layout in LAYOUTS.items():
        assert all(f"`{field}`" in rows[task] for field in layout.fields)
        assert ("acc_norm" in rows[task]) == layout.normalised


def test_its_numbers_are_those_of_the_code(page: str) -> None:
    assert f"Below {SUSPICIOUS_RATIO} the table says so" in page
    assert f"{LOGITS_AT_ONCE * 4 // 2**20} MiB of logits" in page
