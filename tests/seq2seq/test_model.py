"""SpikeLM from a source to a target: the laws, elastic and with other neurons; laws that catch who breaks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from spiking_lm import create_model, explain
from spiking_lm.errors import ConfigError, UsageError
from spiking_lm.interfaces import LMOutput, SpikingLanguageModel
from spiking_lm.testing import ModelContract
from spiking_lm_spikelm.config import SpikeLMSeq2SeqConfig
from spiking_lm_spikelm.seq2seq import Seq2SeqState, SpikeLMSeq2Seq

SMALL: dict[str, Any] = {"vocab_size": 23, "n_layer": 1, "n_embd": 16, "n_head": 2, "n_hidden": 24, "ctx_len": 32}
LIF = {"type": "lif", "threshold": 0.5, "beta": 0.25, "gain": 1.0}


def calibrated(model: SpikingLanguageModel) -> SpikeLMSeq2Seq:
    assert isinstance(model, SpikeLMSeq2Seq)
    source, target = torch.randint(23, (8, 24)), torch.randint(23, (8, 20))
    model.calibrate(source, torch.full((8,), 24), target)
    return model


def small(**changes: Any) -> SpikeLMSeq2Seq:
    torch.manual_seed(7)
    return calibrated(create_model("spikelm-seq2seq", **{**SMALL, "dropout": 0.0, **changes}))


class Seq2SeqContract(ModelContract):
    changes: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def model(self) -> SpikingLanguageModel:
        return small(**self.changes)

    def rebuilt(self, model: SpikingLanguageModel, seed: int) -> SpikingLanguageModel:
        assert isinstance(model.config, SpikeLMSeq2SeqConfig)
        torch.manual_seed(seed)
        return calibrated(SpikeLMSeq2Seq(model.config.model_copy(update={"dropout": 0.2, "word_dropout": 0.1})))


class TestTwoSteps(Seq2SeqContract):
    changes: ClassVar = {"steps": 2, "n_decoder": 2}


class TestTernaryWeights(Seq2SeqContract):
    changes: ClassVar = {
        "steps": 1,
        "weights": "ternary",
        "embedding": "ternary",
        "neuron": {"type": "elastic", "k": 1.5},
    }


class TestLIFTwin(Seq2SeqContract):
    changes: ClassVar = {"neuron": LIF, "steps": 2}


class TestDenseTwin(Seq2SeqContract):
    changes: ClassVar = {"neuron": None, "weights": "binary"}


# -- laws that catch ---------------------------------------------------------------------------------------------------


class NeedsNoSource(SpikeLMSeq2Seq):
    def init_state(self, batch_size: int, **_: Any) -> Any:
        return super().read(torch.zeros(batch_size, 1, dtype=torch.long), torch.ones(batch_size, dtype=torch.long))


class IgnoresTheSource(SpikeLMSeq2Seq):
    def read(self, source: Tensor, lengths: Tensor) -> Seq2SeqState:
        return super().read(torch.zeros_like(source), lengths)


class ReadsThePadding(SpikeLMSeq2Seq):
    def read(self, source: Tensor, lengths: Tensor) -> Seq2SeqState:
        return super().read(source, torch.full_like(lengths, source.shape[1]))


class MixesSources(SpikeLMSeq2Seq):
    def read(self, source: Tensor, lengths: Tensor) -> Seq2SeqState:
        return super().read(source[:1].expand_as(source), lengths)


class ScoresOtherPairs(SpikeLMSeq2Seq):
    def score_pairs(self, source: Tensor, lengths: Tensor, target: Tensor, **options: Any) -> LMOutput:
        return super().score_pairs(source.flip(1), lengths, target, **options)


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (NeedsNoSource, ModelContract.test_a_target_begins_with_a_source),
        (IgnoresTheSource, ModelContract.test_the_source_influences_the_target),
        (ReadsThePadding, ModelContract.test_padding_of_a_source_does_not_influence_the_target),
        (MixesSources, ModelContract.test_sources_are_read_one_by_one),
        (ScoresOtherPairs, ModelContract.test_pairs_are_scored_as_they_are_written),
    ],
    ids=lambda v: v.__name__,
)
def test_a_broken_model_is_caught(broken: type[SpikeLMSeq2Seq], law: Callable[..., None]) -> None:
    model = calibrated(broken(small(steps=1).config)).eval()
    with pytest.raises(AssertionError):
        law(TestTwoSteps(), model)


# -- what it is --------------------------------------------------------------------------------------------------------


def test_a_source_is_kept_as_codes() -> None:
    model = small(steps=2).eval()
    with torch.no_grad():
        state = model.read(torch.randint(23, (3, 7)), torch.tensor([7, 2, 5]))
    for cache in (*state.source, *state.target):
        assert cache.keys.dtype == cache.values.dtype == torch.int8
        assert set(cache.keys.flatten().tolist()) <= {-1, 0, 1}
    assert state.source[0].keys.shape == (3, 2, 2, 7, 8)
    assert state.target[0].keys.shape == (3, 2, 2, 0, 8)


def test_the_decoder_looks_at_the_same_step_of_the_encoder() -> None:
    """Keys of another step change what is found in that step alone."""
    model = small(steps=2).eval()
    block = model.decoder_blocks()[0]
    source, lengths = torch.randint(23, (2, 7)), torch.tensor([7, 7])
    with torch.no_grad():
        looked = block.cross.recall(model.read(source, lengths).source[0], torch.float32)
        x = torch.randn(2, 2, 3, 16)
        found = block.cross.find(x, looked, None)
        turned = [torch.stack([k[0], k[1].flip(2)]) for k in looked[:1]] + [looked[1]]
        other = block.cross.find(x, turned, None)
    assert torch.equal(found[0], other[0])
    assert not torch.equal(found[1], other[1])


def test_what_does_not_fit_is_refused() -> None:
    model = small(steps=1).eval()
    long = torch.zeros(1, 33, dtype=torch.long)
    with pytest.raises(UsageError, match="33 tokens for a model that knows 32 positions"):
        model.read(long, torch.tensor([33]))
    state = model.read(long[:, :5], torch.tensor([5]))
    with pytest.raises(UsageError, match="33 tokens"):
        model(long, state)
    with pytest.raises(UsageError, match=r"S at least 1"):
        model.read(long[:, :0], torch.tensor([0]))
    with pytest.raises(UsageError, match="begins with a source"):
        model(long[:, :3])
    with pytest.raises(UsageError, match="reads no sources"):
        create_model("spikelm", vocab_size=9, n_embd=8, n_head=2).read(long, torch.tensor([1]))
    with pytest.raises(ConfigError, match="multiple of n_head"):
        create_model("spikelm-seq2seq", vocab_size=9, n_embd=10)


def test_both_halves_are_explained() -> None:
    found = explain(small(steps=2), torch.randint(23, (40,)))
    matrices = {op.name for op in found.ops if op.op_class == "AC"}
    assert len(matrices) == 6 + 6 + 4  # of the encoder, of the decoder, of its attention to the source
    assert {op.name for op in found.ops if op.op_class == "MAC"} == {"mlm_head.dense", "mlm_head"}
    assert [op.dense for op in found.ops if op.name == "decoder.0.cross.key"] == [2 * 16 * 16]
