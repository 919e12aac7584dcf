"""Kernels in Triton's interpreter: golden data, then the definition of each op, gradients and states included.

Run in a process of its own (``test_processes.py``): TRITON_INTERPRET is read when Triton is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from torch import Tensor
from triton_aot import INTERPRETING

from spiking_lm import kernels, registry
from spiking_lm.config import SurrogateConfig
from spiking_lm.errors import UsageError
from spiking_lm.gif import gif_quantize
from spiking_lm.schemes import ActivationScheme, SalientChannels

if not INTERPRETING:
    pytest.skip("needs a process of its own: test_processes.py starts it", allow_module_level=True)

from spiking_lm_triton import bench, egru, gif, lif, linear, roofline, sizes
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


# -- egru_scan ---------------------------------------------------------------------------------------------------------


def _egru(n_steps: int, batch: int, hidden: int) -> list[Tensor]:
    shapes = (n_steps, batch, 3 * hidden), (hidden, 3 * hidden), (3 * hidden,), (batch, hidden), (batch, hidden)
    a, kernel, bias, c0, y0 = (normal(i, *s) for i, s in enumerate(shapes))
    return [a, kernel / hidden**0.5, bias / 3, 0.2 * normal(9, hidden).abs(), c0, y0]


@pytest.mark.parametrize(
    ("shape", "mode"),
    [((3, 2, 5), "free"), ((4, 1, 130), "zoneout"), ((3, 2, 7), "keep"), ((1, 1, 1), "free"), ((0, 2, 3), "free"),
     ((2, 0, 3), "free")],
    ids=str,
)  # fmt: skip
def test_egru_is_its_definition(shape: tuple[int, int, int], mode: str) -> None:
    keep = (normal(11, *shape) > -0.5).float() if mode == "keep" else None

    def call(*leaves: Tensor) -> Any:
        zoneout = 0.2 if mode == "zoneout" else 0.0
        return kernels.egru_scan(*leaves, gamma=0.7, epsilon=1.0, keep=keep, zoneout=zoneout)

    y, _, o = both("egru_scan", call, _egru(*shape), tolerance=2e-6)
    if y.numel() > 20:
        assert 0 < o.mean() < 1, "some fire and some do not"


def test_egru_from_one_output_and_any_layout() -> None:
    leaves = _egru(3, 2, 5)
    leaves[0] = leaves[0].transpose(0, 2).contiguous()

    def call(a: Tensor, kernel: Tensor, bias: Tensor, theta: Tensor) -> Any:
        return (kernels.egru_scan(a.transpose(0, 2), kernel, bias, theta, gamma=0.7, epsilon=1.0)[0],)

    both("egru_scan", call, leaves[:4], tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_egru_in_half_precision(dtype: torch.dtype) -> None:
    leaves = _egru(3, 2, 40)
    leaves[0] = leaves[0].to(dtype)
    y, c, o = both("egru_scan", lambda *t: kernels.egru_scan(*t, gamma=0.7, epsilon=1.0), leaves, tolerance=HALF[dtype])
    assert y.dtype == c.dtype == o.dtype == torch.float32


# -- gif_linear --------------------------------------------------------------------------------------------------------


def _scheme(bits: int, steps: int, **options: Any) -> ActivationScheme:
    return ActivationScheme(bits=bits, salient=SalientChannels(rate=0.1, steps=steps) if steps > 1 else None, **options)


def _charges(rows: int, channels: int) -> Tensor:
    """Tokens of every kind: around zero, constant, away from zero, silent, with an outlier."""
    x = normal(0, rows, channels)
    x[1::5] = 2.5
    x[2::5] += 9
    x[3::5] = 0
    x[4::5, 0] = 60
    return x


@pytest.mark.parametrize("channels", [1, 33, 1030])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("steps", [1, 4])
def test_gif_is_its_definition(bits: int, steps: int, channels: int) -> None:
    """Equal to float32's definition, gradients included."""
    salient = normal(3, channels) > 1 if steps > 1 else None
    x = torch.stack([_charges(5, channels), normal(1, 5, channels)])
    scheme = _scheme(bits, steps, spikes="signed" if bits < 8 else "unsigned")

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return (kernels.gif_linear(x, weight, bias, scheme, salient if bits < 16 else None),)

    both("gif_linear", call, [x, normal(4, 7, channels), normal(5, 7)], tolerance=5e-6)


@pytest.mark.parametrize("grid", ["exact", "reference"])
def test_gif_with_static_scales(grid: Any) -> None:
    scheme = _scheme(3, 2, scale="static", grid=grid)
    x, scale = 2 * normal(0, 4, 21), torch.tensor([-2.0, 3.0])

    def call(x: Tensor, weight: Tensor) -> Any:
        return (kernels.gif_linear(x, weight, None, scheme, normal(2, 21) > 0.5, scale),)

    both("gif_linear", call, [x, normal(1, 6, 21)], tolerance=5e-6)


def test_gif_rounds_half_to_even_as_the_definition_does() -> None:
    """A grid of whole numbers and tokens of halves, then what is broken: values are equal to the bit."""
    x = torch.arange(0, 15.5, 0.5).repeat(3, 1)
    x[1] = -x[1]
    x[2] = x[2] * 3 + 1000
    got = gif._quantize(x, None, None, 15, 15)
    assert torch.equal(got, gif_quantize(x, _scheme(4, 1)))
    assert got[0, :4].tolist() == [0, 0, 1, 2]


@BROKEN
def test_gif_keeps_what_is_broken() -> None:
    x = normal(0, 3, 9)
    x[1, 4] = float("nan")
    x[2, 5] = float("inf")
    got = gif._quantize(x, None, None, 15, 15)
    assert got[0].isfinite().all()
    assert got[1:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gif_in_half_precision(dtype: torch.dtype) -> None:
    """The grid is found in float32; the product is torch's in the type of the inputs."""
    x, weight = normal(0, 5, 40).to(dtype), normal(1, 6, 40).to(dtype)
    with kernels.use(gif_linear="triton"):
        got = kernels.gif_linear(x, weight, None, _scheme(4, 1))
    expected = gif_quantize(x.float(), _scheme(4, 1)) @ weight.float().T
    assert got.dtype == dtype
    close(got, expected, HALF[dtype])


@pytest.mark.parametrize("mode", ["spike", "binary"])
def test_gif_leaves_other_views_to_torch(mode: Any) -> None:
    scheme, x, weight = _scheme(4, 1), normal(0, 2, 5), normal(1, 3, 5)
    reasons = dict(kernels.explain_choice("gif_linear", x, weight, None, scheme, mode=mode))
    assert "torch does that" in str(reasons["triton"])
    assert kernels.gif_linear(x, weight, None, scheme, mode=mode).shape == (2, 3)


@pytest.mark.parametrize("spikes", ["signed", "unsigned"])
@pytest.mark.parametrize(("rows", "steps"), [(5, 1), (5, 2), (70, 1), (70, 2)])
def test_gif_on_int8_weights(rows: int, steps: int, spikes: Any) -> None:
    """Whole numbers times whole numbers: what float64 makes of the same codes, but for the scaling of the sums."""
    scheme, channels = _scheme(4, steps, spikes=spikes), 150
    salient = normal(3, channels) > 1 if steps > 1 else None
    x, scale, bias = _charges(rows, channels), normal(1, 37).abs(), normal(2, 37)
    codes = torch.randint(-128, 128, (37, channels), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    got = gif.gif_int8_linear(x.view(5, -1, channels), codes, scale, bias, scheme, salient)
    values = gif_quantize(x, scheme, salient).double()
    expected = values @ (codes * scale[:, None].double()).T + bias
    assert got.shape == (5, rows // 5, 37)
    close(got.flatten(0, 1), expected.float(), 2e-6)


def test_gif_on_int8_weights_refuses_what_int8_cannot_hold() -> None:
    codes = torch.zeros(3, 4, dtype=torch.int8)
    with pytest.raises(UsageError, match="counts reach 255"):
        gif.gif_int8_linear(normal(0, 2, 4), codes, torch.ones(3), None, _scheme(8, 1))
    with pytest.raises(UsageError, match="int8 codes"):
        gif.gif_int8_linear(normal(0, 2, 4), codes.float(), torch.ones(3), None, _scheme(4, 1))


# -- products of one token ---------------------------------------------------------------------------------------------

ONE_TOKEN = ("spike_linear", "int8_linear", "pack_spikes", "packed_linear", "ternary_linear")


def forced(implementation: str) -> Any:
    return kernels.use(**dict.fromkeys(ONE_TOKEN, implementation))


@pytest.mark.parametrize("name", [f"mm_{i:02d}" for i in range(6)])
def test_products_golden(shared: Path, name: str) -> None:
    data = np.load(shared / "golden" / "kernels" / f"{name}.npz")
    s, weight, bias = torch.tensor(data["s"]), torch.tensor(data["W"]), torch.tensor(data["bias"])
    planes = torch.tensor(np.stack([data["W_plus_bits"], data["W_minus_bits"]]).astype(np.uint32).view(np.int32))
    signs = torch.tensor(np.stack([data["s_pos_bits"], data["s_neg_bits"]], 1).astype(np.uint32).view(np.int32))
    scale = torch.tensor(data["row_scale"])
    with forced("triton"):
        y = kernels.spike_linear(s.float(), weight.t().contiguous(), bias)
        ternary = kernels.ternary_linear(s.float(), planes, torch.ones_like(scale))
        if int(s.abs().max()) <= 1:
            assert torch.equal(kernels.pack_spikes(s.float(), 2), signs)
            scaled = kernels.packed_linear(signs, planes, scale)
            np.testing.assert_allclose(scaled.numpy(), data["y_ternary_scaled"], rtol=1e-6)
    bound = 1e-5 * np.sqrt(np.diff(data["active_ptr"]).max() + 1) * np.abs(data["W"]).sum(1).max()
    np.testing.assert_allclose(y.numpy(), data["y"], rtol=0, atol=bound)
    np.testing.assert_array_equal(ternary.numpy(), data["y_ternary_int"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lead", "sources", "targets"), [((), 70, 33), ((2, 3), 33, 5), ((1,), 1, 1), ((2,), 1300, 130), ((0,), 4, 3)]
)
def test_products_are_their_definition(lead: tuple[int, ...], sources: int, targets: int, dtype: torch.dtype) -> None:
    x = (normal(0, *lead, sources) * (normal(1, *lead, sources) > 0.8)).to(dtype)
    weight, bias, scale = normal(2, sources, targets).to(dtype), normal(3, targets).to(dtype), normal(4, targets).abs()
    codes = torch.randint(-127, 128, (targets, sources), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    planes = kernels.pack_ternary(codes.sign() * (codes.abs() > 60))
    results = []
    for implementation in ("reference", "triton"):
        exact = implementation == "reference"  # the definition in float32, as that is what kernels sum in
        real = (lambda t: t.float()) if exact else (lambda t: t)
        with forced(implementation):
            words = [kernels.pack_spikes(x.sign(), 2), kernels.pack_spikes((x > 0).to(dtype), 1)]
            results.append(
                [
                    kernels.spike_linear(real(x), real(weight), real(bias)),
                    kernels.spike_linear(real(x), real(weight)),
                    kernels.int8_linear(real(x), codes, scale, real(bias)),
                    kernels.ternary_linear(real(x), planes, scale),
                    kernels.packed_linear(words[0], planes, scale, bias.float()),
                    kernels.packed_linear(words[1], planes, scale),
                    *words,
                ]
            )
    for expected, got in zip(*results, strict=True):
        close(got, expected, max(HALF[dtype], 2e-6) if got.is_floating_point() else 0.0)
    assert results[1][0].dtype == results[1][2].dtype == results[1][3].dtype == dtype


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_silent_and_all_active(density: float) -> None:
    x, weight, bias = torch.full((2, 90), density), normal(0, 90, 40), normal(1, 40)
    with forced("triton"):
        got = kernels.spike_linear(x, weight, bias)
    close(got, x @ weight + bias, 2e-6)
    assert density or torch.equal(got, bias.expand(2, 40))


def test_sums_do_not_depend_on_the_run_nor_on_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(0, 1, 2000) * (normal(1, 1, 2000) > 0), normal(2, 2000, 40)
    assert sizes.parts(1, 2000, 40) > 1
    with forced("triton"):
        first, second = (kernels.spike_linear(x, weight) for _ in range(2))
        monkeypatch.setattr(sizes, "MOST_PARTS", 1)
        alone = kernels.spike_linear(x, weight)
    assert torch.equal(first, second)
    close(alone, first, 2e-6)


@pytest.mark.parametrize(("rows", "targets", "most"), [(1, 128, 16), (1, 4096, 8), (16, 65536, 1), (1, 1, 16)])
def test_shares_keep_the_processors_busy(rows: int, targets: int, most: int) -> None:
    assert sizes.parts(rows, 65536, targets) == most
    assert sizes.parts(rows, 1, targets) == 1, "a short sum is not cut"


def test_many_rows_are_left_to_dense_products() -> None:
    answers = dict(kernels.explain_choice("spike_linear", torch.ones(17, 4), torch.ones(4, 3)))
    assert "more than 16 rows" in str(answers["triton"])
    words = torch.ones(17, 1, 2, dtype=torch.int32)
    planes = torch.ones(2, 3, 2, dtype=torch.int32)
    answers = dict(kernels.explain_choice("packed_linear", words, planes, torch.ones(3)))
    assert "more than 16 rows" in str(answers["triton"])
    answers = dict(kernels.explain_choice("spike_linear", torch.ones(1, 4).double(), torch.ones(4, 3).double()))
    assert "float64" in str(answers["triton"])


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], dict[str, int]]:
    """Count launches, bytes of the tensors that kernels are given, each once, and what they compute in float32."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    found = {"launches": 0, "bytes": 0, "operations": 0}
    seen: list[Tensor] = []  # kept, so that no memory is used twice
    run = InterpretedFunction.run

    def launched(self: Any, *args: Any, **options: Any) -> Any:
        found["launches"] += 1
        for name, t in zip(self.arg_names, args, strict=False):
            if isinstance(t, Tensor) and name != "scratch" and all(t.data_ptr() != other.data_ptr() for other in seen):
                seen.append(t)
                found["bytes"] += t.numel() * t.element_size()
        return run(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", launched)
    for kind in ("binary_op", "unary_op"):
        compute = getattr(InterpreterBuilder, kind)

        def computed(self: Any, *args: Any, compute: Any = compute) -> Any:
            out = compute(self, *args)
            found["operations"] += out.data.size if out.data.dtype.kind == "f" else 0
            return out

        monkeypatch.setattr(InterpreterBuilder, kind, computed)

    def of(call: Callable[[], Any]) -> dict[str, int]:
        seen.clear()
        found.update(dict.fromkeys(found, 0))
        call()
        return dict(found)

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scans_cost_what_is_predicted(costs: Any, dtype: torch.dtype) -> None:
    """Bytes and launches to the last one; operations per step, as those of edges are not counted."""
    size, channels = dtype.itemsize, 128

    def of_lif(n_steps: int) -> tuple[dict[str, int], dict[str, int]]:
        x = normal(0, n_steps, 2, channels).to(dtype).requires_grad_()
        spikes: list[Tensor] = []
        surrogate = SurrogateConfig()
        forward = costs(lambda: spikes.append(lif.lif_scan(x, **LIF, surrogate=surrogate, final_only=True)[0]))
        gradient = torch.ones_like(spikes[0])
        return forward, costs(lambda: torch.autograd.grad(spikes[0], x, gradient))

    def of_wkv(n_steps: int) -> tuple[dict[str, int], dict[str, int]]:
        k, v = (normal(i, 2, n_steps, channels).to(dtype).requires_grad_() for i in range(2))
        decay, first, y = torch.zeros(channels), torch.zeros(channels), []
        forward = costs(lambda: y.append(wkv_module.wkv(decay, first, k, v)[0]))
        gradient = torch.ones_like(y[0])
        return forward, costs(lambda: torch.autograd.grad(y[0], (k, v), gradient))

    for run, works in (
        (of_lif, lambda n: (roofline.lif(n, 256, size, recorded=True), roofline.lif_backward(n, 256, size))),
        (of_wkv, lambda n: (roofline.wkv(2, n, channels, size, recorded=True),
                            roofline.wkv_backward(2, n, channels, size))),
    ):  # fmt: skip
        short, long = run(3), run(7)
        for way in range(2):
            work, longer = works(3)[way], works(7)[way]
            assert short[way]["bytes"] == work.bytes
            assert short[way]["launches"] == work.launches
            assert long[way]["operations"] - short[way]["operations"] == longer.operations - work.operations


def test_a_long_scan_puts_down_marks(costs: Any) -> None:
    x = normal(0, 130, 1, 64).requires_grad_()
    found = costs(lambda: lif.lif_scan(x, **LIF, surrogate=SurrogateConfig(), final_only=True))
    assert found["bytes"] == roofline.lif(130, 64, 4, recorded=True).bytes
    assert found["bytes"] - roofline.lif(130, 64, 4).bytes == 3 * 64 * 4
    found = costs(lambda: lif.lif_scan_packed(x, **LIF))
    assert found["bytes"] == roofline.lif(130, 64, 4, packed_words=2).bytes


def test_egru_costs_what_is_predicted(costs: Any) -> None:
    leaves = [t.requires_grad_() for t in _egru(3, 2, 128)[:4]]
    out: list[Tensor] = []
    found = costs(lambda: out.append(egru.egru_scan(*leaves, gamma=0.7, epsilon=1.0)[0]))
    assert found["bytes"] == roofline.egru_kernels(3, 2, 128, 4)
    assert found["launches"] == roofline.egru(3, 2, 128, 4).launches - 3, "the products are torch's"
    gradient = torch.ones_like(out[0])
    found = costs(lambda: torch.autograd.grad(out[0], leaves, gradient))
    assert found["bytes"] == roofline.egru_kernels(3, 2, 128, 4, backward=True)
    assert found["launches"] == 3


@pytest.mark.parametrize("rows", [1, 3])
def test_products_cost_what_is_predicted(costs: Any, rows: int) -> None:
    sources, targets = 320, 256
    x, scale = normal(0, rows, sources), torch.ones(targets)  # all are active
    codes = torch.ones(targets, sources, dtype=torch.int8)
    planes = torch.ones(2, targets, 10, dtype=torch.int32)
    for call, work in (
        (lambda: linear.spike_linear(x.clone(), normal(1, sources, targets)),
         roofline.spike_linear(rows, sources, targets, rows * sources, 4)),
        (lambda: linear.int8_linear(x.clone(), codes, scale), roofline.int8_linear(rows, sources, targets, 4)),
        (lambda: linear.ternary_linear(x.clone(), planes, scale.clone()),
         roofline.ternary_linear(rows, sources, targets, 4)),
        (lambda: linear.packed_linear(torch.ones(rows, 2, 10, dtype=torch.int32), planes.clone(), scale.clone()),
         roofline.packed_linear(rows, 2, sources, targets)),
        (lambda: gif._quantize(x.clone(), None, None, 15, 15), roofline.gif_quantize(rows, sources, 4)),
        (lambda: gif.gif_int8_linear(x.clone(), codes.clone(), scale.clone(), None, _scheme(4, 1)),
         roofline.gif_int8_linear(rows, sources, targets, 4)),
    ):  # fmt: skip
        found = costs(call)
        assert found["bytes"] == work.bytes
        assert found["launches"] == work.launches


def test_fewer_events_read_fewer_rows() -> None:
    few, all_ = (roofline.spike_linear(1, 4096, 4096, active, 2).bytes for active in (410, 4096))
    assert all_ - few == (4096 - 410) * (2 * 4096 + 8)


SMALL = {
    "lif_scan": (5, 1, 64), "wkv": (1, 5, 64), "egru_scan": (2, 1, 16), "spike_linear": (1, 64, 128, 10),
    "packed_linear": (1, 64, 16, 2), "ternary_linear": (1, 64, 16), "int8_linear": (1, 64, 16),
    "gif_linear": (3, 64), "gif_int8_linear": (2, 64, 32),
}  # fmt: skip


@pytest.mark.parametrize("op", SMALL)
def test_benchmarks_measure_both_forms(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU at the sizes of the table, here at small ones: what is said is computed from what was timed."""
    assert any(case.op == op for case in roofline.CASES)
    monkeypatch.setattr(bench, "copy_rate", lambda: 1e9)
    case = roofline.case(op, *SMALL[op])
    row = bench.measure(case, 1, cold=2 * case.work.bytes)
    seconds = row.details["seconds"]
    assert row.name == f"triton/{op}/{'x'.join(map(str, SMALL[op]))}"
    assert row.value == pytest.approx(seconds["torch"] / seconds["triton"])
    assert row.details["bytes_per_s"] == pytest.approx(case.work.bytes / seconds["triton"])
    assert row.details["copies"] == 2
    assert row.details["device"] == "the interpreter"
    assert row.details["predicted_s"] is None, "nobody predicts an interpreter"
    assert "% of a copy" in row.note
    one = bench.trial(case, "cpu")
    monkeypatch.setattr(kernels, "use", _forbidden)
    if op.startswith("gif"):
        close(one.triton().float(), one.torch().float(), 1 / 32)


def _forbidden(**_: str) -> Any:
    raise AssertionError("these two forms are no implementations of an op")


def test_every_benchmark_has_cases() -> None:
    for name, registered in registry.manager().all("benchmarks").items():
        if registered.plugin.name == "triton":
            op = name.partition("/")[2]
            assert callable(registered.load("function"))
            assert [case for case in roofline.CASES if case.op == op]
            assert registered.spec.device == "cuda"


# -- as seen by torch.compile ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_keep_torchs_rules() -> None:
    x = (2 * normal(0, 5, 2, 6)).requires_grad_()
    numbers = (0.5, 0.5, 1.0, 0.0, False, True, False, True, 0, 2.0, False)
    torch.library.opcheck(lif._forward, (x, normal(1, 2, 6).requires_grad_(), *numbers))
    w, u, k, v = normal(0, 6), normal(1, 6), normal(2, 2, 5, 6), normal(3, 2, 5, 6)
    leaves = [t.requires_grad_() for t in (w, u, k, v, *_state(2, 6)[:2])]
    torch.library.opcheck(wkv_module._forward, (*leaves, _state(2, 6)[2], True))
    inputs = [t.requires_grad_() for t in _egru(2, 2, 3)]
    torch.library.opcheck(egru._forward, (*inputs, None, 0.0, 0.7, 1.0, True))
    charges = normal(0, 3, 9).requires_grad_()
    torch.library.opcheck(gif._quantize, (charges, normal(1, 9) > 0, None, 15, 60))
    codes, scale = torch.ones(4, 9, dtype=torch.int8), torch.ones(4)
    torch.library.opcheck(gif._int8, (normal(0, 3, 9), codes, scale, None, None, None, 15, 15, True))
    planes = torch.ones(2, 4, 1, dtype=torch.int32)
    x, words = normal(0, 2, 9), torch.ones(2, 1, 1, dtype=torch.int32)
    torch.library.opcheck(linear._spike_linear, (x, normal(1, 9, 4), None))
    torch.library.opcheck(linear._int8_linear, (x, codes, scale, scale))
    torch.library.opcheck(linear._pack_spikes, (x, 2))
    torch.library.opcheck(linear._packed_linear, (words, planes, scale, None))
    torch.library.opcheck(linear._ternary_linear, (x, planes, scale, None))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_graphs_are_whole(backend: str) -> None:
    def model(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spikes, _ = lif.lif_scan(x, None, **LIF, surrogate=surrogate, final_only=True)
        y, _ = wkv_module.wkv(torch.zeros(6), torch.ones(6), k, v)
        events, _, _ = egru.egru_scan(k, v[0, :2, :1] * ones, ones[0], ones[0, :2], gamma=0.7, epsilon=1.0)
        charges = gif._quantize(k, None, None, 15, 15)
        return spikes.sum() + (y * y).sum() + events.sum() + (charges * v).sum()

    surrogate, ones = SurrogateConfig(), torch.full((2, 6), 0.3)
    leaves = [2 * normal(0, 5, 2, 6), normal(1, 2, 5, 6), normal(2, 2, 5, 6)]
    inputs = [t.clone().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(model(*inputs), inputs)
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(model, fullgraph=True, backend=backend)(*inputs), inputs)
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-6)


def test_public_ops_stay_single_nodes_when_triton_runs_them() -> None:
    """Traced, an op of the core is one node; what runs behind it is chosen when the graph runs."""
    scheme = ActivationScheme(bits=4)

    def model(x: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        spikes, _ = kernels.lif_scan(x, **LIF, final_only=True)
        y, _ = kernels.wkv(torch.zeros(6), torch.ones(6), k, v)
        return spikes.sum() + (y * y).sum() + kernels.gif_linear(k, weight, None, scheme).sum()

    leaves = [2 * normal(0, 5, 2, 6), normal(1, 2, 5, 6), normal(2, 2, 5, 6), normal(3, 4, 6)]
    inputs = [t.clone().requires_grad_() for t in leaves]
    torch._dynamo.reset()
    with kernels.use(lif_scan="triton", wkv="triton", gif_linear="triton"):
        expected = torch.autograd.grad(model(*inputs), inputs)
        got = torch.autograd.grad(torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-6)
