"""Reading events, and counting them into frames."""

from __future__ import annotations

from pathlib import Path

import gesture_aedat as aedat
import numpy as np
import pytest

from spiking_lm.data.events import EVENT, RECORDED, Framing, read_aedat, read_annotations, read_numpy_events
from spiking_lm.errors import DataError


def write(path: Path, *packets: bytes, header: bytes = aedat.HEADER + aedat.END) -> Path:
    path.write_bytes(header + b"".join(packets))
    return path


# -- AEDAT 3.1 --------------------------------------------------------------------------------------------------------


def test_every_bit_of_a_polarity_event_is_read(tmp_path: Path) -> None:
    written = [(0, 0, 0, 0), (127, 5, 1, 7), (5, 127, 0, 8), (32767, 16384, 1, 2**31 - 1)]
    events = read_aedat(write(tmp_path / "a.aedat", aedat.packet([aedat.event(*one) for one in written])))
    assert events.dtype == RECORDED
    assert [(int(e["x"]), int(e["y"]), int(e["p"]), int(e["t"])) for e in events] == written


def test_packets_follow_each_other_and_overflow_extends_the_clock(tmp_path: Path) -> None:
    first = aedat.packet([aedat.event(1, 2, 1, 2**31 - 5)])
    second = aedat.packet([aedat.event(3, 4, 0, 6), aedat.event(5, 6, 1, 9)], overflow=1)
    third = aedat.packet([aedat.event(7, 8, 0, 1)], overflow=3)
    events = read_aedat(write(tmp_path / "a.aedat", first, second, third))
    assert events["t"].tolist() == [2**31 - 5, 2**31 + 6, 2**31 + 9, 3 * 2**31 + 1]
    assert events["x"].tolist() == [1, 3, 5, 7]


def test_invalid_events_and_other_packets_are_passed_over(tmp_path: Path) -> None:
    special = aedat.packet([b"\x01\x02\x03\x04" * 5], kind=0, size=20)
    mixed = aedat.packet([aedat.event(1, 1, 1, 1), aedat.event(2, 2, 1, 2, valid=False), aedat.event(3, 3, 1, 3)])
    empty = aedat.packet([])
    events = read_aedat(write(tmp_path / "a.aedat", special, mixed, empty, special))
    assert events["x"].tolist() == [1, 3]
    assert len(read_aedat(write(tmp_path / "none.aedat"))) == 0


@pytest.mark.parametrize("header", [aedat.HEADER + aedat.END, aedat.HEADER, b"#!AER-DAT3.1\r\n"])
def test_the_header_may_lack_its_last_line(tmp_path: Path, header: bytes) -> None:
    path = write(tmp_path / "a.aedat", aedat.packet([aedat.event(9, 8, 1, 7)]), header=header)
    assert read_aedat(path)["y"].tolist() == [8]


def test_events_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    late, early = aedat.packet([aedat.event(1, 0, 0, 90)]), aedat.packet([aedat.event(2, 0, 0, 10)])
    same = aedat.packet([aedat.event(3, 0, 0, 90)])
    assert read_aedat(write(tmp_path / "a.aedat", late, early, same))["x"].tolist() == [2, 1, 3]


def test_many_random_events_are_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x, y, p = rng.integers(0, 128, 3000), rng.integers(0, 128, 3000), rng.integers(0, 2, 3000)
    t = np.sort(rng.integers(0, 2**31, 3000))
    written = [aedat.event(*map(int, one)) for one in zip(x, y, p, t, strict=True)]
    packets = [aedat.packet(written[i : i + 700]) for i in range(0, 3000, 700)]
    events = read_aedat(write(tmp_path / "a.aedat", *packets))
    for name, values in (("x", x), ("y", y), ("p", p), ("t", t)):
        np.testing.assert_array_equal(events[name], values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#!AER-DAT2.0\r\n", "not AEDAT 3.1"),
        (b"", "not AEDAT 3.1"),
        (aedat.HEADER + aedat.END + aedat.packet([aedat.event(1, 1, 1, 1)])[:20], "cut off in a packet header"),
        (aedat.HEADER + aedat.END + aedat.packet([aedat.event(1, 1, 1, 1)])[:-3], "cut off in a packet at byte"),
        (aedat.HEADER + aedat.END + aedat.packet([], number=-1), "no packet of events"),
        (aedat.HEADER + aedat.END + aedat.packet([], size=0), "no packet of events"),
        (aedat.HEADER + aedat.END + aedat.packet([b"0" * 12], size=12), "no packet of events"),
        (aedat.HEADER + aedat.END + aedat.packet([], overflow=-2), "no packet of events"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.aedat"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_aedat(path)
    assert "bad.aedat" in str(caught.value)


# -- annotations and arrays -------------------------------------------------------------------------------------------


def test_annotations(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"class,startTime_usec,endTime_usec\r\n1,80048239,85092709\r\n11,9,10\r\n")
    assert read_annotations(path) == [(1, 80048239, 85092709), (11, 9, 10)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,start,end\n1,2,3\n", "no column 'class'"),
        ("class,startTime_usec,endTime_usec\n1,2\n", "line 2: three whole numbers"),
        ("class,startTime_usec,endTime_usec\n1,2,3\nx,2,3\n", "line 3: three whole numbers"),
        ("class,startTime_usec,endTime_usec\n1,5,5\n", "line 2: the gesture ends"),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_annotations(path)


def test_arrays_of_tonic_in_both_forms(tmp_path: Path) -> None:
    rows = np.array([[3, 4, 1, 12], [5, 6, 0, 20]])
    fields = np.array([(3, 4, 12000, True), (5, 6, 20000, False)], dtype="i2,i2,i8,?")
    fields.dtype.names = ("x", "y", "t", "p")
    for name, array in (("rows", rows), ("float", rows.astype(np.float32)), ("fields", fields)):
        np.save(tmp_path / f"{name}.npy", array)
        events = read_numpy_events(tmp_path / f"{name}.npy")
        assert events["t"].tolist() == [12000, 20000]
        assert events["x"].tolist() == [3, 5]
        assert events["y"].tolist() == [4, 6]
        assert events["p"].tolist() == [1, 0]


def test_arrays_that_hold_no_events_are_refused(tmp_path: Path) -> None:
    for array in (np.zeros((3, 5)), np.zeros(4), np.array([[-1, 0, 0, 0]])):
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(DataError, match=r"bad\.npy"):
            read_numpy_events(tmp_path / "bad.npy")
    np.save(tmp_path / "code.npy", np.array([{"a": print}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a plain array"):
        read_numpy_events(tmp_path / "code.npy")


# -- frames -----------------------------------------------------------------------------------------------------------


def events_of(*rows: tuple[int, int, int, int]) -> np.ndarray:
    return np.array(list(rows), dtype=EVENT)


ROWS = ((0, 0, 0, 1), (24_999, 0, 0, 0), (25_000, 3, 1, 1), (49_999, 3, 1, 1), (80_000, 2, 2, 0))
"""(t, x, y, p)"""


def test_an_event_counts_in_the_frame_of_its_time_and_at_its_pixel() -> None:
    frames = Framing(4, 4, 25_000, "separate", 1.0).frames(events_of(*ROWS), 3)
    assert frames.shape == (3, 2, 4, 4)
    assert frames.dtype == np.float32
    assert {tuple(map(int, place)): frames[tuple(place)] for place in np.argwhere(frames)} == {
        (0, 1, 0, 0): 1,  # ON, at time 0
        (0, 0, 0, 0): 1,  # OFF, in the last microsecond of the frame
        (1, 1, 1, 3): 2,  # row 1, column 3
    }
    assert Framing(4, 4, 25_000, "separate", 1.0).frames(events_of(*ROWS), 4)[3, 0, 2, 2] == 1


def test_polarities_sizes_and_scales() -> None:
    events = events_of(*ROWS)
    separate = Framing(4, 4, 25_000, "separate", 1.0).frames(events, 4)
    together = Framing(4, 4, 25_000, "sum", 1.0).frames(events, 4)
    np.testing.assert_array_equal(together, separate.sum(1, keepdims=True))
    np.testing.assert_array_equal(Framing(4, 4, 25_000, "mean", 1.0).frames(events, 4), together / 2)
    np.testing.assert_array_equal(Framing(4, 4, 25_000, "sum", 4.0).frames(events, 4), together / 4)
    small = Framing(4, 2, 25_000, "sum", 1.0).frames(events, 4)
    np.testing.assert_array_equal(small, together.reshape(4, 1, 2, 2, 2, 2).sum((3, 5)))


def test_no_events_are_empty_frames() -> None:
    assert not Framing(4, 4, 25_000, "mean", 1.0).frames(events_of(), 3).any()
