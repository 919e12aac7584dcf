"""``gestures11``: a synthetic set of eleven gestures as an event camera would see them, made from a seed.

One to three soft bright blobs move over a dark background on the path of their class, in the manner of their subject
(speed, size, contrast, tremor). Every pixel remembers its log intensity at its last event and emits the next one, ON or
OFF, when it has changed by its threshold. Real sensors are watched at microseconds; here the scene is drawn 500 times a
second and the times of events are interpolated in between, which makes the whole set in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from spiking_lm.data.clips import Clip, ClipData, FramesConfig, cached_clips, clip_data
from spiking_lm.data.events import EVENT, Events

LABELS = [
    "left",
    "right",
    "up",
    "down",
    "clockwise",
    "counter-clockwise",
    "zoom in",
    "zoom out",
    "side to side",
    "up and down",
    "pulse",
]

VERSION = 2
"""Changes whenever the same options would give other clips."""

STEP_US = 2000
THRESHOLD, JITTER = 0.2, 0.1
"""Change of log intensity that makes an event, and how far pixels differ in it (relative standard deviation)."""
NOISE = (0.02, 0.05)
"""Events that no motion caused, as a share of the others."""
_AT_ONCE = 64  # clips simulated together: small enough for the processor's cache

Floats = NDArray[np.float32]


class Gestures11Config(FramesConfig):
    """The synthetic gestures; lengths are scaled with ``size``, so that it changes the resolution and nothing else."""

    size: int = Field(default=32, ge=16, le=128)
    """Rows and columns of the sensor and of a frame."""
    subjects: int = Field(default=30, ge=5, le=1000)
    """Of every ten, seven are for training, one for validation and two for testing."""
    clips: int = Field(default=4, ge=1)
    """Clips of each class by each subject."""
    min_s: float = Field(default=1.0, ge=0.2)
    max_s: float = Field(default=1.5, le=10)
    """Clips last between these, in seconds."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Gestures11Config:
        if self.max_s < self.min_s:
            raise ValueError("max_s is below min_s")
        return self


def gestures11(config: Gestures11Config) -> ClipData:
    """Eleven synthetic gestures, split by subject: 924 / 132 / 264 clips by default."""
    key = repr((VERSION, config.size, config.subjects, config.clips, config.min_s, config.max_s, config.seed))
    splits, digest = cached_clips("gestures11", key, lambda: _generate(config))
    return clip_data("gestures11", LABELS, config, config.size, config.size, splits, digest)


def split_of(subject: int, subjects: int) -> str:
    """Return the split that subject ``subject`` of ``subjects`` is in; the last ones are held out."""
    held_out = max(1, round(0.1 * subjects)), max(1, round(0.2 * subjects))
    if subject >= subjects - held_out[1]:
        return "test"
    return "valid" if subject >= subjects - sum(held_out) else "train"


@dataclass(frozen=True)
class _Scene:
    """What happens in one clip; blobs are ``(B,)``, lengths in pixels, times in seconds."""

    label: int
    seconds: float
    rate: float
    """Repetitions of the gesture per second."""
    phase: Floats
    x: Floats
    y: Floats
    """Where each blob is, or about which it moves."""
    radius: Floats
    contrast: Floats
    """Brightness of each blob over the background's; 0 for those that are not there."""
    extent: float
    """Radius of circles, amplitude of swings."""
    tremor: Floats
    """``(2, 2, 2)``: amplitudes (pixels) and frequencies (Hz), for x and y, of two sines each."""
    threshold: Floats
    """``(H, W)``."""
    noise: float
    rng: np.random.Generator


def _generate(config: Gestures11Config) -> Iterator[tuple[str, Clip]]:
    """Make every clip, subject by subject, a few at a time."""
    order = [
        (subject, label, take)
        for subject in range(config.subjects)
        for label in range(len(LABELS))
        for take in range(config.clips)
    ]
    for first in range(0, len(order), _AT_ONCE):
        chosen = order[first : first + _AT_ONCE]
        scenes = [_scene(config, *which) for which in chosen]
        for (subject, _, _), scene, events in zip(chosen, scenes, _simulate(scenes, config.size), strict=True):
            clip = Clip(events, scene.label, round(1e6 * scene.seconds), f"subject{subject:03d}")
            yield split_of(subject, config.subjects), clip


def _scene(config: Gestures11Config, subject: int, label: int, take: int) -> _Scene:
    """Draw one clip: the subject's manner, and what differs from take to take."""
    manner = np.random.default_rng([config.seed, subject])
    rng = np.random.default_rng([config.seed, subject, label, take])
    size = config.size
    pixel = size / 128  # lengths below are pixels of a sensor of 128 x 128
    rate, radius, contrast, shake = (manner.uniform(*r) for r in ((0.8, 1.8), (5.0, 8.5), (1.5, 4.0), (0.0, 2.5)))
    blobs = np.arange(3) < rng.integers(1, 4)
    return _Scene(
        label=label,
        seconds=float(rng.uniform(config.min_s, config.max_s)),
        rate=float(rate * rng.uniform(0.85, 1.15)),
        phase=(rng.uniform(0, 1) + np.array([0, 0.38, 0.71])).astype(np.float32),
        x=(size / 2 + pixel * rng.uniform(-28, 28, 3)).astype(np.float32),
        y=(size / 2 + pixel * rng.uniform(-28, 28, 3)).astype(np.float32),
        radius=(pixel * np.clip(radius * rng.uniform(0.8, 1.2, 3), 4, 10)).astype(np.float32),
        contrast=np.where(blobs, contrast * rng.uniform(0.85, 1.15, 3), 0).astype(np.float32),
        extent=float(pixel * rng.choice([18, 27, 36])),
        tremor=np.stack([pixel * shake * rng.uniform(0, 1, (2, 2)), rng.uniform(2, 6, (2, 2))]).astype(np.float32),
        threshold=(THRESHOLD * (1 + JITTER * rng.standard_normal((size, size)))).clip(0.05).astype(np.float32),
        noise=float(rng.uniform(*NOISE)),
        rng=rng,
    )


def _paths(scene: _Scene, size: int, n_steps: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Return x, y, radius and contrast of every blob at every step, each ``(S, B)``."""
    t = (np.arange(n_steps, dtype=np.float32) * np.float32(STEP_US / 1e6))[:, None]
    shape = (n_steps, len(scene.x))
    x, y, radius, contrast = (np.broadcast_to(v, shape) for v in (scene.x, scene.y, scene.radius, scene.contrast))
    turns = scene.rate * t + scene.phase
    there = turns % 1  # how far a blob is in this repetition, 0 to 1
    swing = scene.extent * np.sin(2 * np.pi * (scene.rate * t + scene.phase[:1]))
    gesture = LABELS[scene.label]
    if gesture in ("left", "right", "up", "down"):
        along = there * (size + 6 * radius) - 3 * radius  # from outside to outside: nothing jumps in sight
        along = along if gesture in ("right", "down") else size - along
        x, y = (along, y) if gesture in ("left", "right") else (x, along)
    elif gesture in ("clockwise", "counter-clockwise"):
        angle = 2 * np.pi * turns * (1 if gesture == "clockwise" else -1)  # rows count downwards
        middle = size / 2 + (scene.x[:1] - size / 2) / 4, size / 2 + (scene.y[:1] - size / 2) / 4
        x, y = middle[0] + scene.extent * np.cos(angle), middle[1] + scene.extent * np.sin(angle)
    elif gesture in ("zoom in", "zoom out"):
        done = there[:, :1]  # the whole scene comes nearer: one phase for all blobs
        scale = 0.4 * 5 ** (done if gesture == "zoom in" else 1 - done)
        x, y, radius = size / 2 + (x - size / 2) * scale, size / 2 + (y - size / 2) * scale, radius * scale
        contrast = contrast * np.clip(4 * np.minimum(done, 1 - done), 0, 1)  # appears and vanishes softly
    elif gesture == "side to side":
        x = x + swing
    elif gesture == "up and down":
        y = y + swing
    else:
        radius = 1.5 * radius * 2 ** (swing / scene.extent)
    amplitude, frequency = scene.tremor
    shake = (amplitude * np.sin(2 * np.pi * frequency * t[:, :, None] + 7 * frequency)).sum(2)  # (S, 2)
    return tuple(  # type: ignore[return-value]
        np.ascontiguousarray(v, dtype=np.float32) for v in (x + shake[:, :1], y + shake[:, 1:], radius, contrast)
    )


def _simulate(scenes: list[_Scene], size: int) -> list[Events]:
    """Watch the scenes; return the events of each, in the order of their times."""
    last_step = np.array([int(1e6 * scene.seconds) // STEP_US for scene in scenes])
    n_steps = int(last_step.max()) + 1
    x, y, radius, contrast = (
        np.stack(v, 1) for v in zip(*(_paths(scene, size, n_steps) for scene in scenes), strict=True)
    )
    pixels = np.arange(size, dtype=np.float32)
    threshold = np.stack([scene.threshold for scene in scenes]).reshape(len(scenes), -1)

    def look(step: int) -> Floats:
        """Return the log intensities ``(C, H W)`` of all scenes."""
        narrow = -0.5 / (0.5 * radius[step]) ** 2  # a blob's radius is two standard deviations
        across = np.exp(narrow[..., None] * (pixels - x[step][..., None]) ** 2)
        down = np.exp(narrow[..., None] * (pixels - y[step][..., None]) ** 2) * contrast[step][..., None]
        light: Floats = np.log1p(np.matmul(down.transpose(0, 2, 1), across))
        return light.reshape(len(scenes), -1)

    before = look(0)
    level = before.copy()  # log intensity at each pixel's last event
    found: list[tuple[NDArray[Any], ...]] = []
    for step in range(1, n_steps):
        now = look(step)
        where = np.nonzero(np.abs(now - level) >= threshold)
        alive = step <= last_step[where[0]]
        clip, pixel = where[0][alive], where[1][alive]
        if len(clip):
            start, end, old, theta = (v[clip, pixel] for v in (before, now, level, threshold))
            sign = np.sign(end - old)
            count = (np.abs(end - old) / theta).astype(np.int64)
            level[clip, pixel] = old + sign * theta * count
            which = np.repeat(np.arange(len(clip)), count)
            nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count) + 1
            crossed = old[which] + (sign * theta)[which] * nth.astype(np.float32)
            change = end[which] - start[which]
            part = np.clip((crossed - start[which]) / np.where(change == 0, 1, change), 0, 1)
            time = ((step - 1 + part) * STEP_US).astype(np.int64)
            found.append((clip[which], time, pixel[which], sign[which] > 0))
        before = now
    return _in_order(scenes, found, size)


def _in_order(scenes: list[_Scene], found: list[tuple[NDArray[Any], ...]], size: int) -> list[Events]:
    """Sort events by clip and time, and mix in each clip's noise."""
    clip, time, pixel, on = (
        (np.concatenate(v) for v in zip(*found, strict=True)) if found else (np.zeros(0, np.int64) for _ in range(4))
    )
    by_clip = np.argsort(clip, kind="stable")
    stops = np.searchsorted(clip[by_clip], np.arange(len(scenes) + 1))
    result = []
    for i, scene in enumerate(scenes):
        own = by_clip[stops[i] : stops[i + 1]]
        duration, noise = round(1e6 * scene.seconds), round(scene.noise * len(own))
        events = np.empty(len(own) + noise, EVENT)
        events["t"] = np.append(np.minimum(time[own], duration - 1), scene.rng.integers(0, duration, noise))
        for name, values, most in (("x", pixel[own] % size, size), ("y", pixel[own] // size, size), ("p", on[own], 2)):
            events[name] = np.append(values, scene.rng.integers(0, most, noise))
        result.append(events[np.argsort(events["t"], kind="stable")])
    return result
