"""The calibration text as it flows through a block: hidden states on disk, and what each projection reads of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spiking_lm.errors import DataError
from spiking_lm_spikellm.model import Block

TOKENS_AT_ONCE = 4096
"""Of the text in memory at a time, at least one window."""

_MEGABYTE = 2**20


class Stream:
    """Hidden states ``(N, S, C)`` on disk, float32, read and written a few windows at a time."""

    def __init__(self, path: Path, shape: tuple[int, int, int], *, new: bool = False) -> None:
        self.path, self.shape = path, shape
        if new:
            _allocate(path, 4 * math.prod(shape))
        self._array = np.memmap(path, dtype=np.float32, mode="r+", shape=shape)

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield which windows, and their states."""
        size = max(1, TOKENS_AT_ONCE // self.shape[1])
        for start in range(0, self.shape[0], size):
            rows = slice(start, start + size)
            yield rows, self[rows]

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.from_numpy(np.array(self._array[rows]))

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self._array[rows] = values.numpy()

    def tensor(self) -> Tensor:
        """Return all of it; what is not looked at stays on disk."""
        return torch.from_numpy(self._array)

    def flush(self) -> None:
        """Have it on disk before something says that it is."""
        self._array.flush()


def _allocate(path: Path, size: int) -> None:
    """Make a file of zeros that has its place on the disk: one without would kill the process once the disk is full."""
    try:
        with writing(path, f"no place for {size / 1e6:,.1f} MB of hidden states"), path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for start in range(0, size, _MEGABYTE):
                    file.write(bytes(min(_MEGABYTE, size - start)))
    except DataError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


@contextmanager
def writing(path: Path, problem: str = "cannot be written") -> Iterator[None]:
    """Turn a refusal of the file system into an error that says what becomes of the conversion."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: {problem}: {error.strerror or error}",
            hint="finished blocks are kept: make room and give the command again, or lower convert.calibration.samples",
        ) from None


class _Read(Exception):
    """Carries what a module reads out of the forward pass that it ends."""


def reading(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Return what ``layer`` reads when ``run`` gets to it; nothing behind that is computed."""

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise _Read(inputs[0])

    handle = layer.register_forward_pre_hook(stop)
    try:
        run()
    except _Read as read:
        states: Tensor = read.args[0]
        return states
    finally:
        handle.remove()
    raise AssertionError(f"{type(layer).__name__} was not reached")


@contextmanager
def watching_attention(block: Block, note: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``note`` with queries, keys and what attention makes of the values, all ``(B, heads, S, d)``."""
    attention = block.self_attn
    attend = attention._attend

    def noting(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        mixed = attend(q, k, v, positions)
        note(q, k, mixed)
        return mixed

    attention.__dict__["_attend"] = noting
    try:
        yield
    finally:
        del attention.__dict__["_attend"]


class Walk:
    """One block, passed by the calibration text in four stages, each as soon as the matrices before it are final.

    Every stage yields batches of what its projections read, and has to be gone through to its end. What lies between
    the stages is kept in files beside the stream, so that no stage is computed twice.
    """

    def __init__(self, block: Block, source: Stream) -> None:
        self.block, self.source = block, source
        self.positions = torch.arange(source.shape[1])
        windows, length, _ = source.shape
        config = block.self_attn.config

        def scratch(name: str, size: int) -> Stream:
            return Stream(source.path.with_suffix(f".{name}"), (windows, length, size), new=True)

        self.mixed = scratch("mixed", config.n_head * config.head_size)
        self.middle = scratch("middle", config.n_embd)
        self.inner = scratch("inner", config.n_inner)

    def stages(self) -> tuple[Callable[[], Iterator[Tensor]], ...]:
        """Return the four stages in order."""
        return self.to_queries, self.to_output, self.to_gate, self.to_down

    def to_queries(self) -> Iterator[Tensor]:
        """What the query, key and value projections read."""
        for _, x in self.source.batches():
            yield self.block.input_layernorm(x)

    def to_output(self) -> Iterator[Tensor]:
        """What the output projection of the attention reads."""
        attention = self.block.self_attn
        for rows, x in self.source.batches():
            h = self.block.input_layernorm(x)
            mixed = reading(attention.o_proj, lambda h=h: attention(h, self.positions))  # type: ignore[misc]
            self.mixed[rows] = mixed
            yield mixed

    def to_gate(self) -> Iterator[Tensor]:
        """What the gate and up projections read."""
        for rows, mixed in self.mixed.batches():
            middle = self.source[rows] + self.block.self_attn.o_proj(mixed)
            self.middle[rows] = middle
            yield self.block.post_attention_layernorm(middle)

    def to_down(self) -> Iterator[Tensor]:
        """What the down projection reads."""
        mlp = self.block.mlp
        for rows, middle in self.middle.batches():
            h = self.block.post_attention_layernorm(middle)
            inner = reading(mlp.down_proj, lambda h=h: mlp(h))  # type: ignore[misc]
            self.inner[rows] = inner
            yield inner

    def finish(self, target: Stream) -> None:
        """Write what the block returns, and forget what lay between the stages."""
        for rows, middle in self.middle.batches():
            target[rows] = middle + self.block.mlp.down_proj(self.inner[rows])
        target.flush()
        for stream in (self.mixed, self.middle, self.inner):
            stream.path.unlink()
