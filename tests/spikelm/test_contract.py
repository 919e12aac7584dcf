"""The conformance kit on SpikeLM: encoder and causal model, elastic and with other neurons, and the dense twin."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from spiking_lm import create_model
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.testing import ModelContract
from spiking_lm_spikelm.config import SpikeLMConfig
from spiking_lm_spikelm.model import SpikeLM

SMALL: dict[str, Any] = {"vocab_size": 23, "n_layer": 2, "n_embd": 16, "n_head": 2, "n_hidden": 24, "ctx_len": 32}
LIF = {"type": "lif", "threshold": 0.5, "beta": 0.25, "gain": 1.0}


class SpikeLMContract(ModelContract):
    changes: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def model(self) -> SpikingLanguageModel:
        torch.manual_seed(7)
        return self.calibrated(create_model("spikelm", **{**SMALL, "dropout": 0.0, **self.changes}))

    def rebuilt(self, model: SpikingLanguageModel, seed: int) -> SpikingLanguageModel:
        assert isinstance(model.config, SpikeLMConfig)
        torch.manual_seed(seed)
        dropping = model.config.model_copy(update={"dropout": 0.2, "word_dropout": 0.1})
        return self.calibrated(SpikeLM(dropping))

    def calibrated(self, model: SpikingLanguageModel) -> SpikingLanguageModel:
        """Evaluation does not begin without amplitudes, and no law may change a module that sets them."""
        assert isinstance(model, SpikeLM)
        model.calibrate(self.tokens(model, batch=8, length=24))
        return model


class TestCausal(SpikeLMContract):
    changes: ClassVar = {"causal": True}


class TestCausalClassifier(SpikeLMContract):
    """One step, symmetric reset, ternary weights and a learned amplitude."""

    changes: ClassVar = {
        **{"causal": True, "num_classes": 3, "steps": 1, "weights": "ternary"},
        "neuron": {"type": "elastic", "reset": "symmetric", "learn_alpha": True},
    }
    outside_the_graph: ClassVar = {"classify_head": "it reads a text, not a token"}


class TestEncoder(SpikeLMContract):
    """All heads; binary weights and a ternary embedding."""

    changes: ClassVar = {
        **{"num_classes": 4, "pooling": "cls", "mlm": True, "nsp": True, "steps": 2},
        **{"weights": "binary", "embedding": "ternary"},
    }
    untrained_parameters: ClassVar = {"nsp_head.*": "no law predicts the next sentence"}
    outside_the_graph: ClassVar = {
        "classify_head": "it reads a text, not a token",
        "nsp_head": "it reads a text, not a token",
        "pooler": "it reads a text, not a token",
        "mlm_head.dense": "it predicts what is hidden, in training",
    }


class TestLIFTwin(SpikeLMContract):
    changes: ClassVar = {"neuron": LIF, "causal": True, "num_classes": 2}
    outside_the_graph: ClassVar = {"classify_head": "it reads a text, not a token"}


class TestDenseTwin(SpikeLMContract):
    changes: ClassVar = {"neuron": None, "num_classes": 2}
    outside_the_graph: ClassVar = {"classify_head": "it reads a text, not a token"}
