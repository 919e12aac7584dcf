"""Norse's neurons: the kernel that stands in for them, against Norse's own cells in Norse's own loop."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from spiking_lm import create_neuron
from spiking_lm.errors import ConfigError, UsageError
from spiking_lm.interfaces import Neuron

SHAPE = (2, 256, 64)


def drive(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2.5 + 0.5).to(dtype)


def box_by_hand(x: Tensor, v: Tensor, dt: float = 0.001, **parameters: Any) -> tuple[Tensor, Tensor]:
    """Norse's ``LIFBoxCell`` in a loop: spikes ``(B, T, N)`` and the membranes after every step."""
    from norse.torch import LIFBoxCell, LIFBoxFeedForwardState, LIFBoxParameters

    import spiking_lm_egru.neurons  # noqa: F401 - imports Norse without its warnings

    defaults = {"tau_mem_inv": 500.0, "v_leak": 0.0, "v_th": 1.0, "v_reset": 0.0}
    p = LIFBoxParameters(
        **{
            name: torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value
            for name, value in {**defaults, **parameters}.items()
        }
    )
    cell, state = LIFBoxCell(p, dt=dt), LIFBoxFeedForwardState(v=v)
    spikes, membranes = [], []
    for x_t in x.unbind(1):
        s_t, state = cell(x_t, state)
        spikes.append(s_t)
        membranes.append(state.v)
    return torch.stack(spikes, 1), torch.stack(membranes, 1)


def gradients(spikes: Tensor, membranes: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum()
        for t in (spikes, membranes)
    )
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, leaves)


def norses(**parameters: Any) -> dict[str, Any]:
    """Our parameters of the box in the words of Norse's tuple."""
    from norse.torch.functional.reset import reset_subtract, reset_value

    reset = parameters.pop("reset_method", "value")
    return {**parameters, "reset_method": reset_value if reset == "value" else reset_subtract}


FORMS: dict[str, dict[str, Any]] = {
    "super": {"tau_mem_inv": 500.0},
    "slow": {"tau_mem_inv": 123.0, "v_th": 0.6},
    "triangle": {"tau_mem_inv": 500.0, "method": "triangle", "alpha": 1.0},
    "tanh": {"tau_mem_inv": 500.0, "method": "tanh", "alpha": 2.0},
    "another-rest": {"tau_mem_inv": 300.0, "v_leak": -0.25, "v_reset": -0.25},
    "subtract": {"tau_mem_inv": 500.0, "reset_method": "subtract"},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_computes_norses_box_in_float64(form: str) -> None:
    box = create_neuron("norse.lif_box", **FORMS[form])
    assert box.dynamics is not None
    x, v = drive().requires_grad_(), (0.4 * drive((2, 64)) - 0.5).requires_grad_()
    spikes, membranes = box_by_hand(x, v, **norses(**FORMS[form]))
    ours, our_membranes = box.dynamics.run(x, v, final_only=False)
    assert 0.05 < float(spikes.detach().mean()) < 0.95
    assert torch.equal(ours, spikes)
    assert (our_membranes - membranes).abs().max() <= 1e-12
    expected = gradients(spikes, membranes, x, v)
    for mine, theirs in zip(gradients(ours, our_membranes, x, v), expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_spikes_in_float32_are_norses(form: str) -> None:
    x = drive((1, 1024, 256), torch.float32)
    box = create_neuron("norse.lif_box", **FORMS[form])
    rest = box.init_state((1, 256))
    with torch.no_grad():
        by_hand, membranes = box_by_hand(x, rest, **norses(**FORMS[form]))
        stepped, stepped_v = box.scan(x, rest)
        fast, fast_v = box(x)
    assert torch.equal(stepped, by_hand)
    assert torch.equal(stepped_v, membranes[:, -1])
    assert int((fast != by_hand).sum()) == 0
    assert (fast_v - stepped_v).abs().max() <= 1e-5


def test_with_half_the_input_it_is_spikegpts_neuron_but_for_ties() -> None:
    x = drive((1, 512, 128), torch.float32)
    same = {"compare": ">", "surrogate": {"name": "fast_sigmoid", "alpha": 1.0}}
    box = create_neuron("norse.lif_box", tau_mem_inv=500.0)
    for name in ("lif", "snntorch.leaky"):
        other = create_neuron(name, **same)
        assert other.dynamics == box.dynamics
        assert torch.equal(other(x)[0], box(x)[0])
    at_threshold = torch.full((1, 1, 3), 2.0)
    assert float(box(at_threshold)[0].sum()) == 0
    assert float(create_neuron("lif")(at_threshold)[0].sum()) == 3


@pytest.mark.parametrize(
    ("parameters", "height", "wide"),
    [
        ({"method": "triangle", "alpha": 0.3}, 0.3, 0.3 * 0.6),
        ({"method": "tanh", "alpha": 1.0}, 1.0, 1 - 0.379948962**2),
        ({"method": "circ", "alpha": 1.0}, 1.0, 1 / 1.16**1.5),
        ({"method": "heavi_erfc"}, 2 / torch.pi**0.5, 2 / torch.pi**0.5 * 0.852143788966),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_a_surrogate_that_the_kernels_lack_is_norses_step_by_step(
    parameters: dict[str, Any], height: float, wide: float
) -> None:
    """ds/dh at a distance of 0 and of -0.4 from the threshold."""
    neuron = create_neuron("norse.lif_box", tau_mem_inv=1000.0, **parameters)
    assert neuron.dynamics is None
    x = torch.tensor([[[1.0, 0.6]]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(neuron(x)[0].sum(), x)
    assert gradient.flatten().tolist() == pytest.approx([height, wide], rel=1e-6)


def test_the_current_of_norse_lif_charges_the_membrane_for_longer() -> None:
    from spiking_lm_egru.neurons import LIFFeedForwardState

    neuron = create_neuron("norse.lif", tau_mem_inv=500.0, tau_syn_inv=250.0)
    assert neuron.dynamics is None
    x = torch.zeros(1, 5, 1)
    x[0, 0, 0] = 1.0
    state, seen = neuron.init_state((1, 1)), []
    for x_t in x.unbind(1):
        spikes, state = neuron.step(x_t, state)
        seen.append((float(state.v), float(state.i)))
        assert float(spikes) == 0
    assert isinstance(state, LIFFeedForwardState)
    assert [i for _, i in seen] == pytest.approx([0.75**n for n in range(1, 6)])
    assert [v for v, _ in seen[:3]] == pytest.approx([0.5, 0.5 * (0.5 + 0.75), 0.5 * (0.625 + 0.5625)])


def test_without_a_lasting_current_norse_lif_is_the_box() -> None:
    x = drive().requires_grad_()
    brief = create_neuron("norse.lif", tau_mem_inv=500.0, tau_syn_inv=1000.0)
    box = create_neuron("norse.lif_box", tau_mem_inv=500.0)
    ours, state = brief(x)
    theirs, v = box.scan(x, box.init_state((2, 64), dtype=x.dtype))
    assert torch.equal(ours, theirs)
    assert torch.equal(state.v, v)
    assert int(torch.count_nonzero(state.i)) == 0
    assert torch.allclose(gradients(ours, state.v, x)[0], gradients(theirs, v, x)[0], rtol=0, atol=1e-12)


def test_membrane_updates_are_counted() -> None:
    import spiking_lm

    for neuron in ("norse.lif_box", "norse.lif"):
        model = spiking_lm.create_model(
            "spikegpt", vocab_size=16, n_layer=1, n_embd=8, neuron={"type": neuron, "tau_mem_inv": 500.0}
        )
        explanation = spiking_lm.explain(model, torch.arange(40) % 16)
        assert not [note for note in explanation.notes if "blocks" in note]
        assert (explanation.neurobench.membrane_updates_per_token or 0) > 0


def neurons() -> list[Neuron]:
    return [create_neuron("norse.lif_box", method="circ"), create_neuron("norse.lif")]


def test_nothing_of_norse_is_saved_cast_or_lost() -> None:
    for neuron in neurons():
        neuron.to(torch.bfloat16)
        assert not neuron.state_dict()
        for again in (copy.deepcopy(neuron), pickle.loads(pickle.dumps(neuron))):
            x = drive((1, 20, 4), torch.float32)
            assert torch.equal(again(x)[0], neuron(x)[0])


def test_neurons_are_built_and_run_on_the_meta_device() -> None:
    with torch.device("meta"):
        for neuron in [*neurons(), create_neuron("norse.lif_box")]:
            spikes, _ = neuron(torch.zeros(2, 3, 4))
            assert spikes.device.type == "meta"
            assert spikes.shape == (2, 3, 4)


def test_a_membrane_of_another_shape_is_refused() -> None:
    for neuron, name in zip(neurons(), ("norse.lif_box", "norse.lif"), strict=True):
        with pytest.raises(UsageError, match=rf"{name}: a membrane of shape \(1, 4\) for input of shape \(2, 4\)"):
            neuron.step(torch.zeros(2, 4), neuron.init_state((1, 4)))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("norse.lif_box", {"tau_mem_inv": 1500.0}, "above 1 the membrane overshoots"),
        ("norse.lif_box", {"v_reset": 1.0}, "v_th must lie above v_reset and v_leak"),
        ("norse.lif_box", {"alpha": 100.0}, "whatever alpha is; leave alpha out"),
        ("norse.lif_box", {"method": "heaviside"}, "method"),
        ("norse.lif", {"tau_syn_inv": 1500.0}, "above 1 the current changes sign"),
        ("norse.lif", {"reset_method": "subtract"}, "unknown field 'reset_method'"),
    ],
)
def test_parameters_that_make_no_neuron_are_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_neuron(name, **parameters)


def test_import_is_silent_and_listing_does_not_import_it() -> None:
    code = (
        "import sys, spiking_lm\n"
        "from spiking_lm import registry\n"
        "entries = registry.all('neurons')\n"
        "for name in ('norse.lif_box', 'norse.lif'): entries[name].load('config')\n"
        "assert 'norse' not in sys.modules and 'torch' not in sys.modules\n"
        "spiking_lm.create_neuron('norse.lif_box')\n"
        "assert 'norse' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout + done.stderr
