"""How work is cut, in plain numbers: shared by the kernels and by what predicts their time."""

from __future__ import annotations

CHUNK = 64
"""Time steps between two states that a scan puts down for the way back."""

MOST_ROWS = 16
"""Rows up to which products read weights row by row; for more, dense products read them once for all."""

GATHER_N, GATHER_K = 128, 16
"""Outputs and sources of a program of the product by active sources."""
PROGRAMS = 264
"""How many programs keep a large GPU busy: two for each of the 132 processors of an H100."""
MOST_PARTS = 16


def cut(size: int, piece: int) -> int:
    """Return how many pieces there are in ``size``, the last one perhaps not full."""
    return -(-size // piece)


def power(size: int) -> int:
    """Return the least power of 2 that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def parts(rows: int, sources: int, targets: int) -> int:
    """Return into how many shares the sum over active sources is cut, so that all processors have work."""
    programs = max(1, rows * cut(targets, GATHER_N))
    return max(1, min(PROGRAMS // programs, MOST_PARTS, cut(sources, 4 * GATHER_K)))
