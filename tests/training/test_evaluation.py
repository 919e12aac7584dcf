"""Evaluation: every token counted once with enough context, and metrics that follow from their definitions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spiking_lm
from spiking_lm import data as datasets
from spiking_lm import evaluation
from spiking_lm.config import parse_config
from spiking_lm.errors import ConfigError, DataError, UnknownNameError, UsageError
from spiking_lm.evaluation import (
    Activity,
    Scores,
    _windows,
    accuracy,
    evaluate,
    macro_f1,
    render,
    score_tokens,
    scored_positions,
    shuffle_words,
)
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
    nll, predicted = score_tokens(model, tokens, EvaluateConfig(window=window, protocol="carried"))
    with torch.no_grad():
        log_p = torch.log_softmax(model.eval()(torch.from_numpy(tokens[:-1])[None]).logits[0], -1)
    expected = -log_p[torch.arange(n - 1), torch.from_numpy(tokens[1:])].numpy()
    np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-5)
    assert (predicted == log_p.argmax(-1).numpy()).mean() > 0.98  # a tie may fall either way


def test_without_the_state_it_is_another_score(model: Any) -> None:
    tokens = np.random.default_rng(1).integers(0, 256, 60)
    carried, _ = score_tokens(model, tokens, EvaluateConfig(window=10, protocol="carried"))
    dropped, _ = score_tokens(model, tokens, EvaluateConfig(window=10, stride=10))
    np.testing.assert_allclose(carried[:10], dropped[:10], rtol=1e-5)
    assert not np.allclose(carried[10:20], dropped[10:20], rtol=1e-3)


@pytest.mark.parametrize("protocol", ["sliding", "carried", "blocks"])
def test_activity_counts_every_scored_token_once(model: Any, protocol: Any) -> None:
    tokens = np.random.default_rng(2).integers(0, 256, 101)
    activity = Activity()
    config = EvaluateConfig(window=30, stride=20, batch_size=2, protocol=protocol)
    with_spikes, _ = score_tokens(model, tokens, config, activity)
    without, _ = score_tokens(model, tokens, config)
    assert (with_spikes == without).all(), "looking at the spikes changed the score"
    sites = {site.name: 16 for site in model.spike_sites()}
    assert activity.places == {site: len(with_spikes) * size for site, size in sites.items()}
    rates = activity.to_dict()
    assert set(rates["sites"]) == set(sites)
    assert rates["mean"] == pytest.approx(np.mean(list(rates["sites"].values())))
    if protocol == "carried":
        spikes = model.eval()(torch.from_numpy(tokens[:-1])[None], return_spikes=True).spikes
        for site, rate in rates["sites"].items():
            assert rate == pytest.approx(float((spikes[site] != 0).float().mean()), abs=1e-6)


def test_words_are_scored_as_perplexity_beside_kneser_ney_models(model: Any) -> None:
    tokenizer = {"type": "word", "split": "punctuation", "min_count": 200, "eos": False}
    data = datasets.load({"type": "austen3", "tokenizer": tokenizer})
    assert isinstance(data, datasets.TextData)
    assert data.tokenizer.vocab_size <= 256
    config = EvaluateConfig(split="valid", window=35, protocol="carried", max_tokens=500)
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


# -- blocks -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(seed=st.integers(0, 3), n=st.integers(2, 90), window=st.integers(2, 30), batch=st.integers(1, 4))
def test_blocks_are_scored_each_by_itself(model: Any, seed: int, n: int, window: int, batch: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 256, max(n, window))
    config = EvaluateConfig(protocol="blocks", window=window, batch_size=batch)
    nll, predicted = score_tokens(model, tokens, config)
    expected, guesses, positions = [], [], []
    for block in range(len(tokens) // window):
        part = torch.from_numpy(tokens[block * window : (block + 1) * window])
        with torch.no_grad():
            log_p = torch.log_softmax(model.eval()(part[None, :-1]).logits[0], -1)
        expected += [-float(log_p[i, part[i + 1]]) for i in range(window - 1)]
        guesses += log_p.argmax(-1).tolist()
        positions += range(block * window + 1, (block + 1) * window)
    np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-5)
    assert scored_positions(len(tokens), config).tolist() == positions
    assert np.mean(predicted == np.array(guesses)) > 0.98


def test_a_large_vocabulary_changes_how_many_windows_go_at_once_and_nothing_else(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(3).integers(0, 256, 200)
    shapes: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: shapes.append(len(inputs[0])))
    config = EvaluateConfig(protocol="blocks", window=20, batch_size=6)
    whole, _ = score_tokens(model, tokens, config)
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 2 * 19 * 256)
    parts, _ = score_tokens(model, tokens, config)
    hook.remove()
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    assert shapes == [6, 4, 2, 2, 2, 2, 2]


def test_the_block_protocol_is_said_exactly(model: Any) -> None:
    data = _text("so it goes " * 200)
    result = evaluate(model, data, EvaluateConfig(protocol="blocks", window=512, max_tokens=1100))
    assert result["protocol"] == (
        "1,022 tokens of the test split (1,022 bytes), each scored once; 2 blocks of 512 without overlap, the first "
        "token of each not scored; state zero at each block's start, no token put before it; the last 76 tokens, less "
        "than a block, left out"
    )
    assert result["metrics"]["bits_per_byte"] == pytest.approx(math.log2(result["metrics"]["perplexity"]))
    with pytest.raises(DataError, match="has 1100 tokens; scoring needs at least 2048"):
        evaluate(model, data, EvaluateConfig(protocol="blocks", window=2048, max_tokens=1100))


@pytest.mark.slow
def test_a_published_model_has_its_known_perplexity_in_blocks(shared: Path) -> None:
    """stories260K on 200 texts of 256 tokens that it wrote itself: 3.599, found with another implementation."""
    from spiking_lm_spikellm import sources

    folder = shared / "data" / "models" / "stories260K"
    source = sources.open_source(folder)
    tokens = np.load(folder / "stories260K_selfsample_dev.npy").astype(np.int64).ravel()
    llama = sources.build(source, source.config)
    nll, _ = score_tokens(llama, tokens, EvaluateConfig(protocol="blocks", window=256, batch_size=20))
    assert len(nll) == 200 * 255
    assert math.exp(nll.mean()) == pytest.approx(3.599, abs=1e-3)


def test_protocols_are_checked_and_older_runs_are_read() -> None:
    assert parse_config(EvaluateConfig, {"carry_state": True}, where="x").protocol == "carried"
    assert parse_config(EvaluateConfig, {"carry_state": False}, where="x").protocol == "sliding"
    for wrong in (
        {"carry_state": True, "protocol": "blocks"},
        {"protocol": "block"},
        {"protocol": "blocks", "window": 1},
    ):
        with pytest.raises(ConfigError, match=r"x: .*(carry_state|protocol|at least 2)"):
            parse_config(EvaluateConfig, wrong, where="x")


# -- words shuffled ---------------------------------------------------------------------------------------------------


@given(text=st.text(alphabet="ab \n\u2003é", max_size=60), seed=st.integers(0, 3))
def test_shuffling_moves_words_and_nothing_else(text: str, seed: int) -> None:
    shuffled = shuffle_words(text, seed)
    assert sorted(shuffled.split()) == sorted(text.split())
    assert [c if c.isspace() else "" for c in shuffled if c.isspace()] == [c for c in text if c.isspace()]
    assert len(shuffled.encode()) == len(text.encode())
    assert shuffled == shuffle_words(text, seed)


class _Cheat(torch.nn.Module):
    """A model that is told the text: whatever comes before, it bets on the token that really follows."""

    def __init__(self, follows: dict[int, int]) -> None:
        super().__init__()
        table = torch.zeros(256, 256)
        for before, after in follows.items():
            table[before, after] = 8.0
        self.table = torch.nn.Parameter(table)
        self.config = type("Config", (), {"vocab_size": 256})()
        self.capabilities = frozenset({"lm"})

    def spike_sites(self) -> list[Any]:
        return []

    def forward(self, tokens: torch.Tensor, state: Any = None, *, return_spikes: bool = False) -> Any:
        return type("Output", (), {"logits": self.table[tokens], "state": None, "spikes": None})()


def _text(text: str) -> datasets.TextData:
    tokenizer = datasets.create_tokenizer({"type": "byte"})
    tokens = tokenizer.encode(text)
    nothing = datasets.TokenSplit(tokens[:0], 0, 0)
    return datasets.TextData("t", tokenizer, nothing, nothing, datasets.TokenSplit(tokens, len(tokens), len(text)), "")


@pytest.mark.parametrize("protocol", ["sliding", "carried", "blocks"])
def test_shuffled_words_are_harder_for_who_knows_their_order(protocol: Any) -> None:
    text = "a b c d e f g h " * 30  # a model of pairs of bytes sees one byte back: over a space, it knows nothing
    config = EvaluateConfig(protocol=protocol, window=32, stride=16, shuffled=True)
    blind: Any = _Cheat({ord(c): ord(" ") for c in "abcdefgh"})
    result = evaluate(blind, _text(text), config)
    assert result["shuffled"]["ratio"] == pytest.approx(1.0, abs=0.02)
    assert "shuffled" not in evaluate(blind, _text(text), EvaluateConfig(protocol=protocol, window=32))

    text = "a\tb\nc\rd\x0be\x0cf g\x1ch\x1d" * 30  # each word has a white space of its own before it, so order shows
    spaces = "\t\n\r\x0b\x0c \x1c\x1d"
    knows: Any = _Cheat({ord(a): ord(b) for a, b in zip("abcdefgh" + spaces, spaces + "bcdefgha", strict=True)})
    result = evaluate(knows, _text(text), config)
    assert result["metrics"]["perplexity"] < 1.2
    assert result["shuffled"]["ratio"] > 10
    tokens = np.frombuffer(shuffle_words(text).encode(), np.uint8).astype(np.int64)
    nll, _ = score_tokens(knows, tokens, config)
    assert result["shuffled"]["perplexity"] == pytest.approx(math.exp(nll.mean()))
    assert render(result)


def test_only_a_text_with_words_can_be_shuffled(model: Any) -> None:
    with pytest.raises(DataError, match="no words that could change places"):
        evaluate(model, _text("antidisestablishmentarianism"), EvaluateConfig(shuffled=True))
    labelled = datasets.load({"type": "authors4", "tokenizer": {"type": "byte"}})
    with pytest.raises(UsageError, match="no running text"):
        evaluate(model, labelled, EvaluateConfig(shuffled=True))
