"""What lava-dl's SLAYER computes: ``python slayer_facts.py OUT.npz PATHS...``, in a process of its own.

Values of ``slayer_facts.npz`` were recorded with lava-dl 0.6.0 and torch 2.14.1 by this script. PATHS are put in front
of where packages are found; object detection, which needs OpenCV, is left out.
"""

from __future__ import annotations

import sys
import types

import numpy as np

FORMS = (
    {"threshold": 1.25, "current_decay": 0.25, "voltage_decay": 0.03},
    {"threshold": 0.7, "current_decay": 1.0, "voltage_decay": 0.5, "tau_grad": 0.03, "scale_grad": 3.0},
    {"threshold": 0.31, "current_decay": 0.1, "voltage_decay": 0.0, "tau_grad": 0.1, "scale_grad": 0.5},
    {"threshold": 5.0, "current_decay": 0.0, "voltage_decay": 1.0, "tau_grad": 0.01, "scale_grad": 1.0},
)
BATCH, NEURONS, STEPS, INPUTS = 2, 6, 40, 9


def inputs(form: int) -> np.ndarray:
    """Real values, most of which are no multiple of anything, (batch, neurons, steps)."""
    drawn = np.random.default_rng(form).normal(0.1, 0.9, (BATCH, NEURONS, STEPS))
    return np.round(drawn, 3).astype(np.float32)


def spikes_in() -> np.ndarray:
    """Input spikes of a layer, (batch, inputs, steps)."""
    return (np.random.default_rng(50).random((BATCH, INPUTS, STEPS)) < 0.4).astype(np.float32)


def weights() -> np.ndarray:
    """Real weights, some too large, (neurons, inputs)."""
    return np.random.default_rng(51).normal(0.2, 2.5, (NEURONS, INPUTS)).astype(np.float32)


def facts(h5_path: str) -> dict[str, np.ndarray]:
    """Run SLAYER's neuron, and its layer, which is written to ``h5_path``."""
    import h5py
    import torch
    from lava.lib.dl import slayer

    found = {}
    for number, form in enumerate(FORMS):
        neuron = slayer.neuron.cuba.Neuron(**form)
        x = torch.tensor(inputs(number), requires_grad=True)
        current, voltage = neuron.dynamics(x)
        spikes = neuron.spike(voltage)
        drawn = np.random.default_rng(99).normal(size=tuple(spikes.shape)).astype(np.float32)
        (spikes * torch.tensor(drawn)).sum().backward()
        found |= {f"{number}.u": current.detach().numpy(), f"{number}.v": voltage.detach().numpy()}
        found |= {f"{number}.s": spikes.detach().numpy().astype(np.int8), f"{number}.gradient": x.grad.numpy()}
    layer = slayer.block.cuba.Dense(FORMS[0], INPUTS, NEURONS)
    with torch.no_grad():
        layer.synapse.weight.copy_(torch.tensor(weights()).reshape(layer.synapse.weight.shape))
    given = torch.tensor(spikes_in())
    made = layer(given)
    drawn = np.random.default_rng(98).normal(size=tuple(made.shape)).astype(np.float32)
    (made * torch.tensor(drawn)).sum().backward()
    found["layer.s"] = made.detach().numpy().astype(np.int8)
    found["layer.gradient"] = layer.synapse.weight.grad.reshape(NEURONS, INPUTS).numpy()
    with h5py.File(h5_path, "w") as file:
        layer.export_hdf5(file.create_group("layer/0"))
    with h5py.File(h5_path, "r") as file:
        found["layer.weight"] = file["layer/0/weight"][()].astype(np.int16)
    return found


if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:]
    sys.modules["lava.lib.dl.slayer.object_detection"] = types.ModuleType("lava.lib.dl.slayer.object_detection")
    np.savez_compressed(sys.argv[1], **facts(sys.argv[1].replace(".npz", ".net")))
