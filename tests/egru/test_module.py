"""The modules: state, masks, thresholds, initialisation, and what Norse expects of them."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from spiking_lm import kernels
from spiking_lm.errors import UsageError
from spiking_lm_egru import EGRU, EGRUCell, EGRUState, functional


def _layer(**options: object) -> EGRU:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EGRU(5, 7, **options).double()  # type: ignore[arg-type]


def _x(*shape: int, seed: int = 1) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("batch_first", [True, False])
def test_time_can_be_cut_and_the_cell_is_a_step(batch_first: bool) -> None:
    layer = _layer(batch_first=batch_first).eval()
    cell = EGRUCell(5, 7).double().eval()
    cell.load_state_dict(layer.state_dict())
    x = _x(3, 6, 5)
    given = x if batch_first else x.transpose(0, 1)
    axis = 1 if batch_first else 0
    whole, end = layer(given)
    assert end.o.any(), "a layer without events shows nothing"
    first, state = layer(given.narrow(axis, 0, 4))
    second, state = layer(given.narrow(axis, 4, 2), state)
    torch.testing.assert_close(torch.cat([first, second], axis), whole)
    torch.testing.assert_close(state, end)
    state, steps = None, []
    for t in range(6):
        y, state = cell(x[:, t], state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, axis), whole)
    torch.testing.assert_close(state, end)
    y, sequences = layer(given, return_sequences=True)
    torch.testing.assert_close(EGRUState(*(value.select(axis, -1) for value in sequences)), end)
    assert torch.equal(y, sequences.y)


def test_no_step_leaves_the_state_as_it_is() -> None:
    layer = _layer()
    _, state = layer(_x(2, 3, 5))
    y, after = layer(_x(2, 0, 5), state)
    assert y.shape == (2, 0, 7)
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


def test_y_only_forgets_everything_but_y() -> None:
    full, published = _layer(), _layer(state_carry="y_only")
    _, state = full(_x(2, 8, 5))
    x = _x(2, 3, 5, seed=2)
    torch.testing.assert_close(published(x, state), full(x, full.init_state(2)._replace(y=state.y)))
    assert not torch.allclose(published(x, state)[0], full(x, state)[0])


def test_masks_are_drawn_in_training_only() -> None:
    layer = _layer(dropout=0.5, zoneout=0.4)
    x = _x(2, 9, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        one, other = layer(x)[0], layer(x)[0]
        assert not torch.equal(one, other)
        torch.manual_seed(3)
        assert torch.equal(layer(x)[0], one)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.zoneout = 0.0
    assert torch.allclose(layer(x)[0], _layer().eval()(x)[0]), "DropConnect is not there in evaluation"


def test_dropconnect_drops_elements_and_keeps_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask for all steps and rows, whose gradient reaches exactly the weights that were kept."""
    seen: list[Tensor] = []

    def scan(a: Tensor, recurrent_kernel: Tensor, *args: object, **options: object) -> object:
        seen.append(recurrent_kernel.detach())
        return kernels.egru_scan(a, recurrent_kernel, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "egru_scan", scan)
    layer = _layer(dropout=0.5)
    y, _ = layer(_x(4, 12, 5))
    (used,) = seen
    kept = used != 0
    assert 0.2 < kept.double().mean() < 0.8
    torch.testing.assert_close(used[kept], 2 * layer.recurrent_kernel[kept])
    y.sum().backward()
    assert layer.recurrent_kernel.grad is not None
    assert (layer.recurrent_kernel.grad[~kept] == 0).all()


def test_zoneout_in_evaluation_is_the_mean_of_training() -> None:
    """One step from one state: p is linear in the mask, so the mean over masks is exact."""
    layer = _layer(zoneout=0.25, thr_mean=0.9).eval()
    with torch.no_grad():
        layer.thr.fill_(1.0)  # no events, and c is p
    state = layer.init_state(1, dtype=torch.float64)._replace(c=0.5 * torch.tanh(_x(1, 7)))
    x = _x(1, 1, 5)
    _, mean = layer(x, state)
    _, moved = _layer_like(layer, zoneout=0.0)(x, state)
    torch.testing.assert_close(mean.c, 0.25 * state.c + 0.75 * moved.c)


def _layer_like(layer: EGRU, **options: float) -> EGRU:
    twin = EGRU(layer.input_size, layer.hidden_size, **options).double().eval()  # type: ignore[arg-type]
    twin.load_state_dict(layer.state_dict())
    return twin


def test_thresholds_are_put_back_in_training_and_left_alone_in_evaluation() -> None:
    layer = _layer()
    wild = torch.linspace(-0.5, 1.5, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.thr.copy_(wild)
    x = _x(2, 6, 5)
    y, _ = layer.eval()(x)
    assert torch.equal(layer.thr.data, wild)
    first, _ = layer.train()(x)
    assert torch.equal(layer.thr.data, wild.clamp(0, 1))
    torch.testing.assert_close(first, y)
    second, _ = layer(x)  # two passes before one backward: putting back is no in-place change of the graph
    (first.sum() + second.sum()).backward()
    assert layer.thr.grad is not None
    assert layer.thr.grad[0] != 0, "a threshold at its bound still learns"


def test_gradients_flow_through_the_carried_state() -> None:
    layer = _layer()
    state = EGRUState(*(value.clone().requires_grad_() for value in layer.init_state(2, dtype=torch.float64)))
    y, after = layer(_x(2, 4, 5), state)
    grads = torch.autograd.grad(y.sum() + after.c.sum() + after.trace.sum(), [state.c, state.y, state.trace])
    assert all(bool(g.abs().sum() > 0) for g in grads)
    torch.testing.assert_close(grads[2], torch.full_like(grads[2], 0.9**4))


def test_initialisation() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = EGRU(200, 400, thr_mean=0.3, weight_initialization_gain=2.0)
        few = EGRU(4, 1000, thr_mean=0.01)
    for weight in (layer.kernel, layer.recurrent_kernel):
        assert weight.std().item() == pytest.approx(2.0 * (2 / sum(weight.shape)) ** 0.5, rel=0.02)
    assert layer.thr.mean().item() == pytest.approx(0.3, abs=0.03)
    assert layer.thr.std().item() == pytest.approx(0.20, abs=0.02)
    assert (few.thr < 1e-6).float().mean().item() == pytest.approx(0.69, abs=0.05)
    assert not layer.bias.any()
    assert not layer.recurrent_bias.any()
    assert set(layer.state_dict()) == {"kernel", "recurrent_kernel", "bias", "recurrent_bias", "thr"}


def test_bfloat16_autocast_and_bfloat16_weights() -> None:
    layer = _layer().float()
    x = _x(2, 5, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x)
    assert y.dtype == torch.float32
    assert {value.dtype for value in state} == {torch.float32}
    y.sum().backward()
    assert layer.kernel.grad is not None
    assert layer.kernel.grad.dtype == torch.float32
    half, state = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert {value.dtype for value in state} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "dropout must be in"),
        ({"zoneout": -0.1}, "zoneout must be in"),
        ({"thr_mean": 0.0}, "thr_mean must be in"),
        ({"pseudo_derivative_support": 0.0}, "pseudo_derivative_support must be above 0"),
        ({"state_carry": "c"}, "state_carry must be"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _layer(**options)


def test_bad_input_is_named() -> None:
    with pytest.raises(UsageError, match=r"not \(B, T, 5\)"):
        _layer()(_x(2, 3, 4))
    with pytest.raises(UsageError, match=r"not \(B, 5\)"):
        EGRUCell(5, 7)(torch.zeros(2, 3, 5))


def test_it_works_in_a_norse_sequence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Norse uses what torch has deprecated
        norse = pytest.importorskip("norse.torch.module.sequential")
    first, second = _layer(batch_first=False), EGRU(7, 3, batch_first=False).double()
    model = norse.SequentialState(first, torch.nn.Identity(), second)
    assert model.stateful_layers == [True, False, True]
    x = _x(6, 2, 5)
    whole, _ = model(x)
    _, states = model(x[:4])
    end, _ = model(x[4:], states)
    torch.testing.assert_close(end, whole[4:])
    torch.testing.assert_close(whole, second(first(x)[0])[0])


def test_without_norse_only_the_plain_path_is_missing() -> None:
    script = """
import sys
for name in ("norse", "norse.torch"):
    sys.modules[name] = None
import torch
from spiking_lm.errors import MissingExtraError
from spiking_lm_egru import EGRU
from spiking_lm_egru.functional import egru_norse
layer = EGRU(3, 4)
y, state = layer(torch.randn(2, 5, 3))
y.sum().backward()
try:
    egru_norse(torch.randn(5, 2, 3), layer.init_state(2), layer.kernel, layer.recurrent_kernel,
               layer.parameters_for_step())
except MissingExtraError as err:
    assert "spiking-lm[egru]" in str(err), err
else:
    raise AssertionError("the plain path needs Norse")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_does_not_import_torch() -> None:
    script = "import sys, spiking_lm_egru; assert 'torch' not in sys.modules; assert spiking_lm_egru.EGRU"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
