"""Lowering of the model ``toy``."""

from __future__ import annotations

from typing import Any

import numpy as np
from toy_config import ToyChipConfig
from toy_program import ToyProgram

from spiking_lm.errors import LoweringError


def lower(model: Any, config: ToyChipConfig) -> ToyProgram:
    ops = {op.name: op for op in model.graph()}
    for op in ops.values():
        if op.name not in ("emb", "mix", "cells", "lift", "head"):
            raise LoweringError(f"toy: the op {op.name!r} ({op.kind}) has no place on this chip")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = {
        "emb": state["emb.weight"],
        "mix": _rounded(state["mix.weight"].T, config.bits),
        "mix_bias": state["mix.bias"],
        "lift": _rounded(state["lift"], config.bits),
        "head": state["head.weight"].T,
        "head_bias": state["head.bias"],
    }
    return ToyProgram({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, config.cores)


def _rounded(weight: Any, bits: int) -> Any:
    step = np.abs(weight).max() / (2 ** (bits - 1) - 1)
    return (np.round(weight / step) * step).astype(np.float32)
