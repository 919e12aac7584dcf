"""Runs on pairs from end to end: recipe, evaluation, generation, the commands, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spiking_lm import create_model, data, generate, run_recipe
from spiking_lm.checkpoints import load_model, resolve_model
from spiking_lm.cli import _load_verb
from spiking_lm.errors import DataError, RecipeError, UsageError
from spiking_lm.evaluation import evaluate
from spiking_lm.generation import sample_text, write_targets
from spiking_lm.objectives import objective_for
from spiking_lm.recipe import load_recipe, resolve
from spiking_lm.rundir import RunDir
from spiking_lm.sequences import Pairs, score_targets
from spiking_lm.stages import EvaluateConfig, GenerateConfig, TrainConfig

MODEL = {"type": "spikelm-seq2seq", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_hidden": 32, "ctx_len": 16, "steps": 1}


def write_pairs(path: Path) -> Path:
    """Words of three letters, to be written twice; short enough to be learned by heart."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcd"), 3)) for _ in range(60)]
    path.write_text("".join(json.dumps({"source": w, "target": f"{w} {w}"}) + "\n" for w in dict.fromkeys(words)))
    return path


def document(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "test/pairs",
        "data": {"type": "pairs", "path": str(path), "test": 0.2, "tokenizer": {"type": "char"}},
        "model": {**MODEL, "dropout": 0.0},
        "train": {"steps": 30, "batch_size": 16, "label_smoothing": 0.1, "save_every": 15, "optimizer": {"lr": 0.01}},
        "evaluate": {"split": "test", "batch_size": 4},
        "generate": {"prompt": "abc", "max_new_tokens": 9, "temperature": 0},
        "explain": {"tokens": 32},
        **changes,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("pairs")
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(document(write_pairs(folder / "pairs.jsonl"))))
    return run_recipe(recipe, out=folder / "runs")


def test_a_recipe_runs_and_learns(run: RunDir) -> None:
    losses = [entry["loss"] for entry in run.metrics() if entry["split"] == "train"]
    assert losses[-1] < 0.6 * losses[0]
    assert any("encoder.0.up.neuron" in entry.get("rates", {}) for entry in run.metrics())
    valid = [entry for entry in run.metrics() if entry["split"] == "valid"]
    assert 0 <= valid[-1]["accuracy"] <= 1
    found = json.loads((run.path / "evaluation.json").read_text())
    assert found["task"] == "pairs"
    assert {"accuracy", "perplexity", "exact_match", "rouge_1", "rouge_2", "rouge_l"} <= found["metrics"].keys()
    copied = found["baselines"]
    assert copied["the source copied, exact match"] == 0
    assert copied["the source copied, rouge 1"] == pytest.approx(2 / 3)  # one of two words
    assert copied["the source copied, rouge 2"] == 0
    assert set(found["samples"][0]) == {"source", "target", "written"}
    assert 0 < found["activity"]["mean"] < 1
    assert (run.path / "samples.txt").read_text().startswith("abc\n")
    assert "each read and written" in json.loads((run.path / "explanation.json").read_text())["sample"]


def test_an_evaluation_does_not_depend_on_its_batches(run: RunDir) -> None:
    model, pairs = load_model(resolve_model(run.path)), data.load(run.recipe.data)
    whole, single = (evaluate(model, pairs, EvaluateConfig(batch_size=size)) for size in (64, 1))
    assert whole["metrics"] == pytest.approx(single["metrics"], rel=1e-4)
    assert whole["activity"]["sites"] == pytest.approx(single["activity"]["sites"], rel=1e-3)
    assert [row["written"] for row in whole["samples"]] == [row["written"] for row in single["samples"]]


def test_the_objective_is_the_cross_entropy_of_true_tokens(run: RunDir) -> None:
    model, pairs = load_model(resolve_model(run.path)).eval(), data.load(run.recipe.data)
    assert isinstance(pairs, data.PairData)
    config = TrainConfig(steps=1, batch_size=5, label_smoothing=0.1)
    objective = objective_for(model, pairs, config, seed=3)
    assert isinstance(objective, Pairs)
    loss, output, count = objective.loss(model, 2, record=True)
    assert output is not None
    assert output.spikes
    chosen = data.epoch_order(len(pairs.train), 3, 0)[10:15]
    losses, tokens = [], 0
    for pair in (pairs.train[int(place)] for place in chosen):
        source, target = (torch.from_numpy(ids.astype(np.int64))[None] for ids in (pair.source, pair.target))
        logits = model(target[:, :-1], model.read(source, torch.tensor([source.shape[1]]))).logits[0]
        losses.append(F.cross_entropy(logits, target[0, 1:], reduction="none", label_smoothing=0.1))
        tokens += source.shape[1] + target.shape[1] - 1
    assert float(loss.detach()) == pytest.approx(float(torch.cat(losses).detach().mean()), rel=1e-4)
    assert count == tokens
    everything = score_targets(model, pairs, pairs.valid, 3)
    assert len(everything.nll) == sum(len(pair.target) - 1 for pair in pairs.valid)


def test_writing_is_taking_the_likeliest_token(run: RunDir) -> None:
    model, pairs = load_model(resolve_model(run.path)), data.load(run.recipe.data)
    assert isinstance(pairs, data.PairData)
    source, lengths = torch.randint(0, 4, (3, 5)), torch.tensor([5, 1, 3])
    written = write_targets(model, source, lengths, pairs.end_id, 8)
    with torch.no_grad():
        for row, ids in enumerate(written):
            text = torch.tensor([[pairs.end_id, *ids]])
            state = model.read(source[row : row + 1, : lengths[row]], lengths[row : row + 1])
            likeliest = model(text, state).logits.argmax(-1)[0].tolist()
            assert likeliest[: len(ids)] == ids
            assert len(ids) == 8 or likeliest[-1] == pairs.end_id
            begun = generate(model, text[:, :1], max_new_tokens=4, temperature=0, state=state)
            assert begun[0, 1 : 1 + len(ids)].tolist() == ids[:4]
    streamed: list[str] = []
    config = GenerateConfig(prompt=" ab ", temperature=0, max_new_tokens=8)
    sample = sample_text(model, pairs.tokenizer, config, stream=streamed.append)
    source = torch.from_numpy(pairs.tokenizer.encode("ab").astype(np.int64))[None]
    assert (
        sample.text
        == "".join(streamed)
        == pairs.tokenizer.decode(write_targets(model, source, torch.tensor([2]), pairs.end_id, 8)[0])
    )
    with pytest.raises(DataError, match="the source is empty"):
        sample_text(model, pairs.tokenizer, GenerateConfig(prompt=" "))


def test_the_commands_work(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    def say(verb: str, *words: str) -> Any:
        capsys.readouterr()
        _load_verb(verb).main([str(run.path), *words, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    found = say("generate", "--prompt", "abc", "--max-tokens", "9")
    assert (run.path / "samples.txt").read_text() == f"abc\n{found['text']}\n"  # without --temperature, the likeliest
    assert found["spikes_per_token"] > 0
    metrics = json.loads((run.path / "evaluation.json").read_text())["metrics"]
    assert say("eval")["metrics"] == pytest.approx(metrics)
    assert math.isfinite(metrics["perplexity"])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(RecipeError, match="'spikelm' writes nothing from a source"):
        resolve(document(path, model={"type": "spikelm", "causal": True}))
    with pytest.raises(RecipeError, match="learns from pairs, and the dataset 'austen3' holds none"):
        resolve(document(path, data={"type": "austen3"}))
    train = {"steps": 1, "batch_size": 2}
    with pytest.raises(RecipeError, match=r"objective.*holds pairs"):
        resolve(document(path, train={**train, "objective": {"type": "masked"}}))
    pairs = data.load(document(path)["data"])
    assert isinstance(pairs, data.PairData)
    causal = create_model("spikelm", vocab_size=pairs.tokenizer.vocab_size, n_embd=8, n_head=2, causal=True)
    with pytest.raises(UsageError, match="needs a model with the capability 'seq2seq'"):
        objective_for(causal, pairs, TrainConfig(**train), 0)
    with pytest.raises(UsageError, match="needs a model with the capability 'seq2seq'"):
        evaluate(causal, pairs, EvaluateConfig())
    small = {key: value for key, value in MODEL.items() if key != "type"}
    model = create_model("spikelm-seq2seq", vocab_size=pairs.tokenizer.vocab_size, **{**small, "ctx_len": 7})
    with pytest.raises(DataError, match=r"pair 1 of train: its target has 8 tokens, and the model knows 7 positions"):
        objective_for(model, pairs, TrainConfig(**train), 0)
    text = data.load({"type": "austen3"})
    with pytest.raises(UsageError, match="needs a model with the capability 'lm'"):
        objective_for(model, text, TrainConfig(**train), 0)
    with pytest.raises(UsageError, match="writes targets from sources, and 'austen3' holds no pairs"):
        evaluate(model, text, EvaluateConfig(max_tokens=100))


@pytest.mark.parametrize("name", ["translate", "summarise"])
def test_the_shipped_recipes_fit_their_data(name: str) -> None:
    recipe = load_recipe(f"spikelm/{name}")
    assert recipe.compare is not None
    assert recipe.compare.variants["dense"] == {"model.neuron": None}
    pairs = data.load(recipe.data)
    assert isinstance(pairs, data.PairData)
    sides = (pair for split in ("train", "valid", "test") for pair in getattr(pairs, split))
    assert max(max(len(pair.source), len(pair.target) - 1) for pair in sides) <= recipe.model["ctx_len"]
