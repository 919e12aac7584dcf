"""What holds for every shape and seed: the fast scan is the plain loop, and the past is the past."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spiking_lm import create_model, create_neuron, explain, kernels, load_model, save_model
from spiking_lm.errors import CheckpointError, ConfigError, DivergedError, UsageError
from spiking_lm.kernels import torch_elastic
from spiking_lm.weights import pack_weights
from spiking_lm_spikelm import SnnTorchElastic
from spiking_lm_spikelm.model import SpikeLM
from spiking_lm_spikelm.neuron import Elastic, ElasticState

quick = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL: dict[str, Any] = {"vocab_size": 31, "n_layer": 2, "n_embd": 16, "n_head": 2, "n_hidden": 24, "ctx_len": 16}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def elastic(**params: Any) -> Elastic:
    neuron = create_neuron("elastic", **params)
    assert isinstance(neuron, Elastic)
    return neuron


def spikelm(**changes: Any) -> SpikeLM:
    torch.manual_seed(3)
    model = create_model("spikelm", **{**SMALL, **changes})
    assert isinstance(model, SpikeLM)
    return model


def calibrated(**changes: Any) -> SpikeLM:
    model = spikelm(**changes)
    model.calibrate(torch.randint(31, (8, 16), generator=torch.Generator().manual_seed(1)))
    return model.eval()


# -- the scan ----------------------------------------------------------------------------------------------------------


@quick
@given(
    steps=st.integers(0, 6),
    shape=st.sampled_from([(), (1,), (3, 7), (2, 3, 5), (0,), (130,)]),
    options=st.fixed_dictionaries(
        {
            "beta": st.sampled_from([0.0, 0.25, 1 / 3, 1.0]),
            "bits": st.sampled_from([1, 2]),
            "reset": st.sampled_from(["asymmetric", "symmetric"]),
        }
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    carried=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_fast_scan_is_the_plain_loop(
    steps: int, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, carried: bool, seed: int
) -> None:
    results = []
    torch_elastic.CHUNK, before = 50, torch_elastic.CHUNK
    try:
        for implementation in ("reference", "torch"):
            x = normal(seed, steps, *shape, dtype=dtype).requires_grad_()
            alpha = (0.6 + normal(seed + 1, steps, dtype=dtype).abs()).requires_grad_()
            start = normal(seed + 2, *shape, dtype=dtype).requires_grad_() if carried else None
            inputs = [t for t in (x, alpha, start) if t is not None]
            with kernels.use(elastic_scan=implementation):
                spikes, after = kernels.elastic_scan(x, alpha, start, **options)
            assert after is not None
            codes = spikes.detach() / alpha.detach().view(-1, *[1] * len(shape))
            assert bool(((codes == 0) | (codes.abs() == 1)).all())
            loss = (spikes * normal(seed + 3, *spikes.shape, dtype=dtype)).sum()
            loss = loss + (after * normal(seed + 4, *after.shape, dtype=dtype)).sum()
            grads = [None] * len(inputs)
            if loss.requires_grad:
                grads = list(torch.autograd.grad(loss, inputs, allow_unused=True))
            zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]
            results.append([spikes, after, *zeros])
    finally:
        torch_elastic.CHUNK = before
    assert torch.equal(results[0][0], results[1][0])
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (2e-5, 2e-5)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def test_without_gradients_the_scan_is_the_same() -> None:
    x, alpha = normal(0, 4, 3, 70, dtype=torch.float32), torch.tensor([0.9, 1.2, 0.0, 1.0])
    spikes, after = kernels.elastic_scan(x.requires_grad_(), alpha)
    with torch.no_grad():
        again, after_again = kernels.elastic_scan(x, alpha)
    assert torch.equal(spikes, again)
    assert after is not None
    assert after_again is not None
    assert torch.equal(after, after_again)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_what_is_no_number_is_not_silent(implementation: str, bits: Any) -> None:
    x = torch.tensor([[0.0, float("nan"), 2.0]])
    with kernels.use(elastic_scan=implementation):
        spikes, _ = kernels.elastic_scan(x, torch.ones(1), bits=bits)
    assert bool(spikes[0, 1].isnan())
    assert spikes[0, [0, 2]].tolist() == [0.0, 1.0]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="alpha has shape"):
        kernels.elastic_scan(torch.zeros(4, 3), torch.ones(3))
    with pytest.raises(UsageError, match="carried has shape"):
        kernels.elastic_scan(torch.zeros(4, 3), torch.ones(4), torch.zeros(4))
    with pytest.raises(UsageError, match="bits is 1 or 2"):
        kernels.elastic_scan(torch.zeros(4, 3), torch.ones(4), bits=4)  # type: ignore[arg-type]


# -- amplitudes --------------------------------------------------------------------------------------------------------


def test_the_first_training_pass_sets_the_amplitudes_and_no_later_one() -> None:
    neuron = elastic(steps=3)
    x = normal(0, 3, 5, 7, dtype=torch.float32)
    first = neuron.fire(x)
    assert bool(neuron.initialized.all())
    assert float(neuron.alpha[0]) == pytest.approx(2 * float(x[0].abs().mean()))
    kept = neuron.alpha.clone()
    neuron.fire(10 * x)
    assert torch.equal(neuron.alpha, kept)
    neuron.calibrate(10 * x.transpose(0, 1))
    assert not torch.equal(neuron.alpha, kept)
    assert not torch.equal(neuron.fire(x), first)


def test_an_amplitude_of_one_is_an_amplitude() -> None:
    neuron = elastic(steps=2)
    neuron.set_amplitudes(torch.ones(2))
    neuron.fire(normal(0, 2, 50, dtype=torch.float32))
    assert neuron.alpha.tolist() == [1.0, 1.0]


def test_evaluation_sets_nothing_and_says_so() -> None:
    neuron = elastic().eval()
    with pytest.raises(UsageError, match="evaluation does not set them") as error:
        neuron.fire(torch.ones(4, 2))
    assert "calibrate()" in str(error.value.hint)
    assert not bool(neuron.initialized.any())
    with pytest.raises(UsageError, match="not set"):
        spikelm(causal=True).eval()(torch.zeros(1, 3, dtype=torch.long))


def test_currents_that_are_not_finite_are_refused_and_change_nothing() -> None:
    neuron = elastic(steps=2)
    x = normal(0, 2, 9, dtype=torch.float32)
    x[1, 3] = float("nan")
    with pytest.raises(DivergedError, match="not finite"):
        neuron.fire(x)
    assert not bool(neuron.initialized.any())
    assert neuron.alpha.tolist() == [1.0, 1.0]


def test_amplitudes_are_saved_with_what_is_known_of_them(tmp_path: Path) -> None:
    model = calibrated(causal=True)
    save_model(model, tmp_path / "set")
    again = load_model(tmp_path / "set").eval()
    tokens = torch.arange(9)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    save_model(spikelm(causal=True), tmp_path / "fresh")
    with pytest.raises(UsageError, match="not set"):
        load_model(tmp_path / "fresh").eval()(tokens)


def test_rows_at_different_steps_have_their_own_amplitudes() -> None:
    neuron = elastic(steps=4)
    neuron.set_amplitudes(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    x = 5 * normal(0, 2, 6, dtype=torch.float32)
    mixed = ElasticState(torch.zeros(2, 6), torch.tensor([0, 3]))
    spikes, after = neuron.step(x, mixed)
    assert spikes[0].abs().max() == 0.5
    assert spikes[1].abs().max() == 2.0
    assert after.step.tolist() == [1, 4]


RANKS = """
    import sys, torch, torch.distributed as dist
    from spiking_lm import create_neuron
    rank = int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    neuron = create_neuron("elastic", steps=2)
    neuron.fire(torch.full((2, 3 + 2 * rank), 1.0 + rank))
    print(neuron.alpha.tolist())
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo and files")
def test_all_ranks_set_the_same_amplitudes(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(RANKS), str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert said[0] == said[1]
    mean = (3 * 1.0 + 5 * 2.0) / 8  # each rank by its number of neurons
    assert eval(said[0])[0] == pytest.approx(2 * mean)


# -- in loops written for snnTorch -------------------------------------------------------------------------------------


def test_a_loop_written_for_snntorch() -> None:
    snn = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(6, 5), nn.Linear(5, 4)
    elastic1, leaky = SnnTorchElastic(steps=4), snn.Leaky(beta=0.5)
    snn.SpikingNeuron.instances.remove(leaky)
    x = normal(1, 4, 3, 6, dtype=torch.float32).requires_grad_()
    mem1, mem2 = elastic1.init_leaky(), leaky.init_leaky()
    spikes, membranes = [], []
    for t in range(4):
        spk1, mem1 = elastic1(fc1(x[t]), mem1)
        _, mem2 = leaky(fc2(spk1), mem2)
        spikes.append(spk1)
        membranes.append(mem1)
    loop = torch.stack(spikes)
    assert torch.stack(membranes).shape == (4, 3, 5)
    mem2.sum().backward(retain_graph=True)
    assert x.grad is not None
    assert bool(x.grad[0].any())
    ours = elastic(steps=4)
    ours.set_amplitudes(elastic1.neuron.alpha)
    y = normal(1, 4, 3, 6, dtype=torch.float32).requires_grad_()
    scanned = ours.fire(fc1(y))
    assert torch.equal(scanned, loop)
    x.grad = None
    (loop * normal(2, 4, 3, 5, dtype=torch.float32)).sum().backward()
    (scanned * normal(2, 4, 3, 5, dtype=torch.float32)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


# -- the model ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(place=st.integers(0, 11), seed=st.integers(0, 99), steps=st.sampled_from([1, 3]))
def test_a_changed_token_changes_nothing_before_it(place: int, seed: int, steps: int) -> None:
    model = calibrated(causal=True, steps=steps)
    tokens = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(seed))
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 31
    with torch.no_grad():
        difference = (model(tokens).logits - model(changed).logits).abs().amax((0, 2))
    assert float(difference[:place].sum()) == 0.0
    assert float(difference[place]) > 0


def test_the_cache_holds_codes() -> None:
    model = calibrated(causal=True)
    state = model(torch.arange(7)[None]).state
    assert state[0].keys.dtype == torch.int8
    assert state[0].keys.shape == (1, 4, 2, 7, 8)
    assert set(state[0].values.unique().tolist()) == {-1, 0, 1}


def test_interchangeable_neurons_do_for_one_another() -> None:
    model = calibrated(num_classes=3)
    tokens, lengths = torch.randint(31, (4, 9)), torch.tensor([9, 3, 5, 7])
    shared = model.classify(tokens, lengths)
    key = model.layers()[0].attention.key.neuron
    assert isinstance(key, Elastic)
    assert model.layers()[0].attention.query.neuron.equals(key)  # type: ignore[union-attr, operator]
    key.config = key.config.model_copy(update={"k": 3.0})  # another configuration with the same amplitudes
    assert not model.layers()[0].attention.query.neuron.equals(key)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(model.classify(tokens, lengths), shared)
    with torch.no_grad():
        key.alpha.mul_(3.0)
    assert not torch.allclose(model.classify(tokens, lengths), shared)


def test_every_matrix_reads_spikes() -> None:
    found = explain(calibrated(causal=True), torch.randint(31, (2, 16)))
    spiking = [op for op in found.ops if op.op_class == "AC"]
    assert len(spiking) == 12
    assert {op.steps for op in spiking} == {4.0}
    assert found.additions_per_product is not None
    assert 0.8 < found.additions_per_product < 2.4
    dense = explain(spikelm(causal=True, neuron=None), torch.randint(31, (2, 16)))
    assert dense.sites == ()
    assert not any(op.op_class == "AC" for op in dense.ops)


def test_packed_weights_are_equal_and_another_precision_is_refused(tmp_path: Path) -> None:
    model = calibrated(num_classes=2, weights="ternary")
    tokens, lengths = torch.randint(31, (3, 8)), torch.tensor([8, 8, 2])
    before = model.classify(tokens, lengths)
    assert pack_weights(model) == 12
    save_model(model, tmp_path / "packed")
    torch.testing.assert_close(load_model(tmp_path / "packed").eval().classify(tokens, lengths), before)
    with pytest.raises(CheckpointError, match="ternary weights"):
        calibrated(num_classes=2, weights="binary").expect(model.state_dict())


def test_bad_requests_are_told() -> None:
    model = calibrated(causal=True)
    with pytest.raises(UsageError, match="17 tokens for a model that knows 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(UsageError, match=r"token ids \(B, S\)"):
        model(torch.zeros(3, dtype=torch.long))
    encoder = calibrated(num_classes=2)
    for call in (lambda: encoder(torch.zeros(1, 2, dtype=torch.long)), lambda: encoder.init_state(1)):
        with pytest.raises(UsageError, match="reads whole texts"):
            call()
    with pytest.raises(UsageError, match="no head for masked tokens"):
        encoder.predict_masked(torch.zeros(1, 2, dtype=torch.long), torch.tensor([2]))
    with pytest.raises(ConfigError, match="no multiple of n_head"):
        spikelm(n_head=3)
    with pytest.raises(ConfigError, match="seen no other"):
        spikelm(causal=True, pooling="cls")
    with pytest.raises(ConfigError, match="elastic"):
        spikelm(neuron={"k": 2.0})


def test_regression_has_one_value_and_a_gradient() -> None:
    model = calibrated(num_classes=1)
    value = model.train().classify(torch.randint(31, (4, 6)), torch.full((4,), 6))
    assert value.shape == (4, 1)
    (value - 1).square().mean().backward()
    assert model.classify_head is not None
    assert model.classify_head.weight.grad is not None
    assert bool(model.word.weight.grad.any())  # type: ignore[union-attr]
