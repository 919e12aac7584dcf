"""The event-based gated recurrent unit (Subramoney et al., arXiv 2206.06178) and the Norse neurons."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spiking_lm_egru.functional import EGRUParameters, EGRUState
    from spiking_lm_egru.module import EGRU, EGRUCell

SPIKING_LM_API = 1

_HOMES = {"EGRU": "module", "EGRUCell": "module", "EGRUParameters": "functional", "EGRUState": "functional"}

__all__ = ["EGRU", "EGRUCell", "EGRUParameters", "EGRUState"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"spiking_lm_egru.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'spiking_lm_egru' has no attribute {name!r}")
