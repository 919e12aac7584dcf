"""SpikeGPT's switches, its heads, and its reading of other people's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spiking_lm
from spiking_lm.errors import ConfigError, DataError, UsageError

SMALL = {"vocab_size": 11, "n_layer": 2, "n_embd": 12, "ctx_len": 16}


def make(**config: Any) -> Any:
    torch.manual_seed(0)
    return spiking_lm.create_model("spikegpt", **{**SMALL, **config})


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(1))


def test_parameter_count_follows_the_formula() -> None:
    v, c, layers = 11, 12, 2
    assert sum(p.numel() for p in make().parameters()) == 2 * v * c + layers * (13 * c * c + 11 * c) + 4 * c


def test_official_sizes() -> None:
    """46,553,088 parameters for enwik8's 5,458 characters, 215,399,424 for the larger model."""
    with torch.device("meta"):
        for vocab, layers, width, count in ((5458, 12, 512, 46_553_088), (50277, 18, 768, 215_399_424)):
            sizes = {"vocab_size": vocab, "n_layer": layers, "n_embd": width, "ctx_len": 1024}
            model = spiking_lm.create_model("spikegpt", **sizes, init="torch", neuron={"type": "lif"})
            assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("init", ["scaled", "rwkv", "torch", "released"])
def test_initialisations(init: str) -> None:
    model = make(init=init)
    att, ffn = model.blocks[0].att, model.blocks[0].ffn
    identity = att.value.weight @ att.value.weight.T
    if init in ("scaled", "rwkv", "released"):
        torch.testing.assert_close(identity, torch.eye(12), atol=1e-5, rtol=0)
    gain = {"scaled": 4.0, "rwkv": 0.0, "released": 1.0}.get(init)
    if gain is not None:
        torch.testing.assert_close(att.output.weight @ att.output.weight.T, gain**2 * torch.eye(12), atol=1e-5, rtol=0)
    assert (ffn.value.weight == 0).all() == (init == "rwkv")
    logits = model(tokens()).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("placement", ["canonical", "spike_input"])
def test_default_initialisation_fires_at_once(placement: str) -> None:
    model = make(vocab_size=256, n_layer=4, n_embd=64, placement=placement)
    batch = torch.randint(0, 256, (8, 128), generator=torch.Generator().manual_seed(2))
    for site, spikes in model(batch, return_spikes=True).spikes.items():
        rate = spikes.flatten(0, 1).mean(0)
        assert 0.02 < rate.mean() < 0.6, site
        assert (rate == 0).float().mean() < 0.1, f"{site}: too many silent channels"


def test_intended_initialisation_is_silent_at_first() -> None:
    spikes = make(init="rwkv")(tokens(), return_spikes=True).spikes
    assert all((value == 0).all() for site, value in spikes.items() if site != "embedding")


def test_sites_of_each_placement() -> None:
    assert [site.name for site in make().spike_sites()] == [
        "embedding",
        *(f"blocks.{i}.{part}" for i in range(2) for part in ("att", "ffn")),
    ]
    sites = make(placement="spike_input").spike_sites()
    assert len(sites) == 2 * 7
    assert all(site.feeds and all(fed.split(".")[-1] != "add_att" for fed in site.feeds) for site in sites)
    assert make(spiking=False).spike_sites() == []


def test_canonical_spikes_feed_no_matrix_and_spike_input_feeds_all_of_the_blocks() -> None:
    for placement, expected in (("canonical", 0), ("spike_input", 14)):
        graph = make(placement=placement).graph()
        fed = [op for op in graph if op.kind == "linear" and graph.input_kinds(op) == ("binary",)]
        assert len(fed) == expected


def test_twin_has_the_same_weights() -> None:
    spiking, twin = make(), make(spiking=False)
    assert spiking.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(spiking.parameters(), twin.parameters(), strict=True))
    assert not torch.equal(spiking(tokens()).logits, twin(tokens()).logits)


def test_head_tying_shares_one_matrix() -> None:
    model = make(head_tying=True)
    assert model.head.weight is model.emb.weight
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in make().parameters()) - 11 * 12


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_does_not_change_a_classification(pool: str) -> None:
    model = make(num_classes=3, pool=pool).eval()
    rows = tokens(3, 10)
    lengths = torch.tensor([10, 4, 1])
    together = model.classify(rows, lengths)
    for row, length, logits in zip(rows, lengths, together, strict=True):
        alone = model.classify(row[None, :length], length[None])
        torch.testing.assert_close(alone[0], logits, atol=1e-6, rtol=1e-5)
    assert together.shape == (3, 3)


def test_without_head_there_is_no_classification() -> None:
    with pytest.raises(UsageError, match="no classification head"):
        make().classify(tokens(), torch.tensor([9, 9]))


def test_l2wrap_has_the_published_gradient() -> None:
    """At the largest logit of each position: its value times 1e-4 / (B T), and nothing elsewhere."""
    model = make(l2wrap=True)
    output = model(tokens())
    output.logits.retain_grad()
    output.aux_losses["l2wrap"].backward()
    logits, grad = output.logits.detach(), output.logits.grad
    top = logits.argmax(-1, keepdim=True)
    expected = torch.zeros_like(logits).scatter(-1, top, logits.gather(-1, top) * 1e-4 / 18)
    torch.testing.assert_close(grad, expected, atol=1e-10, rtol=1e-5)


def test_rows_at_different_positions() -> None:
    """A batch may hold sequences that are not equally far: state has no position."""
    from spiking_lm.interfaces import map_state

    model = make().eval()
    rows = tokens(2, 12)
    with torch.no_grad():
        early = model(rows[:1, :3]).state
        late = model(rows[1:, :9]).state
        pairs: list[torch.Tensor] = []
        map_state(lambda tensor: pairs.append(tensor) or tensor, late)
        queue = iter(pairs)
        both = map_state(lambda tensor: torch.cat([tensor, next(queue)]), early)
        logits, _ = model.step(torch.stack([rows[0, 3], rows[1, 9]]), both)
        torch.testing.assert_close(logits[0], model(rows[:1, :4]).logits[0, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[1], model(rows[1:, :10]).logits[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.ffn.key.weight"), "missing: blocks.1.ffn.key.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda w: w.update({"head.weight": torch.zeros(10, 12)}), r"head.weight: \(10, 12\) instead of \(11, 12\)"),
        (lambda w: w.pop("emb.weight"), "not a SpikeGPT state dict"),
    ],
)
def test_wrong_state_dicts_are_named(change: Any, message: str) -> None:
    weights = spiking_lm.export_reference(make())
    change(weights)
    with pytest.raises(DataError, match=message):
        spiking_lm.import_reference("spikegpt", weights)


def test_buffers_of_snntorch_are_tolerated() -> None:
    weights = spiking_lm.export_reference(make())
    weights["blocks.0.lif1.beta"] = torch.tensor(0.5)
    weights["blocks.0.lif1.threshold"] = torch.tensor(1.0)
    assert spiking_lm.import_reference("spikegpt", weights).config.n_layer == 2


def test_contradicting_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="n_layer=3 but the tensors say 2"):
        spiking_lm.import_reference("spikegpt", spiking_lm.export_reference(make()), n_layer=3)


def test_what_the_released_format_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="no place for"):
        spiking_lm.export_reference(make(placement="spike_input"))


@pytest.mark.parametrize("shape", [(5,), (2, 0), (1, 2, 3)])
def test_tokens_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="token ids"):
        make()(torch.zeros(shape, dtype=torch.long))


def test_silence_is_penalised_where_asked() -> None:
    silent = make(init="rwkv", silence_penalty=0.5)
    assert silent(tokens()).aux_losses["silence"].item() == pytest.approx(0.5)
    assert silent.eval()(tokens()).aux_losses == {}
    assert make()(tokens()).aux_losses == {}
    loss = make(silence_penalty=1.0)(tokens(8, 16)).aux_losses["silence"]
    assert 0 <= loss.item() < 1


def test_typo_in_configuration() -> None:
    with pytest.raises(ConfigError, match="n_layres") as caught:
        make(n_layres=3)
    assert "did you mean 'n_layer'?" in str(caught.value.hint)


def test_gradients_are_exported_under_the_same_keys() -> None:
    model = make()
    model(tokens()).logits.sum().backward()
    grads = spiking_lm.export_reference(model, grads=True)
    assert grads.keys() == spiking_lm.export_reference(model).keys()
    assert torch.equal(grads["head.weight"], model.head.weight.grad)
