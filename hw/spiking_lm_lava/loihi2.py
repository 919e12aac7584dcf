"""Running a network on a Loihi 2 chip, with Lava's ``Loihi2HwCfg``: written to its documentation, untested on a chip.

Lava alone simulates. What compiles for a chip is ``lava-loihi``, which Intel gives to members of its research
community (INRC) and nobody else; an interpreter that has it, and lava-nc, is named by ``SPIKING_LM_LAVA_PYTHON``.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from spiking_lm.errors import LoweringError, PluginError, UsageError
from spiking_lm_lava.executor import STEPS_AT_ONCE, TIMEOUT, LavaRun, LavaSession, Progress
from spiking_lm_lava.graded import Delta, GradedVec, InvSqrt, NormVecDelay, ProdNeuron, Sigma, SigmaDelta
from spiking_lm_lava.install import PYTHON_VARIABLE, Lava, find
from spiking_lm_lava.network import Network
from spiking_lm_lava.neurons import LIF, ResonateAndFire
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.simulator import Rows, checked_inputs

GENERATIONS = ("N2A2", "N3B2", "N3B3", "N3C1", "N3D1")
"""Of chips, as ``lava.utils.loihi`` names them."""

ON_CHIP: tuple[type[Process], ...] = (
    Source,
    Sink,
    Synapse,
    LIF,
    ResonateAndFire,
    GradedVec,
    ProdNeuron,
    NormVecDelay,
    InvSqrt,
    Delta,
    Sigma,
    SigmaDelta,
)
"""Lava's own processes; whatever else there is would need microcode, which only ``lava-loihi`` can assemble."""


@dataclass(frozen=True)
class Loihi2:
    """Where the chip is: a partition or board of SLURM, a host in the network, or what the environment says (nothing).

    Raises: UsageError for more than one of them, and for a generation that there is not.
    """

    partition: str | None = None
    """E.g. ``oheogulch`` (1 chip) or ``kp`` (8)."""
    board: str | None = None
    address: str | None = None
    generation: str = "N3B3"

    def __post_init__(self) -> None:
        given = [name for name in ("partition", "board", "address") if getattr(self, name)]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} are given: one says where the chip is")
        if self.generation not in GENERATIONS:
            raise UsageError(f"there is no chip generation {self.generation!r}", hint=", ".join(GENERATIONS))


def run_on_loihi2(
    network: Network,
    inputs: Mapping[str, Rows],
    where: Loihi2 | None = None,
    *,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
) -> LavaRun:
    """Run ``inputs`` (source -> rows) from the initial state on a chip; states on it are not watched.

    What carries spikes to the chip and back may take steps of its own. Raises: LoweringError for a process without a
    model for neuro cores; PluginError saying what is needed where ``lava-loihi`` is missing, and when the worker fails.
    """
    for node in network.nodes:
        if type(node) not in ON_CHIP:
            raise LoweringError(
                f"{node.kind} {node.name!r}: a process of our own has no model for neuro cores",
                hint="LavaExecutor runs it in Lava's simulation",
            )
    lava = find()
    require_lava_loihi(lava)
    rows, steps = checked_inputs(network, inputs)
    with _ChipSession(lava, network, steps, where or Loihi2(), timeout=timeout) as session:
        for start in range(0, steps, STEPS_AT_ONCE):
            session.advance({name: given[start : start + STEPS_AT_ONCE] for name, given in rows.items()})
            if progress is not None:
                progress(session.done, steps)
    return session.result()


def require_lava_loihi(lava: Lava) -> None:
    """Ask an interpreter for ``lava-loihi``. Raises: PluginError saying where it comes from, where it has none."""
    code = (
        "import importlib.util, sys; sys.path[:0] = sys.argv[1:]\n"
        "sys.exit(importlib.util.find_spec('lava.utils.loihi2_profiler') is None)"
    )
    done = subprocess.run(
        [*lava.command, "-c", code, *map(str, lava.paths)], stdin=subprocess.DEVNULL, capture_output=True
    )
    if done.returncode:
        raise PluginError(
            f"running on Loihi 2 needs lava-loihi, which {lava.origin} does not have",
            hint=f"members of Intel's research community (INRC) get it; then {PYTHON_VARIABLE} names an interpreter "
            "with lava-nc and lava-loihi",
        )


class _ChipSession(LavaSession):
    """A session whose job says where the chip is."""

    def __init__(
        self, lava: Lava, network: Network, steps: int, where: Loihi2, *, watch: Iterable[str] = (), timeout: float
    ) -> None:
        self.where = where
        super().__init__(lava, network, steps, watch=watch, timeout=timeout)

    def _prepare(self) -> None:
        super()._prepare()
        path: Path = self._job / "job.json"
        task = json.loads(path.read_text(encoding="utf-8")) | {"loihi2": asdict(self.where)}
        path.write_text(json.dumps(task), encoding="utf-8")
