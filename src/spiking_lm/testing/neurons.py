"""The laws of a neuron, as a test class to inherit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from spiking_lm.interfaces import LIFDynamics, Neuron, State, detach_state, map_state, select_rows
from spiking_lm.testing.checks import (
    assert_close,
    assert_config_round_trip,
    assert_gradients_alive,
    assert_gradients_close,
    assert_identical,
    assert_kind,
    assert_no_new_tensors,
    assert_states_close,
    assert_states_identical,
    hidden_tensors,
    state_tensors,
)

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
odd_shapes = pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 9), (5, 1), (2, 33)], ids="B{}".format)


class NeuronContract:
    """Every law of :class:`spiking_lm.interfaces.Neuron`; inherit it and override the fixture :meth:`neuron`."""

    name: ClassVar[str | None] = None
    """The registry name of the neuron, e.g. ``"adlif"``; None leaves out the law about the registration."""
    untrained_parameters: ClassVar[Mapping[str, str]] = {}
    """Parameters (shell patterns) that get no gradient -> the reason."""

    @pytest.fixture
    def neuron(self) -> Neuron:
        """The neuron under test, with ``size`` at most a few dozen, or None where its size does not matter."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'neuron'")

    def inputs(self, neuron: Neuron, batch: int = 3, steps: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return input ``(B, T, N)`` on which some neurons fire and some stay silent; override it for another scale."""
        generator = torch.Generator().manual_seed(20)
        shape = (batch, steps, neuron.size or 7)
        return (2.5 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)

    # -- one computation, three ways -----------------------------------------------------------------------------------

    @both_dtypes
    def test_forward_is_a_scan_of_step(self, neuron: Neuron, dtype: torch.dtype) -> None:
        neuron = _cast(neuron, dtype)
        _assert_forward_is_scan(neuron, self.inputs(neuron, dtype=dtype))

    @odd_shapes
    def test_forward_is_a_scan_of_step_at_odd_shapes(self, neuron: Neuron, batch: int, steps: int) -> None:
        _assert_forward_is_scan(neuron, self.inputs(neuron, batch, steps))

    @both_dtypes
    def test_gradients_of_forward_are_those_of_step(self, neuron: Neuron, dtype: torch.dtype) -> None:
        neuron = _cast(neuron, dtype)
        x = self.inputs(neuron, dtype=dtype)
        start = _running_state(neuron, x)
        by_step = _gradients(neuron, _scan, x, start)
        by_forward = _gradients(neuron, Neuron.__call__, x, start)
        for what, gradient in by_step.items():
            assert_gradients_close(by_forward[what], gradient, f"forward against scan of step, gradient of {what}")

    def test_two_pieces_with_carried_state_are_one(self, neuron: Neuron) -> None:
        x = self.inputs(neuron, steps=11)
        spikes, state = neuron(x)
        for cut in (1, 4, 10):
            first, carried = neuron(x[:, :cut])
            second, final = neuron(x[:, cut:], carried)
            assert_identical(torch.cat([first, second], 1), spikes, f"pieces of {cut} and {11 - cut} steps, spikes")
            assert_states_close(final, state, f"pieces of {cut} and {11 - cut} steps")

    def test_no_steps_leave_the_state_alone(self, neuron: Neuron) -> None:
        x = self.inputs(neuron)
        start = _running_state(neuron, x)
        spikes, state = neuron(x[:, :0], start)
        assert spikes.shape == x[:, :0].shape, f"0 steps: spikes have shape {tuple(spikes.shape)}"
        assert_states_identical(state, start, "0 steps")

    def test_starting_without_state_is_starting_at_rest(self, neuron: Neuron) -> None:
        x = self.inputs(neuron)
        spikes, state = neuron(x)
        rested, rested_state = neuron(x, neuron.init_state((x.shape[0], x.shape[2]), dtype=x.dtype))
        assert_identical(spikes, rested, "state None against init_state(), spikes")
        assert_states_identical(state, rested_state, "state None against init_state()")

    # -- what is declared ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_spikes_are_of_the_declared_kind(self, neuron: Neuron, dtype: torch.dtype) -> None:
        neuron = _cast(neuron, dtype)
        spikes, _ = neuron(self.inputs(neuron, dtype=dtype))
        assert_kind(spikes, neuron.spike_kind, type(neuron).__name__)

    def test_some_fire_and_some_are_silent(self, neuron: Neuron) -> None:
        spikes, _ = neuron(self.inputs(neuron))
        rate = float((spikes != 0).double().mean())
        assert 0 < rate < 1, (
            f"firing rate {rate:g} on inputs(): override inputs() so that the laws see spikes and silence"
        )

    @both_dtypes
    def test_dynamics_are_those_of_step(self, neuron: Neuron, dtype: torch.dtype) -> None:
        dynamics = _dynamics(neuron)
        neuron = _cast(neuron, dtype)
        x = self.inputs(neuron, dtype=dtype)
        start = _running_state(neuron, x)
        assert isinstance(start, Tensor), "a neuron with dynamics has one state tensor, the membrane"
        spikes, v = _scan(neuron, x, start)
        kernel_spikes, kernel_v = _run_dynamics(dynamics, x, start)
        assert_identical(kernel_spikes, spikes, "dynamics against step, spikes")
        assert_close(kernel_v, v, "dynamics against step, membrane")
        by_step = _gradients(neuron, _scan, x, start)
        by_kernel = _gradients(neuron, lambda _, x, v: _run_dynamics(dynamics, x, v), x, start)
        for what, gradient in by_step.items():
            assert_gradients_close(by_kernel[what], gradient, f"dynamics against step, gradient of {what}")

    def test_a_membrane_exactly_at_the_threshold_does_what_is_declared(self, neuron: Neuron) -> None:
        dynamics = _dynamics(neuron)
        x = torch.full((1, 1, neuron.size or 7), dynamics.threshold / dynamics.gain, dtype=torch.float64)
        if float(x[0, 0, 0]) * dynamics.gain != dynamics.threshold:
            pytest.skip("no float64 input puts this membrane exactly at its threshold")
        neuron = _cast(neuron, torch.float64)
        fires = dynamics.compare == ">="
        for way, run in (("step", _scan), ("forward", Neuron.__call__)):
            spikes, _ = run(neuron, x, neuron.init_state((1, x.shape[2]), dtype=x.dtype))
            assert set(spikes.flatten().tolist()) == {float(fires)}, (
                f"{way}: a membrane at the threshold must {'fire' if fires else 'stay silent'} "
                f"(dynamics declare {dynamics.compare!r})"
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_dtype_is_kept(self, neuron: Neuron, dtype: torch.dtype) -> None:
        neuron = _cast(neuron, dtype)
        x = self.inputs(neuron, dtype=dtype)
        rest = neuron.init_state((x.shape[0], x.shape[2]), dtype=dtype)
        for way, run in (("step", _scan), ("forward", Neuron.__call__)):
            spikes, state = run(neuron, x, rest)
            assert spikes.dtype == dtype, f"{way}: {dtype} input gave {spikes.dtype} spikes"
            for (path, before), (_, after) in zip(state_tensors(rest), state_tensors(state), strict=True):
                assert after.dtype == before.dtype, f"{way}: state{path} went from {before.dtype} to {after.dtype}"

    # -- state is explicit ---------------------------------------------------------------------------------------------

    def test_rows_of_the_batch_are_independent(self, neuron: Neuron) -> None:
        x = self.inputs(neuron, batch=4)
        spikes, state = neuron(x)
        for what, rows in (("permuted", [2, 0, 3, 1]), ("alone", [1]), ("repeated", [3, 3, 0, 1, 2, 1])):
            chosen = torch.tensor(rows)
            some, some_state = neuron(x[chosen])
            assert_identical(some, spikes[chosen], f"rows {what} ({rows}), spikes")
            assert_states_close(some_state, select_rows(state, chosen), f"rows {what} ({rows})")

    def test_every_state_tensor_is_batch_first(self, neuron: Neuron) -> None:
        size = neuron.size or 7
        state = neuron.init_state((5, size))
        for path, tensor in state_tensors(state):
            assert tensor.shape[:1] == (5,), f"state{path} has shape {tuple(tensor.shape)}: the batch comes first"
            assert not tensor.requires_grad, f"state{path}: the resting state needs no gradient"

    def test_state_can_be_selected_and_carried_on(self, neuron: Neuron) -> None:
        x = self.inputs(neuron, batch=4)
        _, state = neuron(x[:, :5])
        spikes, final = neuron(x[:, 5:], state)
        rows = torch.tensor([3, 1])
        some, some_final = neuron(x[rows, 5:], select_rows(state, rows))
        assert_identical(some, spikes[rows], "continued from select_rows(), spikes")
        assert_states_close(some_final, select_rows(final, rows), "continued from select_rows()")

    def test_interleaved_calls_do_not_disturb_each_other(self, neuron: Neuron) -> None:
        x, other = self.inputs(neuron), -self.inputs(neuron)
        spikes, state = neuron(x[:, 4:], neuron(x[:, :4])[1])
        _, ours = neuron(x[:, :4])
        _, theirs = neuron(other[:, :4])
        neuron(other[:2, 4:], select_rows(theirs, torch.tensor([0, 1])))
        between, final = neuron(x[:, 4:], ours)
        assert_identical(between, spikes, "with another sequence in between, spikes")
        assert_states_identical(final, state, "with another sequence in between")

    def test_nothing_is_kept_in_the_module(self, neuron: Neuron) -> None:
        x = self.inputs(neuron).requires_grad_()
        before = hidden_tensors(neuron)
        _, state = neuron(x)
        assert_no_new_tensors(before, hidden_tensors(neuron), "forward")
        neuron.step(x[:, 0], state)
        assert_no_new_tensors(before, hidden_tensors(neuron), "step")

    def test_state_is_not_changed_in_place(self, neuron: Neuron) -> None:
        x = self.inputs(neuron)
        start = _running_state(neuron, x)
        kept = map_state(torch.clone, start)
        neuron(x, start)
        assert_states_identical(start, kept, "the state handed to forward")
        neuron.step(x[:, 0], start)
        assert_states_identical(start, kept, "the state handed to step")

    # -- training ------------------------------------------------------------------------------------------------------

    def test_gradients_reach_inputs_and_parameters(self, neuron: Neuron) -> None:
        neuron = copy.deepcopy(neuron)
        x = self.inputs(neuron).requires_grad_()
        spikes, _ = neuron(x)
        assert spikes.requires_grad, "spikes are cut off from the graph: the spike function has no surrogate gradient"
        (spikes * torch.randn(spikes.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        assert x.grad is not None, "no gradient reaches the input"
        assert torch.isfinite(x.grad).all(), "the gradient of the input is not finite"
        assert x.grad.any(), "the gradient of the input is zero everywhere"
        assert_gradients_alive(neuron, self.untrained_parameters)

    def test_gradients_flow_through_time(self, neuron: Neuron) -> None:
        if not list(state_tensors(neuron.init_state((1, neuron.size or 7)))):
            pytest.skip(f"{type(neuron).__name__} has no state: nothing flows from step to step")
        x = self.inputs(neuron).requires_grad_()
        spikes, _ = neuron(x)
        spikes[:, -1].sum().backward()
        assert x.grad is not None, "no gradient reaches the input"
        assert x.grad[:, :-1].any(), "the last spike does not depend on earlier inputs: the state carries no gradient"

    def test_silence_and_saturation_stay_finite(self, neuron: Neuron) -> None:
        for scale in (0.0, 1e4, -1e4):
            x = torch.full_like(self.inputs(neuron), scale).requires_grad_()
            spikes, state = neuron(x)
            assert_kind(spikes, neuron.spike_kind, f"constant input {scale:g}")
            for path, tensor in state_tensors(state):
                assert torch.isfinite(tensor).all(), f"constant input {scale:g}: state{path} is not finite"
            (gradient,) = torch.autograd.grad(spikes.sum(), x)
            assert torch.isfinite(gradient).all(), f"constant input {scale:g}: the gradient is not finite"

    # -- module and configuration --------------------------------------------------------------------------------------

    def test_a_copy_taken_after_use_behaves_the_same(self, neuron: Neuron) -> None:
        x = self.inputs(neuron).requires_grad_()
        spikes, state = neuron(x)
        again, again_state = copy.deepcopy(neuron)(x)
        assert_identical(again, spikes, "deepcopy after a forward pass, spikes")
        assert_states_identical(detach_state(again_state), detach_state(state), "deepcopy after a forward pass")

    def test_state_dict_holds_the_weights_and_nothing_else(self, neuron: Neuron) -> None:
        neuron(self.inputs(neuron))
        fresh = type(neuron)(neuron.config, size=neuron.size)
        names = {name for name, _ in neuron.named_parameters()}
        stray = neuron.state_dict().keys() - names - {name for name, _ in neuron.named_buffers()}
        assert not stray, f"state_dict() holds what is neither parameter nor buffer: {sorted(stray)}"
        fresh.load_state_dict(neuron.state_dict())
        x = self.inputs(neuron)
        assert_identical(fresh(x)[0], neuron(x)[0], "rebuilt from config and state_dict(), spikes")

    def test_equal_seeds_give_equal_results(self, neuron: Neuron) -> None:
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            fresh = type(neuron)(neuron.config, size=neuron.size)
            results.append(fresh(self.inputs(fresh))[0])
        assert_identical(results[1], results[0], "built and run twice under one seed, spikes")

    def test_config_survives_json_and_refuses_typos(self, neuron: Neuron) -> None:
        assert_config_round_trip(neuron.config, neuron.config.model_dump(mode="json"))

    def test_registration_matches_the_class(self, neuron: Neuron) -> None:
        if self.name is None:
            pytest.skip("the test class names no registration (class attribute 'name')")
        from spiking_lm import create_neuron, registry

        entry = registry.get("neurons", self.name)
        assert entry.load("config") is type(neuron.config), f"{self.name!r} registers another config class"
        assert entry.spec.spike_kind == neuron.spike_kind, f"{self.name!r} registers another spike_kind"
        built = create_neuron(self.name, size=neuron.size, **neuron.config.model_dump(mode="json"))
        assert type(built) is type(neuron), f"{self.name!r} builds a {type(built).__name__}"
        assert built.config == neuron.config, f"{self.name!r} does not keep its configuration"


Run = Any


def _cast(neuron: Neuron, dtype: torch.dtype) -> Neuron:
    """A copy in another dtype, so that the fixture stays as it was."""
    return copy.deepcopy(neuron).to(dtype)


def _scan(neuron: Neuron, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Step by step, whatever the class does in forward() or scan()."""
    spikes = []
    for x_t in x.unbind(1):
        s_t, state = neuron.step(x_t, state)
        spikes.append(s_t)
    return torch.stack(spikes, 1), state


def _running_state(neuron: Neuron, x: Tensor) -> State:
    """A state that is not the resting one."""
    rest = neuron.init_state((x.shape[0], x.shape[2]), dtype=x.dtype)
    with torch.no_grad():
        return detach_state(_scan(neuron, x.flip(1)[:, :3], rest)[1])


def _assert_forward_is_scan(neuron: Neuron, x: Tensor) -> None:
    start = _running_state(neuron, x)
    spikes, state = _scan(neuron, x, start)
    fast, fast_state = neuron(x, start)
    assert_identical(fast, spikes, "forward against scan of step, spikes")
    assert_states_close(fast_state, state, "forward against scan of step")


def _gradients(neuron: Neuron, run: Run, x: Tensor, state: State) -> dict[str, Tensor | None]:
    """Gradients of a random functional of spikes and final state, by what they belong to."""
    x = x.detach().clone().requires_grad_()
    state = map_state(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), state)
    spikes, final = run(neuron, x, state)
    generator = torch.Generator().manual_seed(9)
    outputs = [spikes, *(t for _, t in state_tensors(final) if t.requires_grad)]
    weights = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs)
    loss = torch.stack([(t * w).sum() for t, w in zip(outputs, weights, strict=True)]).sum()
    leaves = {"the input": x}
    leaves.update({f"state{path}": t for path, t in state_tensors(state) if t.requires_grad})
    leaves.update({f"parameter {name}": p for name, p in neuron.named_parameters() if p.requires_grad})
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, grads, strict=True))


def _dynamics(neuron: Neuron) -> LIFDynamics:
    if neuron.dynamics is None:
        pytest.skip(f"{type(neuron).__name__} declares no dynamics for this configuration: it runs step by step")
    return neuron.dynamics


def _run_dynamics(dynamics: LIFDynamics, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What the declared dynamics say, computed by the reference implementation of the kernel."""
    from spiking_lm import kernels

    with kernels.use(lif_scan="reference"):
        return dynamics.run(x, v)
