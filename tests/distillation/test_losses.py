"""The losses of a distillation: the numbers of the reference, and what holds for any depth, heads and logits."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from spiking_lm.distillation import (
    PENALTIES,
    Probe,
    attention_loss,
    layer_pairs,
    pooled_loss,
    representation_loss,
    soft_cross_entropy,
)


@pytest.mark.parametrize("case", ["b_kd_task", "b_kd_ternary"])
def test_losses_are_the_references(shared: Path, case: str) -> None:
    golden = load_file(shared / "golden" / "spikelm_bitspike" / f"{case}.safetensors")

    def close(actual: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(actual.reshape(1), golden[name].reshape(1), rtol=1e-9, atol=1e-10)

    reps = [(golden[f"student_rep_fit/{i}"], golden[f"teacher_rep/{i}"]) for i in range(5)]
    atts = [(golden[f"student_att/{j}"], golden[f"teacher_att/{j}"]) for j in range(4)]
    for i, (ours, theirs) in enumerate(reps):
        torch.testing.assert_close(
            representation_loss([ours], [theirs]), golden["rep_losses"][i], rtol=1e-9, atol=1e-10
        )
    for j, (ours, theirs) in enumerate(atts):
        torch.testing.assert_close(attention_loss([ours], [theirs]), golden["att_losses"][j], rtol=1e-9, atol=1e-10)
    close(
        representation_loss([a for a, _ in reps], [b for _, b in reps])
        + attention_loss([a for a, _ in atts], [b for _, b in atts]),
        "loss",
    )
    for temperature in (1.0, 2.0):
        loss = soft_cross_entropy(golden["student_logits"], golden["teacher_logits"], temperature)
        close(loss, f"soft_ce_tau{temperature}")
    close(F.cross_entropy(golden["student_logits"], golden["labels"]), "hard_ce")


@given(student=st.integers(1, 24), teacher=st.integers(1, 48))
def test_every_layer_finds_its_teacher(student: int, teacher: int) -> None:
    states, scores = layer_pairs(student, teacher)
    assert (states[0], states[-1]) == (0, teacher)
    assert len(states) == student + 1
    assert len(scores) == student
    assert all(a <= b for a, b in pairwise(states))
    assert all(0 <= layer < teacher for layer in scores)
    assert scores[-1] == teacher - 1
    if teacher % student == 0:  # the published rule
        g = teacher // student
        assert states == [i * g for i in range(student + 1)]
        assert scores == [j * g + g - 1 for j in range(student)]
    if teacher >= student:
        assert len(set(states)) == student + 1, "no layer of the teacher is learned twice"


@given(
    heads=st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12])), seed=st.integers(0, 9)
)
def test_heads_are_laid_on_each_other(heads: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(2, n, 3, 3, generator=generator, dtype=torch.float64) for n in heads)
    n = math.gcd(*heads)
    groups = [scores.reshape(2, n, -1, 3, 3).mean(2) for scores in (ours, theirs)]
    torch.testing.assert_close(attention_loss([ours], [theirs]), F.mse_loss(*groups))
    assert attention_loss([ours], [ours]) == 0


def test_a_masked_place_teaches_nothing() -> None:
    ours, theirs = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    before = attention_loss([ours], [theirs]) * 16
    ours[..., 3] = -10000.0  # what one of them masks, as a causal student does, is nothing to the other
    kept = attention_loss([ours], [theirs]) * 16
    assert kept < before
    theirs[..., 3] = torch.finfo(torch.float32).min
    assert attention_loss([ours], [theirs]) * 16 == kept
    torch.testing.assert_close(kept / 16, F.mse_loss(ours[..., :3], theirs[..., :3]) * 12 / 16)


@given(classes=st.integers(2, 6), temperature=st.floats(0.5, 4), seed=st.integers(0, 9))
def test_soft_labels_are_cross_entropy_over_the_number_of_classes(classes: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(5, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = F.cross_entropy(ours / temperature, (theirs / temperature).softmax(-1)) / classes
    torch.testing.assert_close(soft_cross_entropy(ours, theirs, temperature), expected)
    assert soft_cross_entropy(theirs, theirs, temperature) <= expected + 1e-12, "nothing is nearer than itself"


def test_pooled_texts_are_compared_by_direction() -> None:
    a = torch.randn(6, 5, dtype=torch.float64)
    assert float(pooled_loss(a, 3 * a)) == pytest.approx(0, abs=1e-12)
    assert float(pooled_loss(a, -a)) == pytest.approx(2)


def test_a_probe_finds_a_plane_and_is_the_same_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    labels = (x @ torch.arange(-4.0, 4.0) + 0.1 * torch.randn(400, generator=generator) > 0).long()
    probe = Probe(x[:300], labels[:300], 2, PENALTIES[0])
    logits = probe(x[300:])
    assert float((logits.argmax(-1) == labels[300:]).double().mean()) > 0.95
    assert torch.equal(Probe(x[:300], labels[:300], 2, PENALTIES[0])(x[300:]), logits)
    # At the optimum the gradient of loss and penalty vanishes.
    weight = probe.weight.clone().requires_grad_()
    features = (x[:300].double() - probe.mean) / probe.scale
    loss = F.cross_entropy(features @ weight.T + probe.bias, labels[:300]) + PENALTIES[0] * weight.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4
