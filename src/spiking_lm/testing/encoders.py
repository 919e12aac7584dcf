"""The laws of encoders, which every model obeys that has the capability ``encode`` or ``mlm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from spiking_lm.errors import UsageError
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.testing.checks import assert_close, assert_identical

MASKED = -100.0
"""Scores of places that are masked are at most this."""


def vocabulary(model: SpikingLanguageModel) -> int:
    """Return how many tokens a model knows."""
    size = getattr(model.config, "vocab_size", None)
    assert isinstance(size, int), f"{type(model.config).__name__} has no vocab_size"
    return size


def needs(model: SpikingLanguageModel, *capabilities: str) -> None:
    """Skip the test, with the reason, when the model does not declare a capability."""
    for capability in capabilities:
        if capability not in model.capabilities:
            pytest.skip(f"{type(model).__name__} does not declare {capability!r} (it has {sorted(model.capabilities)})")


def full_lengths(tokens: Tensor) -> Tensor:
    """Return the lengths of rows without padding."""
    return torch.full((len(tokens),), tokens.shape[1])


class EncoderLaws:
    """The part of :class:`spiking_lm.testing.ModelContract` that is about whole texts."""

    length: ClassVar[int] = 12
    """Tokens in the sequences under test."""

    def tokens(self, model: SpikingLanguageModel, batch: int = 3, length: int | None = None) -> Tensor:
        """Return random token ids ``(B, S)``."""
        generator = torch.Generator().manual_seed(30)
        return torch.randint(vocabulary(model), (batch, length or self.length), generator=generator)

    def test_an_encoding_has_the_declared_shapes(self, model: SpikingLanguageModel) -> None:
        needs(model, "encode")
        tokens = self.tokens(model)
        batch, length = tokens.shape
        lengths = torch.tensor([1, length - 3, length])
        with torch.no_grad():
            encoding = model.encode(tokens, lengths)
        assert len(encoding.scores) in (0, len(encoding.hidden) - 1), (
            f"{len(encoding.hidden)} hidden states and {len(encoding.scores)} scores: of L layers there are L + 1, "
            "and L or, without attention, none"
        )
        size = encoding.pooled.shape[-1]
        assert encoding.pooled.shape == (batch, size), f"pooled has shape {tuple(encoding.pooled.shape)}"
        for layer, hidden in enumerate(encoding.hidden):
            assert hidden.shape == (batch, length, size), f"hidden[{layer}] has shape {tuple(hidden.shape)}"
            assert torch.isfinite(hidden).all(), f"hidden[{layer}] is not finite"
        padding = torch.arange(length) >= lengths[:, None]
        for layer, scores in enumerate(encoding.scores):
            assert scores.ndim == 4, f"scores[{layer}] have shape {tuple(scores.shape)}, expected (B, heads, S, S)"
            assert scores.shape == (batch, scores.shape[1], length, length), (
                f"scores[{layer}] have shape {tuple(scores.shape)}"
            )
            assert not torch.isnan(scores).any(), f"scores[{layer}] hold NaN"
            columns = padding[:, None, None, :].expand_as(scores)
            assert (scores[columns] <= MASKED).all(), f"scores[{layer}]: a token looks at padding"

    def test_padding_does_not_influence_an_encoding(self, model: SpikingLanguageModel) -> None:
        needs(model, "encode")
        _assert_padding_is_ignored(model.double(), self.tokens(model), _true_parts)

    def test_rows_of_an_encoding_are_independent(self, model: SpikingLanguageModel) -> None:
        needs(model, "encode")
        model, tokens = model.double(), self.tokens(model, batch=4)
        lengths = torch.tensor([self.length, 2, self.length - 3, self.length])
        with torch.no_grad():
            every = _parts(model, tokens, lengths)
            for what, rows in (("permuted", [2, 0, 3, 1]), ("alone", [1]), ("repeated", [3, 3, 0, 1, 2, 1])):
                chosen = torch.tensor(rows)
                some = _parts(model, tokens[chosen], lengths[chosen])
                for name, tensor in some.items():
                    assert_close(tensor, every[name][chosen], f"rows {what} ({rows}), {name}")

    def test_an_encoding_sees_both_sides_unless_the_model_is_causal(self, model: SpikingLanguageModel) -> None:
        needs(model, "encode")
        tokens = self.tokens(model)
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % vocabulary(model)
        with torch.no_grad():
            before = model.encode(tokens, full_lengths(tokens)).hidden[-1][:, :-1]
            after = model.encode(changed, full_lengths(tokens)).hidden[-1][:, :-1]
        if "lm" in model.capabilities:
            assert_identical(after, before, "the last token was changed; hidden states before it")
        else:
            assert not torch.equal(after, before), "the last token influences no other: this is not read in both ways"

    def test_asking_an_encoding_for_spikes_changes_nothing_else(self, model: SpikingLanguageModel) -> None:
        needs(model, "encode")
        tokens = self.tokens(model)
        with torch.no_grad():
            plain = model.encode(tokens, full_lengths(tokens))
            spiking = model.encode(tokens, full_lengths(tokens), return_spikes=True)
        assert plain.spikes is None, "spikes came without being asked for (they cost memory)"
        assert_identical(spiking.pooled, plain.pooled, "with return_spikes=True, pooled")
        for layer, (a, b) in enumerate(zip(spiking.hidden, plain.hidden, strict=True)):
            assert_identical(a, b, f"with return_spikes=True, hidden[{layer}]")

    def test_classes_are_read_from_the_pooled_encoding(self, model: SpikingLanguageModel) -> None:
        needs(model, "encode", "classify")
        tokens = self.tokens(model)
        lengths = torch.tensor([1, self.length - 3, self.length])
        with torch.no_grad():
            scores = model.classify_pooled(model.encode(tokens, lengths).pooled)
            assert_close(scores, model.classify(tokens, lengths), "classify_pooled(encode().pooled) against classify()")

    def test_masked_tokens_are_predicted_from_both_sides(self, model: SpikingLanguageModel) -> None:
        needs(model, "mlm")
        model, tokens = model.double(), self.tokens(model)
        expected = (*tokens.shape, vocabulary(model))
        changed = tokens.clone()
        changed[:, -1] = (changed[:, -1] + 1) % vocabulary(model)
        with torch.no_grad():
            logits = model.predict_masked(tokens, full_lengths(tokens))
            other = model.predict_masked(changed, full_lengths(tokens))
        assert logits.shape == expected, f"logits have shape {tuple(logits.shape)}, expected {expected}"
        assert torch.isfinite(logits).all(), "logits are not finite"
        assert not torch.equal(other[:, :-1], logits[:, :-1]), "logits ignore what stands behind a place"

    def test_padding_does_not_influence_masked_tokens(self, model: SpikingLanguageModel) -> None:
        needs(model, "mlm")

        def part(model: SpikingLanguageModel, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
            logits = model.predict_masked(tokens, lengths)
            return {f"logits of row {row}": logits[row, :n] for row, n in enumerate(lengths.tolist())}

        _assert_padding_is_ignored(model.double(), self.tokens(model), part)

    def test_what_is_not_declared_is_refused(self, model: SpikingLanguageModel) -> None:
        tokens = self.tokens(model)
        lengths = full_lengths(tokens)
        calls: dict[str, Callable[[], Any]] = {
            "lm": lambda: model(tokens),
            "encode": lambda: model.encode(tokens, lengths),
            "mlm": lambda: model.predict_masked(tokens, lengths),
            "classify": lambda: model.classify(tokens, lengths),
            "seq2seq": lambda: model.read(tokens, lengths),
        }
        for capability in calls.keys() - model.capabilities:
            try:
                calls[capability]()
            except UsageError:
                continue
            raise AssertionError(f"the capability {capability!r} is not declared, and what needs it gave no UsageError")


def _parts(model: SpikingLanguageModel, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Return all tensors of an encoding by name."""
    encoding = model.encode(tokens, lengths)
    named = {f"hidden[{layer}]": tensor for layer, tensor in enumerate(encoding.hidden)}
    named.update({f"scores[{layer}]": tensor for layer, tensor in enumerate(encoding.scores)})
    return {**named, "pooled": encoding.pooled}


def _true_parts(model: SpikingLanguageModel, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Return what an encoding says of true tokens, row by row."""
    parts = {}
    for name, tensor in _parts(model, tokens, lengths).items():
        for row, n in enumerate(lengths.tolist()):
            kept = tensor[row] if name == "pooled" else tensor[row, :n] if "hidden" in name else tensor[row, :, :n, :n]
            parts[f"{name} of row {row}"] = kept
    return parts


@torch.no_grad()
def _assert_padding_is_ignored(
    model: SpikingLanguageModel,
    tokens: Tensor,
    function: Callable[[SpikingLanguageModel, Tensor, Tensor], dict[str, Tensor]],
) -> None:
    """Fail unless other padding, more padding and no padding give the same."""
    length = tokens.shape[1]
    lengths = torch.tensor([1, length - 3, length])
    padding = torch.arange(length) >= lengths[:, None]
    expected = function(model, tokens, lengths)
    versions = {
        "with other tokens in the padding": torch.where(padding, (tokens + 1) % vocabulary(model), tokens),
        "with more padding": torch.cat([tokens, tokens[:, :4]], 1),
    }
    for what, version in versions.items():
        for name, tensor in function(model, version, lengths).items():
            assert_close(tensor, expected[name], f"{what}, {name}")
    for row, n in enumerate(lengths.tolist()):
        alone = function(model, tokens[row : row + 1, :n], lengths[row : row + 1])
        for name, tensor in alone.items():
            assert_close(tensor, expected[name.replace("row 0", f"row {row}")], f"row {row} without padding, {name}")
