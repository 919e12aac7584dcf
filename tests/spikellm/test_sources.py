"""Checkpoints of other tools: what is read is what was written, and what cannot be read is named."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from spiking_lm import data, generate, load_model
from spiking_lm.convert import convert
from spiking_lm.data.tokenizers import SubwordTokenizer
from spiking_lm.errors import DataError, MissingExtraError, UsageError
from spiking_lm_spikellm.gguf_file import GGUFSource, _package
from spiking_lm_spikellm.huggingface import read_config
from spiking_lm_spikellm.model import Rotary, SpikeLLM
from spiking_lm_spikellm.sources import block_shapes, build, open_source

TEXT = "It is a truth universally acknowledged, that 1813 was a good year.\n\n  Was it?"


def tokens(model: SpikeLLM) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(found: SpikeLLM, written: SpikeLLM) -> None:
    assert torch.equal(found(tokens(written)).logits, written(tokens(written)).logits)


# -- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_folder_is_read_as_it_was_written(kind: str, shards: int, write_llama: Any, tmp_path: Path) -> None:
    sizes = {"sliding_window": 4} if kind == "mistral" else {}
    written = write_llama(tmp_path / "m", kind=kind, shards=shards, tie_embeddings=kind == "llama", **sizes)
    source = open_source(tmp_path / "m")
    assert source.config == written.config
    assert_same(build(source, source.config), written)
    block = source.block(1)
    assert {name: tuple(t.shape) for name, t in block.items()} == block_shapes(source.config)
    assert torch.equal(block["mlp.up_proj.weight"], written.blocks()[1].mlp.up_proj.weight)
    assert (source.final().head is None) == (kind == "llama")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full_and_kept_where_it_counts(
    dtype: torch.dtype, write_llama: Any, tmp_path: Path
) -> None:
    written = write_llama(tmp_path / "m", dtype=dtype)
    source = open_source(tmp_path / "m")
    assert {t.dtype for t in source.block(0).values()} == {torch.float32}
    assert source.embedding().dtype == dtype
    assert_same(build(source, source.config), written)
    few_bits = build(
        source,
        source.config.model_copy(update={"weights": {"bits": 8}}).model_validate(
            {**source.config.model_dump(), "weights": {"bits": 8}}
        ),
    )
    assert few_bits.model.embed_tokens.weight.dtype == dtype
    assert few_bits(tokens(written)).logits.dtype == torch.float32


def test_the_identity_is_of_the_weights(llama_folder: Path, write_llama: Any, tmp_path: Path) -> None:
    write_llama(tmp_path / "same", shards=3)
    write_llama(tmp_path / "other", shards=3, seed=1)
    first, same, other = (open_source(path).sha256() for path in (llama_folder, tmp_path / "same", tmp_path / "other"))
    assert first == same != other


def config_of(folder: Path, changes: dict[str, Any], tmp_path: Path) -> Any:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw = {key: value for key, value in {**raw, **changes}.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return read_config(tmp_path / "config.json")


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.factor", 2.0),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.type", "linear"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, "rope_scaling.original_ctx_len", 64),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling", None),
        ({"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta", 5.0),
        ({"rope_theta": "absent", "rope_parameters": {"rope_type": "llama3", **LLAMA3}}, "rope_scaling.factor", 8.0),
        ({"head_dim": "absent", "hidden_size": 32}, "head_size", 8),
        ({"num_key_value_heads": "absent"}, "kv_heads", 4),
        ({"model_type": "mistral", "sliding_window": "absent"}, "sliding_window", 4096),
        ({"model_type": "mistral", "sliding_window": None}, "sliding_window", None),
        ({"model_type": "mistral", "sliding_window": 7, "use_sliding_window": True}, "sliding_window", 7),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": False}, "sliding_window", None),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}, "sliding_window", 7),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2},
         "sliding_window", None),
        ({"model_type": "qwen2"}, "qkv_bias", True),
        ({"tie_word_embeddings": "absent"}, "tie_embeddings", False),
    ],
)  # fmt: skip
def test_configurations(llama_folder: Path, tmp_path: Path, changes: dict[str, Any], field: str, value: Any) -> None:
    found: Any = config_of(llama_folder, changes, tmp_path)
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, r"'gpt2' \(GPT2LMHeadModel\)(?s:.*)llama, mis"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"type 'yarn'(?s:.*)llama3"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"vocab_size": "absent"}, "'vocab_size' is missing"),
        ({"num_key_value_heads": 3}, "no multiple of n_kv_head 3"),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
         "only some layers"),
        ({"model_type": "mistral", "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
         "only some layers"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(
    llama_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        config_of(llama_folder, changes, tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.fixture
def broken(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(llama_folder, tmp_path / "broken"))


SHARD = "model-00002-of-00003.safetensors"


def test_a_missing_shard_is_named(broken: Path) -> None:
    (broken / SHARD).unlink()
    with pytest.raises(DataError, match=rf"{SHARD}: no such file; the index names it for \d+ tensors"):
        open_source(broken)


@pytest.mark.parametrize("length", [0, 6, 200, -100])
def test_a_truncated_shard_is_named(broken: Path, length: int) -> None:
    content = (broken / SHARD).read_bytes()
    (broken / SHARD).write_bytes(content[:length])
    with pytest.raises(DataError, match=rf"{SHARD}: a truncated or damaged safetensors file"):
        open_source(broken)


def test_missing_and_misshapen_tensors_are_named(broken: Path) -> None:
    tensors = load_file(broken / SHARD)
    name = next(name for name in tensors if name.endswith("_proj.weight"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, broken / SHARD)
    with pytest.raises(DataError, match=rf"{name}.* is .*, the configuration says"):
        open_source(broken)
    save_file({key: value for key, value in tensors.items() if key != name}, broken / SHARD)
    with pytest.raises(DataError, match=rf"no tensor '{name}', which the index names"):
        open_source(broken)


def test_other_architectures_under_a_known_name_are_noticed(write_llama: Any, tmp_path: Path) -> None:
    write_llama(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(6)}, tmp_path / "m/model.safetensors")
    with pytest.raises(DataError, match=r"q_norm\.weight', which Llama, Mistral and Qwen2 do not have"):
        open_source(tmp_path / "m")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (["config.json"], r"config\.json: no such file"),
        (["model.safetensors.index.json"], r"neither model\.safetensors nor .*; there is model-00001"),
    ],
)
def test_incomplete_folders(broken: Path, remove: list[str], message: str) -> None:
    for name in remove:
        (broken / name).unlink()
    with pytest.raises(DataError, match=message):
        open_source(broken)


def test_a_shard_outside_the_folder_is_refused(broken: Path) -> None:
    index = broken / "model.safetensors.index.json"
    index.write_text(index.read_text(encoding="utf-8").replace(SHARD, f"../{SHARD}"), encoding="utf-8")
    with pytest.raises(DataError, match="is no file beside it"):
        open_source(broken)


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "text.gguf").write_text("not at all", encoding="utf-8")
    with pytest.raises(DataError, match="not a GGUF file"):
        open_source(tmp_path / "text.gguf")


# -- GGUF -------------------------------------------------------------------------------------------------------------

KINDS = ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"]


def write_gguf(path: Path, model: SpikeLLM, kind: str = "F32", *, architecture: str = "llama", **metadata: Any) -> Path:
    """Write ``model`` as the converter of llama.cpp does: its names, and turned rows of queries and keys."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    for key, value in {
        "block_count": config.n_layer,
        "context_length": config.ctx_len,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_theta)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_string(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        values = tensor.numpy()
        for layer, heads in (("q_proj", config.n_head), ("k_proj", config.kv_heads)):
            if layer in name and architecture == "llama":
                halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        as_kind = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(theirs, gguf.quantize(np.ascontiguousarray(values), as_kind), raw_dtype=as_kind)
    if config.rope_scaling is not None:
        plain = config.model_copy(update={"rope_scaling": None})
        slow, fast = (Rotary(c).frequencies(torch.float64, torch.device("cpu")) for c in (config, plain))
        writer.add_tensor("rope_freqs.weight", (fast / slow).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WIDE = {"n_embd": 32, "n_inner": 64, "head_dim": 8}
"""Rows of whole blocks of 32."""


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_is_read_as_it_was_written(kind: str, write_llama: Any, tmp_path: Path) -> None:
    written = write_llama(tmp_path / "m", **WIDE)
    source = open_source(write_gguf(tmp_path / "m.gguf", written, kind))
    assert source.config == written.config
    if kind == "F32":
        assert_same(build(source, source.config), written)
    worst = {"F32": 0.0, "F16": 1e-3, "Q8_0": 0.01, "Q4_0": 0.25, "Q4_1": 0.15}[kind]
    for index, block in enumerate(written.blocks()):
        for name, tensor in source.block(index).items():
            assert (tensor - block.state_dict()[name]).abs().max() <= worst, name
    assert source.embedding().dtype == (torch.float16 if kind == "F16" else torch.float32)


def test_qwen2_rows_are_not_turned_and_biases_are_read(write_llama: Any, tmp_path: Path) -> None:
    written = write_llama(tmp_path / "m", kind="qwen2", tie_embeddings=False)
    source = open_source(write_gguf(tmp_path / "m.gguf", written, architecture="qwen2"))
    assert source.config == written.config
    assert_same(build(source, source.config), written)


def test_llama3_scaling_is_recognised_by_its_divisors(write_llama: Any, tmp_path: Path) -> None:
    scaling = {"type": "llama3", "factor": 32.0}
    written = write_llama(tmp_path / "m", rope_scaling=scaling, rope_theta=5e5, **{**WIDE, "head_dim": 64})
    source = open_source(write_gguf(tmp_path / "m.gguf", written))
    assert source.config.rope_scaling == written.config.rope_scaling


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_truncated_gguf_files_are_named(write_llama: Any, tmp_path: Path, share: float) -> None:
    path = write_gguf(tmp_path / "m.gguf", write_llama(tmp_path / "m"))
    content = path.read_bytes()
    path.write_bytes(content[: max(8, int(len(content) * share))])
    with pytest.raises(DataError, match=r"m\.gguf: a truncated GGUF file"):
        open_source(path)


def test_other_architectures_in_gguf_are_refused(write_llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", write_llama(tmp_path / "m"), architecture="qwen3")
    with pytest.raises(DataError, match=r"general.architecture is 'qwen3'(?s:.*)supported are: llama, qwen2"):
        open_source(path)


def test_quantised_files_name_the_extra(write_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", write_llama(tmp_path / "m", **WIDE), "Q8_0")
    plain = write_gguf(tmp_path / "plain.gguf", write_llama(tmp_path / "p", **WIDE), "F16")
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    _package.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'spiking-lm\[hf\]'"):
        open_source(path)
    open_source(plain)


def vocabulary(tokenizer: Any) -> tuple[list[str], list[str]]:
    """The tokens by id, and the merges as a GGUF file has them."""
    layout = json.loads(tokenizer.to_json())["model"]
    named = sorted(layout["vocab"], key=layout["vocab"].get)
    return named, [" ".join(merge) if isinstance(merge, list) else merge for merge in layout["merges"]]


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokenizers_of_gguf(split: str, bpe: Any, write_llama: Any, tmp_path: Path) -> None:
    named, merges = vocabulary(bpe)
    metadata = {"model": "gpt2", "pre": split, "tokens": named, "merges": merges, "token_type": [3] + [1] * 319}
    path = write_gguf(
        tmp_path / "m.gguf",
        write_llama(tmp_path / "m"),
        **{f"tokenizer__ggml__{key}": value for key, value in metadata.items()},
    )
    found = open_source(path).tokenizer
    ids = found.encode(TEXT)
    assert found.decode(ids) == TEXT
    if split == "gpt-2":
        assert ids.tolist() == bpe.encode(TEXT).tolist()
    pieces = [found.decode([index]) for index in found.encode("1813")]
    assert pieces == ["1", "8", "1", "3"] or split in ("gpt-2", "llama-bpe")
    assert found.encode(named[0]).tolist() == [0]  # a control token is one wherever it is written


def test_sentencepiece_tokenizers_of_gguf(shared: Path, write_llama: Any, tmp_path: Path) -> None:
    original = data.load_tokenizer(shared / "data/models/stories260K")
    named, merges = vocabulary(original)
    rank = {merge.replace(" ", ""): float(index) for index, merge in reversed(list(enumerate(merges)))}
    metadata = {
        "model": "llama",
        "tokens": named,
        "scores": [-rank.get(token, 0.0) for token in named],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(named) - 259),
    }
    path = write_gguf(
        tmp_path / "m.gguf",
        write_llama(tmp_path / "m", vocab_size=512),
        **{f"tokenizer__ggml__{key}": value for key, value in metadata.items()},
    )
    found = open_source(path).tokenizer
    for text in (TEXT, "Once upon a time, there was a little girl named Lily.", "naïve 😀", "</s> the end", ""):
        assert found.encode(text).tolist() == original.encode(text).tolist()
        assert found.decode(found.encode(text)) == original.decode(original.encode(text))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "it holds no tokenizer"),
        ({"model": "bert", "tokens": ["a", "b"]}, r"kind 'bert'; supported are gpt2 and llama"),
        ({"model": "gpt2", "pre": "tekken", "tokens": ["a", "b"]}, "splits words as 'tekken'"),
        ({"model": "llama", "tokens": ["a", "b"], "scores": [0.0]}, "2 tokens and 1 scores"),
        ({"model": "gpt2", "tokens": ["a", "a"]}, "names a token twice"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(
    metadata: dict[str, Any], message: str, write_llama: Any, tmp_path: Path
) -> None:
    named = {f"tokenizer__ggml__{key}": value for key, value in metadata.items()}
    source = open_source(write_gguf(tmp_path / "m.gguf", write_llama(tmp_path / "m"), **named))
    assert isinstance(source, GGUFSource)
    with pytest.raises(DataError, match=message):
        _ = source.tokenizer


# -- spiking-lm convert -----------------------------------------------------------------------------------------------


def test_convert_keeps_model_and_tokenizer(llama_folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in llama_folder.iterdir()}
    done = convert(llama_folder, tmp_path / "out", to="spikellm")
    assert done.model_type == "spikellm"
    model, source = load_model(tmp_path / "out"), open_source(llama_folder)
    assert isinstance(model, SpikeLLM)
    assert_same(model, build(source, source.config))
    tokenizer = data.load_tokenizer(tmp_path / "out")
    assert isinstance(tokenizer, SubwordTokenizer)
    assert tokenizer.encode(TEXT).tolist() == source.tokenizer.encode(TEXT).tolist()
    assert {path.name: path.read_bytes() for path in llama_folder.iterdir()} == before


def test_convert_rounds_to_nearest_when_told_to(llama_folder: Path, tmp_path: Path) -> None:
    options = {"weights": {"bits": 4}, "activations": {"bits": 4}, "cache": {"bits": 4}}
    convert(llama_folder, tmp_path / "out", options=options)
    model = load_model(tmp_path / "out")
    assert isinstance(model, SpikeLLM)
    assert model.config.weights.bits == 4
    float_model = build(open_source(llama_folder), open_source(llama_folder).config)
    weight, rounded = (m.blocks()[1].mlp.up_proj.weight for m in (float_model, model))
    step = (weight.amax(1) - weight.amin(1)) / 15
    assert ((weight - rounded).abs().amax(1) <= step * 0.501).all()
    with pytest.raises(UsageError, match="did you mean 'weights'"):
        convert(llama_folder, tmp_path / "other", options={"weihgts": {"bits": 4}})


def test_convert_without_a_tokenizer_says_what_to_do(broken: Path, bpe: Any, tmp_path: Path) -> None:
    (broken / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(DataError, match=r"no tokenizer\.json(?s:.*)--tokenizer"):
        convert(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(broken, tmp_path / "out", tokenizer=tmp_path / "elsewhere.json")
    assert data.load_tokenizer(tmp_path / "out").encode(TEXT).tolist() == bpe.encode(TEXT).tolist()


def test_a_folder_given_to_the_wrong_converter_names_the_right_one(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'spikelm' does not convert this folder, .* model_type 'llama'") as caught:
        convert(broken, tmp_path / "out", to="spikelm")
    assert caught.value.hint == "--to spikellm does"


def test_folders_of_other_kinds_are_left_to_others(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"no converter recognises this folder, whose .* model_type 'llama'"):
        convert(broken, tmp_path / "out")


# -- real models ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stories260k(shared: Path) -> None:
    folder = shared / "data/models/stories260K"
    source = open_source(folder)
    model = build(source, source.config)
    (sampled,) = (shared / "data").rglob("stories260K_selfsample_dev.npy")
    rows = torch.from_numpy(np.load(sampled).astype(np.int64))
    losses = [cross_entropy(model(part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()) for part in rows.split(25)]
    assert float(torch.stack(losses).mean().exp()) == pytest.approx(3.599, abs=2e-3)
    story = source.tokenizer.decode(generate(model, [1], max_new_tokens=60, temperature=0).tolist()[1:])
    expected = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she"
    )
    assert story.strip().startswith(expected)


@pytest.mark.slow
@torch.no_grad()
def test_smollm2(smollm2: Path) -> None:
    source = open_source(smollm2)
    ids = source.tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    assert ids.tolist() == [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30]
    row = torch.from_numpy(ids.astype(np.int64))
    logits = build(source, source.config)(row[None]).logits[0]
    loss = cross_entropy(logits[:-1], row[1:], reduction="none")
    expected = [14.3089, 6.2765, 1.4159, 7.0420, 0.0050, 2.6959, 2.4759, 0.1117, 1.7731]
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=0, atol=2e-3)
    best = logits[3].topk(5)
    assert [source.tokenizer.decode([i]) for i in best.indices.tolist()] == [" with", " and", ",", " (", " named"]
    torch.testing.assert_close(best.values, torch.tensor([18.155, 15.715, 15.488, 15.168, 15.008]), rtol=0, atol=2e-3)
