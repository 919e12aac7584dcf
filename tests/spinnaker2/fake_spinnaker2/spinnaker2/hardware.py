"""The chip and the 48-node board."""

from __future__ import annotations

import os

from spinnaker2 import _engine, snn


class _Machine:
    cores = 0

    def run(self, network: snn.Network, timesteps: int, sys_tick_in_s: float = 1e-3, debug: bool = False) -> None:
        if not isinstance(sys_tick_in_s, float) or sys_tick_in_s <= 0:
            raise ValueError(f"sys_tick_in_s is {sys_tick_in_s!r}")
        if network.cores() > self.cores:
            raise RuntimeError(f"{network.cores()} cores, there are {self.cores}")
        _engine.simulate(network, timesteps)
        log = os.environ.get("FAKE_SPINNAKER2_LOG")
        if log:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{type(self).__name__} {self.address}\n")


class SpiNNaker2Chip(_Machine):
    cores = 148

    def __init__(self, eth_ip: str = "192.168.1.25") -> None:
        self.address = eth_ip


class SpiNNcloud48NodeBoard(_Machine):
    cores = 148 * 48

    def __init__(self, stm_ip: str = "192.168.1.2") -> None:
        self.address = stm_ip
