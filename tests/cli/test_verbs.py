"""The verbs run, train, eval, generate, chat and recipes, from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spiking_lm.recipe import load_recipe

Run = Callable[..., "subprocess.CompletedProcess[str]"]
COMMAND = [sys.executable, "-c", "from spiking_lm.cli import main; main()"]


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_recipes_ls(inside: Run) -> None:
    shown = inside("recipes", "ls")
    assert shown.returncode == 0
    row = next(line for line in shown.stdout.splitlines() if "spikegpt/quickstart" in line)
    assert "austen3" in row
    listed = {entry["name"]: entry for entry in json.loads(inside("recipes", "ls", "--json").stdout)}
    assert listed["spikegpt/quickstart"]["model"] == "spikegpt"
    assert listed["spikegpt/quickstart"]["stages"] == ["train", "evaluate", "generate", "explain", "report"]


def test_recipes_show_is_the_resolved_recipe(inside: Run, tmp_path: Path) -> None:
    shown = inside("recipes", "show", "spikegpt/quickstart", "--set", "train.steps=7")
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    recipe = load_recipe(tmp_path / "shown.yaml")
    assert recipe.train is not None
    assert recipe.train.steps == 7
    as_json = json.loads(inside("recipes", "show", "spikegpt/quickstart", "--json").stdout)
    assert as_json["schema"] == 1


def test_recipes_cp_keeps_comments_and_overwrites_nothing(inside: Run, tmp_path: Path) -> None:
    shown = inside("recipes", "cp", "spikegpt/quickstart", "mine.yaml", cwd=tmp_path)
    assert "spiking-lm run mine.yaml" in shown.stdout
    assert (tmp_path / "mine.yaml").read_text().startswith("#")
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("spikegpt/quickstart")
    again = inside("recipes", "cp", "spikegpt/quickstart", "mine.yaml", cwd=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    assert inside("recipes", "cp", "spikegpt/quickstart", ".", cwd=tmp_path).returncode == 0
    assert (tmp_path / "quickstart.yaml").is_file()


def test_recipes_validate_checks_each_and_returns_the_worst(inside: Run, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("extends: spikegpt/quickstart\ntrain: {stepz: 3}\n")
    (tmp_path / "other.yaml").write_text("extends: spikegpt/quickstart\nrequires: [nope]\n")
    good = inside("recipes", "validate", "spikegpt/quickstart", "spikegpt/austen")
    assert (good.returncode, good.stdout) == (0, "spikegpt/quickstart: ok\nspikegpt/austen: ok\n")
    bad = inside("recipes", "validate", "wrong.yaml", "spikegpt/quickstart", "--json", cwd=tmp_path)
    assert bad.returncode == 2
    wrong, right = json.loads(bad.stdout)
    assert (wrong["ok"], right["ok"]) == (False, True)
    assert "did you mean 'steps'?" in wrong["hint"]
    assert inside("recipes", "validate", "wrong.yaml", "other.yaml", cwd=tmp_path).returncode == 3


def test_recipes_schema_is_json(inside: Run) -> None:
    assert "model" in json.loads(inside("recipes", "schema").stdout)["properties"]


# -- run and train ----------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_sizes_and_leaves_nothing(inside: Run, trained: Path) -> None:
    before = sorted(p.name for p in (trained / "runs" / "tiny").iterdir())
    shown = inside("run", "tiny.yaml", "--dry-run", "--set", "train.steps=9", cwd=trained)
    assert shown.returncode == 0
    assert "steps: 9" in shown.stdout
    assert re.search(r"parameters +[\d,]+", shown.stdout)
    assert re.search(r"train\.tokens +[\d,]+", shown.stdout)
    facts = json.loads(inside("run", "tiny.yaml", "--dry-run", "--json", cwd=trained).stdout)
    assert facts["resolved"]["train"]["steps"] == 4
    assert facts["tokens_per_step"] == 32
    assert sorted(p.name for p in (trained / "runs" / "tiny").iterdir()) == before


def test_run_as_json_keeps_progress_off_standard_output(inside: Run, trained: Path) -> None:
    shown = inside("run", "tiny.yaml", "--json", "--out", "elsewhere", "--set", "seed=5", cwd=trained)
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert (trained / result["run"] / "manifest.json").is_file()
    assert result["status"] == "complete"
    assert result["evaluation"]["metrics"]["bits_per_byte"] > 0
    assert "validation" in shown.stderr


def test_train_trains_and_stops_there(inside: Run, trained: Path) -> None:
    result = json.loads(inside("train", "tiny.yaml", "--json", "--out", "trains", cwd=trained).stdout)
    assert list(result["stages"]) == ["train"]
    assert "evaluation" not in result
    complete = inside("run", "--resume", result["run"], cwd=trained)
    assert complete.returncode == 0
    assert "is complete" in complete.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_shown_command_goes_on(
    inside: Run, trained: Path, tmp_path: Path, sent: int, interruptible: Any
) -> None:
    arguments = ["train", str(trained / "tiny.yaml"), "--set", "train.steps=4000", "--set", "train.save_every=0"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob("runs/tiny/2*/metrics.jsonl"))) or found[0].stat().st_size < 500:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"^error: interrupted after step \d+; saved .*step-\d+$", stderr, re.MULTILINE)
    command = re.search(r"^hint: resume: spiking-lm (.*)$", stderr, re.MULTILINE)
    assert command
    run = found[0].parent
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(
        recipe.replace("steps: 4000", f"steps: {int(stderr.split('step ')[1].split(';')[0].replace(',', '')) + 3}")
    )
    resumed = inside(*shlex.split(command[1]), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"


# -- eval -------------------------------------------------------------------------------------------------------------


def test_eval_scores_a_run_on_its_own_data(inside: Run, trained: Path) -> None:
    shown = inside("eval", "runs/tiny", cwd=trained)
    assert shown.returncode == 0, shown.stderr
    assert "bits per byte" in shown.stdout
    result = json.loads(inside("eval", "runs/tiny", "--json", cwd=trained).stdout)
    run = next((trained / "runs" / "tiny").glob("2*"))
    assert result["metrics"] == json.loads((run / "evaluation.json").read_text())["metrics"]
    shorter = json.loads(
        inside("eval", "runs/tiny", "--json", "--split", "valid", "--max-tokens", "50", cwd=trained).stdout
    )
    assert shorter["split"] == "valid"
    assert "49 tokens" in shorter["protocol"]


def test_eval_scores_any_text_or_dataset(inside: Run, trained: Path) -> None:
    (trained / "other.txt").write_text("the dog sat on the cat.\n" * 5, encoding="utf-8")
    result = json.loads(inside("eval", "runs/tiny", "--data", "other.txt", "--json", cwd=trained).stdout)
    assert result["data"]["dataset"] == "other.txt"
    assert "119 tokens of the test split" in result["protocol"]
    named = inside("eval", "runs/tiny", "--data", "text:text.txt", "--max-tokens", "40", "--json", cwd=trained)
    assert json.loads(named.stdout)["data"]["dataset"] == "text"
    missing = inside("eval", "runs/tiny", "--data", "austn3", cwd=trained)
    assert missing.returncode == 2
    assert "did you mean 'austen3'?" in missing.stderr
    (trained / "latin.txt").write_bytes(b"caf\xe9")
    assert inside("eval", "runs/tiny", "--data", "latin.txt", cwd=trained).returncode == 4


def test_eval_of_a_model_without_a_run_needs_data(inside: Run, trained: Path, tmp_path: Path) -> None:
    import shutil

    run = next((trained / "runs" / "tiny").glob("2*"))
    shutil.copytree(run / "checkpoints" / "step-000004", tmp_path / "model")
    shown = inside("eval", str(tmp_path / "model"))
    assert shown.returncode == 2
    assert "name it with --data" in shown.stderr


def test_a_corrupt_model_is_exit_code_4(inside: Run, trained: Path, tmp_path: Path) -> None:
    import shutil

    run = next((trained / "runs" / "tiny").glob("2*"))
    shutil.copytree(run / "checkpoints" / "step-000004", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for verb in ("eval", "generate", "chat"):
        shown = inside(verb, str(tmp_path / "model"))
        assert shown.returncode == 4
        assert "model.safetensors" in shown.stderr


# -- generate and chat ------------------------------------------------------------------------------------------------


def test_generate_is_reproducible_and_streams_the_prompt_first(inside: Run, trained: Path) -> None:
    arguments = ["generate", "runs/tiny", "--prompt", "the cat", "--max-tokens", "20", "--seed", "7"]
    first, second = inside(*arguments, cwd=trained), inside(*arguments, "--stats", cwd=trained)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the cat")
    assert first.stdout == second.stdout
    assert first.stderr == ""
    assert re.fullmatch(r"20 tokens, [\d,.]+ tokens/s, [\d,.]+ spikes per token\n", second.stderr)
    assert inside(*arguments[:-1], "8", cwd=trained).stdout != first.stdout


def test_generate_as_json_and_from_standard_input(inside: Run, trained: Path) -> None:
    shown = inside(
        "generate", "runs/tiny", "--prompt", "-", "--max-tokens", "5", "--json", cwd=trained, input="the mat"
    )
    result = json.loads(shown.stdout)
    assert (result["prompt"], result["tokens"]) == ("the mat", 5)
    assert result["spikes_per_token"] > 0


def test_generate_stops_at_a_stop_string_and_can_be_greedy(inside: Run, trained: Path) -> None:
    common = ["generate", "runs/tiny", "--max-tokens", "40", "--temperature", "0", "--json"]
    greedy = json.loads(inside(*common, cwd=trained).stdout)
    assert greedy["text"] == json.loads(inside(*common, "--seed", "3", cwd=trained).stdout)["text"]
    stop = greedy["text"][3:5]
    stopped = json.loads(inside(*common, "--stop", stop, cwd=trained).stdout)
    assert stopped["stopped_by"] == stop
    assert stopped["text"] == greedy["text"][: greedy["text"].index(stop)]


@pytest.mark.parametrize("wrong", [["--top-p", "1.5"], ["--temperature", "-1"], ["--top-k", "0"], ["--top-p", "0"]])
def test_generate_refuses_senseless_values(inside: Run, trained: Path, wrong: list[str]) -> None:
    shown = inside("generate", "runs/tiny", *wrong, cwd=trained)
    assert shown.returncode == 2
    assert "top" in shown.stderr or "temperature" in shown.stderr


def test_an_empty_prompt_is_explained(inside: Run, trained: Path) -> None:
    shown = inside("generate", "runs/tiny", "--prompt", "", cwd=trained)
    assert (shown.returncode, "the prompt is empty" in shown.stderr) == (2, True)


def test_chat_takes_turns_and_leaves_cleanly(inside: Run, trained: Path) -> None:
    arguments = ["chat", "runs/tiny", "--max-tokens", "8"]
    shown = inside(*arguments, cwd=trained, input="the cat\n\n/reset\nthe cat\n/nonsense\n/quit\nnever read\n")
    assert shown.returncode == 0, shown.stderr
    assert "it was not trained to answer" in shown.stderr
    assert "(forgotten)" in shown.stderr
    assert "unknown command /nonsense" in shown.stderr
    turns = shown.stdout.encode("utf-8", "surrogateescape")
    assert turns
    ended = inside(*arguments, cwd=trained, input="the cat\n")
    assert ended.returncode == 0
    assert shown.stdout.startswith(ended.stdout.removesuffix("\n"))


def test_a_conversation_is_one_text() -> None:
    """Two turns give what one pass over everything said gives: the state is carried, no token is lost or fed twice."""
    import torch

    import spiking_lm
    from spiking_lm.cli.chat import Conversation
    from spiking_lm.data import create_tokenizer

    torch.manual_seed(0)
    model = spiking_lm.create_model("spikegpt", vocab_size=256, n_layer=1, n_embd=16, ctx_len=32)
    tokenizer = create_tokenizer({"type": "byte"})
    fed: list[int] = []
    original = model.forward

    def forward(tokens: torch.Tensor, *rest: object, **options: object) -> object:
        fed.extend(tokens[0].tolist())
        return original(tokens, *rest, **options)

    model.forward = forward  # type: ignore[assignment]
    talk = Conversation(model, tokenizer, max_tokens=6, seed=0, temperature=1.0, top_k=None, top_p=1.0)
    written: list[int] = []
    decoded: list[str] = []
    talk.turn("ab", decoded.append)
    first_fed = list(fed)
    assert first_fed[:2] == list(b"ab")
    written = first_fed[2:] + talk.unread
    assert len(written) == 6
    talk.turn("cd", decoded.append)
    newline = [] if written[-1] == 10 else [10]
    assert fed[len(first_fed) :][: 1 + len(newline) + 2] == [written[-1], *newline, *b"cd"]
    everything = torch.tensor([fed])
    with torch.no_grad():
        model.eval()
        whole = original(everything).state
    for a, b in zip(_tensors(whole), _tensors(talk.state), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    talk.reset()
    assert talk.state is None
    assert talk.unread == []


def test_a_conversation_ends_where_the_positions_of_the_model_end(capsys: pytest.CaptureFixture[str]) -> None:
    import spiking_lm
    from spiking_lm.cli.chat import Conversation
    from spiking_lm.data import create_tokenizer

    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_hidden": 16, "ctx_len": 12}
    model = spiking_lm.create_model("spikelm", causal=True, neuron=None, vocab_size=256, **sizes)
    talk = Conversation(model, create_tokenizer({"type": "byte"}), max_tokens=5, seed=0, temperature=1.0)
    shown: list[str] = []
    talk.turn("ab", shown.append)
    assert (talk.read, len(talk.unread), talk.full) == (6, 1, False)
    talk.turn("much too long", shown.append)
    assert "6 positions that are left" in capsys.readouterr().err
    assert talk.read == 6
    talk.turn("", shown.append)
    assert (talk.read, talk.full) == (11, False)
    talk.turn("", shown.append)
    assert (talk.read, talk.full) == (12, True)
    before = list(shown)
    talk.turn("", shown.append)
    assert shown == before
    talk.reset()
    talk.turn("abcdefghijkl", shown.append)
    assert (talk.read, talk.full) == (12, True)


def _tensors(state: object) -> list:  # type: ignore[type-arg]
    import torch

    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    return [tensor for value in values for tensor in _tensors(value)]  # type: ignore[union-attr]


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_ctrl_c_at_the_prompt_of_chat_leaves_with_0(trained: Path, interruptible: Any) -> None:
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", "runs/tiny"],
        cwd=trained,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        preexec_fn=interruptible,
    )
    os.close(follower)
    shown = b""
    try:
        while b"> " not in shown:
            assert select.select([leader], [], [], 60)[0], shown
            shown += os.read(leader, 1000)
        for _ in range(10):  # one that comes between the prompt and the wait for a line is not heard before the line
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
                break
        assert process.poll() == 0, shown
    finally:
        process.kill()
        process.wait()
        os.close(leader)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_model_cannot_steer_the_terminal() -> None:
    import pty

    code = "from spiking_lm.cli.generate import write; write('a\\x1b[2J\\x07\\nb\\tc\\x9b')"
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stdout=follower) as process:
        process.wait()
    os.close(follower)
    shown = os.read(leader, 1000).decode()
    os.close(leader)
    assert shown == "a\ufffd[2J\ufffd\r\nb\tc\ufffd"
