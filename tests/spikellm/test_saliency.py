"""Saliency: closed forms against token-wise definitions, streaming, masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spiking_lm.errors import DivergedError, UsageError
from spiking_lm_spikellm.saliency import CacheSaliency, SecondMoment, activation_saliency, choose, weight_saliency


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden/spikellm/saliency.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def streamed(x: torch.Tensor) -> SecondMoment:
    moment = SecondMoment(x.shape[-1])
    moment.update(x)
    return moment


def tokenwise(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x = x.reshape(-1, x.shape[-1]).double()
    return (x * (x @ w.double().T @ w.double())).mean(0)


def test_linear_layers_as_released(golden: dict[str, torch.Tensor]) -> None:
    saliency = activation_saliency([golden["W"]], streamed(golden["X"]))
    torch.testing.assert_close(saliency.float(), golden["lin_channel_saliency"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(saliency.float(), golden["lin_token_saliency"][0].mean(0), rtol=1e-5, atol=1e-5)
    for low in (0.5, 0.9, 0.95):
        assert torch.equal(choose(saliency, 1 - low), ~golden[f"lin_mask_low_p{low}"].flatten())
    assert golden["lin_mask_low_p1.0"].all()  # no rate: schemes leave salient out


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_keys_and_values_as_released(golden: dict[str, torch.Tensor], rows: int) -> None:
    q, k, v, p = (golden[name].squeeze(1) for name in "QKVP")
    saliency = CacheSaliency(kv_heads=4, head_size=8)
    for at in range(0, 3, rows):
        part = slice(at, at + rows)
        saliency.update(q[part], k[part], p[part] @ v[part])
    torch.testing.assert_close(saliency.keys, golden["k_channel_saliency"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saliency.values, golden["v_channel_saliency"][0], rtol=1e-5, atol=1e-6)
    for low in (0.5, 0.9, 0.95):
        assert torch.equal(choose(saliency.keys, 1 - low), ~golden[f"k_mask_low_p{low}"].view(4, 8))
        assert torch.equal(choose(saliency.values, 1 - low), ~golden[f"v_mask_low_p{low}"].view(4, 8))


def test_grouped_queries_add_up() -> None:
    torch.manual_seed(0)
    q, p = torch.randn(2, 6, 5, 4), torch.softmax(torch.randn(2, 6, 5, 5), -1)
    k, v = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    every_k, every_v = (x.repeat_interleave(3, 1) for x in (k, v))
    grouped, repeated = CacheSaliency(2, 4), CacheSaliency(6, 4)
    grouped.update(q, k, p @ every_v)
    repeated.update(q, every_k, p @ every_v)
    torch.testing.assert_close(grouped.keys, repeated.keys.view(2, 3, 4).sum(1))
    torch.testing.assert_close(grouped.values, repeated.values.view(2, 3, 4).sum(1))


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 24), st.integers(1, 9), st.integers(1, 3))
def test_closed_form_is_the_tokenwise_mean(seed: int, tokens: int, channels: int, rows: int, matrices: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, tokens, channels, generator=rng) * torch.rand(channels, generator=rng).mul(9).exp2()
    weights = [torch.randn(rows, channels, generator=rng) for _ in range(matrices)]
    want = torch.stack([tokenwise(w, x) for w in weights]).sum(0)
    got = activation_saliency(weights, streamed(x))
    # Terms of either sign may cancel: the error is measured against what is summed.
    size = x.reshape(-1, channels).double().abs()
    terms = torch.stack([(w.double().T @ w.double()).abs() for w in weights]).sum(0) * (size.T @ size) / len(size)
    assert float((got - want).abs().max()) <= 1e-6 * float(terms.sum(1).max())


@given(st.integers(0, 2**31), st.lists(st.integers(1, 700), min_size=1, max_size=4))
def test_any_batching_gives_the_same_moment(seed: int, sizes: list[int]) -> None:
    x = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(seed))
    pieces = SecondMoment(6)
    for piece in x.split(sizes):
        pieces.update(piece[None])
    assert pieces.tokens == len(x)
    torch.testing.assert_close(pieces.mean, streamed(x).mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pieces.mean, x.double().T @ x.double() / len(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pieces.hessian, 2 * pieces.mean)


def test_an_equivalent_transformation_leaves_saliency_alone() -> None:
    torch.manual_seed(1)
    w, x, s = torch.randn(5, 8).double(), torch.randn(30, 8).double(), torch.rand(8).double() + 0.5
    torch.testing.assert_close(activation_saliency([w * s], streamed(x / s)), activation_saliency([w], streamed(x)))


@given(st.integers(1, 200), st.floats(1e-6, 1 - 1e-6), st.integers(0, 2**31))
def test_masks_hold_their_quota(channels: int, rate: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    saliency = torch.randint(-3, 4, (channels,), generator=rng).double()  # many ties
    mask = choose(saliency, rate)
    assert int(mask.sum()) == channels - int((1 - rate) * channels + 1e-9) >= 1
    if not mask.all():
        assert saliency[mask].min() >= saliency[~mask].max()
    drawn = choose(saliency, rate, choice="random", generator=rng)
    assert int(drawn.sum()) == int(mask.sum())


def test_quotas_at_the_edges() -> None:
    ranks = torch.arange(10.0)
    assert choose(ranks, 0.9).tolist() == [False] + [True] * 9  # (1 - 0.9) * 10 is a little below 1 in floats
    assert choose(ranks, 0.95).all()  # the released code would make none salient
    assert choose(ranks, 0.01).tolist() == [False] * 9 + [True]
    assert choose(torch.arange(64.0), 0.1).sum() == 7


def test_random_masks_follow_their_generator() -> None:
    draw = lambda seed: choose(torch.zeros(4, 16), 0.25, choice="random", generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(1).shape == (4, 16)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_weight_saliency_is_the_loss_of_leaving_a_weight_out() -> None:
    torch.manual_seed(2)
    x, w = torch.randn(50, 6).double(), torch.randn(3, 6).double()
    hessian = x.T @ x
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rho = weight_saliency(w, factor)
    for column in range(6):
        rest = hessian[column:, column:]
        # The least of d^T H d over what columns from here on may do, when this one must move by -w.
        block = torch.linalg.inv(rest)
        torch.testing.assert_close(rho[:, column], w[:, column] ** 2 / block[0, 0])


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(UsageError, match="no token"):
        _ = SecondMoment(3).mean
    with pytest.raises(DivergedError, match="1 of 3"):
        choose(torch.tensor([0.0, float("nan"), 1.0]), 0.5)
