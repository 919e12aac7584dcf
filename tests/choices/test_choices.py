"""Answers by log-likelihood: the figures that plain Python finds, whatever is batched and read once."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from choice_toys import TASKS, Pocket, folded, log_likelihood, make_lines, words, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import spiking_lm
from spiking_lm import choices, data
from spiking_lm.choices import Row, encode_row, evaluate_choices, render, score_rows
from spiking_lm.cli import _guarded
from spiking_lm.data.questions import read_questions
from spiking_lm.errors import UsageError

BYTES = data.create_tokenizer({"type": "byte"})


def make_groups(seed: int, count: int = 7) -> list[list[Row]]:
    """Return random questions: contexts that are the same, begin alike or do not, and choices of any length."""
    generator = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        context = f"{words(generator, 1, 8)}:"
        rows = []
        for _ in range(generator.integers(1, 5)):
            own = context if generator.integers(4) else context + words(generator, 0, 2)
            rows.append(encode_row(BYTES, own, " " + words(generator, 1, 3)))
        groups.append(rows)
    return groups


def text(ids: Any) -> str:
    return BYTES.decode(ids)


# -- scoring rows -----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), batch_size=st.integers(1, 12))
def test_every_row_has_the_likelihood_that_plain_python_finds(seed: int, batch_size: int) -> None:
    groups = make_groups(seed)
    scores = score_rows(Pocket(), groups, batch_size=batch_size)
    assert [len(rows) for rows in scores] == [len(rows) for rows in groups]
    for group, row_scores in zip(groups, scores, strict=True):
        for row, score in zip(group, row_scores, strict=True):
            expected, greedy = log_likelihood(text(row.context), text(row.continuation))
            assert score.log_likelihood == pytest.approx(expected, rel=1e-5)
            assert score.greedy == greedy


def test_the_likeliest_continuation_is_called_greedy() -> None:
    model = Pocket()
    context, continuation = b"once", b""
    for _ in range(3):
        continuation += bytes([int(model.table[folded(context + continuation)].argmax())])
    best = np.frombuffer(continuation, np.uint8).astype(np.int64)
    other = best.copy()
    other[1] ^= 1
    start = np.frombuffer(context, np.uint8).astype(np.int64)
    scores = score_rows(model, [[Row(start, best), Row(start, other)]])[0]
    assert [score.greedy for score in scores] == [True, False]
    assert scores[0].log_likelihood > scores[1].log_likelihood


LLAMA = {"n_inner": 40, "n_head": 4, "n_kv_head": 2}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("spikegpt", {"ctx_len": 32}),
        ("egru", {"n_hidden": 24}),
        ("spikellm", LLAMA),
        ("spikellm", {**LLAMA, "activations": {"bits": 4}, "cache": {"bits": 4}}),
    ],
)
def test_real_models_score_as_they_do_row_by_row(name: str, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = spiking_lm.create_model(name, vocab_size=256, n_layer=1, n_embd=16, **config).eval()
    groups = make_groups(5)
    scores = score_rows(model, groups, batch_size=6)
    for group, row_scores in zip(groups, scores, strict=True):
        for row, score in zip(group, row_scores, strict=True):
            tokens = torch.from_numpy(np.concatenate(row))
            with torch.no_grad():
                log_p = torch.log_softmax(model(tokens[None, :-1]).logits[0], -1)
            places = torch.arange(len(row.context), len(tokens))
            expected = log_p[places - 1, tokens[places]].double().sum()
            assert score.log_likelihood == pytest.approx(float(expected), rel=1e-4)


def test_what_rows_have_in_common_is_read_once() -> None:
    context = "x" * 100
    groups = [[encode_row(BYTES, context, f" {word}") for word in ("aa", "bbb", "c", "dd")] for _ in range(3)]
    model = Pocket()
    score_rows(model, groups, batch_size=12)
    assert model.read == [(3, 99), (12, 4)]  # the last token of the context gives the first logits
    model.read.clear()
    score_rows(model, groups, batch_size=4)
    assert model.read == [(1, 99), (4, 4)] * 3


def test_a_large_vocabulary_changes_the_pieces_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = make_groups(3)
    whole = score_rows(Pocket(), groups)
    monkeypatch.setattr(choices, "LOGITS_AT_ONCE", 256 * 40)
    model = Pocket()
    parts = score_rows(model, groups)
    assert max(rows * length for rows, length in model.read) <= 40 + max(length for _, length in model.read)
    for a, b in zip(chain.from_iterable(whole), chain.from_iterable(parts), strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-6)


def test_progress_counts_rows() -> None:
    groups = make_groups(1)
    seen: list[tuple[int, int]] = []
    score_rows(Pocket(), groups, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, groups))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_model_that_predicts_nothing_is_refused() -> None:
    model = Pocket()
    model.capabilities = frozenset({"classify"})
    with pytest.raises(UsageError, match="pocket model does not predict the next token"):
        score_rows(model, make_groups(0))


# -- the border between prompt and choice -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe() -> Any:
    texts = ["the\nthen\nAnswer: the then so\n"] * 20
    return data.create_tokenizer({"type": "bpe", "vocab_size": 300}, texts)


@pytest.mark.parametrize("context", ["Question: so\nAnswer:", "Answer: ", "so the \n ", " "])
@pytest.mark.parametrize("continuation", [" the then", "n", " so", "  x"])
def test_tokens_before_and_after_are_those_of_the_text(bpe: Any, context: str, continuation: str) -> None:
    row = encode_row(bpe, context, continuation)
    assert bpe.decode(np.concatenate(row)) == context + continuation
    head = context.rstrip() or context
    assert bpe.decode(row.context) == head
    assert len(row.continuation) > 0


def test_a_continuation_that_melts_into_the_context_is_encoded_by_itself(bpe: Any) -> None:
    row = encode_row(bpe, "the", "n")  # "then" is one token, and so is "the"
    assert len(bpe.encode("then")) == len(bpe.encode("the")) == 1
    assert (bpe.decode(row.context), bpe.decode(row.continuation)) == ("the", "n")


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_acc_and_acc_norm_are_those_that_plain_python_finds(task: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / f"{task}-some.jsonl", make_lines(task, 9))
    result = evaluate_choices(Pocket(), BYTES, [path], batch_size=5)
    right, right_norm, chance = 0, 0, 0.0
    for question in read_questions(path).questions:
        pairs = list(zip(question.contexts, question.continuations, strict=True))
        values = [log_likelihood(context, f" {choice}")[0] for context, choice in pairs]
        normed = [value / len(choice) for value, (_, choice) in zip(values, pairs, strict=True)]
        right += values.index(max(values)) == question.answer
        right_norm += normed.index(max(normed)) == question.answer
        chance += 1 / len(pairs) / 9
    (found,) = result["tasks"]
    assert (found["task"], found["n"], found["file"]) == (task, 9, str(path))
    assert found["acc"] == pytest.approx(right / 9)
    assert found["chance"] == pytest.approx(chance)
    answers = [1.0] * right + [0.0] * (9 - right)
    assert found["acc_stderr"] == pytest.approx(np.std(answers, ddof=1) / math.sqrt(9))
    if task in ("boolq", "winogrande"):
        assert found["acc_norm"] is None
        assert found["acc_norm_stderr"] is None
    else:
        assert found["acc_norm"] == pytest.approx(right_norm / 9)
    assert json.loads(json.dumps(result)) == result


@settings(max_examples=25)
@given(seed=st.integers(0, 500), order=st.permutations(range(4)))
def test_the_order_of_the_choices_does_not_matter(seed: int, order: list[int], tmp_path_factory: Any) -> None:
    line = make_lines("hellaswag", 1, seed)[0]
    if len({*line["endings"]}) < 4:
        return  # equal choices are a tie
    moved = {**line, "endings": [line["endings"][i] for i in order], "label": order.index(int(line["label"]))}
    folder = tmp_path_factory.mktemp("order")
    paths = [write_lines(folder / f"{i}.jsonl", [it]) for i, it in enumerate([line, moved])]
    a, b = evaluate_choices(Pocket(), BYTES, paths)["tasks"]
    assert (a["acc"], a["acc_norm"]) == (b["acc"], b["acc_norm"])


@pytest.mark.parametrize(("label", "acc"), [(0, 1.0), (1, 0.0)])
def test_a_tie_goes_to_the_first_choice(label: int, acc: float, tmp_path: Path) -> None:
    line = {"goal": "sit", "sol1": "on a chair", "sol2": "on a chair", "label": label}
    (found,) = evaluate_choices(Pocket(), BYTES, [write_lines(tmp_path / "x.jsonl", [line])])["tasks"]
    assert (found["acc"], found["acc_norm"], found["acc_stderr"]) == (acc, acc, None)


def test_length_matters_to_acc_and_not_to_acc_norm(tmp_path: Path) -> None:
    """With all bytes equally likely the shortest choice wins, and per character all tie."""
    model = Pocket()
    torch.nn.init.zeros_(model.table)
    lines = [{"goal": "g", "sol1": "long one", "sol2": "short", "label": label} for label in (0, 0, 1)]
    (found,) = evaluate_choices(model, BYTES, [write_lines(tmp_path / "x.jsonl", lines)])["tasks"]
    assert found["acc"] == pytest.approx(1 / 3)
    # the space before a choice is scored too, and weighs more per character of a short one
    assert found["acc_norm"] == pytest.approx(2 / 3)


# -- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    spiking_lm.save_model(spiking_lm.create_model("egru", vocab_size=256, n_layer=1, n_embd=16, n_hidden=16), folder)
    return folder


def test_the_verb_answers_files(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_lines(tmp_path / f"{task}.jsonl", make_lines(task, 4)) for task in ("arc", "boolq")]
    arguments = ["eval", str(saved), "--choices", str(files[0]), "--choices", str(files[1])]
    assert _guarded([*arguments, "--json", "--limit", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(task["task"], task["n"]) for task in result["tasks"]] == [("arc", 3), ("boolq", 3)]
    model = spiking_lm.load_model(saved)
    expected = evaluate_choices(model, BYTES, files, limit=3)
    assert result == {"model": str(saved), **expected}
    assert _guarded(arguments) == 0
    shown = capsys.readouterr().out
    assert "boolq.jsonl" in shown
    assert "ties go to the first" in " ".join(shown.split())
    assert render(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "5"], "--window is for texts, and --choices for questions"),
        (["--data", "austen3"], "--data is for texts, and --choices for questions"),
        (["--shuffled"], "--shuffled is for texts, and --choices for questions"),
        (["--max-tokens", "9"], "--max-tokens is for texts, and --choices for questions"),
    ],
)
def test_the_verb_does_not_mix_texts_and_questions(
    saved: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _guarded(["eval", str(saved), "--choices", "x.jsonl", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_verb_says_what_is_wrong(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["eval", str(saved), "--limit", "5"]) == 2
    assert "--limit is for --choices" in capsys.readouterr().err
    bad = write_lines(tmp_path / "bad.jsonl", [{"goal": "x", "sol1": "y", "sol2": "z", "label": 7}])
    assert _guarded(["eval", str(saved), "--choices", str(bad)]) == 4
    assert "bad.jsonl, line 1: field 'label' is 7, not a number from 0 to 1" in capsys.readouterr().err


def test_the_verb_scores_blocks_and_shuffled_words(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    arguments = ["eval", str(saved), "--data", str(tmp_path / "text.txt"), "--protocol", "blocks", "--window", "64"]
    assert _guarded([*arguments, "--shuffled", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "441 tokens of the test split" in result["protocol"]
    assert "7 blocks of 64" in result["protocol"]
    assert result["shuffled"]["perplexity"] == pytest.approx(
        result["shuffled"]["ratio"] * result["metrics"]["perplexity"]
    )
    assert _guarded([*arguments, "--shuffled"]) == 0
    assert "perplexity with the words shuffled" in capsys.readouterr().out
    assert _guarded([*arguments[:-1], "1"]) == 2
    assert "at least 2 tokens" in capsys.readouterr().err
    assert _guarded([*arguments[:-3], "strided"]) == 2
    assert "protocol" in capsys.readouterr().err
