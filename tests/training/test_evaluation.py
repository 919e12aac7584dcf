"""Evaluation: every token counted once with enough context, and metrics that follow from their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spiking_lm
from spiking_lm import data as datasets
from spiking_lm.errors import DataError, UnknownNameError
from spiking_lm.evaluation import Activity, Scores, _windows, accuracy, evaluate, macro_f1, render, score_tokens
from spiking_lm.stages import EvaluateConfig


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return spiking_lm.create_model("spikegpt", vocab_size=256, n_layer=1, n_embd=16, ctx_len=32)


@given(n=st.integers(1, 300), window=st.integers(1, 64), stride=st.integers(1, 80), batch=st.integers(1, 5))
def test_windows_count_every_prediction_once(n: int, window: int, stride: int, batch: int) -> None:
    config = EvaluateConfig(window=window, stride=stride, batch_size=batch)
    counts = np.zeros(n, int)
    for starts, length, counted in _windows(n, config):
        assert len(starts) <= batch
        for start in starts:
            assert start >= 0
            assert start + length <= n
            first = start + length - counted
            counts[first : start + length] += 1
            assert start == 0 or first - start >= window - min(stride, window), "too little context"
    assert (counts == 1).all()


def test_one_window_is_the_plain_likelihood(model: Any) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 50)
    nll, predicted = score_tokens(model, tokens, EvaluateConfig(window=64, stride=32))
    with torch.no_grad():
        log_p = torch.log_softmax(model.eval()(torch.from_numpy(tokens[:-1])[None]).logits[0], -1)
    np.testing.assert_allclose(nll, -log_p[torch.arange(49), torch.from_numpy(tokens[1:])].numpy(), rtol=1e-5)
    assert (predicted == log_p.argmax(-1).numpy()).all()


@given(seed=st.integers(0, 5), n=st.integers(2, 120), window=st.integers(2, 40), stride=st.integers(1, 40))
def test_strides_score_each_token_with_its_window(model: Any, seed: int, n: int, window: int, stride: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 256, n)
    config = EvaluateConfig(window=window, stride=stride, batch_size=3)
    nll, _ = score_tokens(model, tokens, config)
    for starts, length, counted in _windows(n - 1, config):
        for start in starts:
            with torch.no_grad():
                inputs = torch.from_numpy(tokens[start : start + length])[None]
                log_p = torch.log_softmax(model(inputs).logits[0], -1)
            for i in range(length - counted, length):
                assert nll[start + i] == pytest.approx(-float(log_p[i, tokens[start + i + 1]]), rel=1e-4, abs=1e-5)


def test_result_is_consistent(model: Any) -> None:
    data = datasets.load({"type": "austen3", "tokenizer": {"type": "byte"}})
    result = evaluate(model, data, EvaluateConfig(split="valid", window=64, stride=32, max_tokens=1500))
    metrics = result["metrics"]
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(metrics["perplexity"]))
    assert metrics["bits_per_character"] >= metrics["bits_per_byte"]
    assert 0 <= metrics["accuracy"] <= 1
    assert "1,499 tokens of the valid split" in result["protocol"]
    assert len(result["baselines"]) == 4
    assert render(result)


def test_unknown_metric_is_named(model: Any) -> None:
    data = datasets.load({"type": "austen3", "tokenizer": {"type": "byte"}})
    with pytest.raises(UnknownNameError, match="bits_per_bite"):
        evaluate(model, data, EvaluateConfig(max_tokens=50, metrics=["bits_per_bite"]))


def test_too_short_a_text_is_refused(model: Any) -> None:
    data = datasets.load({"type": "austen3", "tokenizer": {"type": "byte"}})
    with pytest.raises(DataError, match="at least 2"):
        evaluate(model, data, EvaluateConfig(max_tokens=1))


labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@given(pairs=labels)
def test_classification_metrics_by_counting(pairs: list[tuple[int, int]]) -> None:
    target, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    scores = Scores("classification", np.ones(len(pairs)), target, predicted)
    assert accuracy(scores)["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    f1 = []
    for label in sorted({a for a, _ in pairs}):
        tp = sum(a == b == label for a, b in pairs)
        precision = tp / max(1, sum(b == label for _, b in pairs))
        recall = tp / sum(a == label for a, _ in pairs)
        f1.append(0.0 if tp == 0 else 2 * precision * recall / (precision + recall))
    assert macro_f1(scores)["macro_f1"] == pytest.approx(sum(f1) / len(f1))


@given(n=st.integers(2, 120), window=st.integers(1, 40))
def test_carried_state_makes_any_windows_one_pass(model: Any, n: int, window: int) -> None:
    tokens = np.random.default_rng(n).integers(0, 256, n)
    nll, predicted = score_tokens(model, tokens, EvaluateConfig(window=window, carry_state=True))
    with torch.no_grad():
        log_p = torch.log_softmax(model.eval()(torch.from_numpy(tokens[:-1])[None]).logits[0], -1)
    expected = -log_p[torch.arange(n - 1), torch.from_numpy(tokens[1:])].numpy()
    np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-5)
    assert (predicted == log_p.argmax(-1).numpy()).mean() > 0.98  # a tie may fall either way


def test_without_the_state_it_is_another_score(model: Any) -> None:
    tokens = np.random.default_rng(1).integers(0, 256, 60)
    carried, _ = score_tokens(model, tokens, EvaluateConfig(window=10, carry_state=True))
    dropped, _ = score_tokens(model, tokens, EvaluateConfig(window=10, stride=10))
    np.testing.assert_allclose(carried[:10], dropped[:10], rtol=1e-5)
    assert not np.allclose(carried[10:20], dropped[10:20], rtol=1e-3)


@pytest.mark.parametrize("carry_state", [False, True])
def test_activity_counts_every_scored_token_once(model: Any, carry_state: bool) -> None:
    tokens = np.random.default_rng(2).integers(0, 256, 101)
    activity = Activity()
    config = EvaluateConfig(window=30, stride=20, batch_size=2, carry_state=carry_state)
    with_spikes, _ = score_tokens(model, tokens, config, activity)
    without, _ = score_tokens(model, tokens, config)
    assert (with_spikes == without).all(), "looking at the spikes changed the score"
    sites = {site.name: 16 for site in model.spike_sites()}
    assert activity.places == {site: 100 * size for site, size in sites.items()}
    rates = activity.to_dict()
    assert set(rates["sites"]) == set(sites)
    assert rates["mean"] == pytest.approx(np.mean(list(rates["sites"].values())))
    if carry_state:
        spikes = model.eval()(torch.from_numpy(tokens[:-1])[None], return_spikes=True).spikes
        for site, rate in rates["sites"].items():
            assert rate == pytest.approx(float((spikes[site] != 0).float().mean()), abs=1e-6)


def test_words_are_scored_as_perplexity_beside_kneser_ney_models(model: Any) -> None:
    tokenizer = {"type": "word", "split": "punctuation", "min_count": 200, "eos": False}
    data = datasets.load({"type": "austen3", "tokenizer": tokenizer})
    assert isinstance(data, datasets.TextData)
    assert data.tokenizer.vocab_size <= 256
    config = EvaluateConfig(split="valid", window=35, carry_state=True, max_tokens=500)
    result = evaluate(model, data, config)
    assert set(result["metrics"]) == {"perplexity", "accuracy"}
    assert list(result["baselines"]) == ["Kneser-Ney bigram", "Kneser-Ney trigram"]
    assert result["baseline_unit"] == "perplexity"
    assert 1 < result["baselines"]["Kneser-Ney trigram"] < result["baselines"]["Kneser-Ney bigram"] < 256
    unknown = (data.valid.tokens[1:500] == data.tokenizer.unk_id).mean()
    assert f"499 tokens of the valid split ({unknown:.2%} of them <unk>; no bits per byte" in result["protocol"]
    assert "in one pass; windows of 35 without overlap, batch 1, state carried" in result["protocol"]
    assert 0 < result["activity"]["mean"] < 1
    assert render(result)
