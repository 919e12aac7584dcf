"""Kernels in Triton's interpreter: golden data, then the definition of each op, gradients and states included.

Run in a process of its own (``test_processes.py``): TRITON_INTERPRET is read when Triton is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from torch import Tensor
from triton_aot import INTERPRETING

from spiking_lm import kernels
from spiking_lm.config import SurrogateConfig

if not INTERPRETING:
    pytest.skip("needs a process of its own: test_processes.py starts it", allow_module_level=True)

from spiking_lm_triton import lif
from spiking_lm_triton import wkv as wkv_module

HALF = {torch.float32: 1e-6, torch.bfloat16: 1 / 64, torch.float16: 1 / 512}
"""How far a result may be off, of the greatest one: rounding; the interpreter cuts bfloat16 off instead."""


BROKEN = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
"""The interpreter computes with numpy, which warns of what is broken on purpose."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Any, expected: Any, tolerance: float) -> None:
    """Compare relative to the greatest element."""
    assert (got is None) == (expected is None)
    if got is None:
        return
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    assert torch.equal(got.isnan(), expected.isnan())
    bound = tolerance * max(1.0, float(expected.nan_to_num(0).abs().max())) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=0, atol=bound, equal_nan=True)


def both(op: str, call: Any, leaves: list[Tensor], *, tolerance: float = 1e-6) -> list[Tensor]:
    """Run an op by Triton and by its definition; compare outputs, then gradients of random directions."""
    results = []
    for implementation in ("reference", "triton"):
        inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves]
        with kernels.use(**{op: implementation}):
            outputs = call(*inputs)
        wanted = [(o, normal(7 + i, *o.shape).to(o.dtype)) for i, o in enumerate(outputs) if o.requires_grad]
        grads: Any = [None] * len(inputs)
        if wanted:
            grads = torch.autograd.grad(
                [o for o, _ in wanted], inputs, [direction for _, direction in wanted], allow_unused=True
            )
        results.append((outputs, grads))
    (expected, expected_grads), (got, grads) = results
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        close(a, b, tolerance)
    for a, b, leaf in zip(grads, expected_grads, leaves, strict=True):
        a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
        assert a.dtype == leaf.dtype
        close(a, b, 4 * tolerance)
    return list(got)


# -- lif_scan ----------------------------------------------------------------------------------------------------------

LIF: dict[str, Any] = {"beta": 0.5, "gain": 0.5, "threshold": 1.0}


@pytest.mark.parametrize("name", [f"lif_{i:02d}" for i in range(18)])
def test_lif_golden(shared: Path, name: str) -> None:
    folder = shared / "golden" / "kernels"
    case = json.loads((folder / "lif_cases.json").read_text())[name]
    data = np.load(folder / f"{name}.npz")
    x, v0 = (torch.tensor(data[key], requires_grad=True) for key in ("x", "v0"))
    with kernels.use(lif_scan="triton"):
        spikes, v = kernels.lif_scan(
            x,
            v0,
            beta=case["beta"],
            gain=case["gain"],
            threshold=case["threshold"],
            v_reset=None if case["reset"] == "soft" else case["v_reset"],
            compare=case["compare"],
            surrogate=SurrogateConfig(name=case["surrogate"], alpha=case["alpha"]),
            detach_reset=case["detach_reset"],
        )
    (spikes * torch.tensor(data["g"])).sum().backward()
    np.testing.assert_array_equal(spikes.detach().numpy(), data["spikes"])
    np.testing.assert_allclose(v.detach().numpy(), data["v"], rtol=0, atol=1e-5)
    for leaf, golden in ((x, data["gx"]), (v0, data["gv0"])):
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), golden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 5), {}),
        ((2, 1, 1), {"compare": ">"}),
        ((65, 3, 33), {"final_only": True}),
        ((64, 2, 5), {"v_reset": None, "final_only": True}),
        ((7, 2, 3, 66), {"surrogate": "triangle", "v_reset": None, "detach_reset": True}),
        ((5,), {"surrogate": "fast_sigmoid", "v_reset": -0.25}),
        ((6, 128), {"surrogate": {"name": "sigmoid", "alpha": 4.0}, "v_reset": None}),
        ((0, 2, 3), {"final_only": True}),
        ((0, 4), {}),
        ((3, 0), {}),
    ],
    ids=str,
)
def test_lif_is_its_definition(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    def call(x: Tensor, v0: Tensor) -> Any:
        return kernels.lif_scan(x, v0, **LIF, **options)

    both("lif_scan", call, [3 * normal(0, *shape), normal(1, *shape[1:])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lif_in_half_precision(dtype: torch.dtype) -> None:
    """The membrane is float32; only what is stored is rounded."""

    def call(x: Tensor) -> Any:
        return kernels.lif_scan(x, None, **LIF)

    spikes, v = both("lif_scan", call, [(3 * normal(0, 5, 2, 70)).to(dtype)], tolerance=HALF[dtype])
    assert spikes.dtype == dtype
    assert v.dtype == torch.float32


def test_lif_reads_any_layout() -> None:
    """Batch-first, every other neuron, and one value for all."""
    x = 3 * normal(0, 2, 9, 80)

    def call(x: Tensor) -> Any:
        batch_first = kernels.lif_scan(x.transpose(0, 1)[:, :, ::2], None, **LIF)
        same = kernels.lif_scan(x[0, :, :1].expand(9, 7), None, **LIF, v_reset=None)
        return *batch_first, *same

    both("lif_scan", call, [x])


@BROKEN
def test_lif_ties_and_broken_membranes() -> None:
    x = torch.tensor([[2.0, 2.0, float("nan"), float("inf"), -3.0], [1.0, 2.0, 1.0, 1.0, 2.0]])
    for compare in (">=", ">"):
        spikes, _ = both("lif_scan", lambda x, c=compare: kernels.lif_scan(x, None, **LIF, compare=c), [x])
        assert spikes[0, 0] == (compare == ">=")
        assert spikes[:, 2].isnan().all(), "what is broken must not pass for silent"


def test_lif_in_pieces_is_lif_in_one_to_the_bit() -> None:
    x = 3 * normal(0, 9, 2, 40)
    with kernels.use(lif_scan="triton"):
        whole, v = kernels.lif_scan(x, None, **LIF, final_only=True)
        first, state = kernels.lif_scan(x[:4], None, **LIF, final_only=True)
        second, state = kernels.lif_scan(x[4:], state, **LIF, final_only=True)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(state, v)


@pytest.mark.parametrize("neurons", [1, 32, 33, 70])
def test_lif_packs_its_spikes(neurons: int) -> None:
    x = 3 * normal(0, 6, 2, neurons)
    words, v = lif.lif_scan_packed(x, **LIF)
    with kernels.use(lif_scan="reference"):
        spikes, expected = kernels.lif_scan(x, None, **LIF, final_only=True)
    bits = (words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    assert torch.equal(bits.flatten(-2)[..., :neurons].float(), spikes)
    assert not bits.flatten(-2)[..., neurons:].any(), "there is nobody beyond the last neuron"
    assert torch.equal(v, expected)


# -- wkv ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "t1", "long", "masked", "extremek"])
def test_wkv_golden(shared: Path, name: str) -> None:
    data = np.load(shared / "golden" / "kernels" / f"wkv_{name}.npz")
    inputs = {key: torch.tensor(data[key], requires_grad=True) for key in ("time_decay", "time_first", "k", "v")}
    with kernels.use(wkv="triton"):
        y, (p, q, o) = kernels.wkv(**inputs)
    (y * torch.tensor(data["gy"], dtype=torch.float32)).sum().backward()
    bound = 2e-5 * max(1.0, float(abs(data["k"]).max()))
    np.testing.assert_allclose(y.detach().numpy(), data["y"], rtol=0, atol=bound)
    p, q, o = (s.detach().double().numpy() for s in (p, q, o))
    np.testing.assert_allclose(p / q, data["p_T"] / data["q_T"], rtol=5e-5, atol=5e-5)
    np.testing.assert_allclose(o + np.log(q), data["o_T"] + np.log(data["q_T"]), rtol=1e-5, atol=1e-4)
    for key, golden in (("time_decay", "g_time_decay"), ("time_first", "g_time_first"), ("k", "gk"), ("v", "gv")):
        relative = 2e-4 if key == "time_decay" else 5e-5
        gradient = inputs[key].grad
        assert gradient is not None
        np.testing.assert_allclose(
            gradient.numpy(), data[golden], rtol=0, atol=relative * float(abs(data[golden]).max())
        )


def _state(batch: int, channels: int) -> list[Tensor]:
    return [normal(5, batch, channels), normal(6, batch, channels).abs() + 0.5, 2 * normal(7, batch, channels)]


@pytest.mark.parametrize(
    ("batch", "n_steps", "channels"), [(1, 1, 1), (2, 2, 33), (1, 65, 5), (3, 17, 64), (2, 0, 3), (0, 4, 3)]
)
@pytest.mark.parametrize("started", [False, True])
def test_wkv_is_its_definition(batch: int, n_steps: int, channels: int, started: bool) -> None:
    def call(decay: Tensor, first: Tensor, k: Tensor, v: Tensor, *state: Tensor) -> Any:
        y, (p, q, o) = kernels.wkv(decay, first, k, v, (state[0], state[1], state[2].detach()) if started else None)
        common = torch.full_like(o, 3.0)  # p and q mean something together with o alone
        scale = (o.detach() - common).exp()
        return y, p * scale, q * scale

    leaves = [2 * normal(0, channels), normal(1, channels)]
    leaves += [normal(2, batch, n_steps, channels), normal(3, batch, n_steps, channels)]
    both("wkv", call, [*leaves, *_state(batch, channels)], tolerance=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wkv_in_half_precision(dtype: torch.dtype) -> None:
    def call(decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Any:
        return (kernels.wkv(decay, first, k, v)[0],)

    leaves = [normal(0, 70), normal(1, 70), normal(2, 2, 9, 70).to(dtype), normal(3, 2, 9, 70).to(dtype)]
    both("wkv", call, leaves, tolerance=HALF[dtype])


def test_wkv_reads_any_layout_and_extreme_keys() -> None:
    """Time-major views, every other channel, a gradient that is one value for all; keys of 80 and decays of 20."""

    def call(k: Tensor, v: Tensor) -> Any:
        decay, first = torch.linspace(-8, 3, 21), torch.linspace(-3, 3, 21)
        y, _ = kernels.wkv(decay, first, k.transpose(0, 1)[..., ::2], v.transpose(0, 1)[..., ::2])
        return (y.sum(),)

    k = 80 * (2 * torch.rand(13, 2, 42, generator=torch.Generator().manual_seed(0)) - 1)
    (total,) = both("wkv", call, [k, normal(3, 13, 2, 42)], tolerance=1e-5)
    assert total.isfinite()


def test_wkv_in_pieces_is_wkv_in_one_to_the_bit() -> None:
    decay, first, k, v = normal(0, 40), normal(1, 40), normal(2, 2, 9, 40), normal(3, 2, 9, 40)
    with kernels.use(wkv="triton"):
        whole, last = kernels.wkv(decay, first, k, v)
        one, state = kernels.wkv(decay, first, k[:, :4], v[:, :4])
        two, state = kernels.wkv(decay, first, k[:, 4:], v[:, 4:], state)
    assert torch.equal(torch.cat([one, two], 1), whole)
    assert all(map(torch.equal, state, last))


@BROKEN
def test_wkv_lets_nan_through() -> None:
    k = normal(0, 1, 5, 3)
    k[0, 2, 1] = float("nan")
    both("wkv", lambda k: (kernels.wkv(torch.zeros(3), torch.zeros(3), k, k)[0],), [k])


# -- as seen by torch.compile ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_keep_torchs_rules() -> None:
    x = (2 * normal(0, 5, 2, 6)).requires_grad_()
    numbers = (0.5, 0.5, 1.0, 0.0, False, True, False, True, 0, 2.0, False)
    torch.library.opcheck(lif._forward, (x, normal(1, 2, 6).requires_grad_(), *numbers))
    w, u, k, v = normal(0, 6), normal(1, 6), normal(2, 2, 5, 6), normal(3, 2, 5, 6)
    leaves = [t.requires_grad_() for t in (w, u, k, v, *_state(2, 6)[:2])]
    torch.library.opcheck(wkv_module._forward, (*leaves, _state(2, 6)[2], True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_graphs_are_whole(backend: str) -> None:
    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spikes, _ = lif.lif_scan(x, None, **LIF, surrogate=surrogate, final_only=True)
        y, _ = wkv_module.wkv(torch.zeros(6), torch.ones(6), k, v)
        return spikes.sum() + (y * y).sum()

    surrogate = SurrogateConfig()
    leaves = [2 * normal(0, 5, 2, 6), normal(1, 2, 5, 6), normal(2, 2, 5, 6)]
    inputs = [t.clone().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(model(*inputs), inputs)
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(model, fullgraph=True, backend=backend)(*inputs), inputs)
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-6)
