"""A Lava process that sends the rows of a ``.npy`` file, one per step. Importing it does nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol


class FileSource(AbstractProcess):  # type: ignore[misc]
    """Sends row t - 1 of the file at ``path`` in step t."""

    def __init__(self, *, shape: tuple[int, ...], path: str) -> None:
        super().__init__(shape=shape, path=path)
        self.s_out = OutPort(shape=shape)


@implements(proc=FileSource, protocol=LoihiProtocol)
@requires(CPU)
class PyFileSource(PyLoihiProcessModel):  # type: ignore[misc]
    """Maps the file when the first row is asked for, in its own process."""

    s_out = LavaPyType(PyOutPort.VEC_DENSE, np.int32)
    rows: Any = None

    def run_spk(self) -> None:
        """Send the row of this step."""
        if self.rows is None:
            self.rows = np.load(self.proc_params["path"], mmap_mode="r")
        self.s_out.send(np.array(self.rows[self.time_step - 1]))
