"""Every way in which an installed plugin can go wrong, with real distributions and a host in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest

NEURON = 'NeuronSpec(name="{}", config="spiking_lm.config:LIFConfig", factory="spiking_lm.neurons:LIF")'


def offering(name: str) -> str:
    """A plugin that registers one neuron."""
    return f"""
from spiking_lm import hookimpl
from spiking_lm.records import *

@hookimpl
def spiking_lm_neurons(register):
    register({NEURON.format(name)})
"""


def from_models_hook(body: str) -> str:
    """A plugin whose models hook has this body."""
    return f"""
from spiking_lm import hookimpl
from spiking_lm.records import *

@hookimpl
def spiking_lm_models(register):
    {body}
"""


BROKEN: dict[str, tuple[str, str, str]] = {
    # what is wrong: source, a part of the reason, a part of the hint
    "import error": (
        "import no_such_module_anywhere",
        "No module named 'no_such_module_anywhere'",
        "install what provides",
    ),
    "exit at import": ("import sys; sys.exit(3)", "sys.exit(3)", "SPIKING_LM_BLOCK=bad"),
    "exit without code": ("raise SystemExit", "sys.exit()", "SPIKING_LM_BLOCK=bad"),
    "raises at import": ("1 / 0", "ZeroDivisionError: division by zero", "SPIKING_LM_STRICT=1"),
    "syntax error": ("def broken(:\n    pass", "SyntaxError", "SPIKING_LM_STRICT=1"),
    "null bytes": ("\0", "null bytes", "SPIKING_LM_BLOCK=bad"),
    "misspelled hook": (
        from_models_hook("pass").replace("spiking_lm_models", "spiking_lm_modelz"),
        "unknown hook 'spiking_lm_modelz'",
        "did you mean 'spiking_lm_models'?",
    ),
    "unmarked hook": (
        from_models_hook("pass").replace("@hookimpl", ""),
        "not marked as a hook",
        "@spiking_lm.hookimpl",
    ),
    "wrong argument": (from_models_hook("pass").replace("(register)", "(registry)"), "registry", "SPIKING_LM_STRICT=1"),
    "raising hook": (
        from_models_hook("raise RuntimeError('no chip')"),
        "RuntimeError: no chip",
        "SPIKING_LM_BLOCK=bad",
    ),
    "exit in hook": (from_models_hook("raise SystemExit('bye')"), "sys.exit('bye')", "SPIKING_LM_BLOCK=bad"),
    "not a record": (from_models_hook("register({'name': 'x'})"), "type 'dict'", "spiking_lm.records"),
    "wrong kind": (
        from_models_hook(f"register({NEURON.format('x')})"),
        "spiking_lm_models registered the NeuronSpec 'x'",
        "a NeuronSpec belongs in spiking_lm_neurons",
    ),
    "bad record name": (
        from_models_hook(f"register({NEURON.format('Bad Name')})"),
        "bad name 'Bad Name'",
        "lower-case",
    ),
    "bad target": (
        from_models_hook("register(ModelSpec(name='x', config='os.system(1)', factory='a:b'))"),
        "'config' is 'os.system(1)'",
        "package.module:attribute",
    ),
    "missing field": (from_models_hook("register(ModelSpec(name='x'))"), "TypeError", "SPIKING_LM_STRICT=1"),
    "same record twice": (
        from_models_hook("[register(ModelSpec(name='x', config='a:b', factory='a:b')) for _ in 'ab']"),
        "registered 'x' twice",
        "its own name",
    ),
    "asks the registry": (
        "import spiking_lm.registry\nspiking_lm.registry.plugins()",
        "while plugins were being loaded",
        "inside the function",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_fails_alone(site: Any, what: str) -> None:
    source, reason, hint = BROKEN[what]
    site.add("spiking-lm-bad", source, plugin="bad", version="0.3")
    record = site.plugin("bad")
    assert (record["distribution"], record["version"], record["status"]) == ("spiking-lm-bad", "0.3", "failed")
    assert reason in record["reason"]
    assert hint in record["hint"]
    assert record["provides"] == {}


def test_the_reason_names_file_and_line(site: Any) -> None:
    site.add("spiking-lm-bad", from_models_hook("raise RuntimeError('no chip')"), plugin="bad")
    assert "spiking_lm_bad/__init__.py, line 7)" in site.plugin("bad")["reason"].replace("\\", "/")


def test_records_registered_before_a_hook_failed_are_withdrawn(site: Any) -> None:
    site.add("spiking-lm-bad", offering("half") + "    raise ValueError('then this')", plugin="bad")
    assert site.plugin("bad")["provides"] == {}
    done = site.python("-c", "from spiking_lm import registry; registry.get('neurons', 'half')")
    assert "unknown neuron 'half'" in done.stderr
    assert "this one is from a plugin that did not load: plugin 'bad' is failed: ValueError: then this" in done.stderr


def test_the_name_of_a_built_in_plugin_cannot_be_stolen(site: Any) -> None:
    site.add("aaa-thief", offering("loot"), plugin="spikegpt")
    record = site.plugin("spikegpt")
    assert (record["distribution"], record["status"]) == ("aaa-thief", "failed")
    assert record["reason"] == "the plugin name 'spikegpt' is taken by spiking-lm"
    assert "aaa-thief" in record["hint"]
    done = site.python(
        "-c", "from spiking_lm import registry; print(registry.get('models', 'spikegpt').plugin.distribution)"
    )
    assert done.stdout.strip() == "spiking-lm"


@pytest.mark.parametrize("name", ["lif", "spikegpt"], ids=["record", "plugin's name"])
def test_the_name_of_a_built_in_record_cannot_be_stolen(site: Any, name: str) -> None:
    site.add("aaa-thief", offering(name) + f"    register({NEURON.format('loot')})", plugin="aaa")
    record = site.plugin("aaa")
    assert record["status"] == "failed"
    assert f"the neuron name {name!r} is taken by" in record["reason"]
    assert "spiking-lm" in record["reason"]
    done = site.python(
        "-c",
        "from spiking_lm import registry as r; print({n: e.plugin.distribution for n, e in r.all('neurons').items()})",
    )
    assert "'lif': 'spiking-lm'" in done.stdout
    assert "aaa-thief" not in done.stdout


def test_blocking_a_built_in_does_not_free_its_name(site: Any) -> None:
    source = from_models_hook("register(ModelSpec(name='spikegpt', config='a:b', factory='a:b'))")
    site.add("aaa-thief", source, plugin="aaa")
    record = site.plugin("aaa", SPIKING_LM_BLOCK="spikegpt")
    assert record["status"] == "failed"
    assert "the model name 'spikegpt' is taken by spiking-lm" in record["reason"]


def test_a_command_cannot_take_the_name_of_a_verb(site: Any) -> None:
    source = from_models_hook("register(CommandSpec(name='train', function='a:b'))").replace("_models", "_commands")
    site.add("aaa-thief", source, plugin="aaa")
    assert "the command name 'train' is taken by spiking-lm" in site.plugin("aaa")["reason"]


def test_two_strangers_with_one_record_name_are_both_refused_it(site: Any) -> None:
    site.add("spiking-lm-one", offering("same"), plugin="one")
    site.add(
        "spiking-lm-two", offering("same") + f"    register({NEURON.format('other')})", plugin="two", version="7.1"
    )
    one, two = site.plugin("one"), site.plugin("two")
    assert "its neuron 'same' is refused" in one["reason"]
    assert "'two' (spiking-lm-two 7.1)" in one["reason"]
    assert "'one' (spiking-lm-one 1.0)" in two["reason"]
    assert "SPIKING_LM_BLOCK=one or SPIKING_LM_BLOCK=two" in one["hint"]
    assert (one["status"], one["provides"]) == ("failed", {"neurons": []}), "nothing of it is left"
    assert (two["status"], two["provides"]) == ("active", {"neurons": ["other"]})
    done = site.python("-c", "from spiking_lm import registry; registry.get('neurons', 'same')")
    assert (
        "neuron 'same' is claimed by the plugins 'one' (spiking-lm-one 1.0) and 'two' (spiking-lm-two 7.1)"
        in done.stderr
    )
    assert site.plugin("one", SPIKING_LM_BLOCK="two")["provides"] == {"neurons": ["same"]}


def test_three_strangers_with_one_record_name_are_all_refused_it(site: Any) -> None:
    for name in ("one", "two", "zero"):
        site.add(f"spiking-lm-{name}", offering("same"), plugin=name)
    records = [record for record in site.plugins() if record["name"] in {"one", "two", "zero"}]
    assert [record["status"] for record in records] == ["failed"] * 3
    assert "'one'" in records[2]["reason"]
    assert "'two'" in records[2]["reason"]


def test_two_strangers_with_one_plugin_name_are_both_refused(site: Any) -> None:
    site.add("spiking-lm-one", offering("one"), plugin="same")
    site.add("spiking-lm-two", offering("two"), plugin="same")
    records = [record for record in site.plugins() if record["name"] == "same"]
    assert [record["status"] for record in records] == ["failed", "failed"]
    for record in records:
        assert "spiking-lm-one 1.0 and spiking-lm-two 1.0" in record["reason"]
        assert "pip uninstall spiking-lm-one" in record["hint"]


@pytest.mark.parametrize(
    ("declared", "hint"),
    [
        ("2", "pip install --upgrade spiking-lm"),
        ("0", "pip install --upgrade spiking-lm-bad"),
        ("'1.0'", "spiking-lm-bad"),
    ],
)
def test_another_api_version_is_incompatible(site: Any, declared: str, hint: str) -> None:
    site.add("spiking-lm-bad", offering("future") + f"\nSPIKING_LM_API = {declared}", plugin="bad")
    record = site.plugin("bad")
    assert record["status"] == "incompatible"
    assert f"plugin API {declared}" in record["reason"]
    assert record["hint"].endswith(hint)


def test_a_slow_plugin_works_and_is_pointed_out(site: Any) -> None:
    site.add(
        "spiking-lm-slow", "import time; time.sleep(0.6)" + offering("slow") + "    time.sleep(0.6)", plugin="slow"
    )
    record = site.plugin("slow")
    assert (record["status"], record["provides"]) == ("active", {"neurons": ["slow"]})
    assert record["seconds"] >= 1.2
    assert "s to load" in record["hint"]
    assert "slow: active\n  hint: it takes" in site.cli("plugins").stdout


def test_a_missing_extra_makes_a_plugin_unavailable(site: Any) -> None:
    needs = offering("chip").replace('name="chip"', 'name="chip", extra="hw", requires=("no_such_sdk",)')
    site.add("spiking-lm-chip", needs, plugin="chip")
    record = site.plugin("chip")
    assert record["status"] == "unavailable"
    assert record["reason"] == "the module 'no_such_sdk' is not installed"
    assert record["hint"] == "pip install 'spiking-lm-chip[hw]'"
    assert record["provides"] == {"neurons": ["chip"]}
    done = site.python("-c", "import spiking_lm; spiking_lm.create_neuron('chip')")
    assert (
        "MissingExtraError: neuron 'chip' needs the extra 'hw' (the module 'no_such_sdk' is not installed)"
        in done.stderr
    )
    assert "pip install 'spiking-lm-chip[hw]'" in done.stderr


def test_a_wrong_python_makes_a_plugin_unavailable(site: Any) -> None:
    needs = offering("old").replace('name="old"', 'name="old", extra="old", requires=("python<3",)')
    site.add("spiking-lm-old", needs, plugin="old")
    record = site.plugin("old")
    assert record["status"] == "unavailable"
    assert "Python <3 is needed" in record["reason"]
    assert record["hint"] == "use an environment with Python <3", "pip would install nothing and say nothing"


def test_one_module_under_two_names_is_told_plainly(site: Any) -> None:
    site.add(
        "spiking-lm-twin",
        offering("twin"),
        plugin="",
        entry_points="[spiking_lm]\na = spiking_lm_twin\nb = spiking_lm_twin\n",
    )
    assert site.plugin("a")["status"] == "active"
    record = site.plugin("b")
    assert record["status"] == "failed"
    assert record["reason"] == "'spiking_lm_twin' is already loaded as plugin 'a'"


@pytest.mark.parametrize(
    "target", ["spiking_lm_bad:nothing", "spiking_lm_bad.nowhere", "not a target!", "no_such_package"]
)
def test_an_entry_point_that_leads_nowhere(site: Any, target: str) -> None:
    site.add("spiking-lm-bad", offering("x"), plugin="bad", target=target)
    record = site.plugin("bad")
    assert record["status"] == "failed"
    assert record["hint"]


def test_a_malformed_entry_points_file_hides_no_plugin(site: Any) -> None:
    site.add("spiking-lm-bad", offering("x"), plugin="", entry_points="[spiking_lm]\nthis line has no equals sign\n")
    site.add("unrelated", "", plugin="", entry_points="[console_scripts]\nneither has this\n")
    record = site.plugin("spiking-lm-bad")
    assert record["status"] == "failed"
    assert "malformed" in record["reason"]


@pytest.mark.parametrize("metadata", [None, "Metadata-Version: 2.1\n"], ids=["no METADATA", "no name"])
def test_a_half_removed_distribution_is_shown_as_unknown(site: Any, metadata: str | None) -> None:
    site.add("spiking-lm-half", offering("half"), plugin="half")
    path = site.path / "spiking_lm_half-1.0.dist-info" / "METADATA"
    path.unlink() if metadata is None else path.write_text(metadata)
    record = site.plugin("half")
    assert (record["status"], record["distribution"], record["version"]) == ("active", "unknown", None)


def test_a_plugin_without_hooks_is_asked_whether_it_means_that(site: Any) -> None:
    site.add("spiking-lm-empty", "", plugin="empty")
    record = site.plugin("empty")
    assert record["status"] == "active"
    assert record["reason"] == "it implements no hook"
    assert "'spiking_lm_empty'" in record["hint"]


def test_what_a_plugin_prints_does_not_spoil_the_json(site: Any) -> None:
    site.add("spiking-lm-loud", "print('HELLO')" + offering("loud") + "    print('AGAIN')", plugin="loud")
    done = site.cli("plugins", "--json")
    assert {"loud", "good"} <= {record["name"] for record in json.loads(done.stdout)}
    assert "HELLO" in done.stderr
    assert "AGAIN" in done.stderr


def test_the_table_shows_the_reason_and_the_hint(site: Any) -> None:
    site.add("spiking-lm-bad", "raise OSError('no driver [/dev/x]')", plugin="bad", version="0.3")
    done = site.cli("plugins")
    assert done.returncode == 0
    row = next(line for line in done.stdout.splitlines() if "spiking-lm-bad" in line)
    assert row.split() == ["bad", "0.3", "spiking-lm-bad", "failed"]
    assert "bad: OSError: no driver [/dev/x]" in done.stdout
    assert "  hint: see the traceback" in done.stdout


def test_strict_mode_raises_and_names_the_plugin(site: Any) -> None:
    site.add("spiking-lm-bad", "1 / 0", plugin="bad")
    done = site.cli("plugins", SPIKING_LM_STRICT="1")
    assert done.returncode == 3
    assert done.stderr.startswith("error: plugin 'bad' (spiking-lm-bad 1.0): ZeroDivisionError")
    assert "Traceback" in site.cli("--debug", "plugins", SPIKING_LM_STRICT="1").stderr


def test_a_verb_that_needs_no_plugin_works_beside_a_broken_one(site: Any) -> None:
    site.add("spiking-lm-bad", "import sys; sys.exit(3)", plugin="bad")
    for arguments in (["--help"], ["--version"], ["plugins", "validate", "core"]):
        done = site.cli(*arguments)
        assert done.returncode == 0, done.stderr


def test_listing_imports_no_torch_and_no_framework(site: Any) -> None:
    code = """
import sys
from spiking_lm.cli import main
try:
    main(["plugins", "--json"])
except SystemExit as stop:
    assert stop.code == 0
heavy = {"torch", "numpy", "snntorch", "norse", "tokenizers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = site.python("-c", code)
    assert done.returncode == 0, done.stderr


def test_discovery_is_quick(site: Any) -> None:
    code = """
import time
from spiking_lm import registry
best = 9.0
for _ in range(3):
    start = time.perf_counter()
    registry.PluginManager()
    best = min(best, time.perf_counter() - start)
print(best)
"""
    assert float(site.python("-c", code).stdout) < 0.1
