"""The laws of models that write a target from a source: the capability ``seq2seq``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from spiking_lm.errors import UsageError
from spiking_lm.interfaces import SpikingLanguageModel, State, select_rows
from spiking_lm.testing.checks import assert_close, assert_states_close
from spiking_lm.testing.encoders import full_lengths, needs, vocabulary


class SequenceLaws:
    """The part of :class:`spiking_lm.testing.ModelContract` that is about sources and targets.

    What a causal model obeys, a decoder obeys too, from the state of a source: those laws begin with :meth:`start`.
    """

    source_length: ClassVar[int] = 9
    """Tokens in the sources under test; some rows have fewer."""

    def source(self, model: SpikingLanguageModel, batch: int) -> tuple[Tensor, Tensor]:
        """Return random sources ``(B, S)``, right-padded, and their lengths ``(B,)``."""
        generator = torch.Generator().manual_seed(31)
        source = torch.randint(vocabulary(model), (batch, self.source_length), generator=generator)
        return source, torch.tensor([(self.source_length, 1, self.source_length - 3)[row % 3] for row in range(batch)])

    def start(self, model: SpikingLanguageModel, batch: int) -> State:
        """Return the state before the first token: None of a causal model, that of a source where one is read.

        Skips the test, with the reason, for a model that does neither.
        """
        if "seq2seq" not in model.capabilities:
            needs(model, "lm")
            return None
        with torch.no_grad():
            return model.read(*self.source(model, batch))

    def target(self, model: SpikingLanguageModel, batch: int = 3, length: int = 7) -> Tensor:
        """Return random targets ``(B, N)``."""
        return torch.randint(vocabulary(model), (batch, length), generator=torch.Generator().manual_seed(32))

    def test_a_target_begins_with_a_source(self, model: SpikingLanguageModel) -> None:
        needs(model, "seq2seq")
        target = self.target(model)
        if "lm" in model.capabilities:
            pytest.skip(f"{type(model).__name__} declares 'lm': it begins without a source too")
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda: model(target),
            "init_state": lambda: model.init_state(3),
        }
        for what, call in calls.items():
            try:
                call()
            except UsageError:
                continue
            raise AssertionError(f"{what}() goes without a source, and gave no UsageError")

    def test_the_source_influences_the_target(self, model: SpikingLanguageModel) -> None:
        needs(model, "seq2seq")
        (source, _), target = self.source(model, 3), self.target(model)
        other = source.clone()
        other[:, 0] = (other[:, 0] + 1) % vocabulary(model)
        with torch.no_grad():
            logits, changed = (model(target, model.read(one, full_lengths(one))).logits for one in (source, other))
        same = [row for row in range(3) if torch.equal(logits[row], changed[row])]
        assert not same, f"the first token of the source was changed; the logits of the targets {same} stay as they are"

    def test_padding_of_a_source_does_not_influence_the_target(self, model: SpikingLanguageModel) -> None:
        needs(model, "seq2seq")
        model, target = model.double(), self.target(model)
        source, lengths = self.source(model, 3)
        padding = torch.arange(source.shape[1]) >= lengths[:, None]
        with torch.no_grad():
            logits = model(target, model.read(source, lengths)).logits
            for what, version in (
                ("other tokens in", torch.where(padding, (source + 1) % vocabulary(model), source)),
                ("more of", torch.cat([source, source[:, :4]], 1)),
            ):
                found = model(target, model.read(version, lengths)).logits
                assert_close(found, logits, f"with {what} the padding of the source, logits")
                found = model.score_pairs(version, lengths, target).logits
                assert_close(found, logits, f"with {what} the padding of the source, score_pairs()")
            for row, n in enumerate(lengths.tolist()):
                state = model.read(source[row : row + 1, :n], lengths[row : row + 1])
                alone = model(target[row : row + 1], state).logits
                assert_close(alone, logits[row : row + 1], f"row {row} alone and without padding, logits")

    def test_sources_are_read_one_by_one(self, model: SpikingLanguageModel) -> None:
        needs(model, "seq2seq")
        model = model.double()
        source, lengths = self.source(model, 4)
        rows = torch.tensor([2, 0, 3, 3, 1])
        with torch.no_grad():
            some = model.read(source[rows], lengths[rows])
            assert_states_close(
                some, select_rows(model.read(source, lengths), rows), f"rows {rows.tolist()} of sources"
            )

    def test_pairs_are_scored_as_they_are_written(self, model: SpikingLanguageModel) -> None:
        needs(model, "seq2seq")
        model, target = model.double(), self.target(model)
        source, lengths = self.source(model, 3)
        with torch.no_grad():
            written = model(target, model.read(source, lengths))
            scored = model.score_pairs(source, lengths, target)
        assert_close(scored.logits, written.logits, "score_pairs() against forward() from read(), logits")
        assert_states_close(scored.state, written.state, "score_pairs() against forward() from read()")
