"""Networks to and from netx, the HDF5 files (``.net``) that lava-dl runs on Lava (h5py, extra ``lava``).

What a file can say is a chain: an input, perhaps with neurons, then layers of a dense synapse and neurons, each perhaps
with a recurrent synapse: LIF (``CUBA``) and sigma-delta neurons (``SDNN``). :func:`write_netx` refuses everything else,
and every weight that netx would change while it reads, by the name of the node. What a file has no word for, but
lava-dl takes as arguments, is in an attribute of the file that lava-dl ignores.

Reading mirrors lava-dl 0.6.0: ``spiking_lm_lava.netx_format.netx_synapse`` says what becomes of a matrix of weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spiking_lm.errors import SpikingLMError, UsageError
from spiking_lm_lava.network import Network
from spiking_lm_lava.netx_format import NetxSettings
from spiking_lm_lava.netx_reader import read_netx, stated_settings
from spiking_lm_lava.netx_writer import write_netx
from spiking_lm_lava.process import Source

__all__ = ["NetxSettings", "read_netx", "stated_settings", "write_netx"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a network's folder as a netx file, or a file as a folder; return 0, or an error's exit code.

    With ``--lava`` the file also runs in Lava, built by lava-dl, on drawn values: 1 where the simulator differs.
    """
    parser = argparse.ArgumentParser(prog="python -m spiking_lm_lava.netx", description=main.__doc__)
    parser.add_argument("given", type=Path, nargs="?", help="a network's folder, or a .net file")
    parser.add_argument("made", type=Path, nargs="?", help="the .net file, or the folder, to write")
    parser.add_argument("--lava", type=int, metavar="STEPS", help="compare so many steps with lava-dl in Lava")
    parser.add_argument("--setup", action="store_true", help="first install lava-dl where the worker finds it")
    options = parser.parse_args(arguments)
    try:
        if options.setup:
            from spiking_lm_lava.install import setup_lava_dl

            setup_lava_dl(lambda line: print(line, file=sys.stderr))
        if options.given is None and options.setup:
            return 0
        if options.given is None or options.made is None:
            raise UsageError("two paths are needed: what there is, and what to write")
        if options.given.is_dir():
            network, file = Network.load(options.given), options.made
            write_netx(network, file)
        else:
            network, file = read_netx(options.given), options.given
            network.save(options.made)
        print(f"wrote {options.made}: {len(network.nodes)} nodes")
        if options.lava is not None:
            return _compared(network, file, options.lava)
    except SpikingLMError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


def _compared(network: Network, file: Path, steps: int) -> int:
    from spiking_lm_lava.lava_dl import run_netx
    from spiking_lm_lava.simulator import Simulator

    (source,) = network.of_kind(Source)
    assert isinstance(source, Source)
    rows = np.random.default_rng(0).integers(source.low, source.high + 1, (steps, source.size))
    (mine,) = Simulator(network).run({source.name: rows}).sinks.values()
    theirs = run_netx(file, rows)
    wrong = np.argwhere(mine != theirs)
    if not len(wrong):
        print(f"{steps} steps of {mine.shape[1]} outputs in Lava: the same integers, {int((mine != 0).sum())} not 0")
        return 0
    t, neuron = wrong[0].tolist()
    print(
        f"{len(wrong)} of {mine.size} values differ, the first at step {t + 1}, neuron {neuron}: the simulator has "
        f"{int(mine[t, neuron])}, Lava {int(theirs[t, neuron])}"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
