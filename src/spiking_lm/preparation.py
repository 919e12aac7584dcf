"""What a recipe begins with: its data loaded, and its model built to the size of the data."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiking_lm import registry
from spiking_lm.config import ConverterConfig, parse_config
from spiking_lm.errors import RecipeError, UsageError
from spiking_lm.recipe import Recipe, split_choice
from spiking_lm.registry import Registered

if TYPE_CHECKING:
    from rich.console import Console

    from spiking_lm.data import ClipData, LabelledData, TextData
    from spiking_lm.interfaces import SpikingLanguageModel


def data_of(recipe: Recipe, console: Console) -> TextData | LabelledData | ClipData:
    """Load the data of a recipe; the tokens of one that converts a model are those of that model.

    Raises: what :func:`load_data` raises; RecipeError when the recipe does not say which model.
    """
    if recipe.convert is None:
        return load_data(recipe.data, console)
    with tempfile.TemporaryDirectory(prefix="spiking-lm-") as folder:
        file = Path(folder) / "tokenizer.json"
        converter(recipe).load("tokenizer")(source_of(recipe)).save(file)
        return load_data({**recipe.data, "tokenizer": {"type": "file", "path": str(file)}}, console)


def converter(recipe: Recipe) -> Registered:
    """Return what the convert stage of a recipe names."""
    assert recipe.convert is not None
    return registry.get("converters", recipe.convert["type"])


def converter_options(recipe: Recipe) -> ConverterConfig:
    """Return the options of the convert stage of a recipe."""
    assert recipe.convert is not None
    cls: type[ConverterConfig] = converter(recipe).load("config")
    return parse_config(cls, split_choice(recipe.convert)[1], where=f"recipe {recipe.name}: convert")


def source_of(recipe: Recipe) -> Path:
    """Return the path of what a recipe converts. Raises: RecipeError when it says none, or one that is not there."""
    source = converter_options(recipe).source
    if source is None:
        raise RecipeError(f"recipe {recipe.name}: convert.source is not set", hint="add --set convert.source=MODEL_DIR")
    path = Path(source).expanduser()
    if not path.exists():
        raise RecipeError(f"recipe {recipe.name}: convert.source: {source!r}: no such file or folder")
    return path


def load_data(config: dict[str, Any], console: Console) -> TextData | LabelledData | ClipData:
    """Load what a recipe's ``data`` describes, with a progress bar where tokenizing takes long."""
    from rich.progress import Progress

    from spiking_lm import data

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: list[Any] = []

        def show(done: int, total: int) -> None:
            if not tasks:
                tasks.append(progress.add_task("reading text", total=total))
            progress.update(tasks[0], completed=done, total=total)

        return data.load(config, progress=show)


def build_model(recipe: Recipe, data: TextData | LabelledData | ClipData) -> SpikingLanguageModel:
    """Build the model of a recipe, its weights drawn from the recipe's seed, sized by the data.

    Raises: RecipeError when the recipe gives a ``vocab_size``, ``num_classes`` or ``frame_shape`` that the data
    contradicts.
    """
    import torch

    from spiking_lm.data import ClipData
    from spiking_lm.models import create_model

    name, config = split_choice(recipe.model)
    if isinstance(data, ClipData):
        _fit(recipe, config, "frame_shape", list(data.frame_shape), "a frame of the data")
    else:
        _fit(recipe, config, "vocab_size", data.tokenizer.vocab_size, f"the {data.tokenizer.type} tokenizer")
    if hasattr(data, "labels"):
        _fit(recipe, config, "num_classes", len(data.labels), "the set of labels")
    torch.manual_seed(recipe.seed)
    return create_model(name, **config)


def _fit(recipe: Recipe, config: dict[str, Any], field: str, value: int | list[int], source: str) -> None:
    given = config.get(field)
    if given is not None and given != value:
        raise RecipeError(
            f"recipe {recipe.name}: model.{field} is {given}, but {source} has {value}",
            hint=f"leave model.{field} out: it follows from the data",
        )
    config[field] = value


def sample_tokens(data: TextData | LabelledData | ClipData, split: str, n: int) -> Any:
    """Return the first ``n`` token ids ``(n,)`` of a split, fewer when it is shorter; examples are strung together."""
    import numpy as np

    if data.tokenizer is None:
        raise UsageError(f"the dataset {data.name!r} holds clips of events, and no tokens")
    part = getattr(data, split)
    if hasattr(part, "tokens"):
        return np.asarray(part.tokens[:n]).astype(np.int64)
    pieces: list[Any] = []
    for example in part:
        if sum(map(len, pieces)) >= n:
            break
        pieces.append(data.tokenizer.encode(example.text).astype(np.int64))
    return np.concatenate(pieces)[:n] if pieces else np.zeros(0, np.int64)
