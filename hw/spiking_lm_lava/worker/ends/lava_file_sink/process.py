"""A Lava process that writes what arrives into a ``.npy`` file, one row per step. Importing it does nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import InPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol


class FileSink(AbstractProcess):  # type: ignore[misc]
    """Writes what arrives in step t to row t - 1 of the file at ``path``, which is there and long enough."""

    def __init__(self, *, shape: tuple[int, ...], path: str) -> None:
        super().__init__(shape=shape, path=path)
        self.a_in = InPort(shape=shape)


@implements(proc=FileSink, protocol=LoihiProtocol)
@requires(CPU)
class PyFileSink(PyLoihiProcessModel):  # type: ignore[misc]
    """Maps the file when the first row arrives, in its own process."""

    a_in = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    rows: Any = None

    def run_spk(self) -> None:
        """Write the row of this step."""
        if self.rows is None:
            self.rows = np.load(self.proc_params["path"], mmap_mode="r+")
        self.rows[self.time_step - 1] = self.a_in.recv()
