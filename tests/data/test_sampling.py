"""Batches depend on seed and step alone, cover every valid place evenly, and are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiking_lm.data import epoch_order, gather, pad_batch, sample_offsets
from spiking_lm.data.sampling import Stream
from spiking_lm.errors import DataError


@given(st.integers(2, 50), st.integers(0, 2**31), st.integers(0, 2**31), st.data())
def test_offsets_are_valid_and_stateless(n: int, seed: int, step: int, data: st.DataObject) -> None:
    seq_len = data.draw(st.integers(1, n - 1))
    offsets = sample_offsets(n, seq_len, 16, seed=seed, step=step)
    assert offsets.shape == (16,)
    assert offsets.min() >= 0
    assert offsets.max() + seq_len + 1 <= n
    np.random.default_rng(0).random(5)
    assert (offsets == sample_offsets(n, seq_len, 16, seed=seed, step=step)).all()


def test_offsets_are_uniform_and_reach_both_ends() -> None:
    counts = np.zeros(11)
    for step in range(1000):
        counts += np.bincount(sample_offsets(20, 9, 16, seed=3, step=step), minlength=11)
    expected = 16000 / 11
    # chi squared with 10 degrees of freedom: 29.6 is exceeded once in a thousand
    assert ((counts - expected) ** 2 / expected).sum() < 29.6


def test_steps_and_seeds_differ() -> None:
    draws = {sample_offsets(10**9, 5, 4, seed=s, step=t).tobytes() for s in range(20) for t in range(20)}
    assert len(draws) == 400


@pytest.mark.parametrize("n", [0, 1, 8])
def test_a_text_that_is_too_short_is_refused_with_its_size(n: int) -> None:
    with pytest.raises(DataError, match=f"has {n} tokens"):
        sample_offsets(n, 8, 1, seed=0, step=0)


def test_the_shortest_possible_text_works() -> None:
    assert sample_offsets(9, 8, 3, seed=0, step=0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_gather_reads_sequences_with_their_targets(dtype: type) -> None:
    tokens = np.arange(100).astype(dtype)
    tokens.flags.writeable = False  # as memory maps are
    batch = gather(tokens, np.array([0, 7, 95]), 4)
    assert batch.dtype == np.int64
    assert batch.flags.writeable
    assert batch.tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [95, 96, 97, 98, 99]]
    with pytest.raises(ValueError, match="broadcast"):
        gather(tokens, np.array([97]), 4)


def test_epoch_order_is_a_new_permutation_each_epoch() -> None:
    orders = [epoch_order(50, 1, epoch) for epoch in range(5)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 5
    assert (epoch_order(50, 1, 3) == orders[3]).all()
    assert not (epoch_order(50, 2, 3) == orders[3]).all()


def test_pad_batch() -> None:
    tokens, lengths = pad_batch([np.array([5, 6], np.uint8), np.array([], np.uint8), np.array([7], np.uint8)], 9)
    assert tokens.dtype == lengths.dtype == np.int64
    assert tokens.tolist() == [[5, 6], [9, 9], [7, 9]]
    assert lengths.tolist() == [2, 0, 1]
    assert pad_batch([np.array([1]), np.array([1, 1])], None)[0].tolist() == [[1, 0], [1, 1]]
    assert pad_batch([], 0)[0].shape == (0, 0)


streams = st.fixed_dictionaries(
    {
        "n_tokens": st.integers(40, 900),
        "batch_size": st.integers(1, 5),
        "seq_len": st.integers(1, 40),
        "seed": st.integers(0, 5),
        "jitter": st.booleans(),
    }
)


def stream(n_tokens: int, batch_size: int, seq_len: int, seed: int, jitter: bool) -> Stream:
    return Stream(n_tokens, batch_size, min(seq_len, n_tokens // batch_size - 1), seed=seed, jitter=jitter)


@given(options=streams)
def test_a_pass_reads_every_column_once_from_top_to_bottom(options: dict[str, Any]) -> None:
    subject = stream(**options)
    column, index = options["n_tokens"] // options["batch_size"], 0
    for _ in range(2):
        at = 0
        while at < column - 1:
            window = subject.window(index)
            assert window.first == (at == 0)
            assert window.offsets.tolist() == [row * column + at for row in range(options["batch_size"])]
            assert window.length >= 1
            at, index = at + window.length, index + 1
        assert at == column - 1, "the last target is the column's last token"
    assert subject.window(index).first


@given(options=streams, index=st.integers(0, 400))
def test_a_window_depends_on_seed_and_index_alone(options: dict[str, Any], index: int) -> None:
    walked, asked = stream(**options), stream(**options)
    for i in range(index):
        walked.window(i)
    a, b = walked.window(index), asked.window(index)
    assert (a.offsets.tolist(), a.length, a.first) == (b.offsets.tolist(), b.length, b.first)


def test_jitter_has_the_published_distribution() -> None:
    subject = Stream(4_000_000, 2, 70, seed=3, jitter=True)
    lengths = np.array([subject.window(index).length for index in range(20_000)])
    halved = lengths < 52
    assert lengths.min() >= 5
    assert halved.mean() == pytest.approx(0.05, abs=0.01)
    assert lengths[~halved].mean() == pytest.approx(69.5, abs=0.3), "int() cuts half a token on average"
    assert lengths[~halved].std() == pytest.approx(5, abs=0.2)
    assert lengths[halved].mean() == pytest.approx(34.5, abs=1)
    other = Stream(4_000_000, 2, 70, seed=4, jitter=True)
    assert [other.window(i).length for i in range(20)] != lengths[:20].tolist()


def test_a_column_holds_a_window_and_its_target() -> None:
    assert Stream(22, 2, 10, seed=0).window(0).length == 10
    with pytest.raises(DataError, match="2 columns have 10 each, and a window of 10 and one target need 11"):
        Stream(21, 2, 10, seed=0)
