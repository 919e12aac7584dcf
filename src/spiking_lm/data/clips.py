"""Clips of events with a label: what they are, how they are kept on disk, and the DVS128 Gesture files.

A clip stays a list of events, memory-mapped from the cache; its frames are counted anew each time they are needed, so
that a set of any size fits in memory and the frames can be changed without building anything again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from spiking_lm.config import DatasetConfig
from spiking_lm.data.events import EVENT, Events, Framing, Polarity, read_aedat, read_annotations, read_numpy_events
from spiking_lm.data.sets import SPLITS, joint_hash
from spiking_lm.data.sources import read_lines
from spiking_lm.data.tokenfile import default_cache_dir
from spiking_lm.errors import ConfigError, DataError
from spiking_lm.files import atomic_folder

DVS128_GESTURES = [
    "hand clapping",
    "right hand wave",
    "left hand wave",
    "right arm clockwise",
    "right arm counter clockwise",
    "left arm clockwise",
    "left arm counter clockwise",
    "arm roll",
    "air drums",
    "air guitar",
    "other gestures",
]
DVS128_SENSOR = 128

_LAYOUT = (
    "trials_to_train.txt and trials_to_test.txt beside userNN_LIGHT.aedat and userNN_LIGHT_labels.csv (IBM), or "
    "ibmGestureTrain/userNN_LIGHT/0.npy to 10.npy and ibmGestureTest/ likewise (tonic)"
)


class FramesConfig(DatasetConfig):
    """How the events of a clip become frames."""

    frame_ms: float = Field(default=25.0, ge=0.1)
    """Time that one frame counts events for."""
    polarity: Polarity = "mean"
    """mean, sum: one channel. separate: OFF and ON events as two channels."""
    scale: float = Field(default=1.0, gt=0)
    """Counts are divided by this."""


class DVS128Config(FramesConfig):
    """DVS128 Gesture (Amir et al. 2017), from your own files."""

    path: Path
    """The folder with IBM's files, or with tonic's ibmGestureTrain and ibmGestureTest."""
    size: int = 128
    """Rows and columns of a frame: 128, or a part of it that divides it; counts of merged pixels are added."""
    window_s: float = Field(default=1.7, gt=0, le=60)
    """Gestures are cut into clips of this length; what is left at the end is dropped, a shorter gesture kept whole."""
    valid: float = Field(default=0.15, gt=0, lt=1)
    """Share of the training subjects that is held out for validation."""


@dataclass(frozen=True)
class Clip:
    """A labelled recording; ``label`` indexes the set's ``labels``."""

    events: Events = field(repr=False)
    """Of dtype :data:`~spiking_lm.data.events.EVENT`, by time, counted from the clip's beginning."""
    label: int
    duration_us: int
    subject: str
    """Who is seen in it. No subject is in two splits."""


@dataclass(frozen=True)
class ClipData:
    """A set of labelled clips of events, and how frames are made of them. What a dataset's factory returns, too."""

    name: str
    labels: list[str]
    framing: Framing
    train: Sequence[Clip] = field(repr=False)
    valid: Sequence[Clip] = field(repr=False)
    test: Sequence[Clip] = field(repr=False)
    sha256: str
    """Identity of the clips, their order and their frames."""

    tokenizer: ClassVar[Any] = None
    """Clips have no tokens."""

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a frame."""
        return self.framing.shape

    def length(self, clip: Clip) -> int:
        """Return how many whole frames a clip has, at least 1."""
        return max(1, clip.duration_us // self.framing.frame_us)

    def batch(self, clips: Sequence[Clip], limit: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return frames ``(B, T, P, H, W)``, zero behind a clip's end, and true lengths ``(B,)``, at most ``limit``."""
        lengths = np.array([min(limit, self.length(clip)) for clip in clips], np.int64)
        frames = np.zeros((len(clips), int(lengths.max(initial=0)), *self.frame_shape), np.float32)
        for row, clip, length in zip(frames, clips, lengths, strict=True):
            row[:length] = self.framing.frames(clip.events, int(length))
        return frames, lengths

    def describe(self) -> dict[str, Any]:
        """Return the JSON-able summary that manifests and reports show."""
        splits = {}
        for name in SPLITS:
            clips: Sequence[Clip] = getattr(self, name)
            splits[name] = {
                "examples": len(clips),
                "per_label": [sum(clip.label == i for clip in clips) for i in range(len(self.labels))],
                "subjects": len({clip.subject for clip in clips}),
                "frames": sum(self.length(clip) for clip in clips),
                "events": sum(len(clip.events) for clip in clips),
            }
        return {
            "dataset": self.name,
            "task": "clips",
            "sha256": self.sha256,
            "labels": self.labels,
            "frame": {"shape": list(self.frame_shape), "ms": self.framing.frame_us / 1000},
            "splits": splits,
        }


def clip_data(
    name: str, labels: list[str], config: FramesConfig, sensor: int, size: int, splits: Splits, sha256: str
) -> ClipData:
    """Put a set together. Raises: ConfigError when ``size`` does not divide ``sensor``."""
    if size < 1 or sensor % size:
        raise ConfigError(f"dataset {name!r}: size {size} does not divide the sensor's {sensor} pixels")
    framing = Framing(sensor, size, round(1000 * config.frame_ms), config.polarity, config.scale)
    return ClipData(name, labels, framing, **splits, sha256=joint_hash(sha256, repr(framing)))


# -- clips on disk ----------------------------------------------------------------------------------------------------

Splits = dict[str, list[Clip]]
"""``train``, ``valid`` and ``test``."""

_EVENTS, _INDEX, _FORMAT = "events.bin", "index.json", "spiking-lm clips 1"


def cached_clips(name: str, key: str, make: Callable[[], Iterable[tuple[str, Clip]]]) -> tuple[Splits, str]:
    """Return the clips kept under ``name`` and ``key``, made once by ``make`` as (split, clip), and their SHA-256.

    They lie in the cache folder, events memory-mapped; an entry that is damaged is built again.
    """
    folder = default_cache_dir() / "clips" / f"{name}-{joint_hash(_FORMAT, key)[:32]}"
    with contextlib.suppress(DataError):  # not there or damaged
        return open_clips(folder)
    try:
        with atomic_folder(folder, replace=True) as building:
            _write_clips(building, make())
    except OSError as error:
        raise DataError(
            f"cannot write the clip cache {folder}: {error.strerror or error}",
            hint="set SPIKING_LM_CACHE to a folder with room that you may write to",
        ) from error
    return open_clips(folder)


def _write_clips(folder: Path, clips: Iterable[tuple[str, Clip]]) -> None:
    index: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    with (folder / _EVENTS).open("wb") as file:
        for split, clip in clips:
            data = clip.events.astype(EVENT, copy=False).tobytes()
            file.write(data)
            digest.update(data)
            facts = {"label": clip.label, "duration_us": clip.duration_us, "subject": clip.subject}
            index.append({"split": split, "events": len(clip.events), **facts})
    content = json.dumps(index, indent=0)
    sidecar = {"format": _FORMAT, "sha256": joint_hash(digest.hexdigest(), content), "clips": index}
    (folder / _INDEX).write_text(json.dumps(sidecar, indent=0) + "\n", encoding="utf-8")


def open_clips(folder: Path) -> tuple[Splits, str]:
    """Memory-map clips. Sizes are checked, not hashes. Raises: DataError when files are missing, cut off or foreign."""
    try:
        sidecar = json.loads((folder / _INDEX).read_bytes())
        size = (folder / _EVENTS).stat().st_size
        counts = [int(entry["events"]) for entry in sidecar["clips"]]
        if sidecar["format"] != _FORMAT or sum(counts) * EVENT.itemsize != size:
            raise DataError(f"{folder} is damaged or of another version", hint="delete it and let it be built again")
        events = np.memmap(folder / _EVENTS, EVENT, mode="r") if size else np.zeros(0, EVENT)
        splits: Splits = {name: [] for name in SPLITS}
        stop = 0
        for entry, count in zip(sidecar["clips"], counts, strict=True):
            start, stop = stop, stop + count
            clip = Clip(events[start:stop], int(entry["label"]), int(entry["duration_us"]), str(entry["subject"]))
            splits[entry["split"]].append(clip)
        return splits, str(sidecar["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is damaged or not there: {error}", hint="delete it") from None


# -- DVS128 Gesture ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """One recorded gesture in a file: events from ``start`` to ``stop``, in microseconds."""

    label: int
    start: int
    stop: int


def dvs128_gesture(config: DVS128Config) -> ClipData:
    """Read DVS128 Gesture in IBM's layout (AEDAT 3.1) or in tonic's (npy); the test subjects are the published ones.

    Validation subjects are the last of the training subjects by name. Clips are kept in the cache after the first time.
    """
    path = config.path.expanduser()
    recordings = _find_recordings(path)
    files = [file for _, _, file in recordings]
    states = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = json.dumps([states, config.window_s, config.valid])

    def make() -> Iterator[tuple[str, Clip]]:
        learners = sorted({subject for split, subject, _ in recordings if split == "train"})
        held_out = set(learners[len(learners) - max(1, round(config.valid * len(learners))) :])
        if len(learners) < 2:
            raise DataError(f"{path}: {len(learners)} training subjects cannot be divided into training and validation")
        for split, subject, file in recordings:
            part = "valid" if split == "train" and subject in held_out else split
            for clip in _clips_of(file, subject, round(1e6 * config.window_s)):
                yield part, clip

    splits, digest = cached_clips("dvs128-gesture", key, make)
    for name, clips in splits.items():
        if not clips:
            raise DataError(f"DVS128 Gesture: no clip for {name} in {path}", hint=f"expected {_LAYOUT}")
    return clip_data("dvs128-gesture", DVS128_GESTURES, config, DVS128_SENSOR, config.size, splits, digest)


def _find_recordings(path: Path) -> list[tuple[str, str, Path]]:
    """List (split, subject, file) of whichever layout is there, in order."""
    for folder in (path, path / "DvsGesture", path / "DVSGesture"):
        lists = {split: folder / f"trials_to_{split}.txt" for split in ("train", "test")}
        if all(file.is_file() for file in lists.values()):
            found = []
            for split, file in lists.items():
                for line in filter(None, map(str.strip, read_lines(file))):
                    recording = folder / line
                    for needed in (recording, _annotations_of(recording)):
                        if not needed.is_file():
                            raise DataError(f"{file} names {line}, but {needed} is missing", hint=f"expected {_LAYOUT}")
                    found.append((split, _subject(recording.stem), recording))
            return found
        folders = {split: folder / f"ibmGesture{split.title()}" for split in ("train", "test")}
        if all(below.is_dir() for below in folders.values()):
            return [
                (split, _subject(file.parent.name), file)
                for split, below in folders.items()
                for file in sorted(below.glob("*/*.npy"), key=lambda file: (file.parent.name, file.stem.zfill(4)))
            ]
    raise DataError(
        f"DVS128 Gesture: looked for trials_to_train.txt and trials_to_test.txt, or ibmGestureTrain and "
        f"ibmGestureTest, in {path.absolute()}" + ("" if path.is_dir() else ", which is no folder"),
        hint=f"expected {_LAYOUT}",
    )


def _annotations_of(recording: Path) -> Path:
    return recording.with_name(f"{recording.stem}_labels.csv")


def _subject(name: str) -> str:
    """Return ``user01`` of ``user01_fluorescent_led``."""
    return name.partition("_")[0]


def _clips_of(file: Path, subject: str, window_us: int) -> Iterator[Clip]:
    """Cut one file into clips."""
    if file.suffix == ".npy":
        events = read_numpy_events(file)
        if not file.stem.isdigit():
            raise DataError(f"{file}: the name of the file is the label, a number from 0", hint=f"expected {_LAYOUT}")
        times = events["t"]
        trials = [_Trial(int(file.stem), int(times[0]), int(times[-1]) + 1)] if len(events) else []
    else:
        events = read_aedat(file)
        trials = [_Trial(label - 1, start, stop) for label, start, stop in read_annotations(_annotations_of(file))]
    if len(events) and max(events["x"].max(), events["y"].max()) >= DVS128_SENSOR:
        raise DataError(f"{file} has events outside a sensor of {DVS128_SENSOR} x {DVS128_SENSOR} pixels")
    for trial in trials:
        if not 0 <= trial.label < len(DVS128_GESTURES):
            raise DataError(f"{file}: there is no gesture {trial.label}, counted from 0")
        length = min(window_us, trial.stop - trial.start)
        for start in range(trial.start, trial.stop - length + 1, length):
            first, last = np.searchsorted(events["t"], [start, start + length])
            part = np.empty(last - first, EVENT)
            for name in "xyp":
                part[name] = events[name][first:last]
            part["t"] = events["t"][first:last] - start
            yield Clip(part, trial.label, length, subject)
