"""No token changes what was said before it, and a cache of codes is as good as reading again, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spiking_lm import create_model
from spiking_lm.quantization import round_to_nearest
from spiking_lm_spikellm.layers import SpikingLinear
from spiking_lm_spikellm.model import SpikeLLM

LENGTH = 9
SALIENT = {"rate": 0.2, "steps": 2}


def make(mode: str, bits: int, salient: bool, rotation: bool, **cache: Any) -> SpikeLLM:
    """A random model of grouped queries; a fifth of its channels is salient where there are such."""
    torch.manual_seed(3)
    marked = {"salient": SALIENT} if salient else {}
    model = create_model(
        "spikellm",
        **{"vocab_size": 29, "n_layer": 2, "n_embd": 16, "n_inner": 24, "n_head": 4, "n_kv_head": 2, "ctx_len": 32},
        weights={"bits": 4},
        activations={"bits": 4, **marked},
        cache={"bits": bits, "query_bits": bits, **(marked if bits < 16 else {}), **cache},
        rotation=rotation,
        mode=mode,
    )
    assert isinstance(model, SpikeLLM)
    for name, buffer in model.named_buffers():
        if "salient" in name:
            buffer.copy_(torch.rand(buffer.shape) < 0.2)
        elif "signs" in name:
            buffer.copy_(2 * torch.randint(0, 2, buffer.shape) - 1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.3)
    for layer in model.modules():
        if isinstance(layer, SpikingLinear):  # with weights of a size that attention looks about
            layer.set_weight(round_to_nearest(torch.randn(layer.out_features, layer.in_features) / 2, layer.weights))
    return model.eval()


def text() -> Tensor:
    return torch.randint(29, (2, LENGTH), generator=torch.Generator().manual_seed(4))


def with_another_token(tokens: Tensor, place: int) -> Tensor:
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 29
    return changed


every = [
    pytest.mark.parametrize("mode", ["fake", "spike", "binary"]),
    pytest.mark.parametrize("bits", [4, 16], ids=["kv4", "kv16"]),
    pytest.mark.parametrize("salient", [False, True], ids=["plain", "salient"]),
    pytest.mark.parametrize("rotation", [False, True], ids=["unrotated", "rotated"]),
]


def everywhere(test: Any) -> Any:
    for mark in every:
        test = mark(test)
    return test


@everywhere
@torch.no_grad()
def test_a_token_changes_nothing_before_it(mode: str, bits: int, salient: bool, rotation: bool) -> None:
    model, tokens = make(mode, bits, salient, rotation), text()
    logits = model(tokens).logits
    for place in range(1, LENGTH):
        changed = model(with_another_token(tokens, place)).logits
        assert torch.equal(changed[:, :place], logits[:, :place]), place
        assert not torch.equal(changed[:, place], logits[:, place]), place


@everywhere
@torch.no_grad()
def test_a_text_in_one_is_the_text_token_by_token(mode: str, bits: int, salient: bool, rotation: bool) -> None:
    model, tokens = make(mode, bits, salient, rotation).double(), text()
    whole = model(tokens)
    state, steps = model.init_state(2, dtype=torch.float64), []
    for token in tokens.T:
        logits, state = model.step(token, state)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), whole.logits)
    for ours, theirs in zip(state.layers, whole.state.layers, strict=True):  # type: ignore[attr-defined]
        for kept, expected in zip(ours, theirs, strict=True):
            if bits == 4:
                assert kept.codes.dtype == torch.uint8
                assert torch.equal(kept.codes, expected.codes)
            else:
                torch.testing.assert_close(kept, expected)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["fake", "spike", "binary"])
def test_keys_with_a_range_over_all_tokens_are_not_causal(mode: str) -> None:
    """As released, for parity only: this is why such a model refuses to go on with a text."""
    model, tokens = make(mode, 4, False, False, key_range="channel"), text()
    logits, changed = (model(t).logits for t in (tokens, with_another_token(tokens, LENGTH - 1)))
    before = (changed - logits)[:, : LENGTH - 1].abs().amax((0, 2))
    assert before[0] == 0  # which has nothing but itself to look at
    assert before.max() > 0.01
