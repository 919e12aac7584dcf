"""Counts of queries, keys and values: equal to the quantised view, causal, and the released code's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm.errors import UsageError
from spiking_lm.gif import gif_encode_tokens, gif_quantize, gif_quantize_tokens
from spiking_lm.schemes import ActivationScheme, CacheScheme, SalientChannels


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def some(heads: int, channels: int) -> Tensor:
    return torch.rand((heads, channels), generator=torch.Generator().manual_seed(heads)) < 0.3


@settings(max_examples=30)
@given(
    bits=st.integers(2, 8),
    steps=st.sampled_from([2, 4, 8]),
    of=st.sampled_from(["key", "value"]),
    marked=st.booleans(),
    tokens=st.sampled_from([0, 1, 5]),
)
def test_counts_decode_to_the_quantised_values(
    bits: int, steps: Literal[2, 4, 8], of: Literal["key", "value"], marked: bool, tokens: int
) -> None:
    scheme = CacheScheme(bits=bits, salient=SalientChannels(rate=0.1, steps=steps))
    x, salient = normal(2, 3, tokens, 6), some(3, 6) if marked else None
    counts = gif_encode_tokens(x, scheme, salient, of=of)
    assert counts.codes.dtype == (torch.uint8 if (2**bits - 1) * (steps if marked else 1) < 256 else torch.int32)
    assert torch.equal(counts.decode(scheme, salient, of=of), gif_quantize_tokens(x, scheme, salient, of=of))


def test_heads_with_masks_of_their_own_are_as_if_alone() -> None:
    scheme = CacheScheme(bits=4, salient=SalientChannels(rate=0.1))
    alone = ActivationScheme(bits=4, salient=SalientChannels(rate=0.1))
    x, salient = normal(2, 3, 5, 6).requires_grad_(), some(3, 6)
    together = gif_quantize_tokens(x, scheme, salient, of="value")
    apart = torch.stack([gif_quantize(x[:, h], alone, salient[h]) for h in range(3)], 1)
    assert torch.equal(together, apart)
    weight = normal(2, 3, 5, 6) + 1
    ours, theirs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (together, apart))
    torch.testing.assert_close(ours, theirs)


def test_later_tokens_change_earlier_keys_only_where_channels_share_a_range() -> None:
    x = normal(1, 2, 7, 6)
    changed = torch.cat([x[:, :, :-1], 10 * x[:, :, -1:]], 2)
    for key_range, causal in (("token", True), ("channel", False)):
        scheme = CacheScheme(bits=4, key_range=key_range)
        before, after = (gif_quantize_tokens(k, scheme, of="key")[:, :, :-1] for k in (x, changed))
        assert torch.equal(before, after) == causal


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be kept"):
        gif_encode_tokens(normal(1, 2, 3, 4), CacheScheme(bits=4, key_range="channel"), of="key")
    with pytest.raises(UsageError, match="queries have no salient channels"):
        gif_quantize_tokens(normal(1, 2, 3, 4), CacheScheme(query_bits=4), some(2, 4), of="query")
    with pytest.raises(UsageError, match="with 2 heads"):
        gif_quantize_tokens(normal(1, 2, 3, 4), CacheScheme(bits=4), some(3, 4), of="key")


def test_sixteen_bits_change_nothing() -> None:
    x = normal(1, 2, 3, 4)
    for of in ("query", "key", "value"):
        assert gif_quantize_tokens(x, CacheScheme(), of=of) is x  # type: ignore[arg-type]


@pytest.mark.parametrize("share", ["0.5", "0.9", "0.95"])
def test_released_queries_keys_and_values(shared: Path, share: str) -> None:
    data: Any = np.load(shared / "golden" / "spikellm" / "saliency.npz")
    q, k, v = (torch.tensor(data[name][0]) for name in "QKV")
    scheme = CacheScheme(bits=4, query_bits=4, salient=SalientChannels(rate=0.1), grid="reference", key_range="channel")
    masks = {name: ~torch.tensor(data[f"{name}_mask_low_p{share}"]).reshape(4, 8) for name in "kv"}
    queries = gif_quantize_tokens(q, scheme, of="query")
    keys = gif_quantize_tokens(k, scheme, masks["k"], of="key")
    values = gif_quantize_tokens(v, scheme, masks["v"], of="value")
    torch.testing.assert_close(queries, torch.tensor(data["q_quant"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(keys.transpose(-1, -2), torch.tensor(data[f"k_quant_p{share}"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values, torch.tensor(data[f"v_quant_p{share}"]), rtol=1e-5, atol=1e-6)
