"""The manager itself, with plugins made on the spot."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spiking_lm import hookimpl, hookspecs, registry
from spiking_lm.errors import MissingExtraError, PluginError, UnknownNameError
from spiking_lm.records import CommandSpec, DoctorSpec, ModelSpec, NeuronSpec, RecipeSpec, Record
from spiking_lm.registry import PluginManager

CONFIG = "spiking_lm.config:LIFConfig"


def plugin(*specs: Record, name: str = "made", **attributes: Any) -> types.ModuleType:
    """A module that registers these records, each in the hook of its kind."""
    module = types.ModuleType(name)
    for kind in {spec.kind for spec in specs}:

        def hook(register: Callable[[Record], None], kind: str = kind) -> None:
            for spec in specs:
                if spec.kind == kind:
                    register(spec)

        setattr(module, f"spiking_lm_{kind}", hookimpl(hook))
    vars(module).update(attributes)
    return module


def neuron(name: str, **fields: Any) -> NeuronSpec:
    return NeuronSpec(name=name, **{"config": CONFIG, "factory": "spiking_lm.neurons:LIF", **fields})


@pytest.fixture
def manager() -> PluginManager:
    """A manager that found nothing and raises what goes wrong."""
    return PluginManager(discover=False, strict=True)


@pytest.fixture
def default() -> Iterator[PluginManager]:
    """An empty manager in the place of the default one."""
    new = PluginManager(discover=False)
    previous = registry.set_manager(new)
    yield new
    registry.set_manager(previous)


def test_kinds_are_the_hooks() -> None:
    kinds = "models neurons kernels backends datasets tokenizers recipes metrics converters commands benchmarks doctor"
    assert " ".join(registry.KINDS) == kinds
    classes = {cls.kind for cls in Record.__subclasses__()}
    assert classes == set(registry.KINDS), "every hook has a record class and every record class a hook"


def test_without_discovery_nothing_is_there() -> None:
    manager = PluginManager(discover=False)
    assert manager.plugins() == []
    assert all(manager.all(kind) == {} for kind in registry.KINDS)


def test_first_party_discovery_finds_the_core_first() -> None:
    found = PluginManager(discover="first-party").plugins()
    assert found[0].name == "core"
    assert {record.distribution for record in found} == {"spiking-lm"}


def test_records_are_sorted_and_know_their_plugin(manager: PluginManager) -> None:
    record = manager.register(
        plugin(neuron("b"), neuron("a")), "letters", distribution="spiking-lm-letters", version="3"
    )
    assert list(manager.all("neurons")) == ["a", "b"]
    entry = manager.get("neurons", "a")
    assert entry.plugin is record
    assert record.origin == "spiking-lm-letters 3"
    assert (record.status, record.provides, record.hooks) == ("active", {"neurons": ["b", "a"]}, ["spiking_lm_neurons"])


def test_an_object_with_methods_is_a_plugin_too(manager: PluginManager) -> None:
    class Plugin:
        @hookimpl
        def spiking_lm_neurons(self, register: Callable[[Record], None]) -> None:
            register(neuron("from-a-method"))

    manager.register(Plugin(), "object")
    assert list(manager.all("neurons")) == ["from-a-method"]


def test_a_hook_may_ignore_its_argument_and_an_optional_hook_may_be_unknown(manager: PluginManager) -> None:
    module = plugin()
    module.spiking_lm_neurons = hookimpl(lambda: None)  # type: ignore[attr-defined]
    module.spiking_lm_holograms = hookimpl(lambda: None, optionalhook=True)  # type: ignore[attr-defined]
    assert manager.register(module, "cautious").hooks == ["spiking_lm_neurons"]


def test_unknown_names_offer_the_nearest(manager: PluginManager) -> None:
    manager.register(plugin(neuron("adlif")), "x")
    with pytest.raises(UnknownNameError, match="unknown neuron 'adlf'") as caught:
        manager.get("neurons", "adlf")
    assert caught.value.hint == "did you mean 'adlif'?"
    with pytest.raises(UnknownNameError, match="did you mean 'neurons'"):
        manager.get("neuron", "adlif")


def test_a_blocked_namesake_is_named_when_its_model_is_asked_for() -> None:
    manager = PluginManager(discover="first-party", block=["spikegpt"])
    with pytest.raises(UnknownNameError, match="plugin 'spikegpt' is blocked: it is in the block list"):
        manager.get("models", "spikegpt")


def test_only_and_block_never_touch_the_core() -> None:
    for manager in (
        PluginManager(discover="first-party", only=[]),
        PluginManager(discover="first-party", block=["core"]),
    ):
        assert manager.plugins()[0].status == "active"
    only = {record.name: record.status for record in PluginManager(only=[]).plugins()}
    assert only.pop("core") == "active"
    assert set(only.values()) == {"blocked"}


def test_a_plugin_asked_for_that_is_not_installed_is_named() -> None:
    records = {record.name: record for record in PluginManager(only=["spikgpt"]).plugins()}
    assert records["spikgpt"].status == "failed"
    assert records["spikgpt"].hint == "did you mean 'spikegpt'?"
    assert records["spikegpt"].status == "blocked"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {"core": "active", "spikegpt": "active"}),
        ({"SPIKING_LM_PLUGINS": ""}, {"core": "active", "spikegpt": "blocked"}),
        ({"SPIKING_LM_PLUGINS": " spikegpt , "}, {"core": "active", "spikegpt": "active"}),
        ({"SPIKING_LM_BLOCK": "spikegpt,x"}, {"core": "active", "spikegpt": "blocked"}),
    ],
    ids=str,
)
def test_the_environment_decides(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: dict[str, str]
) -> None:
    for name in ("PLUGINS", "BLOCK", "STRICT"):
        monkeypatch.delenv(f"SPIKING_LM_{name}", raising=False)
    for name, value in {"SPIKING_LM_NO_PLUGINS": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    status = {record.name: record.status for record in PluginManager.from_environment().plugins()}
    assert {name: status[name] for name in expected} == expected


def test_no_plugins_leaves_strangers_alone(site: Any) -> None:
    site.add("spiking-lm-bad", "raise KeyboardInterrupt  # would stop the host", plugin="bad")
    names = {record["name"] for record in site.plugins(SPIKING_LM_NO_PLUGINS="1")}
    assert {"core", "spikegpt"} <= names
    assert not {"bad", "good"} & names
    assert "good" not in site.cli("--no-plugins", "plugins").stdout


def test_trace_tells_each_hook_call(capsys: pytest.CaptureFixture[str]) -> None:
    manager = PluginManager(discover=False, trace=True)
    manager.register(plugin(neuron("a"), neuron("b")), "letters")
    assert capsys.readouterr().err.startswith("trace: plugin letters: spiking_lm_neurons registered a, b (")


def test_strict_raises_a_dispute_too(manager: PluginManager) -> None:
    manager.register(plugin(neuron("a")), "one")
    with pytest.raises(PluginError, match="its neuron 'a' is refused, because plugin 'two'"):
        manager.register(plugin(neuron("a")), "two")


def test_two_plugins_cannot_have_one_name(manager: PluginManager) -> None:
    manager.register(plugin(neuron("a")), "one")
    with pytest.raises(PluginError, match="there is already a plugin 'one'"):
        manager.register(plugin(neuron("b")), "one")
    assert list(manager.all("neurons")) == ["a"], "the first is left alone"


def test_a_failed_plugin_can_be_registered_once_it_is_mended() -> None:
    manager = PluginManager(discover=False)
    broken = plugin(neuron("a"))
    broken.spiking_lm_modelz = hookimpl(lambda register: None)  # type: ignore[attr-defined]
    assert manager.register(broken, "x").status == "failed"
    assert manager.all("neurons") == {}
    del broken.spiking_lm_modelz  # type: ignore[attr-defined]
    assert manager.register(broken, "x").status == "active", "neither name nor module is still taken"


def test_an_odd_object_disturbs_nobody_else(manager: PluginManager) -> None:
    class Odd:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("compare me not")

        @hookimpl
        def spiking_lm_commands(self, register: Callable[[Record], None]) -> None:
            register(CommandSpec(name="odd", function="a:b"))

    PluginManager(discover=False).register(Odd(), "odd")
    for before, after in ((Odd(), plugin(neuron("a"))), (plugin(neuron("b")), Odd())):
        fresh = PluginManager(discover=False)
        fresh.register(before, "before")
        fresh.register(after, "after")
        module = next(record for record in fresh.plugins() if record.hooks == ["spiking_lm_neurons"])
        assert module.status == "active"


# -- loading targets ---------------------------------------------------------------------------------------------------


def test_load_imports_the_target(manager: PluginManager) -> None:
    from spiking_lm.config import LIFConfig

    manager.register(plugin(neuron("a")), "x")
    assert manager.get("neurons", "a").load("config") is LIFConfig


def test_a_missing_requirement_is_a_missing_extra(manager: PluginManager) -> None:
    manager.register(plugin(neuron("a", extra="chip", requires=("no_such_sdk",))), "x", distribution="spiking-lm")
    entry = manager.get("neurons", "a")
    assert entry.missing() == "the module 'no_such_sdk' is not installed"
    with pytest.raises(MissingExtraError, match=r"pip install 'spiking-lm\[chip\]'"):
        entry.load("factory")


def test_a_missing_requirement_without_extra_is_named(manager: PluginManager) -> None:
    manager.register(plugin(neuron("a", requires=("no_such_sdk", "json"))), "x")
    with pytest.raises(PluginError, match="cannot be used here") as caught:
        manager.get("neurons", "a").load("factory")
    assert caught.value.hint == "install what provides 'no_such_sdk'"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("import no_such_sdk", MissingExtraError, "No module named 'no_such_sdk'"),
        ("from targets_of_a_test import nothing", PluginError, "cannot import name 'nothing'"),
        ("raise SystemExit(4)", PluginError, r"sys.exit\(4\)"),
        ("1 / 0", PluginError, "ZeroDivisionError"),
        ("Nuron = 1", PluginError, "did you mean 'Nuron'"),
    ],
    ids=["extra", "own import", "exit", "raises", "no such attribute"],
)
def test_a_broken_target_names_record_and_plugin(
    manager: PluginManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    error: type[PluginError],
    message: str,
) -> None:
    (tmp_path / "targets_of_a_test.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    manager.register(plugin(neuron("a", factory="targets_of_a_test:Neuron", extra="chip")), "x", distribution="dist")
    with pytest.raises(error, match=message) as caught:
        manager.get("neurons", "a").load("factory")
    sys.modules.pop("targets_of_a_test", None)
    assert type(caught.value) is error
    assert "neuron 'a'" in caught.value.message
    assert "dist" in str(caught.value.hint)


def test_a_target_that_was_not_given_is_an_error(manager: PluginManager) -> None:
    manager.register(plugin(ModelSpec(name="m", config=CONFIG, factory="a:b")), "x")
    with pytest.raises(PluginError, match="model 'm' has no importer"):
        manager.get("models", "m").load("importer")


def test_some_records_lacking_an_extra_leave_the_plugin_active(manager: PluginManager) -> None:
    fine, poor = neuron("fine"), neuron("poor", extra="chip", requires=("no_such_sdk",))
    record = manager.register(plugin(fine, poor), "x", distribution="dist", version="1")
    assert record.status == "active"
    assert record.error == "poor cannot be used here: the module 'no_such_sdk' is not installed"
    assert record.hint == "pip install 'dist[chip]'"


def test_a_recipe_beside_an_unusable_model_does_not_make_a_plugin_active(
    manager: PluginManager, tmp_path: Path
) -> None:
    model = ModelSpec(name="m", config=CONFIG, factory="a:b", extra="chip", requires=("no_such_sdk",))
    record = manager.register(plugin(model, RecipeSpec(name="m/small", path=tmp_path)), "m")
    assert record.status == "unavailable"
    assert set(manager.all("recipes")) == {"m/small"}


@pytest.mark.parametrize(
    ("need", "met"), [("python>=3.10", True), ("python<3.10", False), ("python>=3.10,<3.10.1", None)]
)
def test_python_versions_can_be_required(manager: PluginManager, need: str, met: bool | None) -> None:
    manager.register(plugin(neuron("a", requires=(need,))), "x")
    missing = manager.get("neurons", "a").missing()
    expected = sys.version_info[:3] == (3, 10, 0) if met is None else met
    assert (missing is None) == expected


# -- the default manager -----------------------------------------------------------------------------------------------


def test_module_functions_ask_the_default_manager(default: PluginManager) -> None:
    default.register(plugin(neuron("a"), DoctorSpec(name="d", function="a:b")), "x")
    assert registry.get("neurons", "a").spec.name == "a"
    assert list(registry.all("doctor")) == ["d"]
    assert [record.name for record in registry.plugins()] == ["x"]
    assert registry.manager() is default


def test_the_default_manager_is_built_once(default: PluginManager) -> None:
    registry.set_manager(None)
    assert registry.manager() is registry.manager()


def test_every_hookspec_takes_exactly_register() -> None:
    for hook in registry.HOOKS:
        assert list(inspect.signature(getattr(hookspecs, hook)).parameters) == ["register"]
