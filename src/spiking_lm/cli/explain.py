"""``spiking-lm explain``: where a model's spikes are, and what they save."""

from __future__ import annotations

from pathlib import Path

import typer


def command(
    model: Path = typer.Argument(..., help="A model folder, a checkpoint or a run.", show_default=False),
    tokens: int = typer.Option(512, min=1, help="Tokens of the embedded corpus to measure on."),
    full: bool = typer.Option(False, "--full", help="List every operation and site instead of groups of layers."),
    json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Say where a model's spikes are, and what they save.

    The model runs on text of the embedded corpus; each weight matrix is classed by what really arrives at it.
    """
    from spiking_lm import checkpoints, data
    from spiking_lm.accounting import explain, sample_tokens
    from spiking_lm.cli._output import console, print_json
    from spiking_lm.watch import vocab_size

    folder = checkpoints.resolve_model(model)
    loaded = checkpoints.load_model(folder)
    own_tokenizer = folder / "tokenizer.json"
    tokenizer = data.load_tokenizer(own_tokenizer) if own_tokenizer.is_file() else None
    ids, words = sample_tokens(vocab_size(loaded), tokens, tokenizer=tokenizer)
    explanation = explain(loaded, ids, sample=words)
    if json:
        print_json(explanation.to_dict())
    else:
        console.print(explanation.render(full=full))
