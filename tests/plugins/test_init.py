"""``spiking-lm init``: what it writes works at once, and it overwrites nothing."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from spiking_lm.cli import init
from spiking_lm.errors import UsageError
from spiking_lm.recipe import load_recipe


@pytest.fixture
def written(site: Any) -> Path:
    """The package that ``init plugin`` writes, in the folder that :class:`Site` runs in."""
    done = site.cli("init", "plugin", "my-toy")
    assert done.returncode == 0, done.stderr
    return Path(site.elsewhere) / "spiking-lm-my-toy"


@pytest.mark.slow
def test_the_package_installs_and_its_tests_pass(site: Any, written: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", str(site.path), str(written)], check=True, timeout=120)
    assert site.plugin("my-toy")["status"] == "active"
    assert site.cli("plugins", "validate", "my-toy", "--imports").returncode == 0
    tests = site.python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(written), OMP_NUM_THREADS="1")
    assert tests.returncode == 0, tests.stdout
    passed = int(tests.stdout.split(" passed")[0].split()[-1])
    assert passed > 25, "the conformance kit ran"
    code = "from spiking_lm.recipe import load_recipe; load_recipe('spikegpt/quickstart', ['model.neuron.type=my-toy'])"
    shipped_recipe_with_it = site.python("-c", code)
    assert shipped_recipe_with_it.returncode == 0, shipped_recipe_with_it.stderr


@pytest.mark.slow
def test_the_package_is_complete_and_clean(site: Any, written: Path) -> None:
    files = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "pyproject.toml",
        "src/spiking_lm_my_toy/__init__.py",
        "src/spiking_lm_my_toy/config.py",
        "src/spiking_lm_my_toy/neuron.py",
        "src/spiking_lm_my_toy/py.typed",
        "tests/test_neuron.py",
    }
    for path in written.rglob("*.py"):
        assert "$" not in path.read_text(), f"{path} has an unfilled place"
        compile(path.read_text(), path, "exec")
    ruff = site.python("-m", "ruff", "check", "--isolated", "--line-length=120", str(written))
    assert ruff.returncode == 0, ruff.stdout
    mypy = site.python(
        *("-m", "mypy", "--strict", "--cache-dir", str(site.elsewhere / "cache"), str(written / "src")),
        MYPYPATH=str(written / "src"),
    )
    assert mypy.returncode == 0, mypy.stdout


def test_no_framework_is_imported_to_list_it(site: Any, written: Path) -> None:
    code = "import sys, spiking_lm_my_toy, spiking_lm_my_toy.config; assert 'torch' not in sys.modules"
    done = site.python("-c", code, PYTHONPATH=str(written / "src"))
    assert done.returncode == 0, done.stderr


def test_names_that_are_close_to_ours_work(site: Any) -> None:
    names = ("neuron", "spike", "x", "a1-b2", "torch")
    for name in names:
        init.plugin(name, site.path)
    sources = [str(site.path / f"spiking-lm-{name}" / "src") for name in names]
    modules = ", ".join(f"spiking_lm_{name.replace('-', '_')}.neuron" for name in names)
    loaded = site.python("-c", f"import sys; sys.path += {sources!r}; import {modules}")
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("My-Toy", "lower-case"),
        ("my_toy", "lower-case"),
        ("-toy", "lower-case"),
        ("toy-", "lower-case"),
        ("to--y", "lower-case"),
        ("1toy", "begin with a letter"),
        ("../toy", "lower-case"),
        ("toy/two", "lower-case"),
        ("", "lower-case"),
        ("$name", "lower-case"),
        ("é", "lower-case"),
        ("a" * 51, "lower-case"),
        ("spiking-lm-toy", "leave out 'spiking-lm-'"),
        ("spikegpt", "my-spikegpt"),
        ("lif", "my-lif"),
        ("core", "my-core"),
    ],
)
def test_bad_plugin_names_are_refused(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match="name") as caught:
        init.plugin(name, tmp_path)
    assert hint in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_name_is_a_usage_error_of_the_command(site: Any) -> None:
    done = site.cli("init", "plugin", "My-Toy")
    assert done.returncode == 2
    assert done.stderr.startswith("error: bad plugin name 'My-Toy'\nhint: ")
    assert list(site.elsewhere.iterdir()) == []


def test_an_existing_folder_is_left_alone(site: Any, written: Path) -> None:
    (written / "pyproject.toml").write_text("mine")
    done = site.cli("init", "plugin", "my-toy")
    assert done.returncode == 2
    assert "spiking-lm-my-toy exists already" in done.stderr
    assert (written / "pyproject.toml").read_text() == "mine"


def test_another_folder_can_be_chosen(site: Any) -> None:
    done = site.cli("init", "plugin", "toy", "--dir", "some where/deep")
    assert done.returncode == 0, done.stderr
    assert (site.elsewhere / "some where" / "deep" / "spiking-lm-toy" / "pyproject.toml").is_file()
    assert "cd 'some where/deep/spiking-lm-toy'" in done.stdout


@pytest.mark.parametrize("name", ["first", "2026", "null", "1e5", "a_b-C"])
def test_the_recipe_validates(tmp_path: Path, name: str) -> None:
    init.recipe(name, tmp_path)
    path = tmp_path / f"{name}.yaml"
    assert load_recipe(path).name == name
    text = path.read_text()
    assert {"train", "evaluate", "generate", "explain", "report"} < set(yaml.safe_load(text)), "every stage is shown"
    assert text.count("#") > 15, "it is commented"
    with pytest.raises(UsageError, match="exists already"):
        init.recipe(name, tmp_path)
    assert path.read_text() == text


def test_the_recipe_verb_says_what_comes_next(site: Any) -> None:
    done = site.cli("init", "recipe", "first", "--dir", "my recipes")
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-2].strip()
    assert command == "spiking-lm recipes validate 'my recipes/first.yaml'"
    assert site.cli(*shlex.split(command)[1:]).returncode == 0


@pytest.mark.parametrize("name", ["a/b", "../a", ".hidden", "a b", "", "a.yaml", "x" * 101, "-x"])
def test_bad_recipe_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="bad recipe name"):
        init.recipe(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
