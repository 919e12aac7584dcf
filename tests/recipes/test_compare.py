"""The compare stage: variants are checked before anything runs, are runs of their own, and are not run twice."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from spiking_lm import compare as stage
from spiking_lm import create_model, registry, runs, training
from spiking_lm.errors import (
    DataError,
    InterruptedRunError,
    MissingExtraError,
    RecipeError,
    SpikingLMError,
    UnknownNameError,
)
from spiking_lm.interfaces import Neuron
from spiking_lm.recipe import Recipe, load_recipe, recipes, resolve, variants
from spiking_lm.rundir import RunDir
from spiking_lm.runs import plan, run_recipe

COMPARE = """
compare:
  variants:
    lif: {model.neuron.type: lif}
    box: {model.neuron: {type: norse.lif_box, tau_mem_inv: 500.0}, train.steps: 6}
"""

FRAMEWORKS = """
compare:
  spikes: true
  variants:
    lif: {model.neuron.type: lif}
    box: {model.neuron: {type: norse.lif_box, tau_mem_inv: 500.0}}
    current: {model.neuron: {type: norse.lif, tau_mem_inv: 500.0, tau_syn_inv: 500.0}}
report: {}
"""

SAME_NEURON = {
    "model.neuron": {"compare": ">", "surrogate": {"name": "fast_sigmoid", "alpha": 1.0}},
    "train.steps": 4,
    "evaluate.max_tokens": 100,
}


@pytest.fixture
def comparing(tiny: Path) -> Path:
    """The tiny recipe with two variants."""
    tiny.write_text(tiny.read_text(encoding="utf-8") + COMPARE, encoding="utf-8")
    return tiny


def with_variants(tiny: Path, **values: Any) -> Recipe:
    return load_recipe(tiny, {"compare.variants": values})


# -- before anything runs ----------------------------------------------------------------------------------------------


def test_a_variant_is_the_recipe_with_its_values_in_it(comparing: Path) -> None:
    recipe = load_recipe(comparing)
    lif, box = variants(recipe).values()
    assert lif.name == "tests/tiny/lif"
    assert (lif.train, lif.evaluate, lif.explain) == (recipe.train, recipe.evaluate, recipe.explain)
    assert lif.generate is lif.report is lif.compare is None
    assert lif.model["neuron"] == {**recipe.model["neuron"], "type": "lif"}
    assert lif.model["n_embd"] == 16
    assert box.train is not None
    assert box.train.steps == 6
    assert box.model["neuron"]["type"] == "norse.lif_box"
    assert box.model["neuron"]["tau_mem_inv"] == 500.0
    assert "beta" not in box.model["neuron"]
    assert load_recipe(comparing).compare == recipe.compare


def test_a_variant_of_another_type_has_that_types_own_defaults(comparing: Path, tmp_path: Path) -> None:
    given = {"other": {"model.type": "spikegpt"}, "box": {"model.neuron.type": "norse.lif_box"}}
    written = {"schema": 1, "name": "t", "data": {"type": "austen3"}, "model": {"type": "spikelm", "dropout": 0.2}}
    recipe = resolve({**written, "train": {"steps": 1, "batch_size": 1}, "compare": {"variants": given}})
    alone = resolve({**written, "model": {"type": "spikegpt", "dropout": 0.2}, "train": {"steps": 1, "batch_size": 1}})
    found = variants(recipe)
    assert found["other"].model == alone.model
    assert found["box"].model["neuron"] == {"type": "norse.lif_box", **_defaults("neurons", "norse.lif_box")}
    path = tmp_path / "saved.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe, "what a run keeps is what it ran"
    assert variants(again) == found


def _defaults(kind: str, name: str) -> dict[str, Any]:
    config = registry.get(kind, name).load("config")
    return config().model_dump(mode="json")


def test_a_stage_that_a_variant_changes_is_the_variants_too(tiny: Path) -> None:
    pruned = {"prune": {"sparsity": 0.5, "steps": 4}}
    recipe = load_recipe(tiny, {**pruned, "compare.variants": {"more": {"prune.sparsity": 0.9}, "less": {"seed": 4}}})
    more, less = variants(recipe).values()
    assert recipe.prune is not None
    assert more.prune == recipe.prune.model_copy(update={"sparsity": 0.9})
    assert less.prune is None
    assert less.seed == 4


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"train.lr": 0.1}, RecipeError, "compare.variants.a: train.lr: unknown field 'lr'"),
        ({"train.steps": 0}, RecipeError, "compare.variants.a: train.steps"),
        ({"model.neuron.type": "lfi"}, UnknownNameError, "compare.variants.a: model.neuron.type: .*'lfi'"),
        ({"model": {"neuron": {"type": "norse.lif_box", "beta": 0.5}}}, RecipeError, "a: model.neuron.*'beta'"),
        (
            {"model.neuron": {"type": "norse.lif_box", "alpha": 9}},
            RecipeError,
            "compare.variants.a: model.neuron: .*'super'",
        ),
        ({"compare.spikes": True}, RecipeError, "compare.variants.a: a variant compares nothing in its turn"),
        ({"data.type": "austen4"}, UnknownNameError, "compare.variants.a: data.type"),
        ({"evaluate.metrics": ["loss"]}, UnknownNameError, "compare.variants.a: .*'loss'"),
    ],
)
def test_values_that_do_not_fit_are_named_before_anything_runs(
    tiny: Path, values: dict[str, Any], error: type[SpikingLMError], message: str
) -> None:
    with pytest.raises(error, match=message):
        with_variants(tiny, a=values)


def test_no_variants_and_unsafe_names_are_refused(tiny: Path) -> None:
    for names, message in (({}, "compare.variants"), ({"../up": {}}, "becomes a folder"), ({"a b": {}}, "becomes a")):
        with pytest.raises(RecipeError, match=message):
            load_recipe(tiny, {"compare": {"variants": names}})


def test_a_missing_framework_is_named_with_its_extra(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "norse" else find_spec(name, *rest)
    )
    with pytest.raises(MissingExtraError, match=r"compare.variants.a: .*norse"):
        with_variants(tiny, a={"model.neuron.type": "norse.lif"})
    assert {info.name: info for info in recipes()}["spikegpt/frameworks"].extras == ("egru",)


def test_the_plan_counts_the_parameters_of_variants(comparing: Path) -> None:
    facts = plan(load_recipe(comparing, {"compare.variants.lif": {"model.n_embd": 32}}))
    assert facts["variants"]["box"]["parameters"] == facts["parameters"]
    assert facts["variants"]["lif"]["parameters"] > 2 * facts["parameters"]
    assert not Path("runs").exists()


def test_weights_that_do_not_fit_are_refused_before_training(tiny: Path) -> None:
    for values, message in (
        ({"model.n_embd": 8}, r"variants.a: spikes cannot be compared: .* do not fit it: emb.weight and \d+ others"),
        ({"model.spiking": False}, "it has other spike sites"),
        ({"data.tokenizer.type": "char"}, "do not fit it|other data"),
    ):
        with pytest.raises(RecipeError, match=message):
            run_recipe(tiny, {"compare.spikes": True, "compare.variants": {"a": values}})
        run = RunDir.open("runs/tests/tiny")
        assert run.status == "failed"
        assert not run.manifest["stages"]
        assert not (run.path / "checkpoints").exists()


# -- running -----------------------------------------------------------------------------------------------------------


def test_every_framework_gets_the_same_weights(tiny: Path) -> None:
    tiny.write_text(tiny.read_text(encoding="utf-8") + FRAMEWORKS, encoding="utf-8")
    shown = io.StringIO()
    run = run_recipe(tiny, SAME_NEURON, console=Console(file=shown, width=120))
    result = json.loads((run.path / "compare.json").read_text(encoding="utf-8"))
    names = ["this run", "lif", "box", "current"]
    assert [row["name"] for row in result["runs"]] == names
    for row in result["runs"]:
        assert row["parameters"] == run.manifest["model"]["parameters"]
        assert row["tokens_per_s"] > 0
        assert row["seconds"] > 0
        assert 0 < row["activity"] < 1
    # One neuron, three frameworks, one kernel: training them is the same computation.
    bits = [row["metrics"]["bits_per_byte"] for row in result["runs"]]
    assert bits[0] == bits[1] == bits[2] != bits[3]
    assert result["runs"][2]["neuron"] == "norse.lif_box"
    assert result["runs"][2]["changes"]["model.neuron"]["tau_mem_inv"] == 500.0

    spikes = result["spikes"]
    assert 0 < spikes["rate"] < 1
    rows = {row["name"]: row for row in spikes["runs"]}
    for name in names[:3]:
        assert rows[name]["step"]["different"] == rows[name]["forward"]["different"] == 0, name
    assert 0 < rows["current"]["step"]["different"] == rows["current"]["forward"]["different"] < spikes["spikes"]
    assert all(row[way]["tokens_per_s"] > 0 for row in spikes["runs"] for way in ("step", "forward"))

    for name in names[1:]:
        variant = RunDir.open(run.path / "variants" / name)
        assert variant.status == "complete"
        assert variant.recipe == variants(run.recipe)[name]
    assert run_recipe(None, resume=run.path / "variants" / "lif").status == "complete"

    for words in ("Compared", "The same weights", f"of {spikes['spikes']:,} differ", "norse.lif_box", "equal"):
        assert words in shown.getvalue(), words
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert 'id="compared"' in page
    assert "model.neuron = " in page
    assert "spikegpt, norse.lif_box" in page


def test_a_comparison_that_was_stopped_goes_on_with_the_run(comparing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = training._backward
    trained: list[int] = []

    def backward(model: Any, objective: Any, config: Any, index: int, **options: Any) -> Any:
        trained.append(config.steps)
        if config.steps == 6 and index == 2 and trained.count(6) == 3:
            os.kill(os.getpid(), 2)  # in the second variant
        return original(model, objective, config, index, **options)

    monkeypatch.setattr(training, "_backward", backward)
    with pytest.raises(InterruptedRunError) as caught:
        run_recipe(comparing)
    run = RunDir.open("runs/tests/tiny")
    assert caught.value.hint == f"resume: {run.resume_command}"
    assert run.status == "interrupted"
    assert "explain" in run.manifest["stages"]
    assert "compare" not in run.manifest["stages"]
    lif, box = (RunDir.open(run.path / "variants" / name) for name in ("lif", "box"))
    assert (lif.status, box.status) == ("complete", "interrupted")
    assert not (run.path / "compare.json").exists()

    before = lif.manifest
    trained.clear()
    again = run_recipe(None, resume=run.path)
    assert trained == [6, 6, 6]
    assert lif.manifest == before
    assert (again.status, box.status) == ("complete", "complete")
    rows = json.loads((run.path / "compare.json").read_text(encoding="utf-8"))["runs"]
    assert [row["name"] for row in rows] == ["this run", "lif", "box"]
    assert "spikes" not in json.loads((run.path / "compare.json").read_text(encoding="utf-8"))


def test_a_folder_with_another_run_in_it_is_not_taken_for_the_variant(comparing: Path) -> None:
    run = run_recipe(comparing, {"train": None, "evaluate": None, "generate": None, "explain": None, "compare": None})
    folder = run.path / "variants" / "lif"
    other = load_recipe(comparing)
    RunDir.begin(folder, variants(other)["box"])
    with pytest.raises(DataError, match="is a run of another recipe"):
        stage._run_variants(run, other, Console(file=io.StringIO()))


def test_what_a_run_lacks_is_left_open(tiny: Path) -> None:
    bare = {"train": None, "evaluate": None, "generate": None, "explain": None}
    run = run_recipe(tiny, {**bare, "compare.variants": {"lif": {"model.neuron.type": "lif"}}})
    rows = json.loads((run.path / "compare.json").read_text(encoding="utf-8"))["runs"]
    for row in rows:
        assert row["tokens_per_s"] is row["seconds"] is row["activity"] is None
        assert row["metrics"] == {}
    shown = io.StringIO()
    Console(file=shown, width=100).print(stage.render({"runs": rows}))
    assert "–" in shown.getvalue()


# -- by step -----------------------------------------------------------------------------------------------------------


def test_by_step_every_neuron_goes_through_its_framework_and_then_as_before() -> None:
    model = create_model("spikegpt", vocab_size=8, n_layer=1, n_embd=4)
    stepped: list[Neuron] = []
    for neuron in (module for module in model.modules() if isinstance(module, Neuron)):
        original = neuron.step
        neuron.step = lambda x, state, o=original, n=neuron: (stepped.append(n), o(x, state))[1]  # type: ignore[method-assign]
    tokens = torch.arange(6)[None] % 8
    expected = model(tokens)
    assert not stepped
    with stage.by_step(model):
        found = model(tokens)
    assert len(stepped) == 2 * 6
    assert torch.allclose(found.logits, expected.logits, atol=1e-6)
    with pytest.raises(RuntimeError, match="out"), stage.by_step(model):
        raise RuntimeError("out")
    stepped.clear()
    model(tokens)
    assert not stepped


def test_a_model_without_neurons_has_no_step_of_its_own(tiny: Path) -> None:
    recipe = load_recipe(
        tiny, {"model.spiking": False, "compare.spikes": True, "compare.variants": {"same": {"train.steps": 1}}}
    )
    console = Console(file=io.StringIO())
    data = runs.data_of(recipe, console)
    found = stage.compare_spikes(recipe, runs.build_model(recipe, data), data, console)
    assert [row["step"] for row in found["runs"]] == [None, None]
    assert found["spikes"] == 0
