"""A netx file in Lava, as lava-dl reads it, in the worker: what our own reading of it is checked against."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiking_lm_lava.executor import TIMEOUT, LavaExecutor
from spiking_lm_lava.install import find_lava_dl
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.netx import NetxSettings, read_netx, stated_settings
from spiking_lm_lava.process import Process, Sink, Source, State
from spiking_lm_lava.simulator import Rows
from spiking_lm_lava.values import Bounds, Range


@dataclass(frozen=True, eq=False)
class NetxFile(Process):
    """All processes that lava-dl makes of a file, in one: it runs in Lava alone."""

    kind = "netx"
    reads = ("inp",)
    sends = ("out",)
    inputs: int = 1
    file: str = ""
    input_message_bits: int = 0
    reset_interval: int = 0
    reset_offset: int = 0
    spike_exp: int = 6

    def port_size(self, port: str) -> int:
        """Return how many values a port carries."""
        return self.inputs if port == "inp" else self.size

    def step(self, state: State, t: int, *arrived: Any) -> tuple[Any, ...]:
        """Refuse: only lava-dl knows what it makes of the file; :func:`~spiking_lm_lava.netx.read_netx` is ours."""
        raise self.error("lava-dl runs it, in Lava", "read_netx reads the file for the simulator")

    def bounds(self, *arrived: Range) -> Bounds:
        """Refuse, as :meth:`step` does."""
        raise self.error("what lava-dl makes of it is not known here", "Network(checked=False)")


def run_netx(
    path: str | os.PathLike[str], rows: Rows, settings: NetxSettings | None = None, *, timeout: float = TIMEOUT
) -> Rows:
    """Run a ``.net`` file in Lava on ``rows (T, inputs)``, built by lava-dl; return what leaves it, ``(T, outputs)``.

    ``settings`` as for :func:`~spiking_lm_lava.netx.read_netx`. Raises: PluginError, with the command that sets lava-dl
    up where it is not; what ``read_netx`` raises; DataError for rows that do not fit.
    """
    lava = find_lava_dl()
    ours = read_netx(path, settings)
    source, sink = ours.of_kind(Source)[0], ours.of_kind(Sink)[0]
    assert isinstance(source, Source)
    stated = settings or stated_settings(path)
    file = NetxFile(
        "file",
        sink.size,
        inputs=source.size,
        file=str(Path(path).resolve()),
        input_message_bits=stated.input_message_bits,
        reset_interval=stated.reset_interval,
        reset_offset=stated.reset_offset,
        spike_exp=stated.spike_exp,
    )
    nodes = (Source("x", source.size, source.low, source.high), file, Sink("y", sink.size))
    network = Network(nodes, (Edge("x", "file"), Edge("file", "y")), checked=False)
    return LavaExecutor(lava).run(network, {"x": rows}, timeout=timeout).sinks["y"]
