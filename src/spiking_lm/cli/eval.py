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
    protocol: str | None = typer.Option(
        None,
        "--protocol",
        metavar="sliding|carried|blocks",
        help="Windows that overlap; one pass with the state carried; or blocks, each by itself. "
        "Default: what the recipe says, else sliding.",
    ),
    window: int | None = typer.Option(None, "--window", min=1, help="Tokens per window or block."),
    stride: int | None = typer.Option(None, "--stride", min=1, help="sliding: tokens that each further window scores."),
    max_tokens: int | None = typer.Option(None, "--max-tokens", min=1, help="Score only the first so many tokens."),
    shuffled: bool = typer.Option(
        False, "--shuffled", help="Also score the text with its words in another order: it must be much harder."
    ),
    choices: list[Path] = typer.Option(
        [],
        "--choices",
        metavar="FILE",
        help="Answer multiple-choice questions instead: a .jsonl of PIQA, ARC, BoolQ, HellaSwag or Winogrande. "
        "May be repeated.",
    ),
    limit: int | None = typer.Option(None, "--limit", min=1, help="--choices: the first so many questions of a file."),
    batch_size: int | None = typer.Option(
        None, "--batch-size", min=1, help="Windows, or choices, that are scored at once."
    ),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Score a model on text, labelled examples or multiple-choice questions that it has not seen."""
    from spiking_lm.checkpoints import load_model, resolve_model
    from spiking_lm.cli._output import console, errors, print_json
    from spiking_lm.cli.generate import tokenizer_of
    from spiking_lm.config import parse_config
    from spiking_lm.errors import UsageError
    from spiking_lm.evaluation import evaluate, render
    from spiking_lm.recipe import load_recipe
    from spiking_lm.stages import EvaluateConfig

    asked = {
        "split": split,
        "protocol": protocol,
        "window": window,
        "stride": stride,
        "max_tokens": max_tokens,
        "shuffled": shuffled or None,
    }
    given = {key: value for key, value in asked.items() if value is not None}
    if choices:
        if given or data is not None:
            name = next(iter(given), "data").replace("_", "-")
            raise UsageError(f"--{name} is for texts, and --choices for questions", hint="score them one by one")
        _answer(model, choices, limit, batch_size or 16, json)
        return
    if limit is not None:
        raise UsageError("--limit is for --choices", hint="--max-tokens limits a text")

    folder = resolve_model(model)
    recipe_file = next((f / "recipe.yaml" for f in folder.parents[:2] if (f / "recipe.yaml").is_file()), None)
    recipe = load_recipe(recipe_file) if recipe_file else None
    network = load_model(folder)
    tokenizer = None if "clips" in network.capabilities else tokenizer_of(network, folder)

    stage = recipe.evaluate if recipe and recipe.evaluate else EvaluateConfig()
    if data is not None:  # a limit that the recipe sets is meant for its own data
        stage = stage.model_copy(update={"max_tokens": None})
    if batch_size is not None:
        given["batch_size"] = batch_size
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


def _answer(model: Path, files: list[Path], limit: int | None, batch_size: int, json: bool) -> None:
    """Answer the questions of files and print how well."""
    from rich.progress import Progress

    from spiking_lm.choices import evaluate_choices, render
    from spiking_lm.cli._output import console, errors, print_json
    from spiking_lm.cli.generate import load_model_and_tokenizer

    network, tokenizer = load_model_and_tokenizer(model)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("answering", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        result = evaluate_choices(network, tokenizer, files, limit=limit, batch_size=batch_size, progress=show)
    if json:
        print_json({"model": str(model), **result})
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
    """Return a text file, plain or compressed, as data whose test split is all of it."""
    from spiking_lm.data import TextData, TextSource, TokenSplit
    from spiking_lm.data.sources import text_start

    source = TextSource.of_file(path, text_start(path))
    tokens = tokenizer.encode(source.text())
    nothing = TokenSplit(tokens[:0], 0, 0)
    whole = TokenSplit(tokens, source.n_bytes, source.n_chars, source.sha256)
    return TextData(path.name, tokenizer, nothing, nothing, whole, source.sha256)
