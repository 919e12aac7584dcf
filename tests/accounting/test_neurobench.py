"""The same numbers as the neurobench package itself, where it is installed (pip install --no-deps neurobench)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spiking_lm
from spiking_lm.interfaces import Neuron

pytest.importorskip("neurobench")
pytest.importorskip("snntorch")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [{"placement": "canonical"}, {"placement": "spike_input", "input_gain": 3.0}, {"spiking": False}],
    ids=["canonical", "spike_input", "continuous"],
)
def test_numbers_are_those_of_neurobench(config: dict[str, Any]) -> None:
    from neurobench.metrics.static import ConnectionSparsity, Footprint, ParameterCount
    from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
    from neurobench.models import NeuroBenchModel

    torch.manual_seed(3)
    model = spiking_lm.create_model("spikegpt", vocab_size=64, n_layer=2, n_embd=32, ctx_len=24, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("key.weight"):
                parameter[torch.rand_like(parameter) < 0.4] = 0
    tokens = torch.randint(64, (3, 24))
    ours = spiking_lm.explain(model, tokens).neurobench

    class Wrapped(NeuroBenchModel):
        def __call__(self, batch: torch.Tensor) -> Any:
            with torch.no_grad():
                return model(batch).logits

        def __net__(self) -> Any:
            return model

    wrapped = Wrapped()
    wrapped.add_activation_module(Neuron)
    wrapped.register_hooks()
    wrapped(tokens)
    for hook in wrapped.activation_hooks:  # our neurons return (spikes, state); NeuroBench wants the spikes
        hook.activation_outputs[:] = [output[0] for output in hook.activation_outputs]
    theirs = SynapticOperations()(wrapped, None, (tokens, tokens))
    assert ours.synaptic_operations_per_sample == pytest.approx(theirs)
    assert ours.parameter_count == ParameterCount()(wrapped)
    assert ours.footprint_bytes == Footprint()(wrapped)
    assert ours.connection_sparsity == ConnectionSparsity()(wrapped)
    if config.get("placement") != "canonical":  # there the binarised embedding, a function, is a site of ours only
        assert ours.activation_sparsity == pytest.approx(ActivationSparsity()(wrapped, None, (tokens, tokens)))
    wrapped.cleanup_hooks()
