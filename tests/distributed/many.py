"""Small recipes, run by one process and by several, which are all started once and share the jobs of the module."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from spiking_lm.rundir import RunDir
from spiking_lm.runs import run_recipe

SENTENCES = ("the cat sat on the mat\n", "and the dog lay on the rug\n", "while it rained on the town.\n")
TEXT = "".join(SENTENCES[i % 3][i % 5 :] for i in range(300))

TRAIN = {"steps": 8, "batch_size": 6, "seq_len": 12, "log_every": 1, "eval_every": 4, "eval_tokens": 64}
GPT = {"type": "spikegpt", "n_layer": 2, "n_embd": 16, "ctx_len": 32}
SPIKELM = {"type": "spikelm", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_hidden": 32, "ctx_len": 32, "dropout": 0.0}
WORDS = {"type": "word", "lowercase": True, "split": "punctuation", "eos": False, "mask": True}
LABELLED = {"type": "authors4", "tokenizer": {"type": "byte"}}


def recipe_of(
    folder: Path, name: str, model: dict[str, Any], data: Any = None, tokenizer: Any = None, **train: Any
) -> Path:
    """Write a recipe that trains ``model``, and does nothing else."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    text = {"type": "text", "path": str(folder / "text.txt"), "tokenizer": tokenizer or {"type": "byte"}}
    lr = {"optimizer": {"lr": 0.01}}
    document = {"schema": 1, "name": f"many/{name}", "seed": 3, "data": data or text, "model": model}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**document, "train": {**TRAIN, **lr, **train}}), encoding="utf-8")
    return path


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def alone(recipe: Path | None, out: Path, *settings: str, resume: Path | None = None) -> RunDir:
    """Run a recipe in this process."""
    return run_recipe(recipe, settings, out=out, resume=resume, console=Console(file=io.StringIO()))


def environment() -> dict[str, str]:
    """Return that of a child: one thread each, so that sums do not depend on the machine."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{k: v for k, v in os.environ.items() if k not in launcher}, "OMP_NUM_THREADS": "1"}


def together(folder: Path, jobs: list[dict[str, Any]], processes: int) -> list[list[str]]:
    """Run jobs in so many processes; return what became of each in every one of them."""
    filled = [{"set": [], "resume": None, "size": 2, **job} for job in jobs]
    file = folder / "jobs.json"
    # A port for every job: whoever is early waits, and meets nobody who has yet to leave the last one.
    ports = free_ports(len(filled))
    file.write_text(json.dumps([{**job, "port": port} for job, port in zip(filled, ports, strict=True)]))
    worker = Path(__file__).with_name("worker.py")
    children = [
        subprocess.Popen([sys.executable, str(worker), str(rank), str(file)], env=environment(), stderr=subprocess.PIPE)
        for rank in range(processes)
    ]
    try:
        errors = [child.communicate(timeout=400)[1].decode() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * processes, "\n".join(errors)
    return [json.loads(file.with_suffix(f".{rank}").read_text(encoding="utf-8")) for rank in range(processes)]


def run_in(out: Path) -> RunDir:
    """Return the one run below ``out``."""
    return RunDir(next(out.glob("many/*/2*")))


def cut_back(run: RunDir, step: int, path: Path) -> RunDir:
    """Return a copy of a run, at ``path``, as if it had been interrupted after ``step``."""
    shutil.copytree(run.path, path)
    for checkpoint in (path / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    copy = RunDir(path)
    copy.update_manifest(status="interrupted", stages={})
    return copy


def curve(run: RunDir, *names: str) -> list[float]:
    """Return the losses, and whatever else is named, of every logged step and validation."""
    return [entry[name] for entry in run.metrics() for name in ("loss", *names) if name in entry]
