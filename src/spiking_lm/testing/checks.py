"""What the conformance kits measure with: tolerances, comparisons, and a search for hidden state."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from spiking_lm.config import StrictModel
from spiking_lm.interfaces import State

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-8, 1e-9),
    torch.float32: (1e-4, 1e-5),
}
"""(relative, absolute) by dtype: how far two ways of computing the same thing may lie apart.

bfloat16 is missing on purpose: its rounding flips spikes, so two orders of the same arithmetic need not agree in it.
"""

GRADIENT_TOLERANCES: dict[torch.dtype, float] = {torch.float64: 1e-8, torch.float32: 2e-4}
"""How far two gradients may lie apart, as a share of the largest element: sums over time cancel."""


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fail unless both agree within :data:`TOLERANCES`; the message says where and by how much."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    relative, absolute = TOLERANCES.get(expected.dtype, (0.0, 0.0))
    _compare(actual, expected, relative, absolute, what)


def assert_gradients_close(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Fail unless two gradients agree, relative to the largest element; None stands for zero."""
    if actual is None and expected is None:
        return
    zeros = torch.zeros_like(actual if actual is not None else expected)  # type: ignore[arg-type]
    actual = zeros if actual is None else actual
    expected = zeros if expected is None else expected
    absolute = GRADIENT_TOLERANCES[expected.dtype] * float(expected.abs().max()) if expected.numel() else 0.0
    _compare(actual, expected, 0.0, absolute, what)


def assert_identical(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fail unless both are equal in every bit that matters (dtype, shape, values)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    _compare(actual, expected, 0.0, 0.0, what)


def _compare(actual: Tensor, expected: Tensor, relative: float, absolute: float, what: str) -> None:
    actual, expected = actual.detach(), expected.detach()
    wrong = ~torch.isclose(actual, expected, rtol=relative, atol=absolute, equal_nan=True)
    if not wrong.any():
        return
    difference = (actual.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    worst = int(torch.where(wrong, difference, difference.new_full((), -1.0)).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
    got, wanted = actual.flatten()[worst].item(), expected.flatten()[worst].item()
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ, most at {where}: "
        f"{got!r} where {wanted!r} was expected (allowed: relative {relative:g}, absolute {absolute:g})"
    )


def assert_states_close(actual: State, expected: State, what: str) -> None:
    """Fail unless two states have one structure and their tensors agree."""
    _compare_states(actual, expected, what, assert_close)


def assert_states_identical(actual: State, expected: State, what: str) -> None:
    """Fail unless two states have one structure and equal tensors."""
    _compare_states(actual, expected, what, assert_identical)


def _compare_states(actual: State, expected: State, what: str, compare: Any) -> None:
    ours, theirs = dict(state_tensors(actual)), dict(state_tensors(expected))
    assert ours.keys() == theirs.keys(), (
        f"{what}: the structures differ: {sorted(ours.keys() ^ theirs.keys())} occur in one state only"
    )
    for path, tensor in ours.items():
        compare(tensor, theirs[path], f"{what}, state{path}")


def state_tensors(state: State, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a state with its path, e.g. ``("[0].wkv[1]", tensor)``."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from state_tensors(value, f"{path}[{key!r}]")
    elif isinstance(state, tuple) and hasattr(state, "_fields"):
        for key, value in zip(state._fields, state, strict=True):
            yield from state_tensors(value, f"{path}.{key}")
    elif isinstance(state, (tuple, list)):
        for index, value in enumerate(state):
            yield from state_tensors(value, f"{path}[{index}]")
    elif state is not None:
        raise AssertionError(
            f"state{path} is a {type(state).__name__}: a state holds tensors in tuples, NamedTuples, lists and dicts"
        )


def assert_kind(spikes: Tensor, kind: str, what: str) -> None:
    """Fail unless every element is one that the declared kind allows."""
    values = spikes.detach()
    assert torch.isfinite(values).all(), f"{what}: spikes must be finite"
    if kind == "binary":
        right = (values == 0) | (values == 1)
    elif kind == "ternary":
        right = (values == 0) | (values.abs() == 1)
    elif kind == "integer":
        right = values == values.round()
    else:
        assert kind == "graded", f"{what}: unknown kind of spike {kind!r}"
        return
    assert right.all(), (
        f"{what}: declared {kind}, but {int((~right).sum())} of {right.numel()} elements are not, "
        f"e.g. {values[~right][0].item()!r}"
    )


def assert_gradients_alive(module: nn.Module, exceptions: Mapping[str, str]) -> None:
    """Fail unless every trainable parameter has a finite, non-zero gradient; ``exceptions``: pattern -> reason."""
    dead, unused = [], set(exceptions)
    for name, parameter in module.named_parameters():
        matching = {pattern for pattern in exceptions if fnmatch(name, pattern)}
        unused -= matching
        if matching or not parameter.requires_grad:
            continue
        if parameter.grad is None:
            dead.append(f"{name} (no gradient)")
        elif not torch.isfinite(parameter.grad).all():
            dead.append(f"{name} (not finite)")
        elif not parameter.grad.any():
            dead.append(f"{name} (all zero)")
    assert not dead, "parameters without a finite, non-zero gradient: " + ", ".join(dead)
    assert not unused, f"untrained_parameters matches no parameter: {sorted(unused)}"


def hidden_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Find every tensor that a module keeps and that is no parameter: buffers, attributes, containers.

    Returns path -> a copy of the tensor, so that two snapshots can be compared.
    """
    found: dict[str, Tensor] = {}
    parameters = {id(parameter) for parameter in root.parameters()}
    seen: set[int] = set()
    plain = (str, bytes, int, float, complex, bool, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)

    def visit(value: Any, path: str, depth: int) -> None:
        if value is None or isinstance(value, (*plain, torch.dtype, torch.device)) or depth > 12:
            return
        if isinstance(value, Tensor):
            if id(value) not in parameters:
                found[path] = value.detach().clone()
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            for key, item in list(value.items()):
                visit(item, f"{path}[{key!r}]", depth + 1)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for index, item in enumerate(value):
                visit(item, f"{path}[{index}]", depth + 1)
        elif hasattr(value, "__dict__") and not isinstance(value, StrictModel):
            for key, item in list(vars(value).items()):
                visit(item, f"{path}.{key}", depth + 1)

    for name, module in root.named_modules():
        for key, value in list(vars(module).items()):
            if key not in ("_modules", "_parameters"):
                visit(value, f"{name or 'self'}.{key}", 0)
    return found


def assert_no_new_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor], what: str) -> None:
    """Fail if a module keeps a tensor after a call that it did not keep before, or a different one."""
    fresh = sorted(after.keys() - before.keys())
    assert not fresh, f"{what} left tensors in the module: {', '.join(fresh)}. State is passed in and returned"
    changed = sorted(
        path
        for path, tensor in before.items()
        if path not in after or after[path].shape != tensor.shape or not torch.equal(after[path], tensor)
    )
    assert not changed, (
        f"{what} changed tensors kept in the module: {', '.join(changed)}. State is passed in and returned"
    )


def assert_config_round_trip(config: StrictModel, known: Mapping[str, Any]) -> None:
    """Fail unless ``config`` survives JSON, refuses unknown fields and cannot be changed."""
    try:
        text = json.dumps(dict(known))
    except TypeError as err:
        raise AssertionError(f"{type(config).__name__} is not JSON-able: {err}") from None
    again = type(config).model_validate(json.loads(text))
    assert again == config, f"{type(config).__name__} changes on the way through JSON: {config!r} became {again!r}"
    _assert_refuses(config, {**known, "no_such_field": 1})


def _assert_refuses(config: StrictModel, values: Mapping[str, Any]) -> None:
    try:
        type(config).model_validate(dict(values))
    except ValidationError:
        pass
    else:
        raise AssertionError(f"{type(config).__name__} accepts an unknown field: derive it from the host's config base")
    try:
        setattr(config, next(iter(type(config).model_fields), "anything"), 0)
    except (ValidationError, ValueError):
        return
    raise AssertionError(f"{type(config).__name__} is not frozen")
