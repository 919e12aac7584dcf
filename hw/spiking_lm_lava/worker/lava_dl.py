"""Networks of a ``.net`` file, built by lava-dl's netx in the worker. What netx needs to read one is h5py, not torch.

``lava.lib.dl.netx`` imports torch for its training helpers and all of SLAYER for one function about resonate-and-fire
neurons, which no file that is written here has. Empty modules stand in for both, so that the worker starts in a second
and lava-dl comes without its other dependencies; whatever reads from them fails, and says so.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from typing import Any

from hashes import hashable_dataclasses  # type: ignore[import-not-found]

_LEFT_OUT = (
    "lava.lib.dl.slayer",
    "lava.lib.dl.slayer.neuron",
    "lava.lib.dl.slayer.neuron.rf",
    "lava.lib.dl.netx.sequential_modules",
)


def network(node: dict[str, Any]) -> Any:
    """Return the ends of lava-dl's process of the file ``file``, as ``inp`` and ``out``."""
    hdf5 = _netx()
    made = hdf5.Network(
        net_config=node["file"],
        input_message_bits=node["input_message_bits"],
        reset_interval=node["reset_interval"] or None,
        reset_offset=node["reset_offset"],
        spike_exp=node["spike_exp"],
    )
    # Neurons of an input are not joined to the network's own port: what is sent to them goes to their own.
    first = made.in_layer
    inp = made.inp if hasattr(first, "synapse") else first.neuron.a_in
    return types.SimpleNamespace(inp=inp, out=made.out)


def _netx() -> Any:
    import lava.lib.dl

    root = next(iter(lava.lib.dl.__path__))
    for name in _LEFT_OUT:
        module = types.ModuleType(name)
        module.__path__ = []
        # Lava's compiler asks where every module beside that of a process is.
        module.__file__ = f"{root}/{name.removeprefix('lava.lib.dl.').replace('.', '/')}.py"
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=module.__file__)
        sys.modules[name] = module
    sys.modules["lava.lib.dl.slayer.neuron.rf"].neuron_params = _no_resonators  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", message="Cannot import module .*sequential_modules")
    with hashable_dataclasses():
        from lava.lib.dl.netx import hdf5
    return hdf5


def _no_resonators(*arguments: Any, **named: Any) -> None:
    raise NotImplementedError("resonate-and-fire neurons of a .net file need SLAYER, which is not loaded here")
