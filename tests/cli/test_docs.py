"""docs/recipes.md and docs/cli.md say what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from spiking_lm import safeyaml
from spiking_lm.cli import VERBS, _load_verb
from spiking_lm.recipe import load_recipe, resolve
from spiking_lm.stages import STAGES


@pytest.fixture(scope="module")
def recipes_page(root: Path) -> str:
    return (root / "docs" / "recipes.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cli_page(root: Path) -> str:
    return (root / "docs" / "cli.md").read_text(encoding="utf-8")


def test_the_recipe_of_the_page_is_valid_and_has_every_stage(recipes_page: str, tmp_path: Path) -> None:
    whole, _, extending = re.findall(r"```yaml\n(.*?)```", recipes_page, re.DOTALL)
    recipe = resolve(safeyaml.parse(whole, where="docs/recipes.md"))
    assert [stage for stage in STAGES if getattr(recipe, stage) is None] == ["convert"]  # it stands instead of train
    (tmp_path / "longer.yaml").write_text(extending, encoding="utf-8")
    assert load_recipe(tmp_path / "longer.yaml").report is None


def test_every_verb_is_on_the_page(cli_page: str) -> None:
    table = cli_page.partition("| verb |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == set(VERBS)


def test_every_command_on_the_pages_is_accepted(cli_page: str, recipes_page: str) -> None:
    commands = re.findall(r"^(?:echo .*\| )?spiking-lm (.+?)(?: +#.*)?$", cli_page + recipes_page, re.MULTILINE)
    assert len(commands) > 12
    for command in commands:
        words = shlex.split(command)
        verb = _load_verb(words[0])
        rest = words[1:]
        if hasattr(verb, "commands"):
            verb, rest = verb.commands[rest[0]], rest[1:]
        verb.make_context(words[0], rest)  # parses; raises for an option that does not exist
