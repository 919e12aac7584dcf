"""The synthetic gestures: reproducible, balanced, split by subject, and what they say they are."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spiking_lm import data
from spiking_lm.data.gestures11 import LABELS, Gestures11Config, _generate, _scene, _simulate, split_of
from spiking_lm.errors import ConfigError

SPLITS = ("train", "valid", "test")


def clips_of(clips: data.ClipData) -> list[data.Clip]:
    return [clip for split in SPLITS for clip in getattr(clips, split)]


def test_the_same_seed_gives_the_same_clips(small: data.ClipData, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SPIKING_LM_CACHE", str(tmp_path))  # made again, not read again
    options = {"type": "gestures11", "size": 16, "subjects": 5, "clips": 1, "min_s": 0.3, "max_s": 0.4}
    again, other = data.load(options), data.load({**options, "seed": 1})
    assert isinstance(again, data.ClipData)
    assert again.sha256 == small.sha256 != other.sha256
    for ours, theirs in zip(clips_of(again), clips_of(small), strict=True):
        np.testing.assert_array_equal(ours.events, theirs.events)


def test_balanced_and_split_by_subject(small: data.ClipData) -> None:
    facts = small.describe()["splits"]
    assert {name: facts[name]["subjects"] for name in SPLITS} == {"train": 3, "valid": 1, "test": 1}
    assert all(facts[name]["per_label"] == [facts[name]["subjects"]] * 11 for name in SPLITS)
    subjects = [{clip.subject for clip in getattr(small, name)} for name in SPLITS]
    assert sum(map(len, subjects)) == len(set.union(*subjects)) == 5


def test_seven_of_ten_subjects_are_for_training() -> None:
    splits = [split_of(subject, 30) for subject in range(30)]
    assert [splits.count(name) for name in SPLITS] == [21, 3, 6]


def test_events_lie_within_the_clip_and_come_in_order(small: data.ClipData) -> None:
    for clip in clips_of(small):
        assert 300_000 <= clip.duration_us <= 400_000
        assert len(clip.events) > 10
        assert (np.diff(clip.events["t"].astype(np.int64)) >= 0).all()
        assert clip.events["t"].max() < clip.duration_us
        assert max(clip.events["x"].max(), clip.events["y"].max()) < 16
    assert set(np.unique(np.concatenate([clip.events["p"] for clip in clips_of(small)]))) == {0, 1}


def motion(clip: data.Clip, size: int) -> dict[str, float]:
    """Describe a clip by where ON events lie from OFF events: a bright blob has the ones in front, the others behind.

    ``x``, ``y``: mean of that arrow; ``turn``: whether it turns clockwise about the middle; ``spread_x``, ``spread_y``:
    how much it varies.
    """
    step = 50_000
    arrows, places = [np.zeros(2)], [np.zeros(2)]
    for start in range(0, clip.duration_us - step + 1, step):
        part = clip.events[(clip.events["t"] >= start) & (clip.events["t"] < start + step)]
        on, off = part[part["p"] == 1], part[part["p"] == 0]
        if min(len(on), len(off)) >= 5:
            middles = [np.array([side["x"].mean(), side["y"].mean()]) for side in (on, off)]
            arrows.append(middles[0] - middles[1])
            places.append((middles[0] + middles[1]) / 2 - (size - 1) / 2)
    a, r = np.array(arrows), np.array(places)
    r = r - r.mean(0)
    turn = r[:, 0] * a[:, 1] - r[:, 1] * a[:, 0]
    spread = a.std(0)
    return {
        **{"x": a[:, 0].mean(), "y": a[:, 1].mean(), "turn": (turn / (np.abs(turn) + 1)).mean()},
        **{"spread_x": spread[0], "spread_y": spread[1]},
    }


@pytest.mark.slow
def test_a_simple_statistic_tells_the_classes_apart() -> None:
    config = Gestures11Config(size=32, subjects=10, clips=1, min_s=1.2, max_s=1.2)
    clips = [clip for _, clip in _generate(config)]
    mean = {
        label: {key: float(np.mean([m[key] for m in moved])) for key in moved[0]}
        for i, label in enumerate(LABELS)
        if (moved := [motion(clip, 32) for clip in clips if clip.label == i])
    }
    assert mean["left"]["x"] < -0.2 < 0.2 < mean["right"]["x"]
    assert mean["up"]["y"] < -0.2 < 0.2 < mean["down"]["y"]  # rows count downwards
    assert mean["counter-clockwise"]["turn"] < -0.3 < 0.3 < mean["clockwise"]["turn"]
    assert mean["side to side"]["spread_x"] > 2 * mean["side to side"]["spread_y"]
    assert mean["up and down"]["spread_y"] > 2 * mean["up and down"]["spread_x"]


@pytest.mark.parametrize(("label", "sign"), [("zoom in", 1), ("zoom out", -1)])
def test_a_blob_that_comes_nearer_gets_brighter_for_longer(label: str, sign: int) -> None:
    """All pixels of a growing blob see more light, those of a shrinking one less; only the short rest is reversed."""
    config = Gestures11Config(size=32, min_s=1.2, max_s=1.2)
    scenes = [_scene(config, subject, LABELS.index(label), 0) for subject in range(8)]
    middle, one = np.full(3, 16, np.float32), np.array([3, 0, 0], np.float32)
    alone = [replace(scene, x=middle, y=middle, contrast=one, noise=0.0) for scene in scenes]
    balance = []
    for events in _simulate(alone, 32):
        frame = events["t"] // 25_000
        polarity = np.bincount(frame, np.where(events["p"] == 1, 1, -1), 48)
        balance.append(np.sign(polarity).mean())
    assert sign * np.mean(balance) > 0.2


def test_the_default_set_takes_well_under_a_minute() -> None:
    config = Gestures11Config()
    start = time.process_time()
    made = [clip for (_, clip), _ in zip(_generate(config), range(64), strict=False)]
    per_clip = (time.process_time() - start) / len(made)
    assert per_clip * config.subjects * config.clips * len(LABELS) < 40


def test_options_are_checked(small: data.ClipData) -> None:
    with pytest.raises(ConfigError, match="max_s is below min_s"):
        data.load({"type": "gestures11", "min_s": 2.0})
    with pytest.raises(ConfigError, match=r"unknown field 'subject'[\s\S]*subjects"):
        data.load({"type": "gestures11", "subject": 3})
    with pytest.raises(ConfigError, match="have no tokenizer"):
        data.load({"type": "gestures11", "tokenizer": {"type": "byte"}})
