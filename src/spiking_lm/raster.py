"""The spikes of a short text, kept for the report's picture."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spiking_lm.errors import DataError
from spiking_lm.files import atomic_write
from spiking_lm.interfaces import SpikingLanguageModel, longest_text, observe
from spiking_lm.watch import check_range, device_of, vocab_size, watching

_RASTER_CHANNELS = 128


@dataclass(frozen=True)
class Raster:
    """The spikes of one short text: ``spikes[site] (T, channels)``, and the text of each token."""

    text: list[str]
    spikes: dict[str, np.ndarray[Any, Any]]
    channels: dict[str, int]
    """How many channels the site has; ``spikes`` may hold an even selection of them."""


def record_raster(model: SpikingLanguageModel, tokens: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Run one text and return, per site, how strongly each channel fired at each token: uint8 ``(T, at most 128)``.

    Channels are chosen evenly; a value is the size of the spike, its sign dropped, and 255 at most.
    """
    rows = torch.as_tensor(np.asarray(tokens).astype(np.int64)).reshape(1, -1)
    check_range(rows, vocab_size(model))
    with watching(model):
        spikes = observe(model, rows.to(device_of(model))).spikes or {}
    raster = {}
    for name, s in spikes.items():
        # Rounding up keeps weak graded spikes visible: only a true zero is 0.
        per_token = s[0].float().abs().flatten(1, -2).sum(1) if s.ndim > 3 else s[0].float().abs()
        size = per_token.ceil().clamp(max=255).to(torch.uint8).cpu().numpy()
        raster[name] = size[:, _evenly(size.shape[1], _RASTER_CHANNELS)]
    return raster


def save_raster(model: SpikingLanguageModel, data_tokens: Any, tokenizer: Any, path: Path, n_tokens: int = 200) -> None:
    """Record the first ``n_tokens`` of ``data_tokens (N,)`` and write them with their text as ``.npz``, without pickle.

    Fewer if the model reads no text of so many.

    Arrays: ``text`` (a JSON list of T strings in UTF-8), ``sites (S,)``, ``channels (S,)`` and, for the i-th site,
    ``spikes_<i> (T, C)``.
    """
    n_tokens = min(n_tokens, longest_text(model) or n_tokens)
    ids = np.asarray(data_tokens[:n_tokens]).astype(np.int64)
    raster = record_raster(model, ids)
    sizes = {op.name: op.size for op in model.graph()}
    arrays: dict[str, Any] = {
        # JSON, since numpy's strings lose the NUL bytes that they end with.
        "text": np.frombuffer(json.dumps([tokenizer.decode([int(i)]) for i in ids]).encode(), np.uint8),
        "sites": np.array(list(raster), dtype=np.str_),
        "channels": np.array([sizes.get(site, s.shape[1]) for site, s in raster.items()], dtype=np.int64),
    }
    arrays.update({f"spikes_{i}": s for i, s in enumerate(raster.values())})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def load_raster(path: Path) -> Raster:
    """Read what :func:`save_raster` wrote. Raises DataError if the file is damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            sites = [str(site) for site in file["sites"]]
            raster = Raster(
                text=[str(piece) for piece in json.loads(file["text"].tobytes())],
                spikes={site: file[f"spikes_{i}"] for i, site in enumerate(sites)},
                channels={site: int(n) for site, n in zip(sites, file["channels"], strict=True)},
            )
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
        raise DataError(f"{path}: not a spike raster that can be read ({error})") from None
    for site, spikes in raster.spikes.items():
        if spikes.ndim != 2 or len(spikes) != len(raster.text) or spikes.dtype != np.uint8:
            raise DataError(f"{path}: the spikes of {site!r} do not fit the text")
    return raster


def _evenly(n: int, most: int) -> np.ndarray[Any, Any]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))
