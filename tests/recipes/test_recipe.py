"""Loading, extending, overriding and checking recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import spiking_lm
from spiking_lm import safeyaml
from spiking_lm.errors import MissingExtraError, PluginError, RecipeError, UnknownNameError
from spiking_lm.recipe import json_schema, load_recipe, recipes, resolve
from spiking_lm.stages import STAGES

Write = Callable[..., Path]

BASE = """\
schema: 1
name: base
data: {type: austen3}
model: {type: spikegpt, n_layer: 2, neuron: {type: snntorch.leaky, beta: 0.9, threshold: 0.7}}
train: {steps: 10, batch_size: 2, optimizer: {lr: 0.01, weight_decay: 0.1}}
evaluate: {window: 64}
"""


def test_every_shipped_recipe_is_valid_and_survives_its_resolved_form(tmp_path: Path) -> None:
    listed = recipes()
    assert "spikegpt/quickstart" in [info.name for info in listed]
    for info in listed:
        assert info.error is None
        recipe = load_recipe(info.name)
        assert recipe.name == info.name
        path = tmp_path / "resolved.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(path) == recipe


def test_shipped_recipes_can_be_copied_anywhere() -> None:
    for info in recipes():
        base = safeyaml.read(info.path).get("extends", "")
        assert not base.endswith((".yaml", ".yml")), f"{info.name} extends a file that a copy would not find"


def test_shipped_recipes_begin_with_a_comment_that_says_what_they_are() -> None:
    for info in recipes():
        assert info.path.read_text(encoding="utf-8").startswith("# "), info.name
        assert info.description, info.name


def test_checking_a_recipe_imports_no_torch() -> None:
    code = (
        "import sys; from spiking_lm.recipe import load_recipe, recipes; load_recipe('spikegpt/quickstart'); recipes()"
    )
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)


def test_the_public_name_is_the_same_function() -> None:
    assert spiking_lm.recipes is recipes


def test_defaults_are_filled_in(write: Write) -> None:
    recipe = load_recipe(write(BASE))
    assert recipe.data["tokenizer"] == {"type": "byte"}
    assert recipe.model["n_embd"] == 512
    assert recipe.model["neuron"]["surrogate"] == {"name": "atan", "alpha": 2.0}
    assert "vocab_size" not in recipe.model
    assert "num_classes" not in recipe.model


# -- wrong fields -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("steps: 10", "step: 10", "train.step", "did you mean 'steps'?"),
        ("n_layer: 2", "n_layres: 2", "model: unknown field 'n_layres'", "did you mean 'n_layer'?"),
        ("beta: 0.9", "bta: 0.9", "model.neuron: unknown field 'bta'", "did you mean 'beta'?"),
        ("type: austen3", "type: austen3, pth: x", "data: unknown field 'pth'", None),
        ("steps: 10", "steps: many", "train.steps", None),
        ("steps: 10", "steps: 1.5", "train.steps", None),
        ("lr: 0.01", "lr: .nan", "train.optimizer.lr", None),
        ("lr: 0.01", "lr: -1", "train.optimizer.lr", None),
        ("n_layer: 2", "n_layer: 0", "model: n_layer", None),
        ("schema: 1", "schema: 2", "schema", None),
        ("name: base\n", "", "name", None),
        ("{type: austen3}", "austen3", "data", None),
        ("{type: austen3}", "{path: x}", "data: the field 'type' is missing", None),
    ],
)
def test_a_wrong_field_is_named_with_file_and_path(
    write: Write, old: str, new: str, message: str, hint: str | None
) -> None:
    assert old in BASE
    path = write(BASE.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in caught.value.message
    assert path.name in caught.value.message
    if hint:
        assert caught.value.hint == hint


def test_an_unknown_type_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"model\.type: unknown model 'spikegtp'") as caught:
        resolve(safeyaml.parse(BASE.replace("spikegpt", "spikegtp"), where="test"))
    assert "did you mean 'spikegpt'?" in (caught.value.hint or "")


def test_a_required_plugin_that_is_missing_is_a_plugin_error(write: Write) -> None:
    with pytest.raises(PluginError, match="needs the plugin 'spikegtp', which is not installed") as caught:
        load_recipe(write(BASE + "requires: [spikegtp]\n"))
    assert caught.value.exit_code == 3
    assert "spikegpt" in (caught.value.hint or "")


def test_a_missing_extra_is_said_with_its_command(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "snntorch", None)
    with pytest.raises(MissingExtraError) as caught:
        load_recipe(write(BASE))
    assert caught.value.exit_code == 3
    assert "pip install 'spiking-lm[spikegpt]'" in (caught.value.hint or "")
    info = next(info for info in recipes() if info.name == "spikegpt/quickstart")
    assert info.extras == ("spikegpt",)


# -- extends ----------------------------------------------------------------------------------------------------------


def test_extends_merges_mapping_by_mapping(write: Write) -> None:
    write(BASE, "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nname: mine\ntrain: {optimizer: {lr: 0.5}}\nevaluate: null\n"))
    assert recipe.name == "mine"
    assert recipe.train is not None
    assert (recipe.train.steps, recipe.train.optimizer.lr, recipe.train.optimizer.weight_decay) == (10, 0.5, 0.1)
    assert recipe.evaluate is None


def test_extends_takes_a_registered_name(write: Write) -> None:
    recipe = load_recipe(write("extends: spikegpt/quickstart\nname: mine\ntrain: {steps: 7}\n"))
    assert recipe.train is not None
    assert recipe.train.steps == 7
    assert recipe.model["n_layer"] == load_recipe("spikegpt/quickstart").model["n_layer"]


def test_another_type_takes_nothing_from_the_base(write: Write) -> None:
    write(BASE, "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nmodel: {neuron: {type: lif}}\n"))
    assert recipe.model["neuron"]["type"] == "lif"
    assert (recipe.model["neuron"]["beta"], recipe.model["neuron"]["threshold"]) == (0.5, 1.0)
    assert recipe.model["n_layer"] == 2


def test_the_same_type_again_keeps_the_rest(write: Write) -> None:
    write(BASE, "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nmodel: {type: spikegpt, n_embd: 32}\n"))
    assert (recipe.model["n_layer"], recipe.model["n_embd"]) == (2, 32)


def test_extends_goes_one_level(write: Write) -> None:
    write(BASE, "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    write("extends: self.yaml\n", "self.yaml")
    with pytest.raises(RecipeError, match=r"itself extends 'a\.yaml'"):
        load_recipe(write("extends: b.yaml\n"))
    with pytest.raises(RecipeError, match="itself extends"):
        load_recipe(write("extends: self.yaml\n", "self.yaml"))
    with pytest.raises(RecipeError, match="one recipe"):
        load_recipe(write("extends: [a.yaml]\n"))


# -- overrides --------------------------------------------------------------------------------------------------------


def document() -> dict[str, object]:
    return dict(safeyaml.parse(BASE, where="test"))


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=25", ("train", "steps"), 25),
        ("train.optimizer.lr=1e-4", ("train", "optimizer", "lr"), 1e-4),
        ("train.optimizer.betas=[0.8, 0.9]", ("train", "optimizer", "betas"), (0.8, 0.9)),
        ("train.grad_clip=null", ("train", "grad_clip"), None),
        ("train.precision=bf16", ("train", "precision"), "bf16"),
        ("generate.prompt=no", ("generate", "prompt"), "no"),
        ("generate.prompt=12", ("generate", "prompt"), "12"),
        ("generate.prompt=a: b = c", ("generate", "prompt"), "a: b = c"),
        ('generate.prompt="line\\n"', ("generate", "prompt"), "line\n"),
        ("generate.prompt=", ("generate", "prompt"), ""),
        ("generate.stop=[x, y]", ("generate", "stop"), ["x", "y"]),
        ("name=123", ("name",), "123"),
        ("report={}", ("report", "raster_tokens"), 200),
        (" train.steps = 5", ("train", "steps"), 5),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(override: str, path: tuple[str, ...], value: object) -> None:
    found: object = resolve(document(), [override])
    for key in path:
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("train.lr=1", "unknown field 'lr'", "did you mean 'train.optimizer.lr'?"),
        ("n_layer=3", "unknown field 'n_layer'", "did you mean 'model.n_layer'?"),
        ("train.step=4", "unknown field 'step'", "did you mean 'steps'?"),
        ("model.n_layres=4", "unknown field 'n_layres'", "did you mean 'n_layer'?"),
        ("model.neuron.bta=4", "unknown field 'bta'", "did you mean 'beta'?"),
        ("data.tokeniser.type=char", "unknown field 'tokeniser'", "did you mean 'tokenizer'?"),
        ("train.steps=abc", "valid integer", None),
        ("train.precision=fp8", "fp32", None),
        ("train.optimizer=3", "train.optimizer=3", None),
        ("train.steps.x=3", "unknown field 'x'", None),
        ("steps", "cannot be understood", "write --set path.to.field=value"),
        ("=3", "cannot be understood", None),
        ("a..b=3", "cannot be understood", None),
        ("name=../x", "a name becomes a folder", None),
        ("train.steps=!!python/name:os.system", "valid integer", None),
    ],
)
def test_a_wrong_override_is_explained(override: str, message: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(document(), [override])
    assert message in caught.value.message
    if hint:
        assert caught.value.hint == hint


def test_setting_another_type_keeps_what_the_new_one_knows() -> None:
    neuron = resolve(document(), ["model.neuron.type=lif"]).model["neuron"]
    assert (neuron["type"], neuron["beta"], neuron["threshold"]) == ("lif", 0.9, 0.7)
    data = resolve(document(), ["data.type=text", "data.path=x.txt", "data.valid=0.2"]).data
    assert data == {"type": "text", "path": "x.txt", "valid": 0.2, "test": 0.05, "tokenizer": {"type": "byte"}}
    back = {**document(), "data": {**data, "tokenizer": {"type": "char"}}}
    assert resolve(back, ["data.type=austen3"]).data["tokenizer"]["type"] == "char"
    assert set(resolve(back, ["data.type=austen3"]).data) == {"type", "tokenizer"}


def test_a_type_is_set_before_its_fields_whatever_the_order() -> None:
    tokenizer = resolve(document(), ["data.tokenizer.vocab_size=300", "data.tokenizer.type=bpe"]).data["tokenizer"]
    assert (tokenizer["type"], tokenizer["vocab_size"]) == ("bpe", 300)


def test_a_field_of_a_default_neuron_can_be_set() -> None:
    bare = document()
    bare["model"] = {"type": "spikegpt"}
    neuron = resolve(bare, ["model.neuron.beta=0.25"]).model["neuron"]
    assert (neuron["type"], neuron["beta"]) == ("snntorch.leaky", 0.25)


def test_overrides_may_be_a_mapping() -> None:
    recipe = resolve(document(), {"train": {"steps": 3}, "model.neuron": {"type": "lif", "beta": 0.1}, "seed": 5})
    assert recipe.train is not None
    assert (recipe.train.steps, recipe.seed, recipe.model["neuron"]["beta"]) == (3, 5, 0.1)
    with pytest.raises(RecipeError, match="unknown field 'stepz'"):
        resolve(document(), {"train": {"stepz": 3}})


def test_resolving_leaves_the_document_alone() -> None:
    before = document()
    resolve(before, ["train.steps=99", "model.neuron.type=lif"])
    assert before == document()


def test_the_json_schema_knows_what_is_installed() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert {"extends", "schema", "data", "model", *STAGES} <= set(schema["properties"])
    models = schema["$defs"]["models"]["oneOf"]
    spikegpt = next(option for option in models if option["properties"]["type"] == {"const": "spikegpt"})
    assert "vocab_size" not in spikegpt["required"]
    assert spikegpt["properties"]["neuron"] == {"$ref": "#/$defs/neurons"}

    def references(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [ref for item in value.values() for ref in references(item)]
        return [ref for item in value for ref in references(item)] if isinstance(value, list) else []

    for reference in references(schema):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]
