"""Events of a dynamic vision sensor: arrays of them, the files in which they are published, and frames made of them.

An event says that one pixel became brighter (``p`` 1) or darker (0) at a time in microseconds. Pixel (0, 0) is at the
upper left.
"""

from __future__ import annotations

import csv
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spiking_lm.data.sources import read_blocks, read_lines
from spiking_lm.errors import DataError

EVENT = np.dtype([("t", "<u4"), ("x", "u1"), ("y", "u1"), ("p", "u1")])
"""One event, 7 bytes: microseconds since the clip began, column, row, polarity."""

Events = NDArray[Any]
"""Events ``(N,)`` of dtype :data:`EVENT`, or of :data:`RECORDED` before they are cut into clips."""

RECORDED = np.dtype([("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "u1")])
"""One event of a recording, with the sensor's own clock."""

Polarity = Literal["mean", "sum", "separate"]


# -- frames -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Framing:
    """How events become frames: counts per pixel in consecutive spans of time."""

    sensor: int
    """The sensor has so many rows, and as many columns."""
    size: int
    """Rows and columns of a frame; ``sensor`` is a multiple of it."""
    frame_us: int
    polarity: Polarity
    """mean, sum: one channel, both polarities together. separate: OFF and ON as two channels."""
    scale: float
    """What counts are divided by."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a frame."""
        return (2 if self.polarity == "separate" else 1), self.size, self.size

    def frames(self, events: Events, n_frames: int) -> NDArray[np.float32]:
        """Return the first ``n_frames`` frames of a clip, ``(T, P, H, W)``; later events are left out."""
        events = events[: int(np.searchsorted(events["t"], n_frames * self.frame_us))]
        channels, height, width = self.shape
        factor = self.sensor // self.size
        place = events["t"].astype(np.int64) // self.frame_us
        if channels == 2:
            place = 2 * place + events["p"]
        place = (place * height + events["y"] // factor) * width + events["x"] // factor
        counts = np.bincount(place, minlength=n_frames * channels * height * width)
        divisor = np.float32(self.scale * (2 if self.polarity == "mean" else 1))
        frames: NDArray[np.float32] = counts.astype(np.float32) / divisor
        return frames.reshape(n_frames, channels, height, width)


# -- files ------------------------------------------------------------------------------------------------------------

_PACKET = struct.Struct("<hhiiiiii")
"""Type, source, bytes per event, offset of the timestamp, timestamp overflow, capacity, events, valid events."""

_POLARITY, _POLARITY_BYTES = 1, 8
_START, _END = b"#!AER-DAT3.1", b"#!END-HEADER"


def read_aedat(path: Path) -> Events:
    """Read the polarity events of an AEDAT 3.1 file, as iniVation's tools and IBM's DVS128 Gesture write it.

    Header lines begin with ``#``. Then packets: a header of 28 bytes and its events. A polarity event is a word, from
    the lowest bit: valid, polarity, 15 bits of row, 15 bits of column; then 31 bits of microseconds, which the packet's
    overflow counter extends. Packets of other types are passed over, invalid events are left out.

    Returns: events ``(N,)`` of :data:`RECORDED` in the order of their times. Raises: DataError naming file and byte.
    """
    data = b"".join(read_blocks(path))
    if not data.startswith(_START):
        raise DataError(f"{path} is not AEDAT 3.1: it does not begin with {_START.decode()}")
    at, packets = _skip_header(data), []
    while at < len(data):
        if len(data) - at < _PACKET.size:
            raise DataError(f"{path} is cut off in a packet header at byte {at:,}", hint="fetch the file again")
        kind, _, size, _, overflow, _, number, _ = _PACKET.unpack_from(data, at)
        begin, at = at + _PACKET.size, at + _PACKET.size + size * number
        if size <= 0 or number < 0 or overflow < 0 or (kind == _POLARITY and size != _POLARITY_BYTES):
            raise DataError(
                f"{path}: no packet of events at byte {begin - _PACKET.size:,} (type {kind}, {number} of {size} bytes)",
                hint="the file is damaged: fetch it again",
            )
        if at > len(data):
            raise DataError(f"{path} is cut off in a packet at byte {begin:,}", hint="fetch the file again")
        if kind == _POLARITY:
            packets.append(_polarity_packet(data, begin, number, overflow))
    events = np.concatenate(packets) if packets else np.zeros(0, RECORDED)
    return events if (np.diff(events["t"]) >= 0).all() else events[np.argsort(events["t"], kind="stable")]


def _skip_header(data: bytes) -> int:
    """Return where the packets begin: after the end line, or, where a file has none, after the last ``#`` line."""
    at = 0
    while data[at : at + 1] == b"#":
        end = data.find(b"\n", at) + 1 or len(data)
        line, at = data[at:end], end
        if line.startswith(_END):
            break
    return at


def _polarity_packet(data: bytes, begin: int, number: int, overflow: int) -> Events:
    words = np.frombuffer(data, "<u4", 2 * number, begin).reshape(number, 2)
    words = words[(words[:, 0] & 1) == 1]
    events = np.empty(len(words), RECORDED)
    events["p"] = words[:, 0] >> 1 & 1
    events["y"] = words[:, 0] >> 2 & 0x7FFF
    events["x"] = words[:, 0] >> 17
    events["t"] = (np.int64(overflow) << 31) + (words[:, 1] & 0x7FFFFFFF)
    return events


def read_annotations(path: Path) -> list[tuple[int, int, int]]:
    """Read the gestures of one recording, ``class,startTime_usec,endTime_usec`` with a header; classes count from 1."""
    rows = []
    reader = csv.DictReader(io.StringIO("\n".join(read_lines(path))))
    names = ("class", "startTime_usec", "endTime_usec")
    if missing := [name for name in names if name not in (reader.fieldnames or ())]:
        raise DataError(f"{path} has no column {missing[0]!r}", hint=f"expected the header {','.join(names)}")
    for row in reader:
        try:
            label, start, stop = (int(row[name]) for name in names)
        except (TypeError, ValueError):
            raise DataError(f"{path}, line {reader.line_num}: three whole numbers were expected") from None
        if stop <= start:
            raise DataError(f"{path}, line {reader.line_num}: the gesture ends at {stop}, before it starts at {start}")
        rows.append((label, start, stop))
    return rows


def read_numpy_events(path: Path) -> Events:
    """Read a ``.npy`` of tonic: ``(N, 4)`` numbers x, y, p and t in milliseconds, or a structured array, t in us.

    Returns: events ``(N,)`` of :data:`RECORDED` in the order of their times. Raises: DataError.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="the file is damaged or not a plain array") from None
    columns: dict[str, NDArray[Any]] = {}
    if array.dtype.names is not None and {"x", "y", "p", "t"} <= set(array.dtype.names) and array.ndim == 1:
        columns = {name: array[name] for name in "xypt"}
    elif array.dtype.names is None and array.ndim == 2 and array.shape[1] == 4:
        columns = {name: array[:, i] for i, name in enumerate("xypt")}
        columns["t"] = np.round(columns["t"] * 1000.0)
    else:
        raise DataError(
            f"{path} holds {array.dtype} of shape {array.shape}, no events",
            hint="expected (N, 4) numbers x, y, p, t, or an array with the fields x, y, p, t",
        )
    events = np.empty(len(array), RECORDED)
    events["t"], events["p"] = columns["t"], columns["p"] > 0
    for axis in "xy":
        if len(array) and not 0 <= columns[axis].min() <= columns[axis].max() < 1 << 16:
            raise DataError(f"{path}: {axis} runs from {columns[axis].min()} to {columns[axis].max()}")
        events[axis] = columns[axis]
    return events if (np.diff(events["t"]) >= 0).all() else events[np.argsort(events["t"], kind="stable")]
