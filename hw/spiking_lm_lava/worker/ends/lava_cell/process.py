"""A Lava process that runs any cell: a function of whole numbers of ``cells``. Importing it does no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from cells import advance, named  # type: ignore[import-not-found]
from lava.magma.core.decorator import implements, requires
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.process.variable import Var
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

READS, SENDS, STATES = 8, 4, 8
"""Ports and watchable states that a cell may have; Lava wants to know them before there is one."""


class CellProcess(AbstractProcess):  # type: ignore[misc]
    """Ports are ``in0`` and so on, in the cell's order; those that it lacks are there and not connected."""

    def __init__(
        self, *, layout: dict[str, Any], fields: dict[str, Any], state: dict[str, Any], states: tuple[Any, ...]
    ) -> None:
        super().__init__(layout=layout, fields=fields, state=state)
        for i, size in enumerate(_filled(layout["reads"].values(), READS)):
            setattr(self, f"in{i}", InPort(shape=(size,)))
        for i, size in enumerate(_filled(layout["sends"].values(), SENDS)):
            setattr(self, f"out{i}", OutPort(shape=(size,)))
        for i in range(STATES):
            given = states[i] if i < len(states) else np.zeros(1, np.int32)
            setattr(self, f"state{i}", Var(shape=given.shape, init=given))


def _filled(sizes: Any, count: int) -> list[int]:
    given = list(sizes)
    if len(given) > count:
        raise ValueError(f"a cell has {len(given)} ports of a direction; the process for cells has {count}")
    return given + [1] * (count - len(given))


@implements(proc=CellProcess, protocol=LoihiProtocol)
@requires(CPU)
class PyCell(PyLoihiProcessModel):  # type: ignore[misc]
    """Calls the function of a cell, which it finds in its own process."""

    in0 = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    in1 = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    in2 = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    in3 = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    in4 = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    in5 = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    in6 = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    in7 = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    out0 = LavaPyType(PyOutPort.VEC_DENSE, np.int32)
    out1 = LavaPyType(PyOutPort.VEC_DENSE, np.int32)
    out2 = LavaPyType(PyOutPort.VEC_DENSE, np.int32)
    out3 = LavaPyType(PyOutPort.VEC_DENSE, np.int32)
    state0 = LavaPyType(np.ndarray, np.int32)
    state1 = LavaPyType(np.ndarray, np.int32)
    state2 = LavaPyType(np.ndarray, np.int32)
    state3 = LavaPyType(np.ndarray, np.int32)
    state4 = LavaPyType(np.ndarray, np.int32)
    state5 = LavaPyType(np.ndarray, np.int32)
    state6 = LavaPyType(np.ndarray, np.int32)
    state7 = LavaPyType(np.ndarray, np.int32)

    now: Any = None

    def run_spk(self) -> None:
        """Receive, compute, send."""
        if self.now is None:
            given = self.proc_params
            self.layout, self.now = given["layout"], dict(given["state"])
            self.function, self.fields = named(self.layout["function"]), SimpleNamespace(**given["fields"])
        layout = self.layout
        arrived = tuple(getattr(self, f"in{i}").recv().astype(np.int64) for i in range(len(layout["reads"])))
        if layout["gated"]:
            latched, sizes = tuple(layout["latched"]), tuple(layout["sends"].values())
            sent = advance(self.function, self.fields, self.now, arrived, latched, sizes)
        else:
            sent = self.function(self.fields, self.now, *arrived)
        for i, value in enumerate(sent):
            getattr(self, f"out{i}").send(value.astype(np.int32))
        for i, name in enumerate(layout["states"]):
            setattr(self, f"state{i}", self.now[name].astype(np.int32))
