"""``spiking-lm generate``: text from a model, or the target of a source."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer

MODEL = typer.Argument(..., metavar="MODEL", help="A run directory, a checkpoint or a model folder.")
MAX_TOKENS = typer.Option(300, "--max-tokens", min=1, help="Most tokens to write.")
DEFAULT_TEMPERATURE = 0.8
TEMPERATURE = typer.Option(DEFAULT_TEMPERATURE, "--temperature", min=0.0, help="0 always takes the likeliest token.")
TOP_K = typer.Option(None, "--top-k", min=1, help="Choose among the so many likeliest tokens.")
TOP_P = typer.Option(1.0, "--top-p", min=0.0, max=1.0, help="Choose among the likeliest tokens of so much probability.")
SEED = typer.Option(0, "--seed", min=0, help="Same seed, same text.")

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and line end: a model that writes bytes can write escape sequences too."""


def command(
    model: Path = MODEL,
    prompt: str = typer.Option(
        "\n", "--prompt", help="The text to go on from, or the source; '-' reads it from standard input."
    ),
    max_tokens: int = MAX_TOKENS,
    temperature: float | None = typer.Option(
        None,
        "--temperature",
        min=0.0,
        help="0 always takes the likeliest token. Default: 0.8, and 0 for the target of a source.",
    ),
    top_k: int | None = TOP_K,
    top_p: float = TOP_P,
    seed: int = SEED,
    stop: list[str] = typer.Option([], "--stop", help="End before this text. May be repeated."),
    weights: Any = typer.Option(
        None,
        "--weights",
        metavar="float|int8",
        help="'int8': read what follows the prompt with weights of 8 bits; 'float': insist on speed.",
    ),
    stats: bool = typer.Option(False, "--stats", help="Say on standard error how fast, and with how many spikes."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a stream of text."),
) -> None:
    """Write text with a model, as it comes."""
    from spiking_lm.cli._output import print_json
    from spiking_lm.config import parse_config
    from spiking_lm.errors import UsageError
    from spiking_lm.generation import sample_text
    from spiking_lm.stages import GenerateConfig

    if weights not in (None, "float", "int8"):
        raise UsageError(f"--weights is float or int8, not {weights!r}")
    if prompt == "-":
        prompt = sys.stdin.read()
    network, tokenizer = load_model_and_tokenizer(model)
    from_source = "seq2seq" in network.capabilities
    if temperature is None:
        temperature = 0.0 if from_source else DEFAULT_TEMPERATURE
    values = {
        "prompt": prompt,
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
    }
    config = parse_config(GenerateConfig, values, where="generate", error=UsageError)

    def spikes_of(written: str) -> float:
        """Of a model of pairs: while the source is read and written, per token of both sides."""
        return spikes_per_token(network, tokenizer, prompt if from_source else prompt + written)

    if json:
        sample = sample_text(network, tokenizer, config, weights=weights)
        spikes = spikes_of(sample.text)
        print_json({"prompt": prompt, **vars(sample), "spikes_per_token": spikes})
        return
    if prompt.strip() and "lm" in network.capabilities:
        write(prompt)
    sample = sample_text(network, tokenizer, config, stream=write, weights=weights)
    write("\n")
    if sample.positions is not None:
        typer.echo(f"the text ends here: this model knows {sample.positions:,} positions", err=True)
    if stats:
        spikes = spikes_of(sample.text)
        typer.echo(
            f"{sample.tokens} tokens, {sample.tokens_per_s:,.1f} tokens/s, {spikes:,.1f} spikes per token", err=True
        )


def load_model_and_tokenizer(path: Path) -> tuple[Any, Any]:
    """Load the language model that ``path`` means, and its tokenizer."""
    from spiking_lm.checkpoints import load_model, resolve_model
    from spiking_lm.errors import UsageError

    folder = resolve_model(path)
    model = load_model(folder)
    if "clips" in model.capabilities:
        raise UsageError(
            f"{folder} holds a {model.config.model_type} model, which reads clips of events and no text",
            hint="spiking-lm eval scores it",
        )
    return model, tokenizer_of(model, folder)


def tokenizer_of(model: Any, folder: Path) -> Any:
    """Load the tokenizer that was saved with a model; bytes stand in for one that a 256-token model lacks."""
    from spiking_lm.data import create_tokenizer, load_tokenizer
    from spiking_lm.errors import CheckpointError

    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    vocab_size = getattr(model.config, "vocab_size", None)
    if vocab_size != 256:
        raise CheckpointError(
            f"{folder} has no tokenizer.json",
            hint=f"spiking-lm convert {folder} OUT --tokenizer FILE adds it to a copy",
        )
    return create_tokenizer({"type": "byte"})


def spikes_per_token(model: Any, tokenizer: Any, text: str) -> float:
    """Count the spikes of all sites while the model reads ``text``, per token."""
    import torch

    from spiking_lm.generation import evaluating
    from spiking_lm.interfaces import observe

    tokens = torch.from_numpy(tokenizer.encode(text).astype("int64"))[None]
    with evaluating(model):
        spikes = observe(model, tokens).spikes or {}
    return sum(float((s != 0).sum()) for s in spikes.values()) / tokens.shape[1]


def write(text: str) -> None:
    """Put a piece of text on standard output at once; on a terminal, without what would steer the terminal."""
    if sys.stdout.isatty():
        text = _STEERING.sub("\N{REPLACEMENT CHARACTER}", text)
    typer.echo(text, nl=False)
    sys.stdout.flush()
