"""The adapter for lm-eval: its own logic everywhere, and its agreement with lm-eval's tasks where that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from choice_toys import LOGITS, TASKS, Pocket, folded, log_likelihood, make_lines, write_lines

from spiking_lm import data
from spiking_lm.choices import evaluate_choices
from spiking_lm.errors import MissingExtraError

INSTALLED = importlib.util.find_spec("lm_eval") is not None
BYTES = data.create_tokenizer({"type": "byte"})


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``spiking_lm.harness``, on a stand-in for lm-eval's base class where lm-eval is not installed."""
    if not INSTALLED:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lm_eval.api.model"].LM = type("LM", (), {})  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "spiking_lm.harness", raising=False)
    module = importlib.import_module("spiking_lm.harness")
    yield module
    sys.modules.pop("spiking_lm.harness", None)


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.mark.filterwarnings("ignore")
def test_log_likelihoods_come_in_the_order_of_the_requests(harness: Any) -> None:
    lm = harness.HarnessLM(Pocket(), BYTES, batch_size=3)
    asked = [("one two", " three"), ("one two", " four"), ("five", " six"), ("one two ", "three"), ("", "seven")]
    found = lm.loglikelihood(requests(*asked))
    for (context, continuation), (value, greedy) in zip(asked, found, strict=True):
        expected = log_likelihood(context or "\n", continuation)
        assert value == pytest.approx(expected[0] - _moved(context), rel=1e-5)
        assert isinstance(value, float)
        assert greedy is False
    best = chr(int(np.argmax(LOGITS[folded(b"one")])))
    if ord(best) < 128:
        assert lm.loglikelihood(requests(("one", best)))[0][1] is True


def _moved(context: str) -> float:
    """A space at the end of a prompt is scored with what follows."""
    return -log_likelihood(context.rstrip(), " ")[0] if context.endswith(" ") else 0.0


@pytest.mark.filterwarnings("ignore")
def test_prompts_are_cut_on_the_left_where_a_length_is_given(harness: Any) -> None:
    lm = harness.HarnessLM(Pocket(), BYTES, max_length=8)
    ((value, _),) = lm.loglikelihood(requests(("a long prompt", " end")))
    assert value == pytest.approx(log_likelihood("rompt", " end")[0], rel=1e-5), "8 tokens read: rompt and ` en`"
    ((value, _),) = lm.loglikelihood(requests(("a long prompt", " much longer than 8")))
    assert value == pytest.approx(log_likelihood("t", " much longer than 8")[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_running_text_is_scored_whole_or_in_windows(harness: Any) -> None:
    text = "nobody counts the lamps"
    whole = harness.HarnessLM(Pocket(), BYTES).loglikelihood_rolling(requests((text,), ("",)))
    assert whole == [pytest.approx(log_likelihood("\n", text)[0], rel=1e-5), 0.0]
    (cut,) = harness.HarnessLM(Pocket(), BYTES, max_length=10).loglikelihood_rolling(requests((text,)))
    windows = [("\n", text[:10]), (text[9], text[10:20]), (text[12:20], text[20:])]  # the last is filled with context
    assert cut == pytest.approx(sum(log_likelihood(*window)[0] for window in windows), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_text_is_written_until_a_stop(harness: Any) -> None:
    lm = harness.HarnessLM(Pocket(), BYTES)
    greedy = b""
    for _ in range(12):
        greedy += bytes([int(np.argmax(LOGITS[folded(b"one" + greedy)]))])
    expected = greedy.decode("utf-8", errors="replace")
    options = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    assert lm.generate_until(requests(("one", options))) == [expected]
    stop = expected[5]
    (short,) = lm.generate_until(requests(("one", {**options, "until": stop})))
    assert short == expected[: expected.index(stop)]
    sampled = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    assert lm.generate_until(requests(("one", sampled), ("", sampled)))[0] != expected


def test_the_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "spiking_lm.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingExtraError, match="running lm-eval's tasks needs the extra 'eval'") as raised:
        importlib.import_module("spiking_lm.harness")
    assert raised.value.hint == "pip install 'spiking-lm[eval]'"


OWN_TASKS = {
    "piqa": "piqa/piqa.yaml",
    "arc": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
}


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs lm-eval: pip install 'spiking-lm[eval]'")
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_finds_the_same_figures_with_its_own_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from spiking_lm.harness import HarnessLM

    theirs, files = Path(lm_eval.__file__).parent / "tasks", []
    for task in TASKS:
        lines = make_lines(task, 12, seed=3)
        for line in lines if task == "boolq" else []:  # lm-eval reads SuperGLUE's export
            line["label"] = int(line.pop("answer"))
        files.append(write_lines(tmp_path / f"{task}.jsonl", lines))
        (tmp_path / f"own_{task}.yaml").write_text(
            f"include: {theirs / OWN_TASKS[task]}\n"
            f"task: own_{task}\n"
            "tag: null\n"
            "dataset_path: json\n"
            "dataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{validation: {files[-1]}}}, cache_dir: {tmp_path / 'cache'}}}\n"
            "training_split: null\nvalidation_split: validation\ntest_split: null\n",
            encoding="utf-8",
        )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = [f"own_{task}" for task in TASKS]
    model = Pocket()
    found = lm_eval.simple_evaluate(
        model=HarnessLM(model, BYTES), tasks=names, task_manager=manager, num_fewshot=0, bootstrap_iters=10
    )
    assert found is not None
    ours = evaluate_choices(model, BYTES, files)["tasks"]
    for task, name in zip(ours, names, strict=True):
        result = found["results"][name]
        for figure in ("acc", "acc_norm"):
            assert result.get(f"{figure},none") == pytest.approx(task[figure]), (name, figure)
            assert result.get(f"{figure}_stderr,none") == pytest.approx(task[f"{figure}_stderr"]), (name, figure)
    assert len({task["acc"] for task in ours}) > 1
