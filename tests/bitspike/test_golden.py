"""Golden values of the released SpikingBERT: rates, equilibria, scores, distillation losses, gradients, solvers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from spiking_lm import create_neuron, import_reference
from spiking_lm.distillation import attention_loss, representation_loss, soft_cross_entropy
from spiking_lm_bitspike.broyden import find_root
from spiking_lm_bitspike.dynamics import Spiking
from spiking_lm_bitspike.equilibrium import fixed_point
from spiking_lm_bitspike.model import Bitspike

FORWARD = {
    "b_forward_vth1": "full",
    "b_forward_vth07": "full",
    "b_forward_ternary": "ternary",
    "b_forward_binary": "binary",
}


class Golden(NamedTuple):
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def model(self, **config: Any) -> Bitspike:
        """The student with its weights; those behind the levels where there are levels."""
        weights = {**self.below("state/"), **self.below("latent/")}
        settings = {"n_head": self.meta["config"]["num_attention_heads"], "vth": self.meta["vth"], **config}
        model = import_reference("bitspike", weights, **settings)
        assert isinstance(model, Bitspike)
        return model.eval()


@pytest.fixture
def read(shared: Path) -> Any:
    def load(name: str) -> Golden:
        path = shared / "golden" / "spikelm_bitspike" / name
        return Golden(load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text(encoding="utf-8")))

    return load


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["b_neuron_if", "b_neuron_if_vth2", "b_neuron_lif"])
def test_the_neuron(read: Any, name: str) -> None:
    golden = read(name)
    vth, leak = golden.meta["vth"], golden.meta["leaky"]
    neuron = create_neuron("lif", beta=leak, gain=1.0, threshold=vth, reset="subtract")
    current = golden.tensors["current"]
    for steps in golden.meta["T"]:
        spikes, _ = neuron(current[:, None].expand(-1, steps, -1))
        assert torch.equal((spikes.mean(1) * steps).round(), (golden.tensors[f"asr_T{steps}"] * steps).round())
    close((current / vth).clamp(0, 1), golden.tensors["clamp_equilibrium"])


@pytest.mark.parametrize("name", FORWARD)
def test_rates_scores_and_equilibrium(read: Any, name: str) -> None:
    golden = read(name)
    for steps in golden.meta["T"]:
        model = golden.model(steps=steps, leak=golden.meta["leaky"], weights=FORWARD[name])
        lengths = golden.tensors["attention_mask"].sum(1)
        batch = model._batch(golden.tensors["input_ids"], lengths=lengths, types=golden.tensors["segment_ids"])
        with torch.no_grad():
            rates, clamped = model.simulate(batch).rates, model.clamp(batch)
            spiking = Spiking(model.config, model._neurons(), batch, ())
            spiking.scores = []
            model.chain(batch.charge.expand(steps, *batch.charge.shape), batch.mask, spiking)
        for index, population in enumerate(model.chain.names()):
            close(rates[population], golden.tensors[f"asr_T{steps}/layer{index:02d}"], rtol=0, atol=1e-9)
            close(clamped.values[population], golden.tensors[f"equilibrium/layer{index:02d}"])
        assert clamped.scores is not None
        for block in range(model.config.n_layer):
            close(clamped.scores[block], golden.tensors[f"equilibrium/attn_scores{block + 1}"])
            close(spiking.scores[block].sum(0), golden.tensors[f"asr_T{steps}/attn_scores_sum{block + 1}"])


@pytest.mark.parametrize(("name", "weights"), [("b_kd_task", "full"), ("b_kd_ternary", "ternary")])
def test_distillation_losses_and_gradients(read: Any, name: str, weights: str) -> None:
    """The gradients are those of backpropagation through the clamp network: the implicit ones, without a solver."""
    golden = read(name)
    tensors = golden.tensors
    model = golden.model(steps=golden.meta["T"], weights=weights).train()
    lengths = tensors["attention_mask"].sum(1)
    encoding = model.encode(tensors["input_ids"], lengths, types=tensors["segment_ids"])
    fitted = [model.to_teacher(hidden) for hidden in encoding.hidden]
    for index, hidden in enumerate(fitted):
        close(hidden, tensors[f"student_rep_fit/{index}"])
    for index, scores in enumerate(encoding.scores):
        close(scores, tensors[f"student_att/{index}"])
    layers = model.config.n_layer
    attention = [attention_loss([encoding.scores[i]], [tensors[f"teacher_att/{i}"]]) for i in range(layers)]
    representation = [representation_loss([fitted[i]], [tensors[f"teacher_rep/{i}"]]) for i in range(layers + 1)]
    close(torch.stack(attention), tensors["att_losses"])
    close(torch.stack(representation), tensors["rep_losses"])
    loss = torch.stack([*attention, *representation]).sum()
    close(loss, tensors["loss"][0])
    loss.backward()
    gradients = model.to_reference(grads=True)
    gradients["network_x.word_embeddings.weight"][0] = 0  # the released code never trains token 0, its padding
    for key, expected in golden.below("grad/").items():
        close(gradients[key], expected)

    model.zero_grad()
    logits = model.classify_pooled(model.encode(tensors["input_ids"], lengths, types=tensors["segment_ids"]).pooled)
    close(logits, tensors["student_logits"])
    for tau in (1.0, 2.0):
        close(soft_cross_entropy(logits, tensors["teacher_logits"], tau), tensors[f"soft_ce_tau{tau}"][0])
    close(F.cross_entropy(logits, tensors["labels"]), tensors["hard_ce"][0])
    soft_cross_entropy(logits, tensors["teacher_logits"]).backward()
    gradients = model.to_reference(grads=True)
    gradients["network_x.word_embeddings.weight"][0] = 0
    for key, expected in golden.below("grad_soft_ce/").items():
        close(gradients[key], expected)


def test_broyden_solves_the_adjoint_equation(read: Any) -> None:
    golden = read("b_broyden_a").tensors
    jacobian, gradient = golden["J"], golden["grad"]
    root = find_root(lambda v: jacobian.T @ v + gradient - v, torch.zeros_like(gradient))
    close(root.x, golden["exact"], rtol=1e-8, atol=1e-8)
    assert bool((root.residual <= 2e-10 * 12**0.5).all())


def test_feedback_has_the_analytic_equilibrium_and_gradients(read: Any) -> None:
    golden = read("b_analytic_feedback_a")
    tensors = golden.tensors
    f, w, b, x = (tensors[name].clone().requires_grad_() for name in ("F", "W", "b", "x"))
    vth = golden.meta["vth"]
    z, residual = fixed_point(
        lambda z: ((z @ f.T + x @ w.T + b) / vth).clamp(0, 1), torch.zeros_like(tensors["z_star"])
    )
    close(z, tensors["z_star"])
    assert float(residual.max()) < 1e-9
    z.backward(tensors["grad_z"])
    for name, leaf in (("F", f), ("W", w), ("b", b), ("x", x)):
        assert leaf.grad is not None
        close(leaf.grad, tensors[f"grad_{name}"], rtol=1e-9, atol=1e-9)


def test_feedback_by_simulation(read: Any) -> None:
    golden = read("b_analytic_feedback_a")
    tensors, vth = golden.tensors, golden.meta["vth"]
    neuron = create_neuron("lif", beta=1.0, gain=1.0, threshold=vth, reset="subtract")
    charge = tensors["x"] @ tensors["W"].T + tensors["b"]
    membrane, spikes, count = torch.zeros_like(charge), torch.zeros_like(charge), torch.zeros_like(charge)
    for step in range(1, 1001):
        spikes, membrane = neuron.step(spikes @ tensors["F"].T + charge, membrane)
        count += spikes
        if step in (50, 1000):
            assert torch.equal(count, (tensors[f"asr_T{step}"] * step).round())
