"""``spiking-lm plugins`` and ``plugins validate``."""

from __future__ import annotations

import json
from typing import Any

TARGETS = """
from spiking_lm import hookimpl
from spiking_lm.records import *

@hookimpl
def spiking_lm_neurons(register):
    register(NeuronSpec(name="fine", config="spiking_lm.config:LIFConfig", factory="spiking_lm.config:LIFConfig"))
    register(NeuronSpec(name="torn", config="spiking_lm.config:LIFConfg", factory="spiking_lm_targets.no:Where"))
    register(NeuronSpec(name="poor", config="a.b:C", factory="a.b:D", extra="chip", requires=("no_such_sdk",)))

@hookimpl
def spiking_lm_recipes(register):
    from pathlib import Path
    register(RecipeSpec(name="targets/gone", path=Path("no-such-file.yaml")))
"""


def test_plugins_can_be_filtered_by_hook(site: Any) -> None:
    for hook in ("models", "spiking_lm_models"):
        names = [record["name"] for record in json.loads(site.cli("plugins", "--json", "--hook", hook).stdout)]
        assert "spikegpt" in names
        assert "good" not in names
    done = site.cli("plugins", "--hook", "modles")
    assert done.returncode == 2
    assert "did you mean 'models'?" in done.stderr


def test_json_has_every_field(site: Any) -> None:
    (good,) = (record for record in site.plugins() if record["name"] == "good")
    seconds = good.pop("seconds")
    assert 0 < seconds < 1
    assert good == {
        "name": "good",
        "distribution": "spiking-lm-good",
        "version": "2.5",
        "api": None,
        "status": "active",
        "hooks": ["spiking_lm_neurons"],
        "reason": None,
        "hint": None,
        "provides": {"neurons": ["good"]},
        "target": "spiking_lm_good",
    }


def test_validate_imports_nothing_unless_told(site: Any) -> None:
    site.add("spiking-lm-targets", TARGETS.replace("no-such-file.yaml", "") + "Path = None", plugin="targets")
    done = site.cli("plugins", "validate", "targets", "--json")
    results = {(item["name"], item["field"]): item["result"] for item in json.loads(done.stdout)["targets"]}
    assert results["torn", "config"] == "not imported"
    assert results["poor", "config"] == "the module 'no_such_sdk' is not installed"
    assert "runs the plugin's code" not in done.stdout


def test_validate_imports_every_target_and_fails_for_a_broken_one(site: Any) -> None:
    site.add("spiking-lm-targets", TARGETS, plugin="targets")
    done = site.cli("plugins", "validate", "targets", "--imports", "--json")
    assert done.returncode == 1
    found = {(item["name"], item["field"]): item for item in json.loads(done.stdout)["targets"]}
    assert {key: item["ok"] for key, item in found.items()} == {
        ("fine", "config"): True,
        ("fine", "factory"): True,
        ("torn", "config"): False,
        ("torn", "factory"): False,
        ("poor", "config"): True,  # a dependency that is absent is no fault of the plugin
        ("poor", "factory"): True,
        ("targets/gone", ""): False,
    }
    assert "LIFConfg" in found["torn", "config"]["result"]
    assert "No module named 'spiking_lm_targets.no'" in found["torn", "factory"]["result"]
    assert found["targets/gone", ""]["result"] == "no such file"
    table = site.cli("plugins", "validate", "targets", "--imports")
    assert table.returncode == 1
    assert table.stdout.startswith("Importing the targets of 'targets': this runs the plugin's code.")


def test_validate_passes_for_a_sound_plugin(site: Any) -> None:
    done = site.cli("plugins", "validate", "good", "--imports")
    assert done.returncode == 0, done.stderr
    assert "good 2.5 (spiking-lm-good): active" in done.stdout


def test_validate_names_what_is_wrong_with_a_failed_plugin(site: Any) -> None:
    site.add("spiking-lm-bad", "1 / 0", plugin="bad")
    done = site.cli("plugins", "validate", "bad")
    assert done.returncode == 3
    assert "error: plugin 'bad' (spiking-lm-bad 1.0) is failed: ZeroDivisionError" in done.stderr
    unknown = site.cli("plugins", "validate", "god")
    assert unknown.returncode == 2
    assert "did you mean 'good'?" in unknown.stderr
