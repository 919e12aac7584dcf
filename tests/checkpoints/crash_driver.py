"""Saves in child processes that are killed, and looks at what they leave; run by test_crash.py in a process of its own.

Children are forked from here, so that each does not have to import torch again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import spiking_lm
from spiking_lm import files
from spiking_lm.checkpoints import latest_checkpoint, load_checkpoint, load_model, save_checkpoint, save_model


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def save(run: Path, step: int, keep: int = 2) -> None:
    model: Any = spiking_lm.create_model("tiny", width=48)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    save_checkpoint(run, step, model, {"step": step, "moments": [torch.full((48, 48), float(step))]}, keep=keep)
    save_model(model, run / "final")


def check(run: Path) -> int:
    """Load the newest checkpoint, see that it is of one piece, and return its step."""
    latest = latest_checkpoint(run)
    if latest is None:
        return 0
    model, state = load_checkpoint(latest)
    step: int = state["step"]
    assert (model.mix.weight == step).all()
    assert (state["moments"][0] == step).all()
    return step


def random_moments(run: Path, kills: int) -> dict[str, Any]:
    """Kill a saving child at random moments; nothing that it reported as saved may be lost."""
    rng = random.Random(7)
    start = time.perf_counter()
    save(run.with_name("trial"), 1)
    usual = time.perf_counter() - start
    last, caught, replaced = 0, 0, 0
    for _ in range(kills):
        report, told = os.pipe()

        def saving(told: int = told, last: int = last) -> None:
            step = last
            while True:
                step += 1
                save(run, step)
                os.write(told, b"%d\n" % step)

        child = fork(saving)
        time.sleep(rng.uniform(0.1, 2.5) * usual)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        os.close(told)
        with os.fdopen(report) as lines:
            reported = [int(line) for line in lines]
        finished = reported[-1] if reported else last
        caught += any(run.rglob(".*"))
        step = check(run)
        assert step in (finished, finished + 1), (step, finished)
        replaced = max([replaced, *reported])
        if replaced:  # the model that is saved again and again is there at every moment, old or new
            weights = load_model(run / "final").mix.weight
            assert replaced <= weights[0, 0] <= step, (replaced, weights[0, 0], step)
            assert (weights == weights[0, 0]).all()
        last = step
    save(run, last + 1)
    return {"saved": last, "caught": caught, "left": [str(path) for path in run.rglob(".*")]}


def every_call(run: Path, exchange: bool) -> dict[str, Any]:
    """Kill a child before its n-th system call, for every n, while it replaces a checkpoint and a model."""
    names = ("rename", "replace", "fsync", "scandir", "open", "rmdir", "unlink")

    def dying_at(deadline: int, run: Path) -> None:
        calls = 0

        def guard(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == deadline:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in names:
            setattr(os, name, guard(getattr(os, name)))
        if not exchange:
            files._exchange = lambda a, b: False  # type: ignore[assignment]
        save(run, 2, keep=1)

    steps = []
    save(run / "first", 1)
    for deadline in range(1, 400):
        here = run / str(deadline)
        shutil.copytree(run / "first", here)
        child = fork(lambda deadline=deadline, here=here: dying_at(deadline, here))  # type: ignore[misc]
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        steps.append(check(here))
        files.clean_leftovers(here)  # what the next save in this folder does first
        assert load_model(here / "final").mix.weight[0, 0] in (1, 2)
        if not killed:
            return {"calls": deadline - 1, "steps": steps}
    raise AssertionError("the save never came to its end")


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *more = sys.argv[1:]
    if what == "random":
        print(json.dumps(random_moments(Path(folder), int(more[0]))))
    else:
        print(json.dumps(every_call(Path(folder), more[0] == "exchange")))
