"""The compiled ``gif_linear`` is the one in torch: values to the bit, gradients to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_lm import bench, kernels
from spiking_lm.errors import KernelUnavailableError
from spiking_lm.gif import calibrate_scale
from spiking_lm.kernels import compiled
from spiking_lm.schemes import ActivationScheme, SalientChannels

pytest.importorskip("numba", reason="numba is not installed: pip install 'spiking-lm[cpu]'")


@pytest.fixture(autouse=True, scope="module")
def _however_small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "LEAST", 0)
        yield


def _scheme(bits: int, steps: int = 0, **more: Any) -> ActivationScheme:
    salient = SalientChannels(rate=0.5, steps=steps) if steps else None
    return ActivationScheme(bits=bits, salient=salient, **more)


def _both(x: Tensor, scheme: ActivationScheme, salient: Tensor | None = None, scale: Tensor | None = None) -> Any:
    """Return outputs and gradients of x and of the weights, by torch and compiled; the weights are a unit matrix."""
    weight = torch.eye(x.shape[-1], dtype=x.dtype).requires_grad_()
    found = []
    for name in ("torch", "numba"):
        leaf = x.detach().requires_grad_()
        with kernels.use(gif_linear=name):
            y = kernels.gif_linear(leaf, weight, None, scheme, salient, scale)
        gradient = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).sin().to(y.dtype).view(y.shape)
        found.append((y.detach(), *torch.autograd.grad(y, (leaf, weight), gradient)))
    return found


def _agree(both: Any, tolerance: float = 2e-5) -> None:
    theirs, ours = both
    assert torch.equal(ours[0], theirs[0])
    for found, expected in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(1 + expected.abs().max()))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 200)),
    bits=st.integers(2, 8),
    steps=st.sampled_from([0, 2, 4]),
    static=st.booleans(),
    double=st.booleans(),
    spread=st.sampled_from([1e-7, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    seed=st.integers(0, 99),
)
def test_any_charges(
    shape: tuple[int, int], bits: int, steps: int, static: bool, double: bool, spread: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(shape, generator=generator, dtype=torch.float64 if double else torch.float32) + offset
    salient = torch.rand(shape[1], generator=generator) < 0.3 if steps else None
    scale = calibrate_scale(x / 2) if static else None
    scheme = _scheme(bits, steps, scale="static" if static else "dynamic")
    _agree(_both(x, scheme, salient, scale), 1e-12 if double else 2e-5)


def test_tokens_of_one_value_and_ties() -> None:
    x = torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [0.5, 1.5, 2.5, 15.0], [15.0, -0.0, 15.0, 0.0]])
    _agree(_both(x, _scheme(4)))
    _agree(_both(x, _scheme(4, 2, grid="reference"), torch.tensor([True, False, False, True])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_are_quantised_in_float32(dtype: torch.dtype) -> None:
    _agree(_both(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype), _scheme(4)), 1e-2)


def test_layouts_are_respected() -> None:
    x = torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
    _agree(_both(x, _scheme(4, 2), torch.arange(80)[::2] % 3 == 0))


def test_a_number_that_is_none_is_not_hidden() -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    x[1, 7], x[2, 5] = float("nan"), float("inf")
    with kernels.use(gif_linear="numba"):
        y = kernels.gif_linear(x, torch.randn(8, 40), None, _scheme(4))
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


def test_threads_change_nothing() -> None:
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    with bench.threads(1):
        alone = _both(x, _scheme(4))[1]
    with bench.threads(3):
        together = _both(x, _scheme(4))[1]
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


def test_what_is_not_compiled_says_why() -> None:
    x, weight = torch.randn(4, 40), torch.randn(8, 40)
    for scheme, mode in ((_scheme(4), "spike"), (ActivationScheme(), "fake")):
        with kernels.use(gif_linear="numba"), pytest.raises(KernelUnavailableError, match="only mode='fake'"):
            kernels.gif_linear(x, weight, None, scheme, mode=mode)
