"""The conformance kit on every first-party model, in each of its forms."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from spiking_lm import create_model, registry
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


def test_every_first_party_model_is_under_contract() -> None:
    assert {name for name, entry in registry.all("models").items() if entry.plugin.first_party} == {
        "spikegpt",
        "egru",
        "egru-gesture",
        "spikellm",
    }
