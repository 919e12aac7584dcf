"""What a recipe begins with: its data loaded, and its model built to the size of the data."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiking_lm import registry
from spiking_lm.config import ConverterConfig, parse_config
from spiking_lm.errors import CheckpointError, DataError, RecipeError, UsageError
from spiking_lm.files import sha256_file
from spiking_lm.recipe import Recipe, split_choice
from spiking_lm.registry import Registered
from spiking_lm.sealed import SUMS

if TYPE_CHECKING:
    from rich.console import Console

    from spiking_lm.data import Data
    from spiking_lm.interfaces import SpikingLanguageModel

log = logging.getLogger(__name__)


def data_of(recipe: Recipe, console: Console) -> Data:
    """Load the data of a recipe; the tokens of one that converts a model are those of that model.

    The same holds for the tokenizer ``{type: model}`` without a path: it is that of the model that training starts
    from, else of the teacher.

    Raises: what :func:`load_data` raises; RecipeError when the recipe does not say which model.
    """
    if recipe.convert is None:
        return load_data(_with_tokens_of_a_model(recipe), console)
    with tempfile.TemporaryDirectory(prefix="spiking-lm-") as folder:
        file = Path(folder) / "tokenizer.json"
        converter(recipe).load("tokenizer")(source_of(recipe)).save(file)
        return load_data({**recipe.data, "tokenizer": {"type": "file", "path": str(file)}}, console)


def _with_tokens_of_a_model(recipe: Recipe) -> dict[str, Any]:
    """Return the ``data`` of a recipe with the path of the model whose tokenizer it takes."""
    tokenizer = recipe.data.get("tokenizer", {})
    if tokenizer.get("type") != "model" or tokenizer.get("path") is not None or tokenizer.get("kept") is not None:
        return recipe.data
    train = recipe.train
    path = None if train is None else train.start or (train.distill.teacher if train.distill else None)
    if path is None:
        field = "train.distill.teacher" if train is not None and train.distill is not None else "data.tokenizer.path"
        raise RecipeError(
            f"recipe {recipe.name}: {field} is not set, and the tokenizer is that of a model",
            hint=f"add --set {field}=MODEL_DIR",
        )
    return {**recipe.data, "tokenizer": {**tokenizer, "path": path}}


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


def load_data(config: dict[str, Any], console: Console) -> Data:
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


def build_model(recipe: Recipe, data: Data) -> SpikingLanguageModel:
    """Build the model of a recipe, sized by the data: weights drawn from its seed, or those it says it starts from.

    Raises: RecipeError when the recipe gives a ``vocab_size``, ``num_classes`` or ``frame_shape`` that the data
    contradicts; DataError when a model to start or to learn from reads other tokens; CheckpointError.
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
    model = create_model(name, **config)
    if recipe.train is not None and recipe.train.start is not None:
        _start(model, recipe.train.start, data)
    elif recipe.train is not None and recipe.train.distill is not None and recipe.train.distill.embedding == "pca":
        from spiking_lm.distillation import Teacher, embed_as_teacher, teacher_path

        embed_as_teacher(model, Teacher(teacher_path(recipe.train.distill), data.tokenizer).vectors())
    return model


def _start(model: SpikingLanguageModel, path: str, data: Data) -> None:
    """Give ``model`` the weights of another wherever names and shapes agree, and say in the log what it lacks.

    Raises: DataError when that one reads other tokens, CheckpointError when most of its weights do not fit.
    """
    import torch

    from spiking_lm.checkpoints import load_model, resolve_model
    from spiking_lm.data.reduced import tokenizer_of_model

    folder = resolve_model(Path(path).expanduser())
    if data.tokenizer is not None and tokenizer_of_model(folder).sha256 != data.tokenizer.sha256:
        raise DataError(
            f"train.start: {folder} reads other tokens than the {data.tokenizer.type} tokenizer of the data gives",
            hint="data.tokenizer: {type: model} takes those of the model to start from",
        )
    ours, theirs = model.state_dict(), load_model(folder).state_dict()
    fits = {name for name, tensor in ours.items() if name in theirs and theirs[name].shape == tensor.shape}
    if 2 * sum(ours[name].numel() for name in fits) < sum(tensor.numel() for tensor in ours.values()):
        odd = sorted(ours.keys() - fits)
        raise CheckpointError(
            f"train.start: {folder} fits only {len(fits)} of the {len(ours)} tensors of this model, not {odd[0]!r}",
            hint="a run that starts from a model has the same model section, but for the head",
        )
    with torch.no_grad():
        for name in fits:
            ours[name].copy_(theirs[name])
    if fresh := sorted(ours.keys() - fits):
        log.warning("train.start: begin at random, as %s has no such tensors: %s", folder, ", ".join(fresh))


def _fit(recipe: Recipe, config: dict[str, Any], field: str, value: int | list[int], source: str) -> None:
    given = config.get(field)
    if given is not None and given != value:
        raise RecipeError(
            f"recipe {recipe.name}: model.{field} is {given}, but {source} has {value}",
            hint=f"leave model.{field} out: it follows from the data",
        )
    config[field] = value


def identity(path: str) -> dict[str, str]:
    """Return which model a path means: its folder, and the SHA-256 of the list of what the folder holds."""
    from spiking_lm.checkpoints import resolve_model

    folder = resolve_model(Path(path).expanduser())
    return {"path": str(folder), "sha256": sha256_file(folder / SUMS)}


def sample_tokens(data: Data, split: str, n: int) -> Any:
    """Return the first ``n`` token ids ``(n,)`` of a split, fewer when it is shorter; examples are strung together.

    Of pairs they are the sources'.
    """
    import numpy as np

    from spiking_lm.data import PairData

    if data.tokenizer is None:
        raise UsageError(f"the dataset {data.name!r} holds clips of events, and no tokens")
    part = getattr(data, split)
    if hasattr(part, "tokens"):
        return np.asarray(part.tokens[:n]).astype(np.int64)
    pieces: list[Any] = []
    for example in part:
        if sum(map(len, pieces)) >= n:
            break
        tokens = example.source if isinstance(data, PairData) else data.tokenizer.encode(example.text)
        pieces.append(tokens.astype(np.int64))
    return np.concatenate(pieces)[:n] if pieces else np.zeros(0, np.int64)
