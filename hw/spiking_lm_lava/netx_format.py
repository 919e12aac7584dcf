"""What netx, the HDF5 format (``.net``) that lava-dl runs on Lava, says, and what lava-dl makes of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from spiking_lm.errors import LoweringError, MissingExtraError
from spiking_lm_lava.process import Synapse

ATTRIBUTE = "spiking_lm"
"""Of the file: the settings and the names of nodes, as JSON."""
BIAS_EXP = 6
"""Of every bias of a LIF neuron in a file."""
STATE_EXP = 6
"""Of every sigma-delta neuron in a file."""
MOST_DELAY = 62
"""Longer delays are clamped by lava-dl."""
GRADED_BITS = 24
"""Of graded input; only whether it is 0 makes a difference in Lava."""

NO_OTHERS = "netx has LIF and sigma-delta neurons behind dense synapses, one after the other, and nothing else"


@dataclass(frozen=True)
class NetxSettings:
    """What lava-dl is told beside the file, and the values that may arrive."""

    low: int = 0
    high: int = 1
    graded: bool = False
    """Whether the first synapse reads payloads."""
    reset_interval: int = 0
    """Steps between two resets of all LIF neurons; 0: none."""
    reset_offset: int = 0
    """Layer k, from 0, resets at the steps t with t % reset_interval == (reset_offset + 1 + k) % reset_interval."""
    spike_exp: int = 6
    """Fraction bits of sigma-delta neurons' messages."""

    @property
    def input_message_bits(self) -> int:
        """As lava-dl calls it."""
        return GRADED_BITS if self.graded else 0


def netx_synapse(name: str, weight: Any, *, columns: slice = slice(None), **others: Any) -> Synapse:
    """Return the synapse that lava-dl makes of integer ``weight``: shifted up as far as 8 bits allow, and down again.

    ``columns`` are those of ``weight`` that this synapse has, where several share one exponent: Lava takes the sign
    mode of each by itself. Raises: LoweringError for weights that would not arrive as they are.
    """
    whole = np.asarray(weight, np.int64)
    most, least = int(whole.max()), int(whole.min())
    hint = "whole numbers from -256 to 254, or -255 to 255 where all have one sign"
    if most == least == 0:
        raise LoweringError(f"synapse {name!r}: all weights are 0, which netx cannot read", hint="leave it out")
    mixed = least < 0 <= most
    if least >= 0:
        room = 255 / most
    elif most < 0:
        room = 256 / -least
    else:
        room = min(127 / most if most else np.inf, 128 / -least)
    up = int(np.floor(np.log2(room))) + mixed
    if up < 0:
        raise LoweringError(f"synapse {name!r}: weights from {least} to {most} do not fit netx's 8 bits", hint=hint)
    even = next((n for n in range(8, 0, -1) if not (whole % (1 << n)).any()), 0) - mixed
    mine = whole[:, columns]
    made = Synapse(
        name,
        len(mine),
        weight=mine << up,
        sign_mode="auto",
        weight_exp=-up,
        num_weight_bits=8 - up - even,
        **others,
    )
    changed = np.argwhere(made.prepared != made.weight)
    if len(changed):
        at = tuple(changed[0].tolist())
        raise LoweringError(
            f"synapse {name!r}: netx would make {made.prepared[at] / 2**up:g} of the weight {int(mine[at])} at {at}",
            hint=hint,
        )
    kept = {"weight_exp": made.weight_exp, "num_weight_bits": made.num_weight_bits}
    checked = Synapse(name, len(mine), weight=made.weight, sign_mode=made.mode, **kept, **others)  # type: ignore[arg-type]
    checked.check()
    return checked


def open_h5py() -> Any:
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("reading and writing netx files", "lava", detail=str(error)) from None
    return h5py
