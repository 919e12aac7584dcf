"""Whole runs: hidden tokens, a model that starts from another, distillation of a text and of labelled examples."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import contract_encoders as toys
import pytest
import torch
from rich.console import Console

import spiking_lm
from spiking_lm import data, load_model, save_model
from spiking_lm.data import Tokenizer
from spiking_lm.data.reduced import ReducedTokenizer
from spiking_lm.distillation import Teacher, embed_as_teacher, embedding_table
from spiking_lm.errors import CheckpointError, ConfigError, DataError, RecipeError, UsageError
from spiking_lm.preparation import build_model, data_of
from spiking_lm.pruning import prune
from spiking_lm.recipe import Recipe, resolve
from spiking_lm.rundir import RunDir
from spiking_lm.stages import PruneConfig
from spiking_lm.training import train

TEXT = "the cat sat home . the dog ran far away .\n" * 120
INTERNAL = {"representation": 1.0, "attention": 1.0}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def quiet() -> Console:
    return Console(file=io.StringIO())


def recipe(corpus: dict[str, Any], train: dict[str, Any], **more: Any) -> Recipe:
    small = {"type": "toy-encoder", "n_layer": 2, "n_embd": 12, "n_head": 2, **more.pop("model", {})}
    settings = {"steps": 6, "batch_size": 4, "seq_len": 12, "log_every": 1, "eval_tokens": 200, **train}
    return resolve({"schema": 1, "name": "tests/toy", "data": corpus, "model": small, "train": settings, **more})


def run_training(asked: Recipe, **options: Any) -> tuple[RunDir, Any]:
    run = RunDir.create(asked, Path("runs"))
    corpus = data_of(asked, quiet())
    return run, train(run, asked, build_model(asked, corpus), corpus, console=quiet(), **options)


def text_data(tmp_path: Path, tokenizer: dict[str, Any]) -> dict[str, Any]:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return {"type": "text", "path": str(path), "tokenizer": tokenizer}


def labelled_data(labelled: Path, **tokenizer: Any) -> dict[str, Any]:
    return {"type": "tsv", "path": str(labelled), "tokenizer": {"type": "model", **tokenizer}}


def losses(run: RunDir) -> list[float]:
    return [entry["loss"] for entry in run.metrics() if entry["split"] == "train"]


# -- hidden tokens -----------------------------------------------------------------------------------------------------


def test_an_encoder_learns_hidden_tokens_and_is_scored_on_them(tmp_path: Path) -> None:
    words = {"type": "word", "mask": True, "eos": False}
    asked = {"steps": 400, "batch_size": 16, "objective": {"type": "masked"}, "log_every": 25, "eval_tokens": 2000}
    asked |= {"optimizer": {"lr": 0.01}, "schedule": {"warmup": 20}}
    more = {"evaluate": {"window": 12, "split": "test"}, "explain": {"tokens": 32}, "model": {"n_embd": 24}}
    corpus = text_data(tmp_path, words) | {"valid": 0.2, "test": 0.2}
    document = recipe(corpus, asked, **more)
    run = spiking_lm.run_recipe(_written(document, tmp_path), out="runs", console=quiet())
    seen = losses(run)
    assert sum(seen[-3:]) < 0.6 * 3 * seen[0]
    assert set(run.metrics()[1]["rates"]) == {"layers.0.spikes", "layers.1.spikes"}
    valid = [entry for entry in run.metrics() if entry["split"] == "valid"][-1]
    assert valid["masked_accuracy"] > 0.5, "the most frequent of the ten words is a fifth of the text"
    result = json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))
    assert result["task"] == "masked"
    assert set(result["metrics"]) == {"masked_perplexity", "masked_accuracy"}, "no perplexity of a causal model"
    assert 1 < result["metrics"]["masked_perplexity"] < 10
    assert "predicted from both sides" in result["protocol"]
    assert 0 < result["activity"]["mean"] < 1


def _written(document: Recipe, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(document.to_yaml(), encoding="utf-8")
    return path


def test_the_score_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    from spiking_lm.evaluation import evaluate
    from spiking_lm.stages import EvaluateConfig

    corpus = data.load(text_data(tmp_path, {"type": "word", "mask": True}))
    model = toys.toy_encoder(vocab_size=corpus.tokenizer.vocab_size)
    results = [evaluate(model, corpus, EvaluateConfig(window=10, batch_size=size))["metrics"] for size in (1, 7)]
    assert results[0]["masked_perplexity"] == pytest.approx(results[1]["masked_perplexity"], rel=1e-6)
    assert results[0]["masked_accuracy"] == results[1]["masked_accuracy"]
    assert math.log(results[0]["masked_perplexity"]) == pytest.approx(math.log(model.config.vocab_size), abs=1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"train.objective: the model 'toy-encoder' cannot learn next_token"),
        ({"objective": {"type": "masked"}, "sampling": "stream"}, "an encoder has none"),
        ({"label_smoothing": 0.1, "objective": {"type": "masked"}}, "train.label_smoothing: .* running text"),
        ({"distill": {"phases": []}}, "phases"),
        ({"distill": {"phases": [{"share": 2}]}}, "a loss that weighs more than 0"),
        ({"distill": {"phases": [INTERNAL]}, "objective": {"type": "masked"}}, "leave one out"),
    ],
)
def test_what_cannot_be_learned_from_a_text_is_said_at_once(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(text_data(tmp_path, {"type": "word"}), change)


def test_what_cannot_be_learned_from_labels_is_said_at_once(labelled: Path, teacher: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.objective: \{type: masked\}: .* labelled examples"):
        recipe(labelled_data(labelled, path=str(teacher)), {"objective": {"type": "masked"}})
    phases = {"distill": {"phases": [INTERNAL]}}
    document = {"schema": 1, "name": "t", "data": labelled_data(labelled, path=str(teacher))}
    train = {"steps": 1, "batch_size": 1, **phases}
    with pytest.raises(RecipeError, match="'egru' encodes no texts"):
        resolve({**document, "model": {"type": "egru"}, "train": train})


def test_a_causal_model_without_attention_learns_what_is_pooled_and_refuses_scores(
    labelled: Path, teacher: Path
) -> None:
    def learn(phase: dict[str, float]) -> RunDir:
        distill = {"teacher": str(teacher), "phases": [phase], "embedding": "pca"}
        document = {"schema": 1, "name": "t", "data": labelled_data(labelled, path=str(teacher))}
        document["model"] = {"type": "spikegpt", "n_layer": 2, "n_embd": 12, "dropout": 0.0}
        document["train"] = {"steps": 30, "batch_size": 8, "seq_len": 12, "log_every": 1, "distill": distill}
        document["train"]["optimizer"] = {"lr": 0.01}
        return run_training(resolve(document))[0]

    with pytest.raises(UsageError, match="the student has no attention"):
        learn(INTERNAL)
    seen = [entry for entry in learn({"representation": 1.0, "pooled": 1.0}).metrics() if entry["split"] == "train"]
    for part in ("representation_loss", "pooled_loss"):
        assert seen[-1][part] < 0.9 * seen[0][part]


def test_an_encoder_generates_nothing_and_says_so_before_it_trains(tmp_path: Path) -> None:
    words = {"type": "word", "mask": True}
    document = recipe(text_data(tmp_path, words), {"objective": {"type": "masked"}}, generate={"prompt": "the"})
    with pytest.raises(UsageError, match=r"generate: .* says nothing about what comes next"):
        spiking_lm.run_recipe(_written(document, tmp_path), out="runs", console=quiet())


# -- a start -----------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_and_tokens_of_another(tmp_path: Path, labelled: Path) -> None:
    words = {"type": "word", "mask": True, "eos": False}
    first, trained = run_training(recipe(text_data(tmp_path, words), {"objective": {"type": "masked"}}))
    asked = recipe(labelled_data(labelled), {"start": str(first.path)}, model={"mlm": False})
    corpus = data_of(asked, quiet())
    assert corpus.tokenizer.sha256 == data.load(text_data(tmp_path, words)).tokenizer.sha256
    model = build_model(asked, corpus)
    assert model.capabilities == {"encode", "classify"}
    before = trained.state_dict()
    for name, tensor in model.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensor, before[name]), name
    run = spiking_lm.run_recipe(_written(asked, tmp_path), out="runs", console=quiet())
    assert run.manifest["start"]["path"] == str(first.path / "checkpoints" / "step-000006")
    assert len(run.manifest["start"]["sha256"]) == 64
    assert "begin at random" in (run.path / "log.txt").read_text(encoding="utf-8")
    assert "classifier.bias, classifier.weight" in (run.path / "log.txt").read_text(encoding="utf-8")


def test_a_start_with_other_tokens_or_another_shape_is_refused(labelled: Path, teacher: Path) -> None:
    own = {"type": "tsv", "path": str(labelled), "tokenizer": {"type": "word"}}
    asked = recipe(own, {"start": str(teacher)})
    with pytest.raises(DataError, match=r"train.start: .* reads other tokens"):
        build_model(asked, data_of(asked, quiet()))
    asked = recipe(labelled_data(labelled), {"start": str(teacher)}, model={"n_embd": 20})
    with pytest.raises(CheckpointError, match="fits only"):
        build_model(asked, data_of(asked, quiet()))
    with pytest.raises(RecipeError, match=r"data.tokenizer.path is not set.*"):
        data_of(recipe(labelled_data(labelled), {}), quiet())


# -- distillation ------------------------------------------------------------------------------------------------------


def test_general_distillation_brings_a_student_nearer(tmp_path: Path, teacher: Path) -> None:
    distill = {"teacher": str(teacher), "phases": [{**INTERNAL, "pooled": 1.0}]}
    asked = {"steps": 80, "batch_size": 8, "distill": distill, "optimizer": {"lr": 0.02}, "eval_every": 40}
    run, _ = run_training(recipe(text_data(tmp_path, {"type": "model"}), asked))
    entries = [entry for entry in run.metrics() if entry["split"] == "train"]
    for name in ("representation_loss", "pooled_loss"):
        assert entries[-1][name] < 0.7 * entries[0][name], name
    parts = sum(entries[-1][f"{name}_loss"] for name in ("representation", "attention", "pooled"))
    assert entries[-1]["loss"] == pytest.approx(parts, rel=1e-5)
    valid = [entry for entry in run.metrics() if entry["split"] == "valid"]
    assert len(valid) == 2
    assert set(valid[0]) >= {"loss", "representation_loss", "attention_loss", "pooled_loss"}
    manifest = run.manifest["teacher"]
    assert Path(manifest["path"]) == teacher
    assert len(manifest["sha256"]) == 64


def labelled_recipe(labelled: Path, teacher: Path, **train: Any) -> Recipe:
    distill = {
        "teacher": str(teacher),
        "phases": [{"share": 2, **INTERNAL}, {"prediction": 1.0, "labels": 0.5, "pooled": 0.5, "temperature": 2.0}],
    }
    return recipe(labelled_data(labelled, keep="seen"), {"distill": distill, **train}, model={"dropout": 0.1})


def test_the_phases_follow_each_other(labelled: Path, teacher: Path) -> None:
    run, model = run_training(labelled_recipe(labelled, teacher, steps=9))
    kinds = [sorted(k for k in entry if k.endswith("_loss")) for entry in run.metrics() if entry["split"] == "train"]
    internal = ["attention_loss", "representation_loss"]
    assert kinds == [internal] * 6 + [["labels_loss", "pooled_loss", "prediction_loss"]] * 3
    last = run.metrics()[-2]
    whole = last["prediction_loss"] + 0.5 * last["labels_loss"] + 0.5 * last["pooled_loss"]
    assert last["loss"] == pytest.approx(whole, rel=1e-5)
    facts = run.manifest["teacher"]
    assert facts["head"] == "a logistic probe"
    assert facts["valid_accuracy"] == 1.0, "cats and dogs are told apart from what a random encoder makes of them"
    assert 0 <= run.metrics()[-1]["accuracy"] <= 1
    assert not any("project" in name for name in model.state_dict()), "what joined it to its teacher is thrown away"


def test_pruning_goes_on_with_the_last_phase(labelled: Path, teacher: Path) -> None:
    plain = labelled_recipe(labelled, teacher, steps=3)
    asked = plain.model_copy(update={"prune": PruneConfig(sparsity=0.5, steps=6)})
    run, model = run_training(asked)
    corpus = data_of(asked, quiet())
    prune(run, asked, model, corpus, resume_from=run.path / "checkpoints" / "step-000003", console=quiet())
    kinds = [{k for k in entry if k.endswith("_loss")} for entry in run.metrics() if entry["split"] == "train"]
    assert kinds[0] == {"attention_loss", "representation_loss"}
    assert kinds[2:] == [{"labels_loss", "pooled_loss", "prediction_loss"}] * 7


def test_a_distillation_that_was_stopped_is_the_uninterrupted_one(labelled: Path, teacher: Path) -> None:
    asked = labelled_recipe(labelled, teacher, steps=8, save_every=4, accumulate=2, precision="bf16")
    run, whole = run_training(asked)
    other = RunDir.create(asked, Path("resumed"))
    corpus = data_of(asked, quiet())
    torch.manual_seed(99)
    half = run.path / "checkpoints" / "step-000004"
    resumed = train(other, asked, build_model(asked, corpus), corpus, resume_from=half, console=quiet())
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert losses(run)[4:] == losses(other)


def test_a_teacher_is_asked_once_about_the_same_texts(
    labelled: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = data.load(labelled_data(labelled, path=str(teacher), keep="seen"))
    assert isinstance(corpus, data.LabelledData)
    asked = Teacher(str(teacher), corpus.tokenizer)
    pooled = asked.pool(corpus, "train", 12)
    inputs, lengths = (torch.from_numpy(part) for part in corpus.batch(corpus.train, 12))
    torch.testing.assert_close(pooled, asked.encode(inputs, lengths).pooled)
    (file,) = (tmp_path / "cache" / "teachers").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "encode", None)
        assert torch.equal(asked.pool(corpus, "train", 12), pooled)
    file.write_bytes(file.read_bytes()[:100])
    torch.testing.assert_close(asked.pool(corpus, "train", 12), pooled, rtol=0, atol=0)
    assert not torch.equal(asked.pool(corpus, "train", 4), pooled), "other texts, as they are cut"


def test_another_teacher_in_the_middle_is_refused(labelled: Path, teacher: Path, wordpiece: Tokenizer) -> None:
    asked = labelled_recipe(labelled, teacher, steps=4, save_every=2)
    run, _ = run_training(asked)
    save_model(toys.toy_encoder(8, vocab_size=wordpiece.vocab_size, n_layer=4), teacher, tokenizer=wordpiece)
    corpus = data_of(asked, quiet())
    half = run.path / "checkpoints" / "step-000002"
    with pytest.raises(DataError, match="is not the one that the run began with"):
        train(run, asked, build_model(asked, corpus), corpus, resume_from=half, console=quiet())


def test_a_teacher_with_a_head_for_the_classes_uses_it(labelled: Path, tmp_path: Path, wordpiece: Tokenizer) -> None:
    classifier = toys.toy_encoder(3, vocab_size=wordpiece.vocab_size, num_classes=2)
    folder = save_model(classifier, tmp_path / "classifier", tokenizer=wordpiece)
    run, _ = run_training(labelled_recipe(labelled, folder, steps=3))
    assert run.manifest["teacher"]["head"] == "its own head"


def test_who_cannot_teach_is_named(labelled: Path, teacher: Path, tmp_path: Path, wordpiece: Tokenizer) -> None:
    corpus = data.load(labelled_data(labelled, path=str(teacher)))
    egru = spiking_lm.create_model("egru", vocab_size=wordpiece.vocab_size)
    save_model(egru, tmp_path / "gpt", tokenizer=wordpiece)
    with pytest.raises(UsageError, match="cannot teach: it encodes no texts"):
        Teacher(str(tmp_path / "gpt"), corpus.tokenizer)
    words = data.load({"type": "tsv", "path": str(labelled), "tokenizer": {"type": "word"}})
    with pytest.raises(DataError, match="of another") as caught:
        Teacher(str(teacher), words.tokenizer)
    assert "tokenizer: {type: model}" in (caught.value.hint or "")
    with pytest.raises(CheckpointError, match="nobody: no such folder"):
        Teacher(str(tmp_path / "nobody"), corpus.tokenizer)
    phases = {"distill": {"phases": [{"pooled": 1.0}]}}
    with pytest.raises(RecipeError, match=r"train.distill.teacher is not set"):
        data_of(recipe(labelled_data(labelled), phases), quiet())
    asked = recipe(labelled_data(labelled, path=str(teacher)), phases)
    with pytest.raises(ConfigError, match=r"train.distill.teacher is not set"):
        run_training(asked)


def test_opinions_need_labels(tmp_path: Path, teacher: Path) -> None:
    distill = {"teacher": str(teacher), "phases": [INTERNAL, {"prediction": 1.0}]}
    with pytest.raises(ConfigError, match=r"train.distill.phases.1: prediction: 'text' has no labels"):
        run_training(recipe(text_data(tmp_path, {"type": "model"}), {"distill": distill}))


def test_a_student_begins_with_the_teachers_words(labelled: Path, teacher: Path) -> None:
    distill = {"teacher": str(teacher), "phases": [{"pooled": 1.0}], "embedding": "pca"}
    corpus_config = labelled_data(labelled, keep="seen")
    told, own = (
        recipe(corpus_config, {"distill": {**distill, "embedding": embedding}}) for embedding in ("pca", "own")
    )
    corpus = data_of(told, quiet())
    assert isinstance(corpus.tokenizer, ReducedTokenizer)
    model, plain = build_model(told, corpus), build_model(own, corpus)
    table, before = (embedding_table(m).detach().double() for m in (model, plain))
    assert float(table.std()) == pytest.approx(float(before.std()), rel=1e-5), "as large as it was drawn"
    theirs = embedding_table(load_model(teacher)).detach().double()[torch.from_numpy(corpus.tokenizer.kept)]
    centred = theirs - theirs.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    expected = (centred @ directions[:12].T).abs()
    torch.testing.assert_close(
        table.abs() / table.std(), expected / (centred @ directions[:12].T).std(), rtol=1e-4, atol=1e-5
    )
    for name, tensor in model.state_dict().items():
        assert name.startswith("emb.") or torch.equal(tensor, plain.state_dict()[name]), name
    wide = toys.toy_encoder(vocab_size=corpus.tokenizer.vocab_size, n_embd=40)
    with pytest.raises(ConfigError, match="the student has 40 dimensions, its teacher only 24"):
        embed_as_teacher(wide, theirs)
    assert values[0] > values[-1]


# -- labels ------------------------------------------------------------------------------------------------------------


def test_smoothed_labels_and_other_readings_of_a_network(labelled: Path, teacher: Path) -> None:
    from spiking_lm.evaluation import evaluate, render
    from spiking_lm.objectives import Labels

    asked = recipe(labelled_data(labelled, path=str(teacher)), {"label_smoothing": 0.2})
    corpus = data_of(asked, quiet())
    assert isinstance(corpus, data.LabelledData)
    model = build_model(asked, corpus).eval()
    assert asked.train is not None
    plain = asked.train.model_copy(update={"label_smoothing": 0.0})
    with torch.no_grad():
        smooth, sharp = (Labels(corpus, c, 0).loss(model, 0, record=False)[0] for c in (asked.train, plain))
        batch = Labels(corpus, plain, 0).batch(0, torch.device("cpu"))
        uniform = -model.classify(batch.inputs, batch.lengths).log_softmax(-1).mean()
    torch.testing.assert_close(smooth, 0.8 * sharp + 0.2 * uniform)

    def swapped(tokens: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"swapped": model.classify(tokens, lengths).flip(-1)}

    model.classify_also = swapped  # type: ignore[method-assign]
    config = asked.evaluate or spiking_lm.stages.EvaluateConfig(window=12)  # type: ignore[attr-defined]
    result = evaluate(model, corpus, config)
    assert result["metrics"]["accuracy (swapped)"] == pytest.approx(1 - result["metrics"]["accuracy"])
    assert 0 < result["activity"]["mean"] < 1, "an encoder is watched while it classifies"
    console = quiet()
    console.print(render(result))
    assert "accuracy (swapped)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_padding_is_not_counted_among_the_spikes(labelled: Path, teacher: Path) -> None:
    from spiking_lm.evaluation import Activity, classify_examples

    corpus = data.load(labelled_data(labelled, path=str(teacher)))
    assert isinstance(corpus, data.LabelledData)
    model = toys.toy_encoder(vocab_size=corpus.tokenizer.vocab_size, num_classes=2)
    one, many = Activity(), Activity()
    few = dataclasses.replace(corpus, train=corpus.train[:9])
    a = classify_examples(model, few, few.train, 12, 1, one)
    b = classify_examples(model, few, few.train, 12, 9, many)
    torch.testing.assert_close(a, b)
    assert one.places == many.places
    assert one.events == many.events
