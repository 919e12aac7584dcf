"""The way to a chip: what it refuses without Intel's packages, and all of it but the chip with stand-ins for them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lava_nets import recurrent, rows

from spiking_lm.errors import LoweringError, PluginError, UsageError
from spiking_lm_lava import loihi2
from spiking_lm_lava.cell import Cell, Delay
from spiking_lm_lava.floating import FloatLIF
from spiking_lm_lava.install import Lava, find
from spiking_lm_lava.loihi2 import ON_CHIP, Loihi2, require_lava_loihi, run_on_loihi2
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.process import Sink, Source
from spiking_lm_lava.simulator import Simulator

STAND_INS = {
    "lava/utils/loihi2_profiler.py": "",
    "lava/magma/core/model/c/__init__.py": "",
    "lava/magma/core/model/c/model.py": "class CLoihiProcessModel:\n    pass\n",
    "lava/magma/core/model/nc/__init__.py": "",
    "lava/magma/core/model/nc/model.py": "class AbstractNcProcessModel:\n    pass\n",
    "lava/proc/embedded_io/__init__.py": "",
    "lava/proc/embedded_io/spike.py": """
import numpy as np
from lava.magma.core.decorator import implements, requires
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol


class PyToNxAdapter(AbstractProcess):
    def __init__(self, *, shape):
        super().__init__(shape=shape)
        self.inp, self.out = InPort(shape=shape), OutPort(shape=shape)


class NxToPyAdapter(AbstractProcess):
    def __init__(self, *, shape):
        super().__init__(shape=shape)
        self.inp, self.out = InPort(shape=shape), OutPort(shape=shape)


@implements(proc=PyToNxAdapter, protocol=LoihiProtocol)
@requires(CPU)
class Onto(PyLoihiProcessModel):
    inp: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32)

    def run_spk(self):
        self.out.send(self.inp.recv())


@implements(proc=NxToPyAdapter, protocol=LoihiProtocol)
@requires(CPU)
class Off(PyLoihiProcessModel):
    inp: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32)

    def run_spk(self):
        self.out.send(self.inp.recv())
""",
}
"""Modules that lava-loihi brings, and as much of them as it takes to come to the models that Lava itself has."""


@pytest.fixture
def lava() -> Lava:
    try:
        return find()
    except PluginError as error:
        pytest.skip(f"{error.message}: {error.hint}")


def test_without_lava_loihi_the_error_says_where_it_comes_from(lava: Lava) -> None:
    network = recurrent()
    with pytest.raises(PluginError, match=r"running on Loihi 2 needs lava-loihi, which .* does not have") as caught:
        run_on_loihi2(network, rows(network, 3, 1))
    assert caught.value.hint is not None
    assert "INRC" in caught.value.hint
    assert "SPIKING_LM_LAVA_PYTHON" in caught.value.hint


def test_all_of_the_way_but_the_chip(lava: Lava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loihi2HwCfg falls back on Lava's own models where there are none for neuro cores."""
    for name, text in STAND_INS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pretended = replace(lava, paths=(*lava.paths, tmp_path))
    require_lava_loihi(pretended)
    monkeypatch.setattr(loihi2, "find", lambda: pretended)
    network, seen = recurrent(), []
    inputs = rows(network, 230, 1)
    run = run_on_loihi2(network, inputs, progress=lambda done, steps: seen.append((done, steps)))
    expected = Simulator(network).run(inputs).sinks["out"]
    np.testing.assert_array_equal(run.sinks["out"], expected)
    assert expected.any()
    assert seen == [(200, 230), (230, 230)]
    for command in ("ping", "sinfo"):  # neither a host nor a controller of jobs answers
        (tmp_path / command).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(PluginError, match="ValueError: Attempting to use ethernet host for Loihi2"):
        run_on_loihi2(network, inputs, Loihi2(address="host.invalid"))
    with pytest.raises(PluginError, match="ValueError: Attempting to use SLURM for Loihi"):
        run_on_loihi2(network, inputs, Loihi2(partition="oheogulch"))


def test_processes_without_a_model_for_neuro_cores_are_refused_by_name() -> None:
    nodes = (Source("x", 1), FloatLIF("f", 1, du=0.5, dv=0.5, vth=1.0), Sink("y", 1))
    network = Network(nodes, (Edge("x", "f"), Edge("f", "y")), checked=False)
    with pytest.raises(LoweringError, match="float_lif 'f': a process of our own has no model for neuro cores"):
        run_on_loihi2(network, {"x": np.zeros((1, 1), int)})
    assert not any(issubclass(kind, Cell) for kind in ON_CHIP)
    assert Delay not in ON_CHIP


def test_one_thing_says_where_the_chip_is() -> None:
    with pytest.raises(UsageError, match="partition and address are given"):
        Loihi2(partition="kp", address="10.0.0.1")
    with pytest.raises(UsageError, match="no chip generation 'N4'"):
        Loihi2(generation="N4")
