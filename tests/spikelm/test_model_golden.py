"""The model against the golden data of the released code: values, gradients, amplitudes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from spiking_lm import export_reference, import_reference
from spiking_lm_spikelm.config import SpikeLMConfig
from spiking_lm_spikelm.model import Attention, Record, SpikeLM, SpikingLinear
from spiking_lm_spikelm.neuron import Elastic


def golden(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = shared / "golden" / "spikelm_bitspike"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def below(case: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}/"): tensor for key, tensor in case.items() if key.startswith(f"{prefix}/")}


def close(got: Tensor | None, expected: Tensor, what: str) -> None:
    # In float32, sums over many tokens cancel: what is allowed is a share of the largest element.
    largest = max(1.0, float(expected.abs().max()))
    rtol, atol = (1e-9, 1e-10) if expected.dtype == torch.float64 else (1e-4, 1e-5 * largest)
    assert got is not None, what
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def config(**changes: Any) -> SpikeLMConfig:
    return SpikeLMConfig(vocab_size=2, n_embd=32, n_head=4, dropout=0.0, **changes)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_linear_layer(shared: Path, dtype: str) -> None:
    _, case = golden(shared, f"a_linear_T4_{dtype}")
    layer = SpikingLinear(config(), 24, 16, "layer").to(case["x1"].dtype)
    layer.weight.data, layer.bias.data = case["state_after/weight"], case["state_after/bias"]
    for call in "12":  # the second one with the amplitudes of the first
        layer.zero_grad()
        x = case[f"x{call}"].requires_grad_()
        y = layer(x)
        (y * case[f"grad_out{call}"]).sum().backward()
        close(y, case[f"y{call}"], f"output of call {call}")
        close(x.grad, case[f"grad_x{call}"], f"gradient of the input, call {call}")
        close(layer.weight.grad, case[f"grad_weight{call}"], f"gradient of the weight, call {call}")
        close(layer.bias.grad, case[f"grad_bias{call}"], f"gradient of the bias, call {call}")
    assert isinstance(layer.neuron, Elastic)
    amplitudes = torch.stack([case[f"state_after/act_clip_val.{t}"] for t in range(4)])
    close(layer.neuron.alpha, amplitudes, "amplitudes")


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_attention(shared: Path, dtype: str) -> None:
    _, case = golden(shared, f"a_attention_{dtype}")
    layer = Attention(config(), "attention").to(case["x"].dtype)
    for name in ("query", "key", "value"):
        for leaf in ("weight", "bias"):
            layer.get_submodule(name).get_parameter(leaf).data = case[f"state_after/{name}.{leaf}"]
    mask = (1 - case["attention_mask"].to(case["x"].dtype))[:, None, None] * torch.finfo(case["x"].dtype).min
    for shared_neurons in (False, True):  # once the amplitudes are set, one population does for three
        layer.zero_grad()
        x = case["x"].clone().requires_grad_()
        record = Record(scores=True)
        context, _ = layer(x, mask, None, record)
        (context * case["grad_out"]).sum().backward()
        close(context, case["context"], "context")
        close(x.grad, case["grad_x"], f"gradient of the input, {shared_neurons=}")
        for name, gradient in below(case, "grad").items():
            close(layer.get_parameter(name).grad, gradient, f"gradient of {name}")
        assert record.scores is not None
        assert record.scores[0].shape == case["probs"].shape[1:]
    one_step, _ = layer(case["x"][:1], mask, None, record := Record(scores=True))
    assert one_step.shape == case["x"][:1].shape
    assert record.scores is not None
    close(record.scores[0].softmax(-1), case["probs"][0], "attention of the first step")
    for name, neuron in (("clip_key", layer.key_neuron), ("clip_value", layer.value_neuron)):
        assert isinstance(neuron, Elastic)
        close(neuron.alpha, torch.stack([case[f"state_after/{name}.{t}"] for t in range(4)]), name)


@pytest.mark.parametrize("name", ["f64", "f32", "T1_f32"])
def test_encoder(shared: Path, name: str) -> None:
    meta, case = golden(shared, f"a_encoder_{name}")
    model = import_reference("spikelm", below(case, "state_before"), n_head=meta["num_attention_heads"], dropout=0.0)
    assert isinstance(model, SpikeLM)
    assert model.capabilities == {"encode", "mlm"}
    tokens, lengths, types = case["input_ids"], case["attention_mask"].sum(1), case["token_type_ids"]
    model.train()
    logits = model.predict_masked(tokens, lengths, types=types)
    follows = model.predict_next(tokens, lengths, types)
    loss = F.cross_entropy(logits.flatten(0, 1), case["labels"].flatten()) + F.cross_entropy(
        follows, case["next_sentence_label"]
    )
    loss.backward()
    model.eval()
    hidden, _ = model._run(tokens, lengths, types)
    for i in range(meta["num_hidden_layers"]):
        close(hidden[i], case[f"hidden_states/{i}"], f"input of layer {i}")
    encoding = model.encode(tokens, lengths, types=types, return_spikes=True)
    close(encoding.hidden[-1], case[f"hidden_states/{meta['num_hidden_layers']}"], "output of the last layer")
    close(logits, case["prediction_logits"], "logits of masked words")
    close(follows, case["seq_relationship_logits"], "logits of the next sentence")
    close(loss, case["loss"].reshape(()), "loss")
    check_gradients_and_amplitudes(model, case)
    later = case["second_input_ids"]
    full = torch.full((len(later),), later.shape[1])
    close(model.predict_masked(later, full), case["second_prediction_logits"], "a later batch")


@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_causal(shared: Path, dtype: str) -> None:
    meta, case = golden(shared, f"a_encoder_causal_{dtype}")
    model = import_reference(
        "spikelm", below(case, "state_before"), n_head=meta["num_attention_heads"], dropout=0.0, causal=True
    )
    assert isinstance(model, SpikeLM)
    tokens, keep = case["input_ids"], case["attention_mask"].bool()
    hidden, _ = model.train()._run(tokens, keep.sum(1))  # in the golden model padding looks at no padding, either
    assert model.mlm_head is not None
    logits = model.mlm_head(hidden[-1].mean(0), model.word.weight)
    targets = tokens[:, 1:].masked_fill(~keep[:, 1:], -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    loss.backward()
    close(logits, case["prediction_logits"], "logits")
    close(loss, case["loss"].reshape(()), "loss")
    check_gradients_and_amplitudes(model, case)
    close(model.eval()(tokens).logits[keep], case["prediction_logits"][keep], "logits as a language model")


def check_gradients_and_amplitudes(model: SpikeLM, case: dict[str, Tensor]) -> None:
    gradients, exported = export_reference(model, grads=True), export_reference(model)
    for key, gradient in below(case, "grad").items():
        if key in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
            continue  # the word embedding and the bias of the head, which are there too
        close(gradients[key], gradient, f"gradient of {key}")
    for key, value in below(case, "state_after").items():
        close(exported[key], value, key)
