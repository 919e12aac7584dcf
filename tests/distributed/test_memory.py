"""What training keeps: blocks that are computed again, and sequences in chunks with a carried state."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spiking_lm import data as datasets
from spiking_lm.data.sampling import gather, sample_offsets
from spiking_lm.errors import ConfigError, RecipeError, UsageError
from spiking_lm.interfaces import detach_state
from spiking_lm.objectives import objective_for
from spiking_lm.preparation import build_model
from spiking_lm.recipe import Recipe, load_recipe
from spiking_lm.recompute import blocks_of, recomputing
from spiking_lm.training import MicroBatch, _backward
from spiking_lm.world import World

from .many import GPT, LABELLED, SPIKELM, alone, curve, recipe_of

DEEP = {**GPT, "n_layer": 4, "n_embd": 32, "dropout": 0.2}
EGRU = {"type": "egru", "n_embd": 8, "n_hidden": 12, "n_layer": 2}


def kept_for_backward(recipe: Recipe) -> tuple[int, Tensor]:
    """Return the bytes that a forward pass keeps for the backward pass, each storage once, and the loss."""
    assert recipe.train is not None
    data = datasets.load(recipe.data)
    model = build_model(recipe, data)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    micro = MicroBatch(model, objective_for(model, data, recipe.train, 0), "fp32")
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with ExitStack() as stack:
        if recipe.train.activation_checkpointing:
            stack.enter_context(recomputing(blocks_of(model, lambda: micro(0))))
        torch.manual_seed(0)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        loss = micro(0)
    return sum(sizes.values()), loss.detach()


@pytest.mark.parametrize(
    ("model", "data"), [(DEEP, None), ({**SPIKELM, "dropout": 0.2}, LABELLED)], ids=["spikegpt", "spikelm"]
)
def test_computing_again_changes_no_bit_of_a_gradient(tmp_path: Path, model: dict[str, Any], data: Any) -> None:
    recipe = load_recipe(recipe_of(tmp_path, "again", model, data))
    assert recipe.train is not None
    loaded = datasets.load(recipe.data)
    network = build_model(recipe, loaded)
    micro = MicroBatch(network.train(), objective_for(network, loaded, recipe.train, 0), "fp32")
    blocks = blocks_of(network, lambda: micro(0))  # elastic neurons set their amplitudes here
    assert len(blocks) == model["n_layer"]

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        network.zero_grad()
        torch.manual_seed(5)
        loss = micro(3)
        loss.backward()
        after = torch.rand(3)  # the generator goes on from where it was
        found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        return torch.cat([loss.detach()[None], after]), found

    plain = gradients()
    with recomputing(blocks):
        again = gradients()
    assert torch.equal(plain[0], again[0])
    assert plain[1].keys() == again[1].keys()
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in plain[1].items())
    assert any(not torch.equal(gradient, 0 * gradient) for gradient in plain[1].values())


def test_computing_again_changes_no_bit_of_a_run(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, "again", DEEP, steps=4, eval_every=0, accumulate=2)
    plain = alone(path, tmp_path / "plain")
    again = alone(path, tmp_path / "again", "train.activation_checkpointing=true")
    assert curve(plain, "grad_norm") == curve(again, "grad_norm")
    a, b = (next((run.path / "checkpoints").iterdir()) / "model.safetensors" for run in (plain, again))
    assert a.read_bytes() == b.read_bytes()


def test_computing_again_keeps_less(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, "kept", DEEP, seq_len=64)
    whole, loss = kept_for_backward(load_recipe(path))
    less, same = kept_for_backward(load_recipe(path, ["train.activation_checkpointing=true"]))
    assert torch.equal(loss, same)
    assert less < 0.4 * whole, "four blocks, of which what goes in is kept"


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    bits = {"type": "bitspike", "n_layer": 1, "n_embd": 16, "n_head": 2, "ctx_len": 32}
    path = recipe_of(tmp_path, "bits", bits, LABELLED, activation_checkpointing=True)
    with pytest.raises(UsageError, match="no blocks"):
        alone(path, tmp_path)


@pytest.mark.parametrize("model", [GPT, EGRU], ids=["spikegpt", "egru"])
def test_chunks_are_truncated_backpropagation_through_the_whole_sequence(tmp_path: Path, model: dict[str, Any]) -> None:
    """The loss is that of the sequence in one piece; the gradient that of chunks with the state cut between them."""
    recipe = load_recipe(recipe_of(tmp_path, "chunks", model, seq_len=24, chunk_len=8, accumulate=2))
    assert recipe.train is not None
    data = datasets.load(recipe.data)
    network = build_model(recipe, data)
    network.train()
    micro = MicroBatch(network, objective_for(network, data, recipe.train, 7), "fp32")
    loss, tokens = _backward(micro, micro, recipe.train, 1, record=False, world=World())
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    assert tokens == 2 * 6 * 24
    network.zero_grad()
    total = torch.zeros(())
    in_one_piece = []
    for index in (2, 3):
        offsets = sample_offsets(len(data.train.tokens), 24, 6, seed=7, step=index)
        batch = torch.from_numpy(gather(data.train.tokens, offsets, 24))
        with torch.no_grad():
            logits = network(batch[:, :-1]).logits
            in_one_piece.append(float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())))
        state = None
        for start in (0, 8, 16):
            output = network(batch[:, start : start + 8], state)
            state = detach_state(output.state)
            targets = batch[:, start + 1 : start + 9]
            own = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
            total = total + (own + sum(output.aux_losses.values())) / 6
    total.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(np.mean(in_one_piece), rel=1e-4)
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", [GPT, EGRU], ids=["spikegpt", "egru"])
def test_memory_does_not_grow_with_the_sequence(tmp_path: Path, model: dict[str, Any]) -> None:
    path = recipe_of(tmp_path, "long", model, chunk_len=32)
    kept = [kept_for_backward(load_recipe(path, [f"train.seq_len={length}"]))[0] for length in (32, 4096)]
    assert kept[0] == kept[1]
    whole = kept_for_backward(load_recipe(path, ["train.seq_len=512", "train.chunk_len=null"]))[0]
    assert whole > 8 * kept[0]


def test_nothing_is_carried_from_sequence_to_sequence(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path, "chunks", GPT, seq_len=16, chunk_len=8))
    assert recipe.train is not None
    data = datasets.load(recipe.data)
    model = build_model(recipe, data).eval()
    objective = objective_for(model, data, recipe.train, 7)
    losses = [float(objective.loss(model, index, record=False)[0].detach()) for index in (0, 1, 2)]
    assert objective.carried(), "within a sequence"
    objective.loss(model, 3, record=False)
    assert not objective.carried(), "after it"
    assert float(objective.loss(model, 0, record=False)[0].detach()) == losses[0]


@pytest.mark.parametrize(
    ("model", "settings", "error", "says"),
    [
        ({**SPIKELM, "causal": True}, ["train.chunk_len=4"], UsageError, "chunk_len carries a state of constant size"),
        ({**SPIKELM, "causal": True}, ["train.sampling=stream"], UsageError, "sampling: stream carries a state"),
        (GPT, ["train.chunk_len=5"], RecipeError, "seq_len 12 is not a multiple of chunk_len 5"),
        (GPT, ["train.chunk_len=4", "train.sampling=stream"], RecipeError, "a stream is read in windows"),
        (GPT, ["train.chunk_len=4", "train.objective.type=masked"], RecipeError, "an encoder has none"),
        (GPT, ["train.distributed.strategy=zero"], RecipeError, "ddp"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, model: dict[str, Any], settings: list[str], error: type[Exception], says: str
) -> None:
    path = recipe_of(tmp_path, "refused", model)
    with pytest.raises(error, match=says):
        alone(path, tmp_path, *settings)


def test_examples_are_not_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are read whole"):
        alone(recipe_of(tmp_path, "labels", SPIKELM, LABELLED, chunk_len=4), tmp_path)


def test_one_micro_batch_of_many_is_part_of_the_whole(tmp_path: Path) -> None:
    """Rows of a world of three are all rows, each once, and padded alike."""

    class One(World):
        size = 3

        def __init__(self, rank: int) -> None:
            self.rank = rank

    recipe = load_recipe(recipe_of(tmp_path, "labels", SPIKELM, LABELLED))
    assert recipe.train is not None
    data = datasets.load(recipe.data)
    model = build_model(recipe, data)
    objective: Any = objective_for(model, data, recipe.train, 7)
    whole = objective.batch(5, torch.device("cpu"))
    parts = []
    for rank in range(3):
        objective.world = One(rank)
        parts.append(objective.batch(5, torch.device("cpu")))
    assert [row for part in parts for row in part.chosen] == whole.chosen
    for field in ("inputs", "lengths", "labels"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
