"""The conformance kit on every first-party model, in each of its forms."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from spiking_lm import create_model, registry
from spiking_lm.gif import calibrate_scale
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.testing import ModelContract

SMALL = {"vocab_size": 23, "n_layer": 2, "n_embd": 16, "ctx_len": 32}


class SpikeGPTContract(ModelContract):
    changes: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def model(self) -> SpikingLanguageModel:
        torch.manual_seed(7)
        return create_model("spikegpt", **{**SMALL, **self.changes})


class TestSpikeGPT(SpikeGPTContract):
    pass


class TestSpikeGPTOnOurLIF(SpikeGPTContract):
    changes: ClassVar = {"neuron": {"type": "lif", "surrogate": {"name": "sigmoid", "alpha": 4.0}}}


class TestSpikeGPTStepByStep(SpikeGPTContract):
    """A neuron without dynamics: every step is a call of snnTorch."""

    changes: ClassVar = {"neuron": {"type": "snntorch.leaky", "reset": "subtract", "detach_reset": True}}


class TestSpikeGPTSpikeInput(SpikeGPTContract):
    changes: ClassVar = {"placement": "spike_input"}


class TestSpikeGPTContinuousTwin(SpikeGPTContract):
    changes: ClassVar = {"spiking": False}


class TestSpikeGPTRawEmbedding(SpikeGPTContract):
    changes: ClassVar = {"binary_embedding": False, "head_tying": True}


class TestSpikeGPTFeedForwardFirst(SpikeGPTContract):
    changes: ClassVar = {"ffn_pre": True, "n_layer": 3}


class TestSpikeGPTRescaled(SpikeGPTContract):
    changes: ClassVar = {"rescale": True, "n_layer": 7, "n_embd": 8}


class SpikeGPTClassifierContract(SpikeGPTContract):
    outside_the_graph: ClassVar = {"classify_head": "runs once for a text, not for every token"}


class TestSpikeGPTClassifier(SpikeGPTClassifierContract):
    changes: ClassVar = {"num_classes": 3, "dropout": 0.1}


class TestSpikeGPTClassifierOnTheLastToken(SpikeGPTClassifierContract):
    changes: ClassVar = {"num_classes": 2, "pool": "last", "l2wrap": True}


class EGRUContract(ModelContract):
    changes: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def model(self) -> SpikingLanguageModel:
        torch.manual_seed(7)
        return create_model("egru", **{"vocab_size": 23, "n_layer": 2, "n_embd": 12, "n_hidden": 18, **self.changes})


class TestEGRU(EGRUContract):
    pass


class TestEGRUAsPublished(EGRUContract):
    """Frozen thresholds and a steep surrogate; with activity penalties."""

    changes: ClassVar = {
        **{"dampening_factor": 3.6, "pseudo_derivative_support": 3.6, "threshold_lr": 0.0},
        **{"alpha": 0.1, "beta": 0.1, "gamma": 0.1, "activity_penalty": 5.0},
    }


class TestEGRUWithProjection(EGRUContract):
    changes: ClassVar = {"projection": True, "tie_weights": False, "zoneout": 0.2, "n_layer": 1}


class TestEGRUWithDropout(EGRUContract):
    changes: ClassVar = {f"dropout_{place}": 0.2 for place in ("words", "emb", "forward", "last", "connect")}


class TestGRUTwin(EGRUContract):
    changes: ClassVar = {"cell": "gru", "dropout_connect": 0.2}


class TestLSTMTwin(EGRUContract):
    changes: ClassVar = {"cell": "lstm", "dropout_connect": 0.2, "projection": True, "alpha": 0.1, "beta": 0.1}


class SpikeLLMContract(ModelContract):
    changes: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def model(self) -> SpikingLanguageModel:
        torch.manual_seed(7)
        return create_model("spikellm", **{**SMALL, "n_inner": 24, "n_head": 4, **self.changes})


class TestLlama(SpikeLLMContract):
    """Every scheme off: the float model."""


class TestLlamaGroupedQueries(SpikeLLMContract):
    changes: ClassVar = {"n_kv_head": 2, "head_dim": 6, "tie_embeddings": True}


class TestQwen2(SpikeLLMContract):
    changes: ClassVar = {"qkv_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}}


class TestMistral(SpikeLLMContract):
    changes: ClassVar = {"sliding_window": 5, "n_kv_head": 1, "rope_scaling": {"type": "llama3", "factor": 8.0}}


W4A4: dict[str, Any] = {
    "weights": {"bits": 4},
    "activations": {"bits": 4, "salient": {"rate": 0.2}},
    "cache": {"bits": 4, "query_bits": 6, "salient": {"rate": 0.2}},
}


class SpikingLlamaContract(SpikeLLMContract):
    """Counts in front of every projection; a fifth of the channels is salient."""

    changes: ClassVar = W4A4

    @pytest.fixture
    def model(self) -> SpikingLanguageModel:
        torch.manual_seed(7)
        model = create_model("spikellm", **{**SMALL, "n_inner": 24, "n_head": 4, **self.changes})
        for name, mask in model.named_buffers():
            if "salient" in name:
                mask.copy_(torch.rand(mask.shape) < 0.2)
        calibrate(model)
        return model


def calibrate(model: SpikingLanguageModel) -> None:
    """Set static scales to what a random text needs, so that something spikes."""

    def see(module: Any, args: tuple[Tensor, ...]) -> None:
        module.scale.copy_(calibrate_scale(args[0]))

    static = [module for module in model.modules() if getattr(module, "scale", None) is not None]
    hooks = [module.register_forward_pre_hook(see) for module in static]
    with torch.no_grad():
        model(torch.arange(23)[None])
    for hook in hooks:
        hook.remove()


class TestSpikeLLM(SpikingLlamaContract):
    pass


class TestSpikeLLMUnsigned(SpikingLlamaContract):
    """Unsigned spikes one step after the other; grouped queries, weights in ragged groups and a tied embedding."""

    changes: ClassVar = {
        "weights": {"bits": 3, "group_size": 7, "symmetric": True},
        "activations": {"bits": 3, "spikes": "unsigned", "salient": {"rate": 0.2, "steps": 4}},
        "cache": {"bits": 3},
        **{"mode": "spike", "n_kv_head": 2, "tie_embeddings": True},
    }


class TestSpikeLLMRotated(SpikingLlamaContract):
    changes: ClassVar = {**W4A4, "rotation": True, "n_kv_head": 2}


class TestSpikeLLMTernary(SpikingLlamaContract):
    """Weights that only add, biases, and spikes one by one."""

    changes: ClassVar = {
        "weights": {"type": "ternary", "group_size": 8},
        "activations": {"bits": 2},
        **{"mode": "binary", "qkv_bias": True, "n_layer": 1},
    }


class TestSpikeLLMOfRealWeights(SpikingLlamaContract):
    """Trainable: real weights behind counts on a static scale, values and keys of a sliding window as codes."""

    changes: ClassVar = {
        "activations": {"bits": 6, "scale": "static", "salient": {"rate": 0.2}},
        "cache": {"bits": 4, "salient": {"rate": 0.2}},
        "sliding_window": 5,
    }


class TestSpikeLLMOfRealActivations(SpikingLlamaContract):
    changes: ClassVar = {"weights": {"bits": 2}, "n_kv_head": 1, "head_dim": 6}


def test_every_first_party_model_is_under_contract() -> None:
    assert {name for name, entry in registry.all("models").items() if entry.plugin.first_party} == {
        "spikegpt",
        "egru",
        "egru-gesture",
        "spikellm",
        "spikelm",  # in tests/spikelm/test_contract.py
        "spikelm-seq2seq",  # in tests/seq2seq
        "bitspike",  # in tests/bitspike
    }
