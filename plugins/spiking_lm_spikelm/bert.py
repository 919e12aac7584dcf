"""Reading BERT: Hugging Face folders and state dicts become the dense twin of SpikeLM, with their tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spiking_lm.convert import read_tensors
from spiking_lm.data import Tokenizer, load_tokenizer
from spiking_lm.errors import DataError
from spiking_lm_spikelm.model import SpikeLM
from spiking_lm_spikelm.reference import import_reference, is_reference

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def sniff(source: Path | Mapping[str, Tensor]) -> bool:
    """Tell whether this is a Hugging Face folder of BERT, or a state dict of BERT or of the released SpikeLM."""
    if not isinstance(source, Path):
        return is_reference(source)
    return source.is_dir() and _read_config(source).get("model_type") == "bert"


def convert(source: Path | Mapping[str, Tensor], **options: Any) -> SpikeLM:
    """Return the model of a folder or a state dict; ``options`` change fields of its configuration.

    From a folder without a classifier the pooling is the mean over the tokens, as sentence encoders do it, and the
    pooler, if there is one, is left out; ``pooling=cls`` keeps it. A classifier reads the pooler.

    Raises: DataError for a folder without weights, and for variants of BERT that compute something else.
    """
    if not isinstance(source, Path):
        return import_reference(source, **options)
    config = _read_config(source)
    file = next((source / name for name in _WEIGHTS if (source / name).is_file()), None)
    if file is None:
        raise DataError(f"{source}: neither {' nor '.join(_WEIGHTS)} is there", hint="is the copy complete?")
    tensors = read_tensors(file)
    _check(source, config, spiking=any(".act_clip_val." in key for key in tensors))
    told = {
        "n_head": config.get("num_attention_heads"),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "dropout": config.get("hidden_dropout_prob", 0.1),
        "mlm_activation": config.get("hidden_act", "gelu"),
        "pooling": "cls" if "classifier.weight" in tensors or "cls.seq_relationship.weight" in tensors else "mean",
    }
    return import_reference(tensors, **{**told, **options})


def tokenizer(source: Path) -> Tokenizer:
    """Return the tokenizer of a folder."""
    return load_tokenizer(source / "tokenizer.json")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _check(folder: Path, config: dict[str, Any], *, spiking: bool) -> None:
    """Raise DataError for what would be computed otherwise than here; SpikeLM has GELU in its blocks come what may."""
    expected = {
        "position_embedding_type": ("absolute",),
        "hidden_act": ("gelu", "relu") if spiking else ("gelu",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }
    for field, known in expected.items():
        value = config.get(field, known[0])
        if value not in known:
            raise DataError(
                f"{folder / 'config.json'}: {field} is {value!r}, which this model does not have",
                hint=f"known: {', '.join(map(str, known))}",
            )
