"""``spiking-lm eval``: how well a model does on what it has not seen."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any

import typer

from spiking_lm.cli.generate import MODEL


def command(
    model: Path = MODEL,
    data: str | None = typer.Option(
        None, "--data", metavar="DATA", help="A dataset, DATASET:PATH, or a text file. Default: the data of its run."
    ),
    split: str | None = typer.Option(None, "--split", metavar="valid|test", help="Default: what the recipe says."),
    window: int | None = typer.Option(None, "--window", min=1, help="Tokens per window."),
    stride: int | None = typer.Option(None, "--stride", min=1, help="Tokens that each further window scores."),
    max_tokens: int | None = typer.Option(None, "--max-tokens", min=1, help="Score only the first so many tokens."),
    batch_size: int | None = typer.Option(None, "--batch-size", min=1, help="Windows scored at once."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Score a model on text, or on labelled examples, that it has not seen."""
    from spiking_lm.checkpoints import load_model, resolve_model
    from spiking_lm.cli._output import console, errors, print_json
    from spiking_lm.cli.generate import tokenizer_of
    from spiking_lm.config import parse_config
    from spiking_lm.errors import UsageError
    from spiking_lm.evaluation import evaluate, render
    from spiking_lm.recipe import load_recipe
    from spiking_lm.stages import EvaluateConfig

    folder = resolve_model(model)
    recipe_file = next((f / "recipe.yaml" for f in folder.parents[:2] if (f / "recipe.yaml").is_file()), None)
    recipe = load_recipe(recipe_file) if recipe_file else None
    network = load_model(folder)
    tokenizer = None if "clips" in network.capabilities else tokenizer_of(network, folder)

    stage = recipe.evaluate if recipe and recipe.evaluate else EvaluateConfig()
    if data is not None:  # a limit that the recipe sets is meant for its own data
        stage = stage.model_copy(update={"max_tokens": None})
    asked = {"split": split, "window": window, "stride": stride, "max_tokens": max_tokens, "batch_size": batch_size}
    given = {key: value for key, value in asked.items() if value is not None}
    config = parse_config(EvaluateConfig, {**stage.model_dump(), **given}, where="eval", error=UsageError)

    if data is not None:
        config_data = _described(data)
        if config_data is None:
            if tokenizer is None:
                raise UsageError(f"{folder} holds a model that reads clips of events, and {data} is text")
            texts, config = _text_file(Path(data), tokenizer), config.model_copy(update={"split": "test"})
        else:
            texts = _load(config_data, folder, errors)
    elif recipe is not None:
        texts = _load(recipe.data, folder, errors)
    else:
        raise UsageError(f"{model} does not belong to a run, so its data is not known", hint="name it with --data")

    result = evaluate(network, texts, config)
    if json:
        print_json({"model": str(folder), **result})
    else:
        console.print(render(result))


def _described(data: str) -> dict[str, Any] | None:
    """Turn ``DATASET`` or ``DATASET:PATH`` into a recipe's ``data``; None when it is the path of a file."""
    from spiking_lm import registry
    from spiking_lm.errors import UnknownNameError

    name, _, path = data.partition(":")
    known = registry.all("datasets")
    if name in known:
        return {"type": name, **({"path": path} if path else {})}
    if Path(data).is_file():
        return None
    raise UnknownNameError("dataset", name, known, hint="the path of a text file is taken too, but there is none there")


def _load(config: dict[str, Any], folder: Path, console: Any) -> Any:
    """Load data with the tokenizer that was saved with the model: one trained afresh might number tokens otherwise."""
    from spiking_lm import registry
    from spiking_lm.preparation import load_data

    if registry.get("datasets", config["type"]).spec.task == "clips":
        return load_data(config, console)
    saved = folder / "tokenizer.json"
    tokenizer: dict[str, Any] = {"type": "byte"}
    if saved.is_file():
        ours = json_module.loads(saved.read_text(encoding="utf-8")).get("spiking_lm")
        tokenizer = ours if isinstance(ours, dict) else {"type": "file", "path": str(saved)}
    return load_data({**config, "tokenizer": tokenizer}, console)


def _text_file(path: Path, tokenizer: Any) -> Any:
    """Return a text file as data whose test split is all of it."""
    from spiking_lm.data import TextData, TokenSplit
    from spiking_lm.errors import DataError
    from spiking_lm.files import sha256_file

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from None
    digest = sha256_file(path)
    tokens = tokenizer.encode(text)
    nothing = TokenSplit(tokens[:0], 0, 0)
    whole = TokenSplit(tokens, len(text.encode("utf-8")), len(text), digest)
    return TextData(path.name, tokenizer, nothing, nothing, whole, digest)
