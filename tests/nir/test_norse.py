"""Norse reads and writes NIR by its own code: an independent reading of what the files mean."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from spiking_lm.lifnet import INPUT, LIFNet
from spiking_lm.nir_io import from_nir, to_nir

from .networks import networks, spikes

pytest.importorskip("nir")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.jit.script, deprecated, while Norse is imported
    norse = pytest.importorskip("norse.torch")

DT = 2.0**-10

pytestmark = pytest.mark.filterwarnings("ignore:nirtorch.*is being deprecated:DeprecationWarning")


def as_norse_can(net: LIFNet) -> LIFNet:
    """The part of NIR that Norse 1.1 reads: resets to zero, strict, no drift, R = 1, no Delay nodes."""
    layers = tuple(
        dataclasses.replace(
            layer,
            gain=1 - layer.decay if layer.decay.max() < 1 else np.ones(layer.size),
            drift=np.zeros(layer.size),
            v_reset=np.zeros(layer.size),
            v_init=np.zeros(layer.size),
            synapse_gain=np.ones(1) if layer.synapse_decay is None else 1 - layer.synapse_decay,
            compare=">",
        )
        for layer in net.layers
    )
    order = [INPUT, *(layer.name for layer in layers)]
    edges = []
    for edge in net.edges:
        back = order.index(edge.source) >= order.index(edge.target)
        # The executor leaves out what leads back in the first step, and with it a bias, which is always there for us.
        edges.append(dataclasses.replace(edge, delay=int(back), bias=None if back else edge.bias))
    return LIFNet(net.input_size, layers, tuple(edges))


@settings(max_examples=20)
@given(networks(exact=True, synapses=True, recurrent=False))
def test_norse_fires_as_the_network_does(drawn: LIFNet) -> None:
    net = as_norse_can(drawn)
    given_spikes = spikes(net, 16)
    run = net.run(given_spikes)
    assume(any(layer.any() for layer in run.spikes.values()))
    assert norse_run(net, given_spikes) == {
        layer.name.replace(".", "_"): run.spikes[layer.name].tolist() for layer in net.layers
    }


@settings(max_examples=15)
@given(networks(exact=True).filter(lambda net: any(edge.source == edge.target for edge in net.edges)))
def test_norse_agrees_on_neurons_that_excite_themselves(drawn: LIFNet) -> None:
    net = as_norse_can(drawn)
    order = [INPUT, *(layer.name for layer in net.layers)]
    # Where edges skip a layer, or lead back over one, nirtorch's executor visits the layers in another order.
    steps = [order.index(edge.target) - order.index(edge.source) for edge in net.edges]
    net = dataclasses.replace(
        net, edges=tuple(edge for edge, step in zip(net.edges, steps, strict=True) if step in (0, 1))
    )
    given_spikes = spikes(net, 12)
    run = net.run(given_spikes)
    assert norse_run(net, given_spikes) == {
        layer.name.replace(".", "_"): run.spikes[layer.name].tolist() for layer in net.layers
    }


def norse_run(net: LIFNet, given_spikes: np.ndarray) -> dict[str, list[list[bool]]]:
    """Run Norse's import of the network; the outputs of every node lie in the state of nirtorch's executor."""
    module = norse.from_nir(to_nir(net, dt=DT), dt=DT)
    names = [layer.name.replace(".", "_") for layer in net.layers]
    found: dict[str, list[list[bool]]] = {name: [] for name in names}
    state = None
    with torch.no_grad():
        for row in torch.from_numpy(given_spikes.astype(np.float32))[:, None]:
            _, state = module(row, state)
            for name in names:
                found[name].append((state.cache[name][0] > 0).tolist())
    return found


def test_a_network_written_by_norse_is_read() -> None:
    torch.manual_seed(0)
    module = norse.SequentialState(
        torch.nn.Linear(4, 8), norse.LIFBoxCell(), torch.nn.Linear(8, 3, bias=False), norse.LIFBoxCell()
    )
    with torch.no_grad():
        for linear in (module[0], module[2]):
            linear.weight.copy_((linear.weight * 64).round())  # membranes on a grid of 1/10, far from rounding errors
    # Norse writes dt / tau_mem_inv as tau: in seconds when it is given dt=1.
    graph = norse.to_nir(module, torch.zeros(1, 4), dt=1)
    net = from_nir(graph, dt=0.001)
    assert [layer.size for layer in net.layers] == [8, 3]  # Norse writes one number for all neurons
    assert net.layers[0].decay[0] == np.float32(0.9)
    given_spikes = spikes(net, 30)
    run = net.run(given_spikes)
    state, fired = None, []
    with torch.no_grad():
        for row in torch.from_numpy(given_spikes.astype(np.float32))[:, None]:
            out, state = module(row, state)
            fired.append((out[0] > 0).tolist())
    assert run.spikes[net.outputs[0]].tolist() == fired
    assert 0 < np.mean(fired) < 1
