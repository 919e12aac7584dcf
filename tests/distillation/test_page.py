"""docs/distillation.md is true: its recipes are valid, its commands are accepted, and it names every loss."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from spiking_lm import distillation, safeyaml
from spiking_lm.cli import _load_verb
from spiking_lm.recipe import resolve
from spiking_lm.stages import DISTILLATION_LOSSES


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs" / "distillation.md").read_text(encoding="utf-8")


def test_the_recipes_are_valid(page: str) -> None:
    recipes = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = [resolve(safeyaml.parse(text, where="docs/distillation.md")) for text in recipes]
    assert [recipe.name for recipe in found] == ["mine/distilled", "mine/general", "mine/masked"]


def test_the_commands_are_accepted(page: str) -> None:
    commands = re.findall(r"^spiking-lm (.+)$", page, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        verb, *words = shlex.split(command)
        _load_verb(verb).make_context(verb, words)


def test_every_loss_and_function_is_there(page: str) -> None:
    table = page.partition("| loss |")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == DISTILLATION_LOSSES
    for name in re.findall(r"`(\w+_loss|soft_cross_entropy|layer_pairs|Teacher)", page.partition("## In Python")[2]):
        assert hasattr(distillation, name)
