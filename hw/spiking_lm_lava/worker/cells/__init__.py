"""Cells: neurons whose step is a function of whole numbers, in numpy alone, the same for the simulator and for Lava.

The host imports this package as ``spiking_lm_lava.worker.cells``, Lava's worker as ``cells``; nothing in it imports
anything but numpy and its own modules. A cell's function is named ``"module:function"`` and is called as
``function(p, state, *arrived)``: ``p`` has the cell's fields as attributes, ``state`` is a dict of arrays in which it
puts *new* arrays, ``arrived`` are the arrays at its in-ports in order. It returns a tuple, what it sends by port. All
arrays are int64. A function without state must also take ``arrived`` with a dimension of time in front.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

State = dict[str, Any]

LATCH = "latch_"
"""Before the name of a port: the state that keeps what arrives at it while there is no token."""


def named(function: str) -> Callable[..., tuple[Any, ...]]:
    """Return the function of a cell by its name, ``"module:function"``."""
    module, _, name = function.partition(":")
    found: Callable[..., tuple[Any, ...]] = getattr(import_module(f".{module}", __package__), name)
    return found


def advance(
    function: Callable[..., tuple[Any, ...]],
    p: Any,
    state: State,
    arrived: tuple[Any, ...],
    latched: tuple[int, ...],
    sizes: tuple[int, ...],
) -> tuple[Any, ...]:
    """Make a step of a cell whose last in-port is ``valid``, 1 where a token is there, else 0; return what it sends.

    Without a token the state is held and zeros are sent, ``sizes`` of them. What arrives meanwhile at the in-ports
    ``latched``, which loops lead to, is kept and added at the next token: a cell that sends zeros gets zeros back, so
    the sum is what its last token had sent.
    """
    *values, valid = arrived
    if not state:
        return tuple(np.where(valid != 0, sent, 0) for sent in function(p, state, *values))
    for port in latched:
        values[port] = values[port] + state[f"{LATCH}{port}"]
    if valid[0]:
        for port in latched:
            state[f"{LATCH}{port}"] = np.zeros_like(values[port])
        return function(p, state, *values)
    for port in latched:
        state[f"{LATCH}{port}"] = values[port]
    return tuple(np.zeros(size, np.int64) for size in sizes)
