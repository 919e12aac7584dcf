"""The options of the Lava backend (torch-free)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from spiking_lm.config import BackendConfig
from spiking_lm_lava.constants import Costs


class LavaConfig(BackendConfig):
    """How a language model becomes a network of Loihi-style processes, and what runs it."""

    executor: Literal["simulator", "lava"] = "simulator"
    """lava: Lava itself, in its worker ('spiking-lm lower --backend lava --setup'). The integers are the same."""
    board: str | None = None
    """Of Loihi 2, e.g. 'kapoho-point'; None: the smallest that holds the program."""
    costs: Costs = Costs()
    """What operations take, for figures of time and energy: nothing is published of Loihi 2."""
    calibration_tokens: int = Field(default=4096, ge=0)
    """Tokens of text from which formats and clips of the quantised model are found; 0: from the weights alone."""
