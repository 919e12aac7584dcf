"""Checkpoints, packed weights, the released format, what is refused, and what explain says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from spiking_lm import create_model, explain, export_reference, import_reference, load_model, save_model
from spiking_lm.accounting import save_raster
from spiking_lm.errors import CheckpointError, ConfigError, DataError, UsageError
from spiking_lm.raster import load_raster
from spiking_lm.weights import pack_weights
from spiking_lm_bitspike.model import Bitspike

TOKENS = torch.randint(23, (2, 8), generator=torch.Generator().manual_seed(4))
LENGTHS = torch.tensor([8, 5])


def build(seed: int = 1, **config: Any) -> Bitspike:
    torch.manual_seed(seed)
    small = {"vocab_size": 23, "n_layer": 2, "n_embd": 12, "n_head": 3, "n_hidden": 20, "ctx_len": 12, "steps": 6}
    model = create_model("bitspike", **{**small, **config})
    assert isinstance(model, Bitspike)
    return model.eval()


@pytest.mark.parametrize("weights", ["ternary", "binary"])
@torch.no_grad()
def test_packed_models_are_saved_small_and_score_the_same(weights: str, tmp_path: Path) -> None:
    model = build(weights=weights, num_classes=2, n_embd=48, n_hidden=192, n_layer=1)
    scores, count = model.classify(TOKENS, LENGTHS), model.num_parameters()
    save_model(model, tmp_path / "full")
    assert pack_weights(model) == 6
    assert model.num_parameters() == count
    save_model(model, tmp_path / "packed")
    again = load_model(tmp_path / "packed").eval()
    assert torch.equal(again.classify(TOKENS, LENGTHS), scores)
    assert explain(again, TOKENS).neurobench.parameter_count == count
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "packed")}
    assert sizes["packed"] < sizes["full"] / 4  # embeddings and norms are not packed
    other = {"ternary": "binary", "binary": "full"}[weights]
    path = tmp_path / "packed" / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace(f'"{weights}"', f'"{other}"'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"packed {weights} weights for a layer of {other} ones"):
        load_model(tmp_path / "packed", verify=False)
    with pytest.raises(UsageError, match="packed"):
        export_reference(model)


def test_the_released_format_goes_there_and_back() -> None:
    model = build(token_types=2, num_classes=3, teacher_embd=10, mode="released", charge=0.0, feedback=True)
    held = export_reference(model)
    noise = {f"snn_func.{key}": torch.zeros(1) for key in held} | {"pooler_layer.dense.weight": torch.zeros(1)}
    settings: dict[str, Any] = {"n_head": 3, "steps": 6, "feedback": True}
    again = import_reference("bitspike", {**held, **noise}, **settings)
    assert again.config == model.config
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(DataError, match=r"missing: network_s9\.query\.bias"):
        import_reference("bitspike", {k: v for k, v in held.items() if k != "network_s9.query.bias"}, **settings)
    with pytest.raises(DataError, match=r"of the wrong shape: network_s2\.dense\.bias: \(5,\) instead of \(12,\)"):
        import_reference("bitspike", {**held, "network_s2.dense.bias": torch.zeros(5)}, **settings)
    with pytest.raises(UsageError, match="n_layer=3 but the tensors say 2"):
        import_reference("bitspike", held, **settings, n_layer=3)
    with pytest.raises(DataError, match="not a SpikingBERT state dict"):
        import_reference("bitspike", {"emb.weight": torch.zeros(2, 2)})
    with pytest.raises(UsageError, match=r"no place for 'head\.bias'"):
        export_reference(build(masked=True))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"n_head": 5}, "no multiple of n_head"),
        ({"causal": True, "masked": True}, "masked is for models that are not causal"),
        ({"causal": True, "tolerance": 0.1}, "tolerance is for models that are not causal"),
        ({"mode": "sequential", "feedback": True}, "no feedback and no tolerance"),
        ({"mode": "sequential", "tolerance": 0.1}, "no feedback and no tolerance"),
        ({"replace": {"by": "rounding"}, "leak": 0.9}, "choose simulation"),
        ({"weights": "tenary"}, "weights"),
        ({"stepz": 3}, "did you mean"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**config)
    assert words in f"{caught.value} {caught.value.hint}".lower() or words in str(caught.value)


def test_texts_that_cannot_be() -> None:
    model = build(causal=True)
    with pytest.raises(UsageError, match="the text has 13 tokens, and this model reads at most 12"):
        model(torch.zeros(1, 13, dtype=torch.long))
    state = model(torch.zeros(1, 12, dtype=torch.long)).state
    with pytest.raises(UsageError, match="the text has 13 tokens"):
        model.step(torch.zeros(1, dtype=torch.long), state)
    with pytest.raises(DataError, match="token ids run from 12 to 23"):
        model(torch.arange(12)[None] + 12)
    with pytest.raises(UsageError, match="at least 1"):
        model(torch.zeros(1, 0, dtype=torch.long))


@torch.no_grad()
def test_a_causal_state_is_two_bits_for_each_channel_and_step() -> None:
    model = build(causal=True, n_embd=24, steps=16)
    state = model(TOKENS).state
    held = sum(t.numel() * t.element_size() for block in state for t in block)
    assert held == TOKENS.numel() * 2 * model.config.n_layer * 16 * 24 // 8


@torch.no_grad()
def test_causal_logits_follow_one_by_one_from_the_spikes_of_the_past() -> None:
    for mode in ("released", "rate-consistent", "sequential"):
        model = build(causal=True, mode=mode, weights="ternary").double()
        whole = model(TOKENS).logits
        state, logits = model.init_state(2), []
        for token in TOKENS.unbind(1):
            scores, state = model.step(token, state)
            logits.append(scores)
        torch.testing.assert_close(torch.stack(logits, 1), whole, rtol=0, atol=1e-12)
        changed = TOKENS.clone()
        changed[:, 5] = (changed[:, 5] + 1) % 23
        after = model(changed).logits
        assert torch.equal(after[:, :5], whole[:, :5])
        assert not torch.equal(after[:, 5:], whole[:, 5:])


def test_training_without_a_simulation_hands_on_spikes_at_the_clamp_networks_rates() -> None:
    model = build(causal=True, replace={"by": "none"}).train()
    first = model(TOKENS[:, :4])
    second = model(TOKENS[:, 4:], first.state)
    assert second.logits.isfinite().all()
    whole = model(TOKENS)
    assert [tuple(t.shape) for block in second.state for t in block] == [
        tuple(t.shape) for block in whole.state for t in block
    ]
    # The first block's keys see no attention, so that their rates are those of the whole text.
    ours, theirs = second.state[0].keys[:, 4:], whole.state[0].keys[:, 4:]
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_classes_of_the_clamp_network_are_told_beside_those_of_the_spikes() -> None:
    model = build(num_classes=3, steps=400, pooling="mean")
    spikes, also = model.classify(TOKENS, LENGTHS), model.classify_also(TOKENS, LENGTHS)
    assert list(also) == ["clamp network"]
    torch.testing.assert_close(also["clamp network"], spikes, rtol=0, atol=0.01)
    few = build(num_classes=3, steps=2, pooling="mean")
    assert not torch.allclose(few.classify(TOKENS, LENGTHS), also["clamp network"], rtol=0, atol=1e-4)


def test_explain_counts_every_spike_step() -> None:
    """Additions are spikes times fan-out, by hand; the twin computes each product once."""
    model = build(weights="ternary", steps=8, mode="released", ctx_len=8)
    found = explain(model, TOKENS)
    batch = model._batch(TOKENS, lengths=torch.tensor([8, 8]))
    spikes = model.simulate(batch, keep=model.chain.names()).spikes
    driven = {op.name: op for op in found.ops if op.op_class}
    assert {op.op_class for op in driven.values()} == {"AC"}
    block, op = model.layers()[1], driven["blocks.1.up"]
    fan_out = torch.count_nonzero(block.up.effective_weight(), dim=0)
    assert int(fan_out.sum()) < block.up.weight.numel()  # ternary zeros are no synapses
    by_hand = float((spikes["blocks.1.mixed"].sum((0, 1, 2)) * fan_out).sum()) / TOKENS.numel()
    assert op.accumulations == pytest.approx(by_hand)
    assert op.steps == 8
    assert op.dense == 8 * 20 * 12
    twin, built, _ = found.energy
    assert twin.synaptic_pj == pytest.approx(4.6 * 2 * (4 * 144 + 2 * 240))
    assert built.synaptic_pj == pytest.approx(0.9 * sum(op.accumulations for op in driven.values()))
    assert twin.other_pj < built.other_pj / 4
    total = sum(float(s.sum()) for s in spikes.values())
    assert found.spikes_per_token == pytest.approx(total / TOKENS.numel())
    additions = found.additions_per_product
    assert additions == pytest.approx(built.synaptic_pj / 0.9 / (twin.synaptic_pj / 4.6))
    note = next(note for note in found.notes if "break-even" in note)
    assert f"{additions:.2f} additions" in note
    assert "break-even is at 5.1" in note
    assert "fewer picojoules" in note


def test_explain_says_when_spikes_cost_more() -> None:
    found = explain(build(steps=40, mode="rate-consistent"), TOKENS)
    assert found.additions_per_product is not None
    assert found.additions_per_product > 4.6 / 0.9
    note = next(note for note in found.notes if "break-even" in note)
    assert "MORE picojoules" in note
    assert "times as much as its dense twin" in note
    assert found.energy[1].ratio is not None
    assert found.energy[1].ratio < 1


def test_explain_counts_the_steps_that_were_taken() -> None:
    settings: dict[str, Any] = {"steps": 60, "ctx_len": 8}
    full, settled = explain(build(**settings), TOKENS), explain(build(**settings, tolerance=0.05), TOKENS)
    taken = build(**settings, tolerance=0.05).steps_taken(TOKENS, torch.tensor([8, 8])).double().mean()
    key = next(op for op in settled.ops if op.name == "blocks.0.key")
    assert key.steps == pytest.approx(float(taken))
    assert settled.energy[1].synaptic_pj < full.energy[1].synaptic_pj
    assert any(f"took {float(taken):.1f} of 60 spike steps on average" in note for note in settled.notes)
    assert not any("settled early" in note for note in full.notes)


def test_sequential_models_wait_with_norms_and_say_so() -> None:
    waiting, running = (explain(build(mode=mode, n_embd=24), TOKENS) for mode in ("sequential", "released"))
    steps = {op.name: op.steps for op in waiting.ops}
    assert steps["blocks.0.mix_norm"] == steps["blocks.0.attention"] == 1
    assert steps["blocks.0.key"] == 6
    assert sum(waiting.other_ops.values()) < sum(running.other_ops.values())


def test_a_raster_has_as_many_tokens_as_the_model_reads(tmp_path: Path) -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return chr(97 + ids[0])

    save_raster(build(), torch.arange(20), Tokenizer(), tmp_path / "raster.npz")
    raster = load_raster(tmp_path / "raster.npz")
    assert raster.text == [chr(97 + i) for i in range(12)]
    assert raster.spikes["blocks.1.keys"].max() > 1  # of six steps


def test_a_copy_of_a_packed_model_is_the_same() -> None:
    model = build(weights="binary", num_classes=2)
    pack_weights(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).classify(TOKENS, LENGTHS), model.classify(TOKENS, LENGTHS))
