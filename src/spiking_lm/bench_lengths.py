"""Benchmarks of long texts: time per token and memory do not grow with what a model has read.

Memory is the greatest that a process was resident with, and every figure of it comes from a process of its own.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from spiking_lm.bench import Row

T = TypeVar("T")

LENGTHS = (1024, 4096, 16384, 65536)
CHUNK = 1024
"""Tokens that are read at once; the state goes from one chunk to the next."""

SIZES: dict[str, dict[str, Any]] = {
    "spikegpt": {"n_layer": 4, "n_embd": 128, "ctx_len": 1024},
    "egru": {"n_layer": 2, "n_embd": 128, "n_hidden": 256},
}

DOCUMENTS = (65536, 262144, 1048576)
DOCUMENT_MODEL: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "ctx_len": 1024}

_STATUS = Path("/proc/self/status")


def bench_lengths(model: str, repeats: int, *, lengths: tuple[int, ...] = LENGTHS, chunk: int = CHUNK) -> list[Row]:
    """Read texts of these lengths in chunks with carried state; compare time per token and memory of last and first.

    As many tokens are read for each length, in several texts where they are short.
    """
    found = {length: alone(read, model, length, max(lengths), chunk) for length in lengths}
    return [
        _flat(
            f"lengths/{model}-{name}",
            f"{model}, texts in chunks of {chunk} with carried state: {what} at {lengths[-1]:,} tokens over "
            f"{lengths[0]:,}",
            {f"{length:,} tokens": values[name] for length, values in found.items()},
            unit,
        )
        for name, what, unit in (("time", "time per token", "us"), ("memory", "peak memory", "MB"))
    ]


def bench_document(repeats: int, *, sizes: tuple[int, ...] = DOCUMENTS, window: int = CHUNK) -> Row:
    """Run ``spiking-lm eval`` on documents of these sizes in bytes, and compare the memory."""
    from spiking_lm.checkpoints import save_model
    from spiking_lm.data import create_tokenizer
    from spiking_lm.models import create_model

    found = {}
    with TemporaryDirectory(prefix="document-") as name:
        folder = Path(name)
        model = create_model("spikegpt", vocab_size=256, **DOCUMENT_MODEL)
        save_model(model, folder / "model", tokenizer=create_tokenizer({"type": "byte"}))
        line = b"It is a truth universally acknowledged, that a document may be as long as it likes.\n"
        for size in sizes:
            document = folder / f"{size}.txt"
            document.write_bytes((line * (size // len(line) + 1))[:size])
            found[f"{size // 1024:,} KiB"] = alone(score, folder / "model", document, window)["memory"]
    return _flat(
        "lengths/document",
        f"spiking-lm eval --protocol carried, a document of {sizes[-1] // 1024:,} KiB: peak memory over that for "
        f"{sizes[0] // 1024:,} KiB",
        found,
        "MB",
    )


def _flat(name: str, what: str, found: Mapping[str, float | None], unit: str) -> Row:
    """Return the row of a figure that should not grow: the last over the first."""
    values = list(found.values())
    if any(value is None for value in values):
        return Row(name, what, None, note=f"{_STATUS} tells it, and is not here")
    told = ", ".join(f"{value:.4g} {unit} ({label})" for label, value in found.items())
    growth = values[-1] / values[0]  # type: ignore[operator]
    return Row(name, what, growth, target=1.1, at_most=True, note=told, details=dict(found))


# -- what runs in a process of its own ---------------------------------------------------------------------------------


def alone(function: Callable[..., T], *args: Any) -> T:
    """Return ``function(*args)`` from a new process, with as many threads as this one has."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(partial(_with_threads, torch.get_num_threads(), function), *args).result()


def _with_threads(count: int, function: Callable[..., T], *args: Any) -> T:
    torch.set_num_threads(count)
    return function(*args)


def read(name: str, length: int, tokens: int, chunk: int) -> dict[str, float | None]:
    """Read ``tokens`` random tokens in texts of ``length``; return microseconds per token and this process's peak."""
    from spiking_lm.generation import evaluating
    from spiking_lm.models import create_model

    model = create_model(name, vocab_size=256, **SIZES[name])
    text = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        model(text[:, :chunk])  # compiles what is compiled
        begun = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
        for _ in range(tokens // length):
            state = None
            for start in range(0, length, chunk):
                state = model(text[:, start : start + chunk], state).state
        ended = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    return {"time": 1e6 * (ended - begun) / (tokens // length * length), "memory": peak_memory()}


def score(model: Path, document: Path, window: int) -> dict[str, float | None]:
    """Evaluate a model on a document as the command line does; return this process's peak."""
    from spiking_lm.cli import main

    options = ["--protocol", "carried", "--window", str(window), "--json"]
    arguments = ["eval", str(model), "--data", str(document), *options]
    with redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"spiking-lm {' '.join(arguments)} ended with {end.code}") from None
    return {"memory": peak_memory()}


def peak_memory() -> float | None:
    """Return the greatest resident memory of this process so far, in MB; None where the system does not tell."""
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text(encoding="ascii").splitlines()  # getrusage counts the parent's as well
    return next(int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmHWM:"))


spikegpt = partial(bench_lengths, "spikegpt")
egru = partial(bench_lengths, "egru")
