"""The laws of every model, for each kind of this one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spiking_lm import create_model
from spiking_lm.testing import ModelContract
from spiking_lm_bitspike.model import Bitspike

SMALL = {"vocab_size": 23, "n_layer": 2, "n_embd": 12, "n_head": 3, "n_hidden": 20, "ctx_len": 40, "steps": 6}


def build(seed: int = 1, **config: Any) -> Bitspike:
    torch.manual_seed(seed)
    model = create_model("bitspike", **{**SMALL, **config})
    assert isinstance(model, Bitspike)
    return model.eval()


class Classifier(ModelContract):
    outside_the_graph = {"classifier": "it reads a text once", "head": "it reads what is encoded"}


class TestEncoder(Classifier):
    @pytest.fixture
    def model(self) -> Bitspike:
        return build(num_classes=3, masked=True, pooling="mean")


class TestReleasedBinary(Classifier):
    outside_the_graph = {"classifier": "it reads a text once"}

    @pytest.fixture
    def model(self) -> Bitspike:
        return build(num_classes=2, mode="released", weights="binary")


class TestSequentialTernary(Classifier):
    outside_the_graph = {"classifier": "it reads a text once"}

    @pytest.fixture
    def model(self) -> Bitspike:
        return build(num_classes=2, mode="sequential", weights="ternary", replace={"by": "rounding"})


class TestFeedback(Classifier):
    outside_the_graph = {"classifier": "it reads a text once"}

    @pytest.fixture
    def model(self) -> Bitspike:
        model = build(num_classes=2, feedback=True, replace={"by": "populations"})
        assert model.chain.feedback is not None
        model.chain.feedback.weight.data *= 0.3
        return model


class TestCausal(ModelContract):
    outside_the_graph = {"classifier": "it reads a text once"}

    @pytest.fixture
    def model(self) -> Bitspike:
        return build(causal=True, num_classes=2, tie_weights=True)


class TestCausalReleased(ModelContract):
    @pytest.fixture
    def model(self) -> Bitspike:
        return build(causal=True, mode="released", weights="ternary")


class TestCausalSequential(ModelContract):
    @pytest.fixture
    def model(self) -> Bitspike:
        return build(causal=True, mode="sequential", replace={"by": "rounding"})


del Classifier  # a base, not a test


def test_validation_reads_no_longer_texts_than_the_model() -> None:
    """Twice the training length is more than a model of learned positions may have room for."""
    from spiking_lm import data
    from spiking_lm.objectives import NextToken
    from spiking_lm.stages import TrainConfig

    corpus = data.load({"type": "austen3", "tokenizer": {"type": "byte"}})
    assert isinstance(corpus, data.TextData)
    config = TrainConfig(steps=1, batch_size=1, seq_len=24, eval_tokens=100)
    score = NextToken(corpus, config, seed=0).validate(build(causal=True, vocab_size=256))
    assert 5.0 < score["loss"] < 6.5  # ln 256 is 5.5
