"""Post-training quantisation to int8, calibrated on text: from a trained model to the integers of its processes.

What is looked at is what arrives at each matrix while the float model reads the text (:func:`observe`). From that
follow the clip of every row of weights, the one that leaves the least error in the row's sums, the clip of the
embedding, and the range of what is sent from one matrix to another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spiking_lm.generation import evaluating
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm_lava.arithmetic import STATE_LIMIT

Array = NDArray[np.float64]
Int8 = NDArray[np.int8]

LIMIT = 127
"""Codes are -127 .. 127, so that a matrix and its negative are as good."""
CLIPS = np.linspace(1.0, 0.5, 21)
"""Shares of a row's greatest weight that are tried as its clip."""

_TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class Seen:
    """What reached a matrix while a text was read."""

    moments: Array
    """(I, I): mean of x x^T."""
    most: Array
    """(I,): the greatest magnitude of each input."""


def observe(model: SpikingLanguageModel, tokens: NDArray[Any]) -> dict[str, Seen]:
    """Return, by matrix (``linear`` op) of the graph, what reached it while ``model`` read ``tokens`` as one stream.

    That is what ``LMOutput.arrived`` says, and of a ``nn.Linear`` what it was called with.
    """
    graph = model.graph()
    sums: dict[str, Tensor] = {}
    most: dict[str, Tensor] = {}
    count = 0

    def note(name: str, x: Tensor) -> None:
        rows = x.detach().cpu().reshape(-1, x.shape[-1]).double()
        sums[name] = sums.get(name, torch.zeros(())) + rows.T @ rows
        most[name] = torch.maximum(most.get(name, torch.zeros(rows.shape[1])), rows.abs().amax(0))

    hooks = []
    modules = dict(model.named_modules())
    matrices = {op.name: modules.get(op.module or "") for op in graph if op.kind == "linear"}
    for name, module in matrices.items():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0])))
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(device)
    state = None
    try:
        with evaluating(model), torch.no_grad():
            for piece in torch.split(ids, _TOKENS_AT_ONCE):
                output = model(piece[None], state, return_spikes=True)
                state, count = output.state, count + len(piece)
                for name, x in output.arrived.items():
                    if name in matrices and not isinstance(matrices[name], nn.Linear):
                        note(name, x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Seen((sums[name] / count).numpy(), most[name].numpy()) for name in sums}


def quantise_rows(weight: Array, seen: Seen | None = None) -> tuple[Int8, Array]:
    """Return codes (out, in), -127 .. 127, and a scale per row: ``weight ~ codes * scale``.

    Of the clips tried, a row gets the one whose sums are off by the least, in the mean square over what was ``seen``;
    without that, over inputs that are independent and alike.
    """
    weight = np.asarray(weight, np.float64)
    greatest = np.abs(weight).max(1, keepdims=True)
    best = np.full(len(weight), np.inf)
    codes, scales = np.zeros(weight.shape, np.int8), np.ones(len(weight))
    for clip in CLIPS:
        scale = np.where(greatest > 0, clip * greatest / LIMIT, 1.0)
        tried = np.clip(np.rint(weight / scale), -LIMIT, LIMIT)
        off = tried * scale - weight
        error = ((off if seen is None else off @ seen.moments) * off).sum(1)
        better = error < best
        best[better] = error[better]
        codes[better], scales[better] = tried[better].astype(np.int8), scale[better, 0]
    return codes, scales


def quantise_table(table: Array, tokens: NDArray[Any] | None = None) -> tuple[Int8, float]:
    """Return codes (V, E) and the one scale of an embedding; the clip errs least over ``tokens``, or over all rows."""
    table = np.asarray(table, np.float64)
    uses = np.ones(len(table)) if tokens is None else np.bincount(tokens, minlength=len(table)).astype(np.float64)
    greatest = float(np.abs(table).max(initial=0)) or 1.0
    found: list[tuple[float, float]] = []
    for clip in np.geomspace(1.0, 0.01, 93):
        scale = clip * greatest / LIMIT
        off = np.clip(np.rint(table / scale), -LIMIT, LIMIT) * scale - table
        found.append((float(((off * off).sum(1) * uses).sum()), scale))
    scale = min(found)[1]
    return np.clip(np.rint(table / scale), -LIMIT, LIMIT).astype(np.int8), scale


def most_of_messages(readers: Iterable[Int8]) -> int:
    """Return the greatest magnitude that messages may have so that no row of any reader's sums leaves 24 bits."""
    norm = max((int(np.abs(codes.astype(np.int64)).sum(1).max(initial=0)) for codes in readers), default=0)
    return int((STATE_LIMIT - 1) // max(norm, 1))
