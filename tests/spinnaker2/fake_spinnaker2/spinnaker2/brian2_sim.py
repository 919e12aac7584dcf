"""The Brian2 back end."""

from __future__ import annotations

from spinnaker2 import _engine, snn


class Brian2Backend:
    def run(self, network: snn.Network, timesteps: int, quantize_weights: bool = True) -> None:
        _engine.simulate(network, timesteps)
