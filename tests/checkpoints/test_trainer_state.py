"""The trainer's state: nested Python and tensors go to JSON and safetensors, never pickle, and come back exactly."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spiking_lm.checkpoints import load_checkpoint, save_checkpoint
from spiking_lm.errors import UsageError

Make = Callable[..., Any]


def identical(a: Any, b: Any) -> bool:
    """Equal in type, in value and in every bit of every float."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        flat_a, flat_b = a.contiguous().flatten(), b.contiguous().flatten()
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8))
        )
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        keys_a, keys_b = list(a), list(b)
        return identical(keys_a, keys_b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(
        0, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    ).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 100),
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors
keys = st.text(max_size=6) | st.integers() | st.sampled_from(["$tensor", "$dict", "$", "__metadata__", "0", "a.b", ""])
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(keys, nested, max_size=5))
def test_any_nested_state_comes_back_exactly(tmp_path: Path, tiny: Make, state: dict[Any, Any]) -> None:
    path = save_checkpoint(tmp_path, 3, tiny(), state)
    assert identical(load_checkpoint(path)[1], state)


def test_shared_memory_views_and_parameters(tmp_path: Path, tiny: Make) -> None:
    base = torch.randn(4, 6)
    state = {"base": base, "again": base, "row": base[1], "t": base.t(), "p": torch.nn.Parameter(base[:, 2])}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tiny(), state))[1]
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_optimizer_and_generators_go_on_as_if_never_stopped(tmp_path: Path, tiny: Make) -> None:
    """Five steps, save, five more: equal in every bit to five, load in new objects, five more."""

    def steps(model: Any, optimizer: torch.optim.Optimizer, rng: random.Random, count: int) -> None:
        model.train()
        for _ in range(count):
            tokens = torch.randint(7, (2, 8)) if rng.random() < 0.5 else torch.randint(3, (2, 8))
            optimizer.zero_grad()
            model(tokens).logits.square().mean().backward()
            optimizer.step()

    model, rng = tiny(seed=4), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99))
    steps(model, optimizer, rng, 5)
    state = {"optimizer": optimizer.state_dict(), "torch_rng": torch.get_rng_state(), "python_rng": rng.getstate()}
    path = save_checkpoint(tmp_path, 5, model, state)
    steps(model, optimizer, rng, 5)

    again, loaded = load_checkpoint(path)
    assert again.training
    new_optimizer = torch.optim.AdamW(again.parameters(), lr=3.0)
    new_optimizer.load_state_dict(loaded["optimizer"])
    new_rng = random.Random()
    new_rng.setstate(loaded["python_rng"])
    torch.set_rng_state(loaded["torch_rng"])
    steps(again, new_optimizer, new_rng, 5)
    assert identical(dict(model.state_dict()), dict(again.state_dict()))
    assert identical(optimizer.state_dict(), new_optimizer.state_dict())
    assert rng.random() == new_rng.random()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": [1, {"b": {1, 2}}]}, r"a\.1\.b: cannot save a set"),
        ({"a": object()}, "a: cannot save a object"),
        ({"f": print}, "f: cannot save a builtin_function_or_method"),
        ({"a": {1.5: 0}}, "a: keys are str or int"),
        ({"a": {True: 0}}, "a: keys are str or int"),
        ({"b": b"bytes"}, "b: cannot save a bytes"),
    ],
)
def test_other_types_are_refused_by_name(tmp_path: Path, tiny: Make, value: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        save_checkpoint(tmp_path, 1, tiny(), value)
    assert not list(tmp_path.rglob("step-*"))
