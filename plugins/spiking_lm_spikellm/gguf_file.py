"""GGUF files of Llama, Mistral and Qwen2 models.

The header is read here, in a fraction of the time that the ``gguf`` package takes over tens of thousands of tokens; the
package (extra ``hf``) knows how each kind of quantised block becomes numbers.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spiking_lm import data
from spiking_lm.config import parse_config
from spiking_lm.errors import DataError, MissingExtraError
from spiking_lm.files import sha256_file
from spiking_lm_spikellm.config import RopeScaling, SpikeLLMConfig
from spiking_lm_spikellm.sources import EMBEDDING, HEAD, NORM, Source

SUPPORTED = ("llama", "qwen2")
"""``general.architecture``; Mistral is ``llama`` there."""

_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": NORM, "output.weight": HEAD}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOAT_KINDS: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
"""Tensor types that need no package: float32 and float16."""


class _Entry(NamedTuple):
    """Where a tensor is in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class _Reader:
    """Reads the header from a mapped file, little-endian."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer, self.path, self.at = buffer, path, 0

    def scalar(self, code: str) -> Any:
        try:
            (value,) = struct.unpack_from("<" + code, self.buffer, self.at)
        except struct.error:
            raise self.truncated() from None
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        end = self.scalar("Q") + self.at
        if end > len(self.buffer):
            raise self.truncated()
        text = self.buffer[self.at : end].decode("utf-8", errors="replace")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            if count > len(self.buffer):
                raise self.truncated()
            return [self.value(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise DataError(f"{self.path}: metadata of unknown type {kind}", hint="is this file damaged?")
        return self.scalar(_SCALARS[kind])

    def truncated(self) -> DataError:
        return DataError(f"{self.path}: a truncated GGUF file: it ends inside its header", hint="copy the file again")


class GGUFSource(Source):
    """A ``.gguf`` file: weights of any precision that the ``gguf`` package can read, and the tokenizer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, _Entry] = {}
        self.metadata = self._read_header()
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in SUPPORTED:
            raise DataError(
                f"{path}: general.architecture is {self.architecture!r}", hint=f"supported are: {', '.join(SUPPORTED)}"
            )
        self.config = self._config()
        self._check({name: entry.shape for name, entry in self._entries.items()})

    def tensor(self, name: str) -> Tensor:
        values = self._values(self._entries[name])
        heads = {"q_proj": self.config.n_head, "k_proj": self.config.kv_heads}.get(name.split(".")[-2])
        if heads and self.architecture == "llama":
            # llama.cpp turns neighbours (2j, 2j + 1) by position where everyone else turns (j, j + d/2).
            values = values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
        return values.contiguous()

    @functools.cached_property
    def tokenizer(self) -> data.Tokenizer:
        """The tokenizer that the metadata describes, as one of the tokenizers library."""
        from spiking_lm_spikellm.gguf_tokenizer import read_tokenizer

        return read_tokenizer(self.metadata, self.path)

    def sha256(self) -> str:
        """Return the hash of the file."""
        return sha256_file(self.path)

    def _read_header(self) -> dict[str, Any]:
        """Read the metadata, and fill the table of tensors under Hugging Face's names."""
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise DataError(f"{self.path}: not a GGUF file", hint="a Hugging Face model is a folder: name that")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                reader = _Reader(buffer, self.path)
                reader.at = 4
                version, tensors, values = reader.scalar("I"), reader.scalar("Q"), reader.scalar("Q")
                if version not in (2, 3):
                    raise DataError(
                        f"{self.path}: GGUF version {version}, or big-endian", hint="versions 2 and 3 can be read"
                    )
                metadata = {reader.string(): reader.value(reader.scalar("I")) for _ in range(values)}
                found: list[tuple[str, _Entry]] = []
                for _ in range(tensors):
                    name, dimensions = reader.string(), reader.scalar("I")
                    shape = tuple(reader.scalar("Q") for _ in range(dimensions))[::-1]  # innermost first in the file
                    found.append((name, _Entry(shape, reader.scalar("I"), reader.scalar("Q"))))
                alignment = metadata.get("general.alignment", 32)
                start = -(-reader.at // alignment) * alignment
                for name, entry in found:
                    end = start + entry.offset + _size(entry)
                    if end > len(buffer):
                        raise DataError(
                            f"{self.path}: a truncated GGUF file: {name!r} ends at byte {end} of {len(buffer)}",
                            hint="copy the file again",
                        )
                    self._entries[_name(name)] = entry._replace(offset=start + entry.offset)
        return metadata

    def _values(self, entry: _Entry) -> Tensor:
        raw = np.memmap(self.path, np.uint8, "r", entry.offset, (_size(entry),))
        if entry.kind in _FLOAT_KINDS:
            return torch.from_numpy(np.array(raw.view(_FLOAT_KINDS[entry.kind]))).reshape(entry.shape)
        gguf = _package()
        kind = gguf.GGMLQuantizationType(entry.kind)
        try:
            values = gguf.dequantize(np.array(raw), kind)
        except NotImplementedError as error:
            raise DataError(
                f"{self.path}: weights of type {kind.name} cannot be read ({error})",
                hint="make a file of type Q8_0, Q4_1, F16 or another one that the gguf package reads",
            ) from None
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(entry.shape)

    def _config(self) -> SpikeLLMConfig:
        def field(name: str, default: Any = None, *, needed: bool = False) -> Any:
            value = self.metadata.get(f"{self.architecture}.{name}", default)
            if value is None and needed:
                raise DataError(f"{self.path}: metadata {self.architecture}.{name} is missing")
            return value

        heads, size = field("attention.head_count", needed=True), field("embedding_length", needed=True)
        if EMBEDDING not in self._entries:
            raise DataError(f"{self.path}: no tensor 'token_embd.weight'")
        scaling = field("rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise DataError(f"{self.path}: rotary scaling of type {scaling!r}", hint="supported are: none, linear")
        values = {
            "vocab_size": self._entries[EMBEDDING].shape[0],
            "n_layer": field("block_count", needed=True),
            "n_embd": size,
            "n_inner": field("feed_forward_length", needed=True),
            "n_head": heads,
            "n_kv_head": field("attention.head_count_kv"),
            "head_dim": field("attention.key_length", field("rope.dimension_count")),
            "ctx_len": field("context_length", needed=True),
            "sliding_window": field("attention.sliding_window") or None,
            "norm_eps": float(str(np.float32(field("attention.layer_norm_rms_epsilon", 1e-5)))),  # 1e-05 again
            "rope_theta": field("rope.freq_base", 10000.0),
            "rope_scaling": {"type": "linear", "factor": field("rope.scaling.factor", needed=True)}
            if scaling == "linear"
            else None,
            "qkv_bias": "model.layers.0.self_attn.q_proj.bias" in self._entries,
            "tie_embeddings": HEAD not in self._entries,
        }
        config = parse_config(SpikeLLMConfig, values, where=str(self.path), error=DataError)
        if "rope_freqs.weight" in self._entries:
            config = config.model_copy(update={"rope_scaling": self._llama3_scaling(config)})
        return config

    def _llama3_scaling(self, config: SpikeLLMConfig) -> RopeScaling:
        """Find the scaling of which only the divisors of the frequencies are in the file."""
        from spiking_lm_spikellm.model import Rotary

        divisors = self._values(self._entries["rope_freqs.weight"]).double()
        scaling = RopeScaling(type="llama3", factor=float(divisors.max()))  # the published models share all but this
        plain, scaled = (
            Rotary(config.model_copy(update={"rope_scaling": s})).frequencies(torch.float64, divisors.device)
            for s in (None, scaling)
        )
        if divisors.shape != plain.shape or not torch.allclose(plain / scaled, divisors, rtol=1e-3):
            raise DataError(
                f"{self.path}: rope_freqs.weight are not those of Llama 3", hint="convert the original model"
            )
        return scaling


def _name(name: str) -> str:
    """Return Hugging Face's name of a GGUF tensor; unknown ones keep theirs."""
    if name.startswith("blk."):
        _, index, *inner = name.split(".")
        if inner and inner[0] in _BLOCK_NAMES:
            return ".".join(["model.layers", index, _BLOCK_NAMES[inner[0]], *inner[1:]])
    return _NAMES.get(name, name)


def _size(entry: _Entry) -> int:
    """Return the bytes that a tensor takes."""
    if entry.kind in _FLOAT_KINDS:
        return math.prod(entry.shape) * _FLOAT_KINDS[entry.kind].itemsize
    gguf = _package()
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.kind)]
    except (ValueError, KeyError):
        raise DataError(f"a tensor of unknown type {entry.kind}", hint="pip install --upgrade gguf") from None
    return math.prod(entry.shape) // int(block) * int(size)


@functools.cache
def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("reading quantised GGUF files", "hf", detail=str(error)) from None
    return gguf
