"""A Lava process that writes a state of another one into a ``.npy`` file after each step; importing it does no more.

Lava's own monitor hands its record over element by element, at a tenth of a millisecond each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyRefPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import RefPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol


class FileProbe(AbstractProcess):  # type: ignore[misc]
    """Writes the variable that ``state`` is connected to, after step t, to row t - 1 of the file at ``path``."""

    def __init__(self, *, shape: tuple[int, ...], path: str) -> None:
        super().__init__(shape=shape, path=path)
        self.state = RefPort(shape)


class _Probe(PyLoihiProcessModel):  # type: ignore[misc]
    state: Any = None
    rows: Any = None

    def post_guard(self) -> bool:
        """Ask for the phase in which variables can be read, at each step."""
        return True

    def run_post_mgmt(self) -> None:
        """Write the row of this step."""
        if self.rows is None:
            self.rows = np.load(self.proc_params["path"], mmap_mode="r+")
        self.rows[self.time_step - 1] = self.state.read()


@implements(proc=FileProbe, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyFileProbeFixed(_Probe):
    """Of whole numbers."""

    state = LavaPyType(PyRefPort.VEC_DENSE, np.int32)


@implements(proc=FileProbe, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt")
class PyFileProbeFloat(_Probe):
    """Of real numbers."""

    state = LavaPyType(PyRefPort.VEC_DENSE, float)
