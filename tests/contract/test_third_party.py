"""A stranger's package beside the host: its own tests, and SpikeGPT with its neuron from a shipped recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECIPE = "spikegpt/quickstart"
SHORT = {
    "model.n_layer": 2,
    "model.n_embd": 32,
    "train.steps": 6,
    "train.batch_size": 2,
    "train.seq_len": 32,
    "train.log_every": 2,
    "train.eval_every": 0,
    "train.eval_tokens": 256,
    "evaluate.max_tokens": 512,
    "generate.max_new_tokens": 20,
    "explain.tokens": 128,
}


@pytest.fixture(scope="module")
def package(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, so that building it leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("source") / "spiking-lm-adlif"
    shutil.copytree(root / "examples/spiking-lm-adlif", copy, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return copy


@pytest.fixture(scope="module")
def environment(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The example, installed into a folder of its own, and the environment in which that folder is seen."""
    pytest.importorskip("hatchling", reason="building the example needs hatchling (it is in the extra 'dev')")
    target = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*install, "--target", target, package], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SPIKING_LM_")}
    path = os.pathsep.join(filter(None, [str(target), inherited.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def spiking_lm(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from spiking_lm.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_it_is_listed_without_importing_torch(environment: dict[str, str], tmp_path: Path) -> None:
    done = spiking_lm("plugins", "--json", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    listed = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    ours = listed["adlif"]
    assert (ours["distribution"], ours["version"], ours["status"]) == ("spiking-lm-adlif", "0.1.0", "active")
    assert ours["provides"] == {"neurons": ["adlif"]}
    look = "import sys; from spiking_lm.registry import get; get('neurons', 'adlif'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], env=environment, cwd=tmp_path, check=False).returncode == 0


def test_its_own_tests_pass(environment: dict[str, str], package: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


def test_an_unchanged_recipe_runs_with_its_neuron(environment: dict[str, str], root: Path, tmp_path: Path) -> None:
    shipped = (root / "recipes" / f"{RECIPE}.yaml").read_bytes()
    overrides = [f"--set={key}={value}" for key, value in {"model.neuron.type": "adlif", **SHORT}.items()]
    done = spiking_lm("run", RECIPE, "--out", "run", *overrides, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / "recipes" / f"{RECIPE}.yaml").read_bytes() == shipped

    run = next(path.parent for path in (tmp_path / "run").rglob("manifest.json"))
    resolved = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    assert (resolved["model"]["neuron"]["type"], resolved["model"]["neuron"]["rho"]) == ("adlif", 0.9)
    assert resolved["train"]["steps"] == 6
    manifest = (run / "manifest.json").read_text(encoding="utf-8")
    assert "spiking-lm-adlif" in manifest

    code = (
        "import sys, torch\n"
        "from spiking_lm import load_model\n"
        "from spiking_lm.checkpoints import resolve_model\n"
        "from spiking_lm_adlif.neuron import AdLIF, AdLIFState\n"
        "model = load_model(resolve_model(sys.argv[1]))\n"
        "neurons = [m for m in model.modules() if isinstance(m, AdLIF)]\n"
        "assert len(neurons) == 4 and all(n.size == 32 for n in neurons), neurons\n"
        "learned = [torch.nn.functional.softplus(n.raw_strength) - n.config.strength for n in neurons]\n"
        "assert any((change.abs() > 1e-4).any() for change in learned), 'its parameters were never trained'\n"
        "output = model(torch.randint(0, 256, (2, 40)), return_spikes=True)\n"
        "states = [s for block in output.state for s in block.neurons.values()]\n"
        "assert all(isinstance(s, AdLIFState) for s in states) and len(states) == 4\n"
        "for name, spikes in output.spikes.items():\n"
        "    print(name, float(spikes.mean()))\n"
        "assert any((s.a > 0).any() for s in states), 'no neuron fired'\n"
    )
    checked = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_without_the_package_the_name_is_unknown_and_the_exit_code_says_usage(tmp_path: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SPIKING_LM_")}
    done = spiking_lm("run", RECIPE, "--set", "model.neuron.type=adlif", cwd=tmp_path, env=clean)
    assert done.returncode == 2
    assert "adlif" in done.stderr
    assert not list(tmp_path.rglob("manifest.json"))
