"""A process that dies, and Ctrl-C: the others end soon, say how to go on, and what goes on is the same run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spiking_lm.checkpoints import latest_checkpoint
from spiking_lm.rundir import RunDir

from .many import GPT, alone, curve, cut_back, environment, free_ports, recipe_of, run_in, together

STEPS = 100
EGRU = {"type": "egru", "n_embd": 8, "n_hidden": 8, "n_layer": 1}


def wait_for_steps(out: Path, steps: int, *children: subprocess.Popen[bytes]) -> RunDir:
    """Wait until a run below ``out`` has logged so many steps, while all ``children`` live."""
    for _ in range(6000):
        time.sleep(0.02)
        assert [child.poll() for child in children] == [None] * len(children), "it ended before it was stopped"
        logs = list(out.glob("many/*/2*/metrics.jsonl"))
        if logs and logs[0].read_bytes().count(b"\n") >= steps:
            return run_in(out)
    raise AssertionError("it makes no steps")


def process_of_rank(launcher: int, rank: int) -> int:
    """Return the process that a launcher started for a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="utf-8").split()
    variables = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return next(int(pid) for pid, given in variables.items() if b"RANK=%d" % rank in given)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
def test_a_lost_rank_ends_the_run_and_the_rest_is_the_same(tmp_path: Path) -> None:
    # So slow that no rounding ever decides whether a neuron fires: after one such spike curves would drift apart.
    recipe = recipe_of(tmp_path, "lost", GPT, steps=STEPS, eval_every=0, optimizer={"lr": 1e-4})
    whole = alone(recipe, tmp_path / "alone")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "spiking_lm", "train", str(recipe), "--out", str(tmp_path / "lost")]
    launcher = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        run = wait_for_steps(tmp_path / "lost", 20, launcher)
        os.kill(process_of_rank(launcher.pid, 1), signal.SIGKILL)
        since = time.monotonic()
        said = launcher.communicate(timeout=120)[0].decode()
    finally:
        launcher.kill()
    assert time.monotonic() - since < 60
    assert launcher.returncode == 1
    assert "rank 0 of 2: another process is gone after step" in said
    assert "resume, with any number of processes: spiking-lm run --resume" in said
    assert run.status == "interrupted"
    saved = latest_checkpoint(run.path)
    assert saved is not None
    step = int(saved.name[5:])
    assert 19 <= step < STEPS
    copies = [cut_back(run, step, tmp_path / name) for name in ("one", "two")]
    alone(None, tmp_path, resume=copies[0].path)
    answers = together(tmp_path, [{"recipe": None, "out": None, "resume": str(copies[1].path)}], 2)
    assert answers == [["ok"], ["ok"]]
    for copy in copies:
        found = curve(copy)
        assert len(found) == STEPS + 1
        np.testing.assert_allclose(found, curve(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_saves_a_stream_that_one_process_goes_on_with(
    tmp_path: Path, interruptible: Callable[[], None] | None
) -> None:
    recipe = recipe_of(tmp_path, "stopped", EGRU, steps=STEPS, eval_every=0, sampling="stream", optimizer={"lr": 1e-4})
    whole = alone(recipe, tmp_path / "alone")
    port = str(free_ports(1)[0])
    command = [sys.executable, "-m", "spiking_lm", "train", str(recipe), "--out", str(tmp_path / "stopped")]
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "preexec_fn": interruptible}
    variables = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [subprocess.Popen(command, env={**variables, "RANK": str(rank)}, **options) for rank in range(2)]
    try:
        run = wait_for_steps(tmp_path / "stopped", 20, *children)
        children[1].send_signal(signal.SIGINT)  # one is enough: they agree
        said = [child.communicate(timeout=120)[0].decode() for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [130, 130], said
    assert "hint: resume: spiking-lm run --resume" in said[0]
    assert said[1].strip() == "", "rank 0 alone reports"
    saved = latest_checkpoint(run.path)
    assert saved is not None
    assert run.status == "interrupted"
    alone(None, tmp_path, resume=run.path)
    np.testing.assert_allclose(curve(run), curve(whole), rtol=1e-4, atol=1e-4)
    shutil.rmtree(run.path)
