"""The gesture classifier: the laws of a recurrent model with frames for tokens, its penalties, files and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import spiking_lm
from spiking_lm import data
from spiking_lm.accounting import explain
from spiking_lm.errors import ConfigError, UsageError
from spiking_lm.interfaces import SpikingClipClassifier, mean_over_steps, select_rows
from spiking_lm.raster import record_raster
from spiking_lm.testing.checks import (
    assert_close,
    assert_gradients_alive,
    assert_identical,
    assert_no_new_tensors,
    assert_states_close,
    hidden_tensors,
)

SIZES: dict[str, Any] = {"frame_shape": (2, 16, 16), "num_classes": 5, "n_features": 12, "n_hidden": 10}


def make(**config: Any) -> SpikingClipClassifier:
    torch.manual_seed(3)
    model = spiking_lm.create_model("egru-gesture", **{**SIZES, **config})
    assert isinstance(model, SpikingClipClassifier)
    return model.eval()


def clips(batch: int = 3, steps: int = 9, shape: tuple[int, ...] = (2, 16, 16)) -> torch.Tensor:
    """Return frames of few events, 0 to 3 a pixel."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.randint(0, 4, (batch, steps, *shape), generator=generator)
    return (counts * (torch.rand(counts.shape, generator=generator) < 0.2)).float()


# -- laws -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_forward_is_a_scan_of_step() -> None:
    model, frames = make().double(), clips().double()
    whole = model(frames)
    assert whole.logits.shape == (3, 9, 5)
    state, scores = model.init_state(3, dtype=torch.float64), []
    for frame in frames.unbind(1):
        logits, state = model.step(frame, state)
        scores.append(logits)
    assert_close(torch.stack(scores, 1), whole.logits, "logits")
    assert_states_close(state, whole.state, "state")


@torch.no_grad()
def test_two_pieces_with_carried_state_are_one() -> None:
    model, frames = make().double(), clips().double()
    whole = model(frames)
    for cut in (1, 4, 8):
        first = model(frames[:, :cut])
        second = model(frames[:, cut:], first.state)
        assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, f"cut after {cut} frames")
        assert_states_close(second.state, whole.state, f"cut after {cut} frames")


@torch.no_grad()
def test_a_later_frame_changes_nothing_earlier() -> None:
    model, frames = make(), clips()
    other = frames.clone()
    other[:, 5] += 1
    before, after = model(frames).logits, model(other).logits
    assert_identical(after[:, :5], before[:, :5], "logits before the changed frame")
    assert not torch.equal(after[:, 5:], before[:, 5:])


@torch.no_grad()
def test_rows_are_independent_and_can_be_selected() -> None:
    model, frames = make().double(), clips(4).double()
    whole = model(frames)
    for row in range(4):
        assert_close(model(frames[row : row + 1]).logits, whole.logits[row : row + 1], f"row {row} alone")
    rows = torch.tensor([2, 0])
    scores, _ = model.step(frames[rows, 0], select_rows(whole.state, rows))
    assert_close(scores, model.step(frames[:, 0], whole.state)[0][rows], "rows selected")


@torch.no_grad()
def test_what_lies_behind_a_clips_end_does_not_count() -> None:
    model, frames = make().double(), clips().double()
    lengths = torch.tensor([1, 6, 9])
    scores = model.classify(frames, lengths)
    assert scores.shape == (3, 5)
    noise = torch.where((torch.arange(9) >= lengths[:, None])[..., None, None, None], frames + 1, frames)
    assert_close(model.classify(noise, lengths), scores, "with events in the padding")
    for row, n in enumerate(lengths.tolist()):
        alone = model(frames[row : row + 1, :n]).logits.mean(1)
        assert_close(scores[row : row + 1], alone, f"the mean over the frames of row {row}")


@torch.no_grad()
def test_events_are_graded_sparse_and_change_nothing_else() -> None:
    model, frames = make(), clips()
    plain, watched = model(frames), model(frames, return_spikes=True)
    assert plain.spikes is None
    assert_identical(watched.logits, plain.logits, "logits")
    assert watched.spikes is not None
    assert set(watched.spikes) == {site.name for site in model.spike_sites()} == {"egru"}
    events = watched.spikes["egru"]
    assert events.shape == (3, 9, 10)
    assert 0 < (events != 0).float().mean() < 1


@pytest.mark.parametrize("cnn", ["small", "alexnet"])
def test_gradients_reach_every_parameter_and_nothing_is_kept(cnn: str) -> None:
    shape = (2, 16, 16) if cnn == "small" else (2, 32, 32)
    sizes = {"frame_shape": shape, "n_features": 32, "n_hidden": 48, "thr_mean": 0.02}
    model = make(**sizes, cnn=cnn, activity_loss=1.0, voltage_loss=1.0).train()
    before = hidden_tensors(model)
    frames, lengths = clips(5, 9, shape), torch.tensor([9, 9, 9, 5, 2])
    output = model(frames, lengths=lengths)
    loss = F.cross_entropy(mean_over_steps(output.logits, lengths), torch.arange(5)) + sum(output.aux_losses.values())
    loss.backward()
    assert_gradients_alive(model, {})
    assert_no_new_tensors(before, hidden_tensors(model), "a forward pass")


# -- penalties --------------------------------------------------------------------------------------------------------


def test_penalties_are_those_of_the_true_frames_and_only_in_training() -> None:
    options = {"activity_loss": 2.0, "activity_target": 0.1, "voltage_loss": 3.0, "voltage_target": 0.2}
    model, frames, lengths = make(**options).double(), clips().double(), torch.tensor([4, 9, 7])
    assert model(frames, lengths=lengths).aux_losses == {}
    model.train()
    aux = model(frames, lengths=lengths).aux_losses
    with torch.no_grad():
        features = model.cnn(frames.flatten(0, 1)).unflatten(0, (3, 9))
        y, run = model.egru(features, return_sequences=True)
        true = torch.arange(9) < lengths[:, None]
        rate = (y[true] != 0).double().mean()
        gap = (run.c[true] - (model.egru.thr - 0.2)).mean()
    torch.testing.assert_close(aux["activity"], 2 * (rate - 0.1) ** 2)
    torch.testing.assert_close(aux["voltage"], 3 * gap)
    padded = torch.cat([frames, frames], 1)
    for name, value in model(padded, lengths=lengths).aux_losses.items():
        torch.testing.assert_close(value, aux[name])
    assert set(make(activity_loss=1.0).double().train()(frames).aux_losses) == {"activity"}


def test_the_activity_penalty_has_a_gradient_towards_its_target() -> None:
    model, frames = make(activity_loss=1.0, activity_target=0.0, zoneout=0.0).train(), clips(4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(frames).aux_losses["activity"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_it_learns_synthetic_gestures(small: data.ClipData) -> None:
    """Scores after 40 steps on 22 clips: far above the 2 in 22 of a guess."""
    torch.manual_seed(0)
    model = spiking_lm.create_model("egru-gesture", frame_shape=small.frame_shape, num_classes=11, n_hidden=64).train()
    chosen = small.train[:22]
    frames, lengths = map(torch.from_numpy, small.batch(chosen, 100))
    labels = torch.tensor([clip.label for clip in chosen])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        loss = F.cross_entropy(model.classify(frames, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.eval().classify(frames, lengths).argmax(1) == labels).sum() >= 12


# -- sizes, files, refusals -------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    model = make(frame_shape=(1, 128, 128), num_classes=11, cnn="alexnet", n_features=512, n_hidden=795)
    convolutions = [(1, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
    expected = sum(n_out * (n_in * k * k + 1) for n_in, n_out, k in convolutions) + 512 * 257
    expected += (512 + 795 + 2) * 3 * 795 + 795 + 11 * 796
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("size", [32, 48, 64, 96])
def test_alexnet_fits_smaller_frames(size: int) -> None:
    model = make(frame_shape=(1, size, size), cnn="alexnet")
    with torch.no_grad():
        assert torch.isfinite(model(clips(1, 2, (1, size, size))).logits).all()


def test_frames_that_are_too_small_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"frames of shape \(1, 16, 16\) are too small for cnn: alexnet"):
        make(frame_shape=(1, 16, 16), cnn="alexnet")


@torch.no_grad()
def test_save_and_load_give_bit_equal_scores(tmp_path: Path) -> None:
    model, frames, lengths = make(zoneout=0.2, dropout=0.3), clips(), torch.tensor([9, 3, 7])
    spiking_lm.save_model(model, tmp_path / "model")
    again = spiking_lm.load_model(tmp_path / "model")
    assert type(again) is type(model)
    assert again.config == model.config
    assert_identical(again.classify(frames, lengths), model.classify(frames, lengths), "class logits")


def test_what_needs_a_text_is_refused() -> None:
    model = make()
    assert model.capabilities == {"clips"}
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(UsageError, match=r"reads frames of events \(B, T, 2, 16, 16\), not \(1, 8\)"):
        spiking_lm.generate(model, tokens, max_new_tokens=1)
    for call in (lambda: explain(model), lambda: explain(model, tokens), lambda: record_raster(model, tokens[0])):
        with pytest.raises(UsageError, match="has no vocabulary: it reads no text"):
            call()
    with pytest.raises(UsageError, match="no graph of operations per token"):
        model.graph()
    with pytest.raises(UsageError, match=r"not \(1, 4, 1, 16, 16\)"):
        model(clips(1, 4, (1, 16, 16)))
