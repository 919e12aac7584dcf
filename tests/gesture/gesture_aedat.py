"""AEDAT 3.1 files written byte by byte, from the published description of the format."""

from __future__ import annotations

HEADER = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#Start-Time: 2016-03-14 15:09:26 (TZ+0100)\r\n"
END = b"#!END-HEADER\r\n"


def little(value: int, size: int) -> bytes:
    """Return an integer as ``size`` bytes, lowest first."""
    return value.to_bytes(size, "little")


def event(x: int, y: int, p: int, t: int, *, valid: bool = True) -> bytes:
    """Return one polarity event: bit 0 valid, bit 1 polarity, bits 2 to 16 row, bits 17 to 31 column; then the time."""
    word = x * 2**17 + y * 2**2 + p * 2 + int(valid)
    return little(word, 4) + little(t, 4)


def packet(events: list[bytes], *, kind: int = 1, size: int = 8, overflow: int = 0, number: int | None = None) -> bytes:
    """Return a packet: type, source, event size, offset of the time, overflow, capacity, events, valid events."""
    n = len(events) if number is None else number
    numbers = [(kind, 2), (1, 2), (size, 4), (4, 4), (overflow, 4), (n, 4), (n, 4), (n, 4)]
    head = b"".join(value.to_bytes(width, "little", signed=True) for value, width in numbers)
    assert len(head) == 28
    return head + b"".join(events)
