"""Activation checkpointing: a block keeps what goes into it, and computes the rest again when its gradient is due."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spiking_lm.errors import UsageError


def blocks_of(model: nn.Module, run: Callable[[], Any]) -> list[nn.Module]:
    """Return the blocks of ``model``: members of its module lists that are called exactly once when ``run`` is.

    Neurons that set themselves from the first batch do so here: what is computed twice later is the same both times.
    """
    listed = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    listed = [block for block in listed if next(block.parameters(), None) is not None]
    calls: Counter[int] = Counter()
    handles = [block.register_forward_pre_hook(lambda block, _: calls.update([id(block)])) for block in listed]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    blocks = [block for block in listed if calls[id(block)] == 1]
    inner = {id(below) for block in blocks for below in block.modules() if below is not block}
    return [block for block in blocks if id(block) not in inner]


@contextmanager
def recomputing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let every one of ``blocks`` compute its inside a second time for its gradient, in place of keeping it.

    Raises: UsageError when there is none.
    """
    if not blocks:
        raise UsageError(
            "train.activation_checkpointing: this model has no blocks that are called once for a batch",
            hint="leave it out; a smaller batch_size with more accumulate needs less memory too",
        )
    for block in blocks:
        block.__dict__["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]
