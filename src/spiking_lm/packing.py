"""Codes of few levels in as few bytes: what a converted model keeps on disk and in memory.

A byte holds as many base-``levels`` digits as fit in it: five ternary ones, two of sixteen levels. Where that wastes
more than it takes to let codes cross bytes (3, 5, 6 and 7 bits), they cross. The bytes do not depend on the machine.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from spiking_lm.errors import CheckpointError, UsageError

MOST_LEVELS = 2**15
"""Codes that int16 can hold."""
_SLICE = 2**20
"""Codes that are spread over bytes at a time: they need eight bytes each while they are."""


def pack(codes: Tensor, levels: int) -> Tensor:
    """Return whole numbers in 0..levels-1 as one row of uint8, or of int16 when there are more than 256 levels.

    ``codes`` has any shape and integer type and is read row by row; :func:`unpack` needs to be told their number.
    Raises: UsageError for a code that is not in 0..levels-1.
    """
    flat = codes.reshape(-1)
    if not 2 <= levels <= MOST_LEVELS:
        raise UsageError(f"codes of {levels} levels cannot be packed", hint=f"2 to {MOST_LEVELS} levels can")
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= levels):
        raise UsageError(f"codes from {int(flat.min())} to {int(flat.max())} are not {levels} levels from 0 upwards")
    if levels > 256:
        return flat.to(torch.int16)
    flat = flat.to(torch.uint8)
    if _crosses(levels):
        bits = _bits(levels)
        return torch.cat([_spread(part, bits) for part in torch.split(flat, _SLICE)]) if flat.numel() else flat.clone()
    digits = _digits(levels)
    rows = _padded(flat, digits).view(-1, digits)
    packed = rows[:, -1].clone()
    for place in range(digits - 2, -1, -1):
        packed.mul_(levels).add_(rows[:, place])
    return packed


def unpack(packed: Tensor, levels: int, count: int) -> Tensor:
    """Return the ``count`` codes that :func:`pack` packed: one row of uint8, or of int16 for more than 256 levels.

    Raises: CheckpointError when the bytes are too few, too many, or no codes of so many levels.
    """
    if packed.dim() != 1 or packed.dtype != _dtype(levels) or packed.numel() != packed_size(count, levels):
        raise CheckpointError(
            f"{count} codes of {levels} levels are {packed_size(count, levels)} x {_dtype(levels)}, "
            f"not {tuple(packed.shape)} x {packed.dtype}"
        )
    if levels > 256:
        codes = packed
    elif _crosses(levels):
        bits = _bits(levels)
        parts = torch.split(packed, _SLICE // 8 * bits)
        codes = torch.cat([_gather(part, bits) for part in parts])[:count] if count else packed
    else:
        codes = _table(levels).to(packed.device)[packed.int()].view(-1)[:count]
    if count and (int(codes.min()) < 0 or int(codes.max()) >= levels):
        raise CheckpointError(f"the packed bytes hold codes that are not below {levels}", hint="the file is damaged")
    return codes


def packed_size(count: int, levels: int) -> int:
    """Return how many elements :func:`pack` makes of ``count`` codes: bytes, or int16 for more than 256 levels."""
    if levels > 256:
        return count
    if _crosses(levels):
        return -(-count * _bits(levels) // 8)
    return -(-count // _digits(levels))


def _bits(levels: int) -> int:
    return (levels - 1).bit_length()


def _digits(levels: int) -> int:
    """Return how many base-``levels`` digits a byte holds."""
    digits = 1
    while levels ** (digits + 1) <= 256:
        digits += 1
    return digits


def _crosses(levels: int) -> bool:
    """Return whether codes that cross bytes take less room than digits that stay in one."""
    return _bits(levels) * _digits(levels) < 8


def _dtype(levels: int) -> torch.dtype:
    return torch.uint8 if levels <= 256 else torch.int16


def _padded(flat: Tensor, multiple: int) -> Tensor:
    padded: Tensor = torch.nn.functional.pad(flat, (0, -flat.numel() % multiple))
    return padded


def _spread(codes: Tensor, bits: int) -> Tensor:
    """Return codes of ``bits`` < 8 bits end to end, lowest bit first: eight codes are ``bits`` bytes."""
    eights = _padded(codes, 8).view(-1, 8).long()
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    words = (eights << shifts).sum(1, keepdim=True)
    whole = ((words >> torch.arange(0, 8 * bits, 8, device=codes.device)) & 255).to(torch.uint8)
    return whole.view(-1)[: -(-codes.numel() * bits // 8)]


def _gather(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`_spread`, but for its zeros at the end."""
    parts = _padded(packed, bits).view(-1, bits).long()
    words = (parts << torch.arange(0, 8 * bits, 8, device=packed.device)).sum(1, keepdim=True)
    codes: Tensor = (words >> torch.arange(0, 8 * bits, bits, device=packed.device)) & (2**bits - 1)
    return codes.to(torch.uint8).view(-1)


@lru_cache
def _table(levels: int) -> Tensor:
    """Return the digits of every byte, lowest first; a byte that is no number of so many digits gives 255s."""
    digits = _digits(levels)
    byte = torch.arange(256)
    table: Tensor = torch.stack([byte // levels**place % levels for place in range(digits)], 1)
    table[byte >= levels**digits] = 255
    return table.byte()
