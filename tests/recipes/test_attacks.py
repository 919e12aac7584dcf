"""Recipes are untrusted files: none may run code, use up the memory, or reach outside its folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spiking_lm import safeyaml
from spiking_lm.errors import RecipeError, UnknownNameError
from spiking_lm.recipe import load_recipe
from spiking_lm.rundir import RunDir

Write = Callable[..., Path]

MINIMAL = "schema: 1\nname: x\ndata: {type: austen3}\nmodel: {type: spikegpt}\n"


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [echo]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!mine 3",
        "!!binary aGk=",
    ],
)
def test_a_tag_that_is_not_plain_data_is_refused(write: Write, tag: str) -> None:
    with pytest.raises(RecipeError, match=r"line 5.*tag .* is refused") as caught:
        load_recipe(write(MINIMAL + f"description: {tag}\n"))
    assert "data only" in (caught.value.hint or "")


def test_an_object_tag_runs_nothing(write: Write, tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(RecipeError):
        load_recipe(write(f"!!python/object/apply:pathlib.Path.touch [{target}]\n"))
    assert not target.exists()


def test_aliases_that_multiply_are_refused_quickly(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    start = time.perf_counter()
    with pytest.raises(RecipeError, match="aliases expanded"):
        load_recipe(write("\n".join(lines)))
    assert time.perf_counter() - start < 5


def test_merge_keys_that_multiply_are_refused(write: Write) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="aliases expanded"):
        load_recipe(write("\n".join(lines)))


def test_an_alias_of_itself_is_refused(write: Write) -> None:
    with pytest.raises(RecipeError, match="aliases expanded"):
        load_recipe(write("a: &a [*a]\n"))


def test_an_ordinary_alias_works() -> None:
    assert safeyaml.parse("a: &x {k: 1}\nb: *x\nc: {<<: *x, m: 2}", where="test") == {
        "a": {"k": 1},
        "b": {"k": 1},
        "c": {"k": 1, "m": 2},
    }


def test_two_mebibytes_are_refused_before_they_are_parsed(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safeyaml, "parse", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        load_recipe(write(b"#" * (2 << 20)))


def test_nesting_without_end_is_refused(write: Write) -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        load_recipe(write("[" * 100_000))


@pytest.mark.parametrize("value", ["os.system", "builtins:eval", "spiking_lm_spikegpt.model:SpikeGPT"])
@pytest.mark.parametrize("slot", ["model", "data", "data.tokenizer", "model.neuron"])
def test_a_dotted_path_is_never_imported(write: Write, slot: str, value: str) -> None:
    before = set(sys.modules)
    with pytest.raises(UnknownNameError, match=slot) as caught:
        load_recipe(write(MINIMAL), [f"{slot}.type={value}"])
    assert "never imported" in (caught.value.hint or "")
    assert caught.value.exit_code == 2
    assert "spiking_lm_spikegpt.model" in before or "spiking_lm_spikegpt.model" not in sys.modules


@pytest.mark.parametrize("name", ["../x", "a/../b", "/etc/x", "a//b", ".hidden", "a/.b", "c:\\x", "a b", "", "x" * 200])
def test_a_name_that_is_no_folder_name_is_refused(write: Write, name: str) -> None:
    with pytest.raises(RecipeError, match="name"):
        load_recipe(write(MINIMAL.replace("name: x", f"name: '{name}'")))


@pytest.mark.parametrize("name", ["../x", "../../etc/passwd", "/etc/passwd", "./recipe"])
def test_the_name_of_a_recipe_is_not_a_path(name: str) -> None:
    with pytest.raises(UnknownNameError):
        load_recipe(name)


@pytest.mark.parametrize("base", ["../other.yaml", "sub/other.yaml", "/etc/other.yaml", "..\\other.yaml"])
def test_extends_stays_in_its_folder(write: Write, tmp_path: Path, base: str) -> None:
    (tmp_path / "sub").mkdir()
    for place in (tmp_path / "other.yaml", tmp_path / "sub" / "other.yaml"):
        place.write_text(MINIMAL)
    with pytest.raises(RecipeError, match="not a file in the same folder"):
        load_recipe(write(f"extends: '{base}'\n", "sub/mine.yaml" if base.startswith("..") else "mine.yaml"))


def test_extends_follows_no_link_out_of_its_folder(write: Write, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "base.yaml").write_text(MINIMAL)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "base.yaml").symlink_to(outside / "base.yaml")
    with pytest.raises(RecipeError, match="same folder"):
        load_recipe(write("extends: base.yaml\n", "inside/mine.yaml"))


def test_a_latest_pointer_cannot_lead_elsewhere(tmp_path: Path) -> None:
    from spiking_lm.errors import DataError

    (tmp_path / "runs").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    (tmp_path / "runs" / "latest").write_text("../")
    with pytest.raises(DataError, match="does not name a run"):
        RunDir.open(tmp_path / "runs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: \xff\xfe\n", "not UTF-8"),
        (b"name: a\x00b\n", "not allowed"),
        ("train:\n\tsteps: 3\n", "line 2"),
        ("- a\n- b\n", "top level is a list"),
        ("", "top level is empty"),
        ("just text", "top level is a str"),
        ("name: x\nname: y\n", "line 2: 'name' is already given in line 1"),
        ("train: {steps: 1, steps: 2}\n", "'steps' is already given"),
        ("no: 3\n", "the key no is not text"),
        ("3: 3\n", "the key 3 is not text"),
        ("? [a]\n: 1\n", "is not text"),
        ("a: [1\n", "line 2"),
        ("--- {}\n--- {}\n", "document"),
        ("a: " + "9" * 5000, "digits"),
    ],
)
def test_malformed_files_are_named_with_the_line(write: Write, text: str | bytes, message: str) -> None:
    path = write(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(path) in caught.value.message


def test_tabs_are_explained(write: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("train:\n\tsteps: 3\n"))
    assert caught.value.hint == "indent with spaces, not with tabs"


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read .*no\.yaml"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_numbers_are_numbers_and_dates_are_text() -> None:
    parsed = safeyaml.parse("{a: 1e-3, b: -2E5, c: 1.5e3, d: 2026-01-01, e: .5, f: 1_000}", where="test")
    assert parsed == {"a": 1e-3, "b": -2e5, "c": 1.5e3, "d": "2026-01-01", "e": 0.5, "f": 1000}
