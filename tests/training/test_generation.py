"""Generation: cached equals recomputed, seeds, cuts, stop strings, streaming."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import spiking_lm
from spiking_lm import data as datasets
from spiking_lm.errors import UsageError
from spiking_lm.generation import iterate, sample_text, sampling_weights
from spiking_lm.stages import GenerateConfig


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    return spiking_lm.create_model("spikegpt", vocab_size=256, n_layer=2, n_embd=24, ctx_len=32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return datasets.load({"type": "austen3", "tokenizer": {"type": "byte"}}).tokenizer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_equals_recomputing_the_prefix(model: Any, temperature: float) -> None:
    prompt = torch.tensor([10, 65, 66])
    cached = spiking_lm.generate(model, prompt, max_new_tokens=60, temperature=temperature, seed=5)
    generator = torch.Generator().manual_seed(5)
    tokens = prompt.clone()
    model.eval()
    with torch.no_grad():
        for _ in range(60):
            weights = sampling_weights(model(tokens[None]).logits[:, -1], temperature)
            new = torch.multinomial(weights, 1, generator=generator)[:, 0] if temperature else weights.argmax(-1)
            tokens = torch.cat([tokens, new])
    assert torch.equal(cached, tokens)


def test_seed_decides(model: Any) -> None:
    def draw(seed: int) -> list[int]:
        return spiking_lm.generate(model, [10], max_new_tokens=30, seed=seed).tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_batch_rows_are_greedy_alone(model: Any) -> None:
    prompts = torch.randint(0, 256, (3, 5), generator=torch.Generator().manual_seed(0))
    together = spiking_lm.generate(model, prompts, max_new_tokens=12, temperature=0)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, spiking_lm.generate(model, prompt, max_new_tokens=12, temperature=0))


def test_generation_leaves_the_model_as_it_was(model: Any) -> None:
    model.train()
    seen: list[int] = []
    full = spiking_lm.generate(model, [10], max_new_tokens=7, seed=0, stream=lambda token: seen.append(int(token)))
    assert model.training
    assert full.tolist() == [10, *seen]
    assert all(p.grad is None for p in model.parameters())


def test_empty_prompt_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        spiking_lm.generate(model, [], max_new_tokens=1)


logit_lists = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30)


@given(logits=logit_lists, temperature=st.floats(0.1, 3), top_p=st.floats(0.01, 1), top_k=st.integers(1, 40))
@settings(max_examples=200)
@example(logits=[0.0, 0.0, 0.0, 0.0, 8.0], temperature=1.0, top_p=1 - 1e-16, top_k=2)  # the sum rounds to less
def test_cuts_keep_the_best_and_at_least_the_mass(
    logits: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    row = torch.tensor(logits)
    weights = sampling_weights(row, temperature, top_k, top_p)
    kept = weights > 0
    assert kept[row.argmax()]
    assert torch.isfinite(weights).all()
    if kept.any() and (~kept).any():
        assert row[kept].min() >= row[~kept].max() - 1e-4, "what is cut is never likelier than what is kept"
    mass = torch.softmax(row.masked_fill(row < row.topk(min(top_k, len(row))).values[-1], -torch.inf), -1)[kept].sum()
    assert mass >= min(top_p, 1) - 1e-4


@given(logits=logit_lists)
def test_no_cut_means_no_cut(logits: list[float]) -> None:
    assert (sampling_weights(torch.tensor(logits), 1.0, None, 1.0) > 0).all()


def test_stop_strings_and_streaming(model: Any, tokenizer: Any) -> None:
    plain = sample_text(model, tokenizer, GenerateConfig(prompt="a", max_new_tokens=80, seed=4))
    stop = next(c for c in plain.text[5:] if c.isascii() and c.isprintable())
    pieces: list[str] = []
    config = GenerateConfig(prompt="a", max_new_tokens=80, seed=4, stop=[stop, "never there at all"])
    stopped = sample_text(model, tokenizer, config, stream=pieces.append)
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert stopped.stopped_by == stop
    assert "".join(pieces) == stopped.text
    assert stopped.tokens < plain.tokens


def test_state_can_be_carried_on(model: Any) -> None:
    def first(n: int, prompt: list[int], state: Any = None) -> list[Any]:
        return list(itertools.islice(iterate(model, torch.tensor([prompt]), temperature=0, state=state), n))

    run = first(10, [10, 20])
    token, state = run[4]
    again = first(5, [int(token)], state)
    assert [int(t) for t, _ in again] == [int(t) for t, _ in run[5:10]]


def test_a_text_ends_where_the_positions_end(tokenizer: Any) -> None:
    sizes = {"vocab_size": tokenizer.vocab_size, "n_layer": 1, "n_embd": 16, "n_head": 2, "ctx_len": 8}
    model = spiking_lm.create_model("spikelm", causal=True, **sizes)
    model.calibrate(torch.arange(8)[None] % tokenizer.vocab_size)
    short = sample_text(model, tokenizer, GenerateConfig(prompt="abc", max_new_tokens=6, temperature=0))
    assert (short.tokens, short.positions) == (6, None)
    cut = sample_text(model, tokenizer, GenerateConfig(prompt="abc", max_new_tokens=50, temperature=0))
    assert (cut.tokens, cut.positions) == (6, 8), "the last token drawn is not read any more"
    assert spiking_lm.generate(model, [1, 2, 3], max_new_tokens=6).shape == (9,)
    with pytest.raises(UsageError, match="3 tokens and 7 new ones are more than the 8 positions") as caught:
        spiking_lm.generate(model, [1, 2, 3], max_new_tokens=7)
    assert caught.value.hint == "max_new_tokens is at most 6"


def test_an_encoder_generates_nothing(tokenizer: Any) -> None:
    model = spiking_lm.create_model("spikelm", vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=16, n_head=2)
    with pytest.raises(UsageError, match="says nothing about what comes next"):
        sample_text(model, tokenizer, GenerateConfig(prompt="abc"))
