"""From processes to a Loihi 2 chip, for those who have Intel's ``lava-loihi``. Runs in the worker.

Written to Lava's documented interface: ``lava.utils.loihi`` says where the chip is, ``Loihi2HwCfg`` takes for each
process the model that a neuro core has, and adapters of ``lava.proc.embedded_io`` carry spikes between Python and the
chip. No chip was at hand: nothing here has run on one.
"""

from __future__ import annotations

from typing import Any


def configuration(where: dict[str, Any]) -> Any:
    """Return the configuration of runs on a chip. Raises: RuntimeError without ``lava-loihi``."""
    from lava.magma.core.run_configs import Loihi2HwCfg
    from lava.utils import loihi

    if not loihi.is_installed():
        raise RuntimeError("lava-loihi, which Intel gives to members of its research community, is not installed")
    generation = loihi.ChipGeneration[where["generation"]]
    if where["address"]:
        loihi.use_ethernet_host(where["address"], loihi_gen=generation)
    elif where["partition"] or where["board"]:
        loihi.use_slurm_host(partition=where["partition"], board=where["board"], loihi_gen=generation)
    return Loihi2HwCfg(select_tag="fixed_pt")


def onto_chip(port: Any) -> Any:
    """Return the port of the chip that sends what a Python process sends from ``port``."""
    from lava.proc.embedded_io import spike

    adapter = spike.PyToNxAdapter(shape=port.shape)
    port.connect(adapter.inp)
    return adapter.out


def off_chip(port: Any) -> Any:
    """Return the port of the chip that reads what a Python process gets at ``port``."""
    from lava.proc.embedded_io import spike

    adapter = spike.NxToPyAdapter(shape=port.shape)
    adapter.out.connect(port)
    return adapter.inp
