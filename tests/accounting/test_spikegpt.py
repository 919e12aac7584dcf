"""What explain() says of the real SpikeGPT, in both placements and without spikes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spiking_lm
from spiking_lm.accounting import Explanation

pytest.importorskip("snntorch")


def explained(**config: Any) -> Explanation:
    torch.manual_seed(0)
    model = spiking_lm.create_model("spikegpt", vocab_size=64, n_layer=2, n_embd=32, ctx_len=64, **config)
    return spiking_lm.explain(model)


def test_canonical_placement_feeds_no_matrix_with_spikes() -> None:
    found = explained(placement="canonical")
    assert found.classes["AC"].matrices == found.classes["integer-AC"].matrices == 0
    assert found.classes["MAC"].weight_share == 1.0
    assert found.neurobench.synaptic_operations_per_token["Effective_ACs"] == 0
    assert found.answer.startswith("In front of no weight matrix: the spikes of 5 sites go to 4 additions to the real")
    assert found.energy[1].ratio == pytest.approx(1.0)
    assert {site.name: site.feeds_kinds for site in found.sites}["embedding"] == ("norm",)
    residual = [op for op in found.ops if op.kind == "residual"]
    assert all(op.declared_inputs == ("real", "binary") and op.emits == "real" for op in residual)


def test_spike_input_placement_feeds_all_matrices_but_the_head() -> None:
    found = explained(placement="spike_input")
    assert {op.name for op in found.ops if op.op_class == "MAC"} == {"head"}
    head, blocks = 64 * 32, 2 * 13 * 32 * 32
    assert found.classes["AC"].weights == blocks
    assert found.classes["AC"].weight_share == pytest.approx(blocks / (blocks + head))
    assert found.neurobench.synaptic_operations_per_token["Effective_MACs"] <= head
    for op in found.ops:
        if op.op_class == "AC":
            assert (op.seen_input, op.effective_macs, op.runs_on) == ("binary", 0, "neuromorphic")
    assert found.energy[1].ratio > 2


def test_continuous_twin_has_no_spikes() -> None:
    found = explained(spiking=False)
    assert found.sites == ()
    assert found.spikes_per_token == 0
    assert found.neurobench.activation_sparsity == 0.0
    assert found.neurobench.membrane_updates_per_token is None
    assert found.answer.startswith("Nowhere")
    assert found.classes["MAC"].weight_share == 1.0


def test_membrane_updates_follow_snntorch() -> None:
    """NeuroBench hooks snnTorch's own membrane before and after each call; ours must find the same changes."""
    import snntorch

    torch.manual_seed(1)
    model = spiking_lm.create_model("spikegpt", vocab_size=64, n_layer=1, n_embd=16, ctx_len=32)
    drive: dict[str, torch.Tensor] = {}
    for site, firing in model.blocks[0].neurons.items():

        def keep(module: Any, args: Any, output: Any, site: str = site) -> None:
            drive[site] = args[0]

        firing.neuron.register_forward_hook(keep)
    tokens = torch.randint(64, (2, 32))
    found = spiking_lm.explain(model, tokens)
    updates = 0
    for x in drive.values():
        leaky = snntorch.Leaky(beta=0.5, threshold=1.0, reset_mechanism="zero", reset_delay=False)
        membrane = torch.zeros(2, 16)
        for t in range(32):
            before = membrane
            _, membrane = leaky(0.5 * x[:, t], before)
            updates += membrane.numel() if t == 0 else int(torch.count_nonzero(before - membrane))
    assert found.neurobench.membrane_updates_per_token == updates / 64
