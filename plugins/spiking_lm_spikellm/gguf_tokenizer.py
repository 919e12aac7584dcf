"""The tokenizer in a GGUF file's metadata, rebuilt as one of the Hugging Face ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiking_lm.data.tokenizers import SubwordTokenizer
from spiking_lm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Types of tokens."""

_WORDS = (  # Llama 3's and Qwen2's; {} is how many digits stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPACE = "▁"


def read_tokenizer(metadata: Mapping[str, Any], path: Path) -> SubwordTokenizer:
    """Rebuild the tokenizer. Raises DataError for a kind that is not known, or where there is none."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise DataError(
            f"{path}: it holds no tokenizer",
            hint="take a file that does, or the Hugging Face folder; without a recipe, --tokenizer names one",
        )
    if len(set(tokens)) != len(tokens):
        raise DataError(f"{path}: its tokenizer names a token twice", hint="name another one with --tokenizer")
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens, path)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens, path)
    else:
        raise DataError(
            f"{path}: its tokenizer is of the kind {kind!r}; supported are gpt2 and llama",
            hint="name the model's tokenizer.json with --tokenizer",
        )
    _mark_special(backend, tokens, metadata.get("tokenizer.ggml.token_type") or [])
    return SubwordTokenizer(backend)


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE, in which the kind of splitting before it is known by its name only."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges") or []]
    split = str(metadata.get("tokenizer.ggml.pre", "default"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def after_words(digits: str) -> pre_tokenizers.PreTokenizer:
        words = pre_tokenizers.Split(Regex(_WORDS.format(digits)), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, rest])

    known = {
        "default": plain,
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": after_words("{1,3}"),
        "llama3": after_words("{1,3}"),
        "qwen2": after_words(""),
    }
    if split not in known:
        raise DataError(
            f"{path}: its tokenizer splits words as {split!r}; supported are {', '.join(sorted(known))}",
            hint="name the model's tokenizer.json with --tokenizer",
        )
    whole_words = split in ("llama-bpe", "llama3")  # a word that is a token is one, whatever the merges say
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    backend.pre_tokenizer = known[split]
    backend.decoder = decoders.ByteLevel()
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: there are no merges, but pieces with scores, and the best pair of neighbours joins first."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise DataError(f"{path}: its tokenizer has {len(tokens)} tokens and {len(scores)} scores")
    index = {token: i for i, token in enumerate(tokens)}
    pairs = [
        (-scores[whole], index[left], index[right], left, right)
        for token, whole in index.items()
        for cut in range(1, len(token))
        if (left := token[:cut]) in index and (right := token[cut:]) in index
    ]
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    unknown = next((tokens[i] for i, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    bytes_too = all(f"<0x{byte:02X}>" in index for byte in range(256))
    backend = tokenizers.Tokenizer(
        models.BPE(
            index,
            [(left, right) for *_, left, right in sorted(pairs)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bytes_too,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if prefix:
        steps.insert(0, normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _mark_special(backend: tokenizers.Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Have control tokens and the user's own found in a text before anything is split."""
    import tokenizers

    for token, kind in zip(tokens, kinds, strict=False):
        added = tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
        if kind == _CONTROL:
            backend.add_special_tokens([added])
        elif kind == _USER_DEFINED:
            backend.add_tokens([added])
