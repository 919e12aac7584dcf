"""The EGRU language model against the numbers of its paper's own code (EvNN): outputs, scores, gradients, training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import spiking_lm
from spiking_lm.interfaces import detach_state

MODELS = ["lm_tied", "lm_projection_reg"]


class Golden:
    """One golden file: arrays as tensors, and how they were made."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.arrays = dict(file)
        self.meta = json.loads(bytes(self.arrays.pop("meta_json")))

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}

    def model(self, **config: Any) -> Any:
        penalties = {name: self.meta[name] for name in ("alpha", "beta", "gamma")}
        quirks = ["batch_axis_beta", "last_word_as_padding", "decayed_biases"]
        settings = {"state_carry": "y_only", "reference_quirks": quirks, **penalties, **config}
        return spiking_lm.import_reference("egru", self.below("sd."), **settings)

    def windows(self, tokens: torch.Tensor, length: int | None = None) -> list[torch.Tensor]:
        """Cut ``tokens (B, N + 1)`` into windows of inputs, each with the target that follows its last token."""
        size = length or self.meta["bptt"]
        return [tokens[:, i : i + size + 1] for i in range(0, tokens.shape[1] - 1, size)]


@pytest.fixture(params=MODELS)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    return Golden(shared / "golden" / "egru" / f"{request.param}.npz")


def test_sizes_come_from_the_tensors(golden: Golden) -> None:
    config, meta = golden.model().config, golden.meta
    assert (config.vocab_size, config.n_layer, config.n_embd, config.n_hidden) == (
        *(meta["vocab"], meta["layers"]),
        *(meta["emb"], meta["hidden"]),
    )
    assert (config.projection, config.tie_weights, config.cell) == (meta["projection"], True, "egru")
    assert config.dampening_factor == config.pseudo_derivative_support == float(np.float32(meta["width"]))


def test_windows_with_carried_state(golden: Golden) -> None:
    """Events are carried from window to window, states are not."""
    model, state = golden.model().eval(), None
    for number, window in enumerate(golden.windows(golden["tokens"])):
        with torch.no_grad():
            output = model(window[:, :-1], state, return_spikes=True)
        state = output.state
        logprobs = output.logits.log_softmax(-1).flatten(0, 1)
        torch.testing.assert_close(logprobs, golden[f"win{number}.logprobs"], atol=1e-9, rtol=0)
        for layer in range(model.config.n_layer):
            hidden = output.spikes[f"rnns.{layer}"]
            torch.testing.assert_close(hidden, golden[f"win{number}.hidden{layer}"], atol=1e-9, rtol=0)
            torch.testing.assert_close(state[layer].y[None], golden[f"win{number}.state{layer}"], atol=1e-9, rtol=0)
    assert number + 1 == golden.meta["nwin"]


def test_carrying_the_whole_state_is_something_else(golden: Golden) -> None:
    """The published forms differ from the second window on, where the states begin at zero again."""
    model, state = golden.model(state_carry="full").eval(), None
    for number, window in enumerate(golden.windows(golden["tokens"])):
        with torch.no_grad():
            output = model(window[:, :-1], state)
        state = output.state
        far = (output.logits.log_softmax(-1).flatten(0, 1) - golden[f"win{number}.logprobs"]).abs().max()
        assert far < 1e-9 if number == 0 else far > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2])
def test_evaluation(golden: Golden, batch_size: int) -> None:
    """Loss and event rates of the reference's evaluate().

    It divides by all tokens of the columns, though the first of each is no target: its loss is low by 1 - bs / N.
    """
    model, stream = golden.model().eval(), golden["eval.stream"]
    columns = stream[: len(stream) // batch_size * batch_size].reshape(batch_size, -1)
    summed, state, rates = 0.0, None, []
    for window in golden.windows(columns):
        with torch.no_grad():
            output = model(window[:, :-1], state, return_spikes=True)
        state = output.state
        loss = F.cross_entropy(output.logits.flatten(0, 1), window[:, 1:].flatten())
        summed += loss.item() * window[:, 1:].numel()
        active = [output.spikes[f"rnns.{layer}"] != 0 for layer in range(model.config.n_layer)]
        rates.append([*(a.double().mean() for a in active), torch.cat([a.flatten() for a in active]).double().mean()])
    name = f"eval.bs{batch_size}"
    assert summed / columns.numel() == pytest.approx(golden[f"{name}.loss"].item(), abs=1e-8)
    assert math.exp(summed / columns.numel()) == pytest.approx(golden[f"{name}.ppl"].item(), rel=1e-7)
    *layers, mean = np.mean(rates, 0)
    np.testing.assert_allclose(layers, golden[f"{name}.layer_activity_f16"], atol=2e-3)
    assert mean == pytest.approx(golden[f"{name}.mean_activity_f16"].item(), abs=2e-3)


def test_training(golden: Golden) -> None:
    """Gradients of the first step, then losses, penalties and weights of all steps."""
    meta, model, state = golden.meta, golden.model(threshold_lr=golden.meta["thr_lr_multiplier"]), None
    groups = model.parameter_groups(meta["weight_decay"])
    for group in groups:
        group["lr"] = meta["lr"] * group.get("lr_scale", 1.0)
    optimizer = torch.optim.AdamW(groups, betas=tuple(meta["betas"]))
    windows = golden.windows(golden["train.tokens"])
    assert len(windows) == meta["train_steps"]
    for step, window in enumerate(windows):
        output = model(window[:, :-1], None if state is None else detach_state(state))
        state = output.state
        loss = F.cross_entropy(output.logits.flatten(0, 1), window[:, 1:].flatten())
        penalty = sum(output.aux_losses.values(), torch.zeros(()))
        assert loss.item() == pytest.approx(golden["train.losses"][step].item(), abs=1e-8)
        assert penalty.item() == pytest.approx(golden["train.ar_losses"][step].item(), abs=1e-8)
        optimizer.zero_grad()
        (loss + penalty).backward()
        if step == 0:
            grads = spiking_lm.export_reference(model, grads=True)
            assert torch.equal(grads.pop("decoder.decoder.weight"), grads["embeddings.weight"])
            wanted = golden.below("train.grad0.")
            assert grads.keys() == wanted.keys()
            for key, grad in grads.items():
                torch.testing.assert_close(grad, wanted[key], atol=1e-10, rtol=1e-8, msg=lambda m, k=key: f"{k}: {m}")
        if meta["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), meta["clip"])
        optimizer.step()
    weights, wanted = spiking_lm.export_reference(model), golden.below("train.final_sd.")
    assert weights.keys() == wanted.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-6, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
    assert any((weights[key] - tensor).abs().max() > 1e-3 for key, tensor in golden.below("sd.").items())


def test_beta_along_time_needs_no_second_row(golden: Golden) -> None:
    """The reference's beta compares rows of the batch; along time it is another number, and the same as row by row."""
    tokens = golden["train.tokens"][:, : golden.meta["bptt"]]
    only_beta = {"alpha": 0.0, "beta": 1.0, "gamma": 0.0}
    copied = golden.model(**only_beta)(tokens).aux_losses["beta"]
    model = golden.model(**only_beta, reference_quirks=[])
    right = model(tokens).aux_losses["beta"]
    assert abs(copied.item() - right.item()) > 1e-4
    assert torch.isfinite(model(tokens[:1, :1]).aux_losses["beta"])
    single = golden.model(**only_beta)(tokens[:1]).aux_losses["beta"]
    torch.testing.assert_close(single, model(tokens[:1]).aux_losses["beta"])


def test_round_trip(golden: Golden) -> None:
    weights, exported = golden.below("sd."), spiking_lm.export_reference(golden.model())
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)
