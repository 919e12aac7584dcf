"""Packed codes come back as they were, in no more bytes than promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spiking_lm import packing
from spiking_lm.errors import CheckpointError, UsageError

LEVELS = st.one_of(st.integers(2, 300), st.sampled_from([2**bits for bits in range(1, 16)]))


@given(levels=LEVELS, count=st.integers(0, 200), seed=st.integers(0, 2**20))
def test_a_round_trip_is_exact(levels: int, count: int, seed: int) -> None:
    codes = torch.randint(levels, (count,), generator=torch.Generator().manual_seed(seed))
    packed = packing.pack(codes, levels)
    assert packed.numel() == packing.packed_size(count, levels)
    assert torch.equal(packing.unpack(packed, levels, count).long(), codes)


def test_extreme_codes_and_shapes() -> None:
    for bits in range(1, 16):
        codes = torch.tensor([[2**bits - 1, 0, 2**bits - 1], [2**bits - 1] * 3])
        assert torch.equal(packing.unpack(packing.pack(codes, 2**bits), 2**bits, 6).view(2, 3).long(), codes)


@pytest.mark.parametrize(
    ("levels", "size"),
    [(2, 1), (4, 2), (8, 3), (16, 4), (32, 5), (64, 6), (128, 7), (256, 8), (3, 1.6), (5, 8 / 3), (9, 4), (17, 5)],
)
def test_bits_per_code(levels: int, size: float) -> None:
    count = 120  # a whole number of bytes at each size
    assert packing.pack(torch.zeros(count, dtype=torch.int32), levels).numel() * 8 == pytest.approx(size * count)


def test_codes_that_are_spread_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.arange(1000) % 8
    whole = packing.pack(codes, 8)
    monkeypatch.setattr(packing, "_SLICE", 64)
    assert torch.equal(packing.pack(codes, 8), whole)
    assert torch.equal(packing.unpack(whole, 8, 1000).long(), codes)


def test_the_bytes_are_the_same_everywhere() -> None:
    assert packing.pack(torch.tensor([1, 2, 3]), 16).tolist() == [0x21, 0x03]
    assert packing.pack(torch.tensor([1, 2, 0, 1, 2, 2]), 3).tolist() == [1 + 2 * 3 + 27 + 2 * 81, 2]
    assert packing.pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 5]), 8).tolist() == [
        0b11010001,
        0b01011000,
        0b00011111,
        5,
    ]


def test_wrong_codes_and_bytes_are_named() -> None:
    with pytest.raises(UsageError, match="codes from 0 to 16 are not 16 levels"):
        packing.pack(torch.tensor([0, 16]), 16)
    with pytest.raises(UsageError, match="from -1"):
        packing.pack(torch.tensor([-1]), 3)
    with pytest.raises(UsageError, match="cannot be packed"):
        packing.pack(torch.tensor([0]), 2**16)
    with pytest.raises(CheckpointError, match="5 codes of 16 levels are 3"):
        packing.unpack(torch.zeros(2, dtype=torch.uint8), 16, 5)
    with pytest.raises(CheckpointError, match=r"torch\.int16"):
        packing.unpack(torch.zeros(5, dtype=torch.uint8), 512, 5)
    with pytest.raises(CheckpointError, match="not below 3"):
        packing.unpack(torch.tensor([243], dtype=torch.uint8), 3, 5)
    with pytest.raises(CheckpointError, match="not below 512"):
        packing.unpack(torch.tensor([512], dtype=torch.int16), 512, 1)
