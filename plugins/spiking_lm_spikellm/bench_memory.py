"""How much memory a conversion takes: a model of random weights is written in shards, converted in part, and removed.

Every conversion runs in a process of its own, whose greatest resident memory is what counts: libraries, mapped files
and all. A block of Llama-7B is not converted; what it would take is projected from the parts that were measured.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from spiking_lm.bench import Row
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.conversion_config import SpikeLLMConversion
from spiking_lm_spikellm.sources import EMBEDDING, HEAD, NORM, block_shapes, open_source, tensor_shapes

SIZES: dict[str, Any] = {
    **{"vocab_size": 32000, "n_layer": 22, "n_embd": 2048, "n_inner": 5632, "n_head": 32, "n_kv_head": 4}
}
"""TinyLlama's: 1.1 billion parameters, with grouped queries and a head of its own."""

LARGER = SpikeLLMConfig(vocab_size=32000, n_layer=32, n_embd=4096, n_inner=11008, n_head=32)
"""Llama-7B's sizes."""

CALIBRATION = {"samples": 8, "window": 512}
"""Memory hardly depends on it: a few windows are in memory at a time, whatever their number."""

_GPTQ: dict[str, Any] = {
    "rotation": True,
    "weights": {"bits": 4},
    "activations": {"bits": 4, "salient": {"rate": 0.1, "steps": 2}},
    "cache": {"bits": 4},
}

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"rounding": "nearest", **{name: {"bits": 4} for name in ("weights", "activations", "cache")}},
    "gptq": _GPTQ,
    "gptq-follow": {**_GPTQ, "gptq": {"follow": 0.5}},
}
"""Name -> options of a conversion; the last is ``spikellm/w4a4``, which has the float model beside."""

TARGET_GB = 6.0

_STATUS = Path("/proc/self/status")


class Measured(NamedTuple):
    """What a process took."""

    at_start: int
    """Greatest resident bytes before it opens the source: Python, torch and this package."""
    between_blocks: int
    """Resident bytes when a block begins, at most."""
    peak: int
    """Greatest resident bytes in the end."""
    seconds: list[float]
    """Of each block, by the processor time of the process."""


def memory(repeats: int, *, blocks: int = 3, **sizes: Any) -> list[Row]:
    """Convert the first blocks of a synthetic model by each method, once, and return the peaks and projections."""
    config = SpikeLLMConfig(**{**SIZES, **sizes})
    parameters = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
    name = f"{parameters / 1e9:.1f}B" if parameters >= 5e7 else f"{parameters / 1e6:.1f}M"
    needed, place = 2.5 * parameters, tempfile.gettempdir()
    if not _STATUS.exists():
        problem = f"{_STATUS} tells it, and is not here"
    elif shutil.disk_usage(place).free < needed:
        problem = f"no place for {needed / 1e9:.1f} GB in {place}: set TMPDIR to another folder"
    else:
        problem = None
    if problem is not None:
        return [Row("spikellm-memory", f"SpikeLLM, synthetic {name} Llama: peak memory", None, "GB", note=problem)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="spikellm-memory-") as folder:
        source = Path(folder, "source")
        write_synthetic(source, config)
        for method in METHODS:
            found = _in_another_process(source, method, Path(folder, method), blocks)
            rows += _rows(method, name, config, found, blocks)
    return rows


def _in_another_process(source: Path, method: str, work: Path, blocks: int) -> Measured:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, source, method, work, blocks, torch.get_num_threads()).result()


def _rows(method: str, name: str, config: SpikeLLMConfig, found: Measured, blocks: int) -> list[Row]:
    block = found.peak - found.between_blocks
    growth = max(_block_weights(LARGER) / _block_weights(config), (LARGER.n_inner / config.n_inner) ** 2)
    projected = found.between_blocks + growth * block
    seconds = ", ".join(f"{s:.0f}" for s in found.seconds)
    details = {**found._asdict(), "blocks": blocks, "growth": growth, "options": METHODS[method]}
    return [
        Row(
            f"spikellm-memory/{method}",
            f"SpikeLLM, synthetic {name} Llama in shards, {method}, {blocks} of {config.n_layer} blocks: peak memory",
            found.peak / 1e9,
            "GB",
            target=TARGET_GB,
            at_most=True,
            note=f"of the process; {found.at_start / 1e9:.2f} GB before it begins; {seconds} s per block",
            details=details,
        ),
        Row(
            f"spikellm-memory/{method}-7b",
            f"SpikeLLM, Llama-7B's sizes, {method}: peak memory, a projection",
            projected / 1e9,
            "GB",
            note=f"projection from measured parts: {found.between_blocks / 1e9:.2f} GB between blocks, and a block's "
            f"{block / 1e9:.2f} GB times {growth:.2f}, as its matrices or the squares of their inputs grow",
            details=details,
        ),
    ]


def _block_weights(config: SpikeLLMConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in block_shapes(config).values())


# -- the model ---------------------------------------------------------------------------------------------------------


def write_synthetic(folder: Path, config: SpikeLLMConfig, *, seed: int = 0) -> None:
    """Write a Llama of random bfloat16 weights as other tools do: config.json, shards of two blocks, their index."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(config)
    table: dict[str, str] = {}
    for number, names in enumerate(_shards(config, shapes)):
        file = f"model-{number + 1:05d}.safetensors"
        save_file({name: _random(shapes[name], generator) for name in names}, folder / file)
        table |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}), encoding="utf-8")
    told = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.ctx_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(told), encoding="utf-8")


def _shards(config: SpikeLLMConfig, shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    yield [name for name in (EMBEDDING, NORM, HEAD) if name in shapes]
    for first in range(0, config.n_layer, 2):
        yield [name for name in shapes if name.startswith((f"model.layers.{first}.", f"model.layers.{first + 1}."))]


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[-1] ** -0.5, generator=generator)


# -- the process that is measured --------------------------------------------------------------------------------------


class _Enough(Exception):
    """Ends a conversion when so many blocks are done."""


def measure(source: Path, method: str, work: Path, blocks: int, threads: int) -> Measured:
    """Convert the first ``blocks`` of ``source`` in this process, from random text, and return what it took."""
    from spiking_lm_spikellm.pipeline import Conversion, converted_config

    torch.set_num_threads(threads)
    at_start = peak_memory()
    options = SpikeLLMConversion.model_validate({"source": str(source), "calibration": CALIBRATION, **METHODS[method]})
    opened = open_source(source)
    config = converted_config(options, opened)
    shape = (options.calibration.samples, options.calibration.window)
    text = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    begun: dict[int, float] = {}
    between_blocks = 0

    def show(index: int, _: str) -> None:
        nonlocal between_blocks
        if index not in begun:
            begun[index] = time.process_time()
            between_blocks = max(between_blocks, resident_memory())
        if index == blocks:
            raise _Enough

    try:
        with torch.no_grad():
            Conversion(options, opened, config, text, work, seed=0).run(show)
        begun[blocks] = time.process_time()
    except _Enough:
        pass
    times = [begun[index] for index in sorted(begun)]
    seconds = [stop - start for start, stop in pairwise(times)]
    return Measured(at_start, between_blocks, peak_memory(), seconds)


def peak_memory() -> int:
    """Return the greatest resident memory of this process so far, in bytes."""
    return _status("VmHWM")  # getrusage counts the parent's as well


def resident_memory() -> int:
    """Return the resident memory of this process, in bytes."""
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
