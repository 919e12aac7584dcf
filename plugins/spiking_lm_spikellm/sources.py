"""Reading Llama, Mistral and Qwen2 checkpoints of other tools: Hugging Face folders and GGUF files.

A source is opened once, which checks that every tensor is there and has its shape; tensors are then read when they are
asked for, so that a model can be converted with one block in memory. Nothing in a source is executed.
"""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from spiking_lm.config import parse_config
from spiking_lm.data import Tokenizer
from spiking_lm.errors import DataError
from spiking_lm.quantization import round_to_nearest
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.layers import SpikingLinear

if TYPE_CHECKING:
    from spiking_lm_spikellm.model import Block, SpikeLLM

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How Hugging Face names architectures that go on with a text; of those that are not Llama's we say so."""


class Final(NamedTuple):
    """What stands behind the last block."""

    norm: Tensor
    """(C,), float32."""
    head: Tensor | None
    """(V, C) in the source's precision; None: the embedding."""


class Source(ABC):
    """A checkpoint of another tool; tensors are named as by Hugging Face."""

    path: Path
    config: SpikeLLMConfig

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Read one tensor in the source's precision (float32 when that is neither float16 nor bfloat16)."""

    @functools.cached_property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the source has with it. Raises DataError when there is none that can be read."""

    @abstractmethod
    def sha256(self) -> str:
        """Return the identity of the weights; computed from all bytes."""

    def embedding(self) -> Tensor:
        """Read the embedding table, ``(V, C)``, in the source's precision."""
        return self.tensor(EMBEDDING)

    def block(self, index: int) -> dict[str, Tensor]:
        """Read a block in float32, by names below the block such as ``self_attn.q_proj.weight``."""
        return {name: self.tensor(f"model.layers.{index}.{name}").float() for name in block_shapes(self.config)}

    def final(self) -> Final:
        """Read the last norm and the head."""
        return Final(self.tensor(NORM).float(), None if self.config.tie_embeddings else self.tensor(HEAD))

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise DataError unless every tensor of the model is among ``shapes`` and has its shape."""
        expected = tensor_shapes(self.config)
        problems = [f"no tensor {name!r}" for name in expected if name not in shapes]
        problems += [
            f"{name!r} is {tuple(shapes[name])}, the configuration says {shape}"
            for name, shape in expected.items()
            if name in shapes and tuple(shapes[name]) != shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise DataError(f"{self.path}: {'; '.join(problems[:3])}{more}", hint="is the copy complete?")
        foreign = [name for name in shapes if name not in expected and name.endswith((".bias", "_norm.weight"))]
        if foreign:
            raise DataError(
                f"{self.path}: it has {foreign[0]!r}, which Llama, Mistral and Qwen2 do not have",
                hint="the model is of another architecture",
            )


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face folder or a ``.gguf`` file and check its tensors' names and shapes.

    Raises: DataError naming the file that is missing, truncated or of another architecture; MissingExtraError.
    """
    path = Path(path)
    if path.is_dir():
        from spiking_lm_spikellm.huggingface import HuggingFaceSource

        return HuggingFaceSource(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    from spiking_lm_spikellm.gguf_file import GGUFSource

    return GGUFSource(path)


def block_shapes(config: SpikeLLMConfig) -> dict[str, tuple[int, ...]]:
    """Return the float tensors of a block, by their names below it."""
    size, inner = config.n_embd, config.n_inner
    queries, keys = config.n_head * config.head_size, config.kv_heads * config.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (size,),
        "self_attn.q_proj.weight": (queries, size),
        "self_attn.k_proj.weight": (keys, size),
        "self_attn.v_proj.weight": (keys, size),
        "self_attn.o_proj.weight": (size, queries),
        "post_attention_layernorm.weight": (size,),
        "mlp.gate_proj.weight": (inner, size),
        "mlp.up_proj.weight": (inner, size),
        "mlp.down_proj.weight": (size, inner),
    }
    if config.qkv_bias:
        shapes |= {f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", queries), ("k", keys), ("v", keys))}
    return shapes


def tensor_shapes(config: SpikeLLMConfig) -> dict[str, tuple[int, ...]]:
    """Return every float tensor of a model."""
    table = (config.vocab_size, config.n_embd)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, NORM: (config.n_embd,)}
    if not config.tie_embeddings:
        shapes[HEAD] = table
    for index in range(config.n_layer):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in block_shapes(config).items()}
    return shapes


# -- the converter ----------------------------------------------------------------------------------------------------


def sniff(source: Path | Mapping[str, Tensor]) -> bool:
    """Tell whether ``spiking-lm convert`` should hand ``source`` to us: a GGUF file or a causal Hugging Face model."""
    if not isinstance(source, Path):
        return False
    if source.is_file():
        with source.open("rb") as file:
            return file.read(4) == b"GGUF"
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = config.get("architectures") if isinstance(config, dict) else None
    return isinstance(named, list) and any(str(name).endswith(_CAUSAL) for name in named)


def convert(source: Path, **options: Any) -> SpikeLLM:
    """Return the float SpikeLLM model of a source; ``options`` change fields of its configuration.

    With schemes switched on in ``options``, weights are rounded to nearest, without calibration.
    """
    opened = open_source(source)
    values = {**opened.config.model_dump(mode="json"), **options}
    return build(opened, parse_config(SpikeLLMConfig, values, where="model 'spikellm'"))


def build(source: Source, config: SpikeLLMConfig) -> SpikeLLM:
    """Return a model of ``config`` with the weights of ``source``, rounded to nearest where they are to be packed.

    Of a model with packed weights, embedding and head stay in the source's precision; all else is float32.
    """
    from spiking_lm_spikellm.model import SpikeLLM

    with torch.random.fork_rng(devices=[]):
        model = SpikeLLM(config)
    fill_ends(model, source)
    for index, block in enumerate(model.blocks()):
        fill_block(block, source.block(index))
    return model.eval()


def fill_block(block: Block, tensors: Mapping[str, Tensor]) -> None:
    """Put a block's float tensors into ``block``; what is to be packed is rounded to nearest."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = block.get_submodule(owner)
        if isinstance(module, SpikingLinear) and leaf == "weight" and not module.weights.off:
            module.set_weight(round_to_nearest(tensor, module.weights))
        else:
            setattr(module, leaf, nn.Parameter(tensor))


def fill_ends(model: SpikeLLM, source: Source) -> None:
    """Put the source's embedding, last norm and head into ``model``."""
    final = source.final()

    def stored(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.float() if model.config.weights.off else tensor)

    model.model.norm.weight = nn.Parameter(final.norm)
    model.model.embed_tokens.weight = stored(source.embedding())
    model.lm_head.weight = model.model.embed_tokens.weight if final.head is None else stored(final.head)


def tokenizer(source: Path) -> Tokenizer:
    """Return the tokenizer that a source has with it."""
    return open_source(source).tokenizer
