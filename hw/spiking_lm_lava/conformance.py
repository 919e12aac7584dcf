"""``python -m spiking_lm_lava.conformance DIR [--lava]``: is what we compute what Lava computes?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from spiking_lm.errors import DataError, SpikingLMError
from spiking_lm_lava.cases import FLOAT_TOLERANCE, Array, Case, read_case
from spiking_lm_lava.simulator import Run, Simulator, reference


class Outcome(Protocol):
    """What sinks received and states held, whoever computed it."""

    sinks: dict[str, Array]
    watched: dict[str, Array]


Executor = Callable[[Case], Outcome]


@dataclass(frozen=True)
class Mismatch:
    """The first value of an array that differs."""

    case: str
    array: str
    index: tuple[int, ...]
    """As in the file: neuron, step."""
    expected: float
    found: float
    count: int

    def __str__(self) -> str:
        where = ", ".join(str(i) for i in self.index)
        return f"{self.case}: {self.array}[{where}] is {self.found}, expected {self.expected} ({self.count} differ)"


def in_steps(case: Case) -> Run:
    """Run a case step by step."""
    return reference(case.network, case.inputs, watch=case.watch)


def fast(case: Case) -> Run:
    """Run a case in the simulator."""
    return Simulator(case.network).run(case.inputs, watch=case.watch)


def compare(case: Case, run: Outcome) -> list[Mismatch]:
    """Return where a run differs from what the case expects."""
    found: list[Mismatch] = []
    for name, (where, rows) in case.expected.items():
        got: Array = run.watched[where] if "." in where else run.sinks[where]
        if got.shape != rows.shape:
            raise DataError(f"{case.name}: {name} has the shape {got.T.shape}, expected {rows.T.shape}")
        if rows.dtype.kind == "f":
            differs = ~(np.abs(got - rows) <= FLOAT_TOLERANCE)
        else:
            differs = got != rows
        if differs.any():
            step, neuron = (int(i) for i in np.argwhere(differs)[0])
            expected, value = rows[step, neuron].item(), got[step, neuron].item()
            found.append(Mismatch(case.name, name, (neuron, step), expected, value, int(differs.sum())))
    return found


def read_folder(folder: Path) -> list[Case]:
    """Read all cases of a folder by name. Raises: DataError naming what is missing or wrong."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise DataError(f"{folder}: no .npz file there")
    return [read_case(path) for path in paths]


def conformance(cases: Sequence[Case], executors: dict[str, Executor]) -> tuple[int, list[tuple[str, Mismatch]]]:
    """Run every case in every executor; return how many are exact in all, and every mismatch with its executor."""
    exact, wrong = 0, []
    for case in cases:
        found = [(name, mismatch) for name, run in executors.items() for mismatch in compare(case, run(case))]
        exact += not found
        wrong += found
    return exact, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Print ``N of M exact`` and every mismatch; return 0 if there is none, 1 if there are, or an error's exit code."""
    parser = argparse.ArgumentParser(prog="python -m spiking_lm_lava.conformance", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of .npz cases")
    parser.add_argument("--lava", action="store_true", help="run them in Lava too, in its worker")
    options = parser.parse_args(arguments)
    try:
        cases = read_folder(options.folder)
        executors: dict[str, Executor] = {"model": in_steps, "simulator": fast}
        if options.lava:
            from spiking_lm_lava.executor import LavaExecutor

            lava = LavaExecutor.find()
            executors["lava"] = lambda case: lava.run(case.network, case.inputs, watch=case.watch)
        exact, wrong = conformance(cases, executors)
    except SpikingLMError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    for name, mismatch in wrong:
        print(f"{name}: {mismatch}")
    print(f"{exact} of {len(cases)} exact ({', '.join(executors)})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
