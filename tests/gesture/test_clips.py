"""Clips from DVS128 Gesture's files in both layouts, the cache, and batches of frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gesture_aedat as aedat
import numpy as np
import pytest

from spiking_lm import data
from spiking_lm.data.clips import DVS128_GESTURES, Clip, cached_clips
from spiking_lm.data.events import EVENT
from spiking_lm.errors import ConfigError, DataError

WINDOW = 200_000


def recording(folder: Path, name: str, gestures: list[tuple[int, int, int]]) -> None:
    """Write a recording with one event every 10 ms at column = class, and its annotations."""
    events = []
    for label, start, stop in gestures:
        events += [aedat.event(label, 2 * label, (t // 10_000) % 2, t) for t in range(start, stop, 10_000)]
    (folder / f"{name}.aedat").write_bytes(aedat.HEADER + aedat.END + aedat.packet(events))
    rows = "".join(f"{label},{start},{stop}\n" for label, start, stop in gestures)
    (folder / f"{name}_labels.csv").write_text(f"class,startTime_usec,endTime_usec\n{rows}")


@pytest.fixture
def ibm(tmp_path: Path) -> Path:
    """Three training subjects and one for testing; the second gesture of each is shorter than a window."""
    folder = tmp_path / "DvsGesture"
    folder.mkdir()
    for user in (1, 2, 3, 24):
        recording(folder, f"user{user:02d}_led", [(1, 1_000_000, 1_500_000), (11, 2_000_000, 2_150_000)])
    recording(folder, "user01_fluorescent_led", [(4, 0, 450_000)])
    train = ["user01_led", "user01_fluorescent_led", "user02_led", "user03_led"]
    (folder / "trials_to_train.txt").write_text("".join(f"{name}.aedat\n" for name in train))
    (folder / "trials_to_test.txt").write_text("user24_led.aedat\n\n")
    return folder


def load(path: Path, **options: Any) -> data.ClipData:
    config = {"type": "dvs128-gesture", "path": str(path), "window_s": WINDOW / 1e6, "size": 32, **options}
    clips = data.load(config)
    assert isinstance(clips, data.ClipData)
    return clips


def test_ibms_layout(ibm: Path) -> None:
    clips = load(ibm)
    assert clips.labels == DVS128_GESTURES
    assert clips.frame_shape == (1, 32, 32)
    # Two whole windows of the 500 ms gesture, and the 150 ms one as it is.
    assert [(clip.label, clip.duration_us) for clip in clips.test] == [(0, WINDOW), (0, WINDOW), (10, 150_000)]
    assert {clip.subject for clip in clips.train} == {"user01", "user02"}
    assert {clip.subject for clip in clips.valid} == {"user03"}
    assert {clip.subject for clip in clips.test} == {"user24"}
    assert [clip.label for clip in clips.train if clip.subject == "user01"] == [0, 0, 10, 3, 3]
    second = clips.test[1]
    assert second.events["t"].tolist() == list(range(0, WINDOW, 10_000))
    assert set(second.events["x"]) == {1}
    assert set(second.events["y"]) == {2}
    assert clips.describe()["splits"]["test"] == {
        **{"examples": 3, "per_label": [2, *[0] * 9, 1], "subjects": 1, "frames": 22, "events": 55}
    }


def test_the_folder_above_will_do_and_the_result_is_kept(ibm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(ibm)
    monkeypatch.setattr("spiking_lm.data.clips.read_aedat", lambda path: pytest.fail(f"{path} was read again"))
    again = load(ibm.parent)
    assert again.sha256 == first.sha256
    assert load(ibm, size=64).sha256 != first.sha256  # other frames of the same clips
    with pytest.raises(pytest.fail.Exception):
        load(ibm, window_s=0.1)


def test_tonics_layout_gives_the_same_clips(ibm: Path, tmp_path: Path) -> None:
    for split, user in (("Train", 1), ("Train", 2), ("Train", 3), ("Test", 24)):
        folder = tmp_path / "tonic" / f"ibmGesture{split}" / f"user{user:02d}_led"
        folder.mkdir(parents=True)
        for label, start, stop in ((0, 1000, 1500), (10, 2000, 2150)):
            t = np.arange(start, stop, 10)
            columns = [np.full(len(t), label + 1), np.full(len(t), 2 * label + 2), (t // 10) % 2, t]
            np.save(folder / f"{label}.npy", np.stack(columns, 1))
    ours, theirs = load(tmp_path / "tonic"), load(ibm)
    assert [clip.label for clip in ours.train] == [0, 0, 10, 0, 0, 10]
    for clip, other in zip(ours.test[:2], theirs.test[:2], strict=True):
        np.testing.assert_array_equal(clip.events, other.events)
        assert (clip.label, clip.duration_us, clip.subject) == (other.label, other.duration_us, other.subject)


def test_missing_files_are_named(ibm: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"trials_to_train\.txt and trials_to_test\.txt, or ibmGestureTrain") as caught:
        load(tmp_path / "nowhere")
    assert "which is no folder" in str(caught.value)
    assert "userNN_LIGHT.aedat and userNN_LIGHT_labels.csv" in str(caught.value)
    (ibm / "user02_led_labels.csv").unlink()
    with pytest.raises(DataError, match=r"names user02_led\.aedat, but .*user02_led_labels\.csv is missing"):
        load(ibm)


def test_contradictions_are_named(ibm: Path) -> None:
    with pytest.raises(ConfigError, match="size 100 does not divide the sensor's 128 pixels"):
        load(ibm, size=100)
    recording(ibm, "user24_led", [(12, 0, 300_000)])
    with pytest.raises(DataError, match=r"user24_led\.aedat: there is no gesture 11, counted from 0"):
        load(ibm)
    event = aedat.event(130, 3, 1, 5)
    (ibm / "user24_led.aedat").write_bytes(aedat.HEADER + aedat.END + aedat.packet([event]))
    with pytest.raises(DataError, match="outside a sensor of 128 x 128"):
        load(ibm)
    (ibm / "trials_to_test.txt").write_text("\n")
    with pytest.raises(DataError, match="no clip for test"):
        load(ibm)
    (ibm / "trials_to_train.txt").write_text("user01_led.aedat\n")
    with pytest.raises(DataError, match="1 training subjects cannot be divided"):
        load(ibm)


def test_a_damaged_cache_is_built_again(cache: Path) -> None:
    clip = Clip(np.array([(1, 2, 3, 1), (5, 6, 7, 0)], EVENT), 4, 1000, "someone")
    made: list[int] = []

    def make() -> list[tuple[str, Clip]]:
        made.append(1)
        return [("train", clip), ("test", clip)]

    splits, digest = cached_clips("damaged", "key", make)
    folder = next((cache / "clips").glob("damaged-*"))
    assert cached_clips("damaged", "key", make)[1] == digest
    assert len(made) == 1
    for name, content in (("events.bin", b"short"), ("index.json", b"{}"), ("index.json", b"not JSON")):
        (folder / name).write_bytes(content)
        again, same = cached_clips("damaged", "key", make)
        assert same == digest
        np.testing.assert_array_equal(again["test"][0].events, clip.events)
    assert len(made) == 4
    assert splits["train"][0].label == 4
    assert splits["valid"] == []


def test_an_interrupted_build_leaves_nothing(cache: Path) -> None:
    def make() -> Any:
        yield "train", Clip(np.zeros(3, EVENT), 0, 10, "someone")
        raise DataError("the second file is damaged")

    with pytest.raises(DataError, match="second file"):
        cached_clips("interrupted", "key", make)
    assert not list((cache / "clips").glob("interrupted-*"))


def test_batches_are_padded_with_silence_and_cut(small: data.ClipData) -> None:
    clips = sorted(small.train, key=small.length)
    chosen = [clips[0], clips[-1]]
    frames, lengths = small.batch(chosen, 100)
    assert frames.dtype == np.float32
    assert frames.shape == (2, small.length(chosen[1]), 1, 16, 16)
    assert lengths.tolist() == [small.length(clip) for clip in chosen]
    assert lengths[0] < lengths[1]
    assert not frames[0, lengths[0] :].any()
    for row, clip, length in zip(frames, chosen, lengths, strict=True):
        np.testing.assert_array_equal(row[:length], small.framing.frames(clip.events, int(length)))
        whole = (clip.events["t"] < length * 25_000).sum()
        assert row.sum() == whole / 2  # polarity: mean
    cut, lengths = small.batch(chosen, 5)
    assert lengths.tolist() == [5, 5]
    np.testing.assert_array_equal(cut, frames[:, :5])
