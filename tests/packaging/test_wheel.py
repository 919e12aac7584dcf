"""The wheel and the sdist: everything that is needed is in them, nothing else is, and the installed wheel works."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="building needs the extra dev")

PACKAGES = {
    "spiking_lm",
    "spiking_lm_spikegpt",
    "spiking_lm_egru",
    "spiking_lm_spikellm",
    "spiking_lm_bitspike",
    "spiking_lm_spikelm",
    "spiking_lm_spinnaker2",
    "spiking_lm_lava",
    "spiking_lm_triton",
}

SMOKE = """
import json, sys
import spiking_lm, spiking_lm_spikegpt
from spiking_lm import data, registry
from spiking_lm.recipe import load_recipe
heavy = "torch" in sys.modules
print(json.dumps({
    "home": [spiking_lm.__file__, spiking_lm_spikegpt.__file__],
    "plugins": {p.name: [p.status, p.distribution, p.version] for p in spiking_lm.plugins()},
    "recipes": {r.name: [str(r.path), r.error] for r in spiking_lm.recipes()},
    "heavy": heavy,
    "text": data.load({"type": "austen3"}).describe(),
}))
load_recipe("spikegpt/quickstart")
"""


def hatch(root: Path, out: Path, *targets: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *targets]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hatch(root, tmp_path_factory.mktemp("wheel"), "-t", "wheel")


@pytest.fixture(scope="module")
def sdist(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hatch(root, tmp_path_factory.mktemp("sdist"), "-t", "sdist")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def text(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(name))).decode()


def tracked(root: Path, *patterns: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (root / name).exists()]


def test_every_source_file_is_in_the_wheel(root: Path, wheel: Path) -> None:
    sources = tracked(root, "src/*", "plugins/*", "hw/*")
    missing = [name for name in sources if name.partition("/")[2] not in names(wheel)]
    assert not missing
    assert any(name.startswith("spiking_lm/data/embedded/") for name in names(wheel))


def test_every_recipe_is_in_the_wheel(root: Path, wheel: Path) -> None:
    recipes = tracked(root, "recipes/*.yaml")
    assert recipes
    assert {f"spiking_lm/_recipes/{name.removeprefix('recipes/')}" for name in recipes} <= names(wheel)


def test_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    rubbish = re.compile(r"__pycache__|\.pyc$|\.tmp-|\.yaml\.orig|\.DS_Store|\.so$")
    assert not [name for name in names(wheel) if rubbish.search(name)]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 10_000_000


def test_typed_licensed_and_described(root: Path, wheel: Path) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= names(wheel)
    metadata = email.message_from_string(text(wheel, ".dist-info/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    for name in ("LICENSE", "NOTICE"):
        assert text(wheel, f".dist-info/licenses/{name}") == (root / name).read_text(encoding="utf-8")
    assert metadata["Requires-Python"] == ">=3.10"
    extras = {"spikegpt", "egru", "spinnaker2", "nir", "report", "all", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_entry_points(wheel: Path) -> None:
    points = text(wheel, ".dist-info/entry_points.txt")
    assert "[console_scripts]\nspiking-lm = spiking_lm.cli:main" in points
    assert "\n[spiking_lm]\n" in points
    assert "\ncore = spiking_lm.builtin\n" in points
    assert "[pytest11]\nspiking_lm = spiking_lm.testing.pytest_plugin" in points


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
        if sys.version_info >= (3, 12):
            archive.extractall(tmp_path, filter="data")
        else:
            archive.extractall(tmp_path)
    assert {"Makefile", "noxfile.py", "tests/conftest.py", "docs/checkpoints.md", "SECURITY.md"} <= members
    assert not [name for name in members if name.startswith(("runs/", ".git/", ".venv/"))]
    (unpacked,) = tmp_path.iterdir()
    again = hatch(unpacked, tmp_path / "out", "-t", "wheel")
    assert names(again) == names(wheel)


def use(folder: Path, *paths: Path) -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPIKING_LM")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run([sys.executable, "-c", SMOKE], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_the_installed_wheel_works_far_from_the_repository(root: Path, wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:  # what installing a pure wheel comes to
        archive.extractall(site)
    (tmp_path / "elsewhere").mkdir()
    found = use(tmp_path / "elsewhere", site)
    assert all(str(path).startswith(str(site)) for path in found["home"])  # type: ignore[attr-defined]
    assert found["plugins"]["core"] == ["active", "spiking-lm", version(root)]  # type: ignore[index]
    assert found["plugins"]["spikegpt"][1:] == ["spiking-lm", version(root)]  # type: ignore[index]
    for path, error in found["recipes"].values():  # type: ignore[attr-defined]
        assert path.startswith(str(site / "spiking_lm/_recipes"))
        assert error is None
    assert not found["heavy"]


def test_the_editable_install_works_far_from_the_repository(root: Path, tmp_path: Path) -> None:
    direct = importlib.metadata.distribution("spiking-lm").read_text("direct_url.json")
    if not direct or not json.loads(direct).get("dir_info", {}).get("editable"):
        pytest.skip("the tests do not run on an editable install")
    found = use(tmp_path)
    shipped = {name.removeprefix("recipes/").removesuffix(".yaml") for name in tracked(root, "recipes/*.yaml")}
    assert shipped <= set(found["recipes"])  # type: ignore[call-overload]
    for path, error in found["recipes"].values():  # type: ignore[attr-defined]
        assert Path(path).is_relative_to(root)
        assert error is None
    assert not found["heavy"]


def version(root: Path) -> str:
    found = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found[1]


def test_one_version_everywhere(root: Path, wheel: Path) -> None:
    from spiking_lm import __version__

    assert version(root) == __version__
    assert wheel.name.startswith(f"spiking_lm-{__version__}-")
    headings = re.findall(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_python_3_10_can_parse_every_file(root: Path) -> None:
    for name in tracked(root, "*.py"):
        ast.parse((root / name).read_text(encoding="utf-8"), name, feature_version=(3, 10))
