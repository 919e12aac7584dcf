"""The kit's laws of encoders: a toy that obeys passes, and each that breaks a law is caught by that law."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contract_encoders as toys
import pytest
import torch
from test_the_kit import laws, try_law

from spiking_lm import explain, registry
from spiking_lm.errors import UsageError
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.raster import record_raster
from spiking_lm.testing import ModelContract
from spiking_lm.testing.encoders import EncoderLaws


@pytest.fixture(autouse=True)
def toy_is_registered() -> Iterator[None]:
    manager = registry.PluginManager(discover="first-party")
    manager.register(toys.EncoderPlugin(), "toy")
    previous = registry.set_manager(manager)
    yield
    registry.set_manager(previous)


class TestHealthyEncoder(ModelContract):
    outside_the_graph = {"classifier": "runs once for a text", "head": "runs for hidden tokens"}

    @pytest.fixture
    def model(self) -> SpikingLanguageModel:
        return toys.toy_encoder(num_classes=3)


BROKEN = [
    (toys.LeavesOutTheEmbedding, "test_an_encoding_has_the_declared_shapes"),
    (toys.LooksAtPadding, "test_an_encoding_has_the_declared_shapes"),
    (toys.LooksAtPadding, "test_padding_does_not_influence_an_encoding"),
    (toys.PoolsThePadding, "test_padding_does_not_influence_an_encoding"),
    (toys.PoolsThePadding, "test_padding_does_not_influence_a_classification"),
    (toys.MixesTexts, "test_rows_of_an_encoding_are_independent"),
    (toys.LooksBackOnly, "test_an_encoding_sees_both_sides_unless_the_model_is_causal"),
    (toys.AlwaysGivesSpikes, "test_asking_an_encoding_for_spikes_changes_nothing_else"),
    (toys.HasAnotherHead, "test_classes_are_read_from_the_pooled_encoding"),
    (toys.PredictsFromTheTokenAlone, "test_masked_tokens_are_predicted_from_both_sides"),
    (toys.PredictsFromPadding, "test_padding_does_not_influence_masked_tokens"),
    (toys.ScoresNextTokensAnyway, "test_what_is_not_declared_is_refused"),
    (toys.GradedButSaysBinary, "test_every_site_emits_its_declared_kind"),
    (toys.CutsTheGradient, "test_gradients_reach_every_parameter"),
    (toys.DropsOutInEval, "test_evaluation_is_not_random"),
    (toys.HidesAWeight, "test_save_and_load_give_bit_equal_results"),
]


@pytest.mark.parametrize(("broken", "law"), BROKEN, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_broken_encoder_is_caught(
    broken: type[toys.ToyEncoder], law: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toys, "ToyEncoder", broken)  # what load_model() builds

    def make() -> dict[str, Any]:
        torch.manual_seed(0)
        return {"model": broken(toys.ToyEncoderConfig(num_classes=3)).eval()}

    with pytest.raises(AssertionError):
        try_law(TestHealthyEncoder(), law, make, tmp_path)


def test_every_law_of_encoders_has_caught_something() -> None:
    assert set(laws(EncoderLaws)) <= {law for _, law in BROKEN}


def test_a_causal_model_that_encodes_must_not_look_ahead(tmp_path: Path) -> None:
    model = toys.toy_encoder().eval()
    model.capabilities = frozenset({"encode", "lm"})
    with pytest.raises(AssertionError, match="hidden states before it"):
        try_law(
            TestHealthyEncoder(),
            "test_an_encoding_sees_both_sides_unless_the_model_is_causal",
            lambda: {"model": model},
            tmp_path,
        )


def test_an_encoder_refuses_what_a_causal_model_does() -> None:
    model = toys.toy_encoder(mlm=False)
    tokens, lengths = torch.ones(1, 4, dtype=torch.long), torch.tensor([4])
    for call in (
        lambda: model(tokens),
        lambda: model.init_state(1),
        lambda: model.step(tokens[:, 0], None),
        lambda: model.classify(tokens, lengths),
        lambda: model.predict_masked(tokens, lengths),
    ):
        with pytest.raises(UsageError, match=r"ToyEncoder .*\(capabilities: \['encode'\]\)"):
            call()


def test_an_encoder_is_explained_and_shown_like_any_model() -> None:
    model = toys.toy_encoder(ctx_len=16)
    tokens = torch.arange(40) % 19
    explanation = explain(model, tokens)
    assert explanation.tokens == 32
    assert {site.name for site in explanation.sites} == {"layers.0.spikes", "layers.1.spikes"}
    assert explanation.classes["AC"].matrices == 6
    raster = record_raster(model, tokens[:16])
    assert {name: spikes.shape for name, spikes in raster.items()} == dict.fromkeys(raster, (16, 12))
