"""The documentation of the hooks is true: signatures, fields, and every example run as a real distribution."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from spiking_lm import hookspecs, registry
from spiking_lm.provenance import Status
from spiking_lm.records import Record

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {cls.kind: cls for cls in Record.__subclasses__()}


def page(kind: str) -> str:
    return (ROOT / "docs" / "hooks" / f"{kind}.md").read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield language, first line and text of each code block."""
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield language, body.split("\n")[0].removeprefix("# "), body


def test_every_hook_has_a_page_and_every_page_a_hook() -> None:
    assert {path.stem for path in (ROOT / "docs" / "hooks").glob("*.md")} == set(registry.KINDS)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_page_states_the_exact_signature_and_every_field(kind: str) -> None:
    text = page(kind)
    hook = getattr(hookspecs, f"spiking_lm_{kind}")
    parameters = inspect.signature(hook)
    assert text.startswith(
        f"# `spiking_lm_{kind}`\n\n```python\nspiking_lm_{kind}{str(parameters).replace(chr(39), '')}\n```\n"
    )
    assert f"`spiking_lm.records.{CLASSES[kind].__name__}`" in text
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == {field.name for field in dataclasses.fields(CLASSES[kind])}


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_example_in_the_docstring_runs_and_is_that_of_the_page(kind: str) -> None:
    hook = getattr(hookspecs, f"spiking_lm_{kind}")
    (test,) = doctest.DocTestFinder(recurse=False).find(hook, globs={"hookimpl": hookspecs.hookimpl})
    results = doctest.DocTestRunner().run(test, clear_globs=False)
    assert results.attempted >= 2
    assert results.failed == 0
    plugin = types.ModuleType("example")
    vars(plugin).update(test.globs)
    record = registry.PluginManager(discover=False, strict=True).register(plugin, "example")
    (name,) = record.provides[kind]
    assert f'"{name}"' in page(kind) or f"name: {name}" in page(kind)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_example_of_the_page_works_as_an_installed_plugin(site: Any, kind: str) -> None:
    found = list(blocks(page(kind)))
    site.add("demo", "", plugin="demo")
    for _, name, body in found:
        if name.startswith("demo/") or name.startswith("test_"):
            path = site.path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(body, encoding="utf-8")
    checked = site.cli("plugins", "validate", "demo", "--imports")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert site.plugin("demo")["hooks"] == [f"spiking_lm_{kind}"]
    tried = 0
    for language, name, body in found:
        if name == "try it":
            done = site.python("-W", "error", "-c", body, OMP_NUM_THREADS="1")
            assert done.returncode == 0, done.stderr
            tried += 1
        if language == "console":
            for command, expected in sessions(body):
                done = site.cli(*command.removeprefix("spiking-lm ").split())
                assert done.stdout + done.stderr == expected
                tried += 1
    assert tried, "the page shows the example in use"
    if (site.path / "test_demo.py").exists():
        tests = site.python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(site.path / "test_demo.py"))
        assert tests.returncode == 0, tests.stdout


def sessions(body: str) -> Iterator[tuple[str, str]]:
    """Yield command and output of a console block."""
    for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


@pytest.mark.slow
def test_the_tutorial_is_true(site: Any) -> None:
    """Write the files of docs/plugins.md in order, run its commands, compare what they print; ``...`` is anything."""
    shutil.rmtree(site.path / "spiking_lm_good-2.5.dist-info")
    project, checker = site.elsewhere / "spiking-lm-delta", doctest.OutputChecker()
    installed = False
    for language, name, body in blocks((ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")):
        if language != "console":
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_text(body, encoding="utf-8")
            continue
        for command, expected in sessions(body):
            if command == "pip install --quiet -e .":
                options = f"--no-deps --no-build-isolation --no-index --target '{site.path}'"
                command, installed = command.replace("-e .", f"{options} ."), True
            elif installed:  # --target knows no editable installation
                shutil.copytree(project / "spiking_lm_delta", site.path / "spiking_lm_delta", dirs_exist_ok=True)
            done = site.shell(command, project)
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert checker.check_output(expected, done.stdout + done.stderr, flags), (command, done.stdout, done.stderr)
    tests = site.shell("pytest -q", project)
    assert tests.returncode == 0, tests.stdout


def test_the_tutorial_lists_every_hook() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    for kind in registry.KINDS:
        assert f"| `spiking_lm_{kind}` | `{CLASSES[kind].__name__}` | [{kind}](hooks/{kind}.md) |" in text
    for status in get_args(Status):
        assert f"| `{status}` |" in text
