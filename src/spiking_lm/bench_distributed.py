"""Benchmarks of training in several processes: what is equal to one process, what a lost one costs, what is kept.

Every figure comes from ``spiking-lm train`` itself, in processes on this machine that talk by gloo.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spiking_lm.bench import Row
from spiking_lm.errors import SpikingLMError
from spiking_lm.rundir import RunDir

STEPS, LOST_AFTER = 50, 15
_LIMIT = 300.0  # seconds for a run

# Small, since rounding differs: of a million membranes that are compared with a threshold in float32, about one in ten
# runs has one that lies so near that rounding decides, and from that spike on curves differ by 1e-4 to 1e-3.
RECIPE: dict[str, Any] = {
    "schema": 1,
    "name": "bench/distributed",
    "seed": 1,
    "data": {"type": "austen3", "tokenizer": {"type": "byte"}},
    "model": {"type": "spikegpt", "n_layer": 2, "n_embd": 32, "ctx_len": 64},
    "train": {
        "steps": STEPS,
        "batch_size": 4,
        "accumulate": 2,
        "seq_len": 16,
        "grad_clip": 0.5,
        "optimizer": {"lr": 1e-3, "weight_decay": 0.01},
        "eval_every": 25,
        "eval_tokens": 512,
        "save_every": 10,
        "log_every": 1,
        "threads": 1,
    },
}


def _start(words: Sequence[str], processes: int) -> list[subprocess.Popen[bytes]]:
    """Start ``spiking-lm train`` as so many processes that meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    given = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if processes > 1:
        given |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "spiking_lm", "run", *words]
    return [
        subprocess.Popen(
            command,
            env={**given, "OMP_NUM_THREADS": "1", **({"RANK": str(rank)} if processes > 1 else {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]


def _end(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; return their exit codes. Raises: SpikingLMError when they take too long."""
    try:
        for child in children:
            child.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        raise SpikingLMError(f"a run did not end within {_LIMIT:.0f} s") from None
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children]


def _finish(words: Sequence[str], processes: int) -> None:
    codes = _end(_start(words, processes))
    if any(codes):
        raise SpikingLMError(f"a run of {processes} processes ended with the exit codes {codes}")


def _run_below(out: Path) -> RunDir:
    return RunDir(next(out.glob("bench/distributed/2*")))


def _curve(run: RunDir) -> list[tuple[str, int, float]]:
    return [(entry["split"], entry["step"], entry["loss"]) for entry in run.metrics()]


def _apart(run: RunDir, reference: RunDir) -> float:
    """Return the greatest difference of two curves. Raises: SpikingLMError when they have other steps."""
    ours, theirs = _curve(run), _curve(reference)
    if [entry[:2] for entry in ours] != [entry[:2] for entry in theirs]:
        raise SpikingLMError(f"{run.path} has logged other steps than {reference.path}")
    return max(abs(a[2] - b[2]) for a, b in zip(ours, theirs, strict=True))


def _kill_one(recipe: Path, out: Path, strategy: str) -> tuple[RunDir, int, list[int], float]:
    """Kill rank 1 of two; return the run, the step of its checkpoint, the exit codes and the seconds to the end."""
    words = [str(recipe), "--out", str(out), "--set", f"train.distributed.strategy={strategy}"]
    children = _start(words, 2)
    log, limit = None, time.monotonic() + _LIMIT
    while log is None or log.read_bytes().count(b"\n") < LOST_AFTER:
        if time.monotonic() > limit or any(child.poll() is not None for child in children):
            _end(children)
            raise SpikingLMError("the run ended before a process could be killed")
        time.sleep(0.01)
        log = next(out.glob("bench/distributed/2*/metrics.jsonl"), None)
    children[1].send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    since = time.monotonic()
    codes = _end(children)
    run = _run_below(out)
    return run, int((run.path / "latest").read_text().strip()[-6:]), codes, time.monotonic() - since


def bench_equal(repeats: int) -> list[Row]:
    """Train SpikeGPT with one process, with two, and with two of which one is killed; compare the losses.

    Once, whatever ``repeats``: nothing here is a matter of chance.
    """
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
        _finish([str(recipe), "--out", str(folder / "one")], 1)
        one = _run_below(folder / "one")
        for strategy in ("ddp", "fsdp2"):
            out = folder / strategy
            _finish([str(recipe), "--out", str(out), "--set", f"train.distributed.strategy={strategy}"], 2)
            rows.append(_row(f"equal-{strategy}", f"{strategy} on 2 processes against 1", _run_below(out), one))
        for strategy in ("ddp", "fsdp2"):
            run, step, codes, seconds = _kill_one(recipe, folder / f"lost-{strategy}", strategy)
            for processes in (1, 2):
                copy = RunDir(folder / f"{strategy}-{processes}")
                shutil.copytree(run.path, copy.path)
                _finish(["--resume", str(copy.path)], processes)
                what = f"{strategy}: rank 1 of 2 killed, resumed on {processes} from step {step}"
                facts = {"checkpoint": step, "exit_code_of_rank_0": codes[0], "seconds_to_the_end": seconds}
                rows.append(_row(f"lost-{strategy}-{processes}", what, copy, one, **facts))
    return rows


def _row(name: str, what: str, run: RunDir, one: RunDir, **facts: Any) -> Row:
    return Row(
        f"distributed/{name}",
        f"{what}: greatest difference of the loss over {STEPS} steps (fp32)",
        _apart(run, one),
        unit="nats",
        target=1e-5,
        at_most=True,
        note=f"global batch 8 x 16, training and validation; last loss {run.metrics()[-1]['loss']:.6f}",
        details={**facts, "loss": [entry[2] for entry in _curve(run)], "one_process": [e[2] for e in _curve(one)]},
    )


# -- memory ------------------------------------------------------------------------------------------------------------


def kept_for_backward(chunk: int, length: int, *, again: bool) -> tuple[int, Tensor]:
    """Return the bytes that a forward pass of SpikeGPT 8 x 256 keeps for its backward pass, and the loss."""
    from contextlib import ExitStack

    from spiking_lm.data import load
    from spiking_lm.objectives import objective_for
    from spiking_lm.preparation import build_model
    from spiking_lm.recipe import resolve
    from spiking_lm.recompute import blocks_of, recomputing
    from spiking_lm.training import MicroBatch

    train = {**RECIPE["train"], "accumulate": 1, "seq_len": length, "chunk_len": chunk}
    model_config = {"type": "spikegpt", "n_layer": 8, "n_embd": 256, "ctx_len": 512}
    recipe = resolve({**RECIPE, "model": model_config, "train": train})
    assert recipe.train is not None
    data = load(recipe.data)
    model = build_model(recipe, data)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    micro = MicroBatch(model.train(), objective_for(model, data, recipe.train, 0), "fp32")
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with ExitStack() as stack:
        if again:
            stack.enter_context(recomputing(blocks_of(model, lambda: micro(0))))
        torch.manual_seed(0)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        loss = micro(0)
    return sum(sizes.values()), loss.detach()


def bench_memory(repeats: int) -> list[Row]:
    """Count what is kept for the backward pass: with blocks computed again, and along long sequences in chunks."""
    whole, loss = kept_for_backward(512, 512, again=False)
    less, same = kept_for_backward(512, 512, again=True)
    far, _ = kept_for_backward(512, 65536, again=False)
    return [
        Row(
            "distributed/memory-again",
            "activation checkpointing, SpikeGPT 8x256, B 4, T 512: bytes kept for the backward pass, without over with",
            whole / less if torch.equal(loss, same) else None,
            note=f"{whole / 2**20:.0f} MiB against {less / 2**20:.0f} MiB; loss "
            + ("identical" if torch.equal(loss, same) else "DIFFERENT"),
            details={"bytes": whole, "bytes_again": less},
        ),
        Row(
            "distributed/memory-chunks",
            "chunks of 512, SpikeGPT 8x256, B 4: bytes kept for the backward pass at T 65,536 over T 512",
            far / whole,
            target=1.01,
            at_most=True,
            note=f"{far / 2**20:.0f} MiB against {whole / 2**20:.0f} MiB",
            details={"bytes": far, "bytes_short": whole},
        ),
    ]
