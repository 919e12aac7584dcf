"""What compiled kernels promise beyond their results: elastic neurons to the bit, threads, compiling only once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_lm import kernels
from spiking_lm.errors import KernelUnavailableError
from spiking_lm.kernels import compiled

pytest.importorskip("numba", reason="numba is not installed: pip install 'spiking-lm[cpu]'")
LIF: dict[str, Any] = {"beta": 0.5, "gain": 0.5, "threshold": 1.0}


@pytest.fixture
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setattr(compiled, "SHARE", 50)


@pytest.fixture(scope="module", autouse=True)
def _at_once() -> Any:
    """Three threads, so that the pieces differ in size."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@settings(max_examples=40)
@given(
    steps=st.integers(1, 6),
    shape=st.sampled_from([(), (1,), (3, 7), (2, 3, 5), (130,)]),
    options=st.fixed_dictionaries(
        {
            "beta": st.sampled_from([0.0, 0.25, 1 / 3, 1.0]),
            "bits": st.sampled_from([1, 2]),
            "reset": st.sampled_from(["asymmetric", "symmetric"]),
            "final": st.booleans(),
        }
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    carried=st.booleans(),
    layout=st.sampled_from(["plain", "expanded", "transposed"]),
    seed=st.integers(0, 99),
)
@pytest.mark.usefixtures("_any_size")
def test_elastic_neurons_are_the_plain_loop_to_the_bit(
    steps: int,
    shape: tuple[int, ...],
    options: dict[str, Any],
    dtype: torch.dtype,
    carried: bool,
    layout: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(steps, *shape, generator=generator, dtype=dtype)
    if layout == "expanded":
        x = x[:1].expand(x.shape)
    elif layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    alpha = torch.rand(steps, generator=generator, dtype=dtype) + 0.2
    start = torch.randn(shape, generator=generator, dtype=dtype) if carried else None
    results = []
    for name in ("reference", "numba"):
        leaves = [t.clone().requires_grad_() for t in (x, start) if t is not None]
        with kernels.use(elastic_scan=name):
            spikes, after = kernels.elastic_scan(leaves[0], alpha, leaves[1] if carried else None, **options)
        loss = (spikes * torch.linspace(-1, 1, spikes.numel(), dtype=dtype).view(spikes.shape)).sum()
        if after is not None:
            loss = loss + (after * after.detach()).sum()
        results.append([spikes, *([] if after is None else [after]), *torch.autograd.grad(loss, leaves)])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.usefixtures("_any_size")
def test_a_membrane_that_is_no_number_does_not_pass_for_a_silent_one() -> None:
    x = torch.zeros(3, 40)
    x[1, 7] = torch.nan
    with kernels.use(elastic_scan="numba"):
        spikes, after = kernels.elastic_scan(x, torch.ones(3))
    broken = torch.zeros(3, 40, dtype=torch.bool)
    broken[1:, 7] = True
    assert after is not None
    assert torch.equal(spikes.isnan(), broken)
    assert torch.equal(after.isnan(), broken[2])


@pytest.mark.usefixtures("_any_size")
@pytest.mark.parametrize("name", ["lif_scan", "wkv", "elastic_scan"])
def test_second_derivatives_are_refused(name: str) -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    with kernels.use(**{name: "numba"}):
        if name == "lif_scan":
            y, _ = kernels.lif_scan(x, **LIF)
        elif name == "wkv":
            y, _ = kernels.wkv(torch.zeros(8), torch.zeros(8), x, x)
        else:
            y, _ = kernels.elastic_scan(x, torch.ones(2))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_it_cannot_do_is_refused_with_the_reason() -> None:
    small = torch.zeros(2, 3)
    with kernels.use(lif_scan="numba"), pytest.raises(KernelUnavailableError, match="fewer than 16384 elements"):
        kernels.lif_scan(small, **LIF)
    large = torch.zeros(2, compiled.LEAST)
    learned = torch.ones(2, requires_grad=True)
    with kernels.use(elastic_scan="numba"), pytest.raises(KernelUnavailableError, match="learned"):
        kernels.elastic_scan(large, learned)
    assert dict(kernels.explain_choice("lif_scan", large, **LIF))["numba"] is True
    assert "cpu" not in str(dict(kernels.explain_choice("lif_scan", small, **LIF))["torch"])
    assert next(name for name, answer in kernels.explain_choice("lif_scan", large, **LIF) if answer is True) == "numba"


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SHARE", 50)
    x = torch.randn(20, 7, 301, generator=torch.Generator().manual_seed(0))
    with kernels.use(lif_scan="numba"):
        torch.set_num_threads(1)
        alone = kernels.lif_scan(x, **LIF)
        torch.set_num_threads(3)
        shared = kernels.lif_scan(x, **LIF)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_it_compiles_once_per_machine(tmp_path: Path) -> None:
    code = (
        "import torch; from spiking_lm import kernels; "
        "kernels.lif_scan(torch.randn(4, 8192), beta=.5, gain=.5, threshold=1.); "
        "from spiking_lm.kernels import jit; "
        "print(sum(jit.lif_forward.stats.cache_hits.values()), sum(jit.lif_forward.stats.cache_misses.values()))"
    )
    environment = {**os.environ, "SPIKING_LM_CACHE": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    said = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert [line.split() for line in said] == [["0", "1"], ["1", "0"]]
    assert list((tmp_path / "numba").rglob("*.nbi"))
