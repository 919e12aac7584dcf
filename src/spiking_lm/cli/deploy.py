"""``spiking-lm deploy``: run a program, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from spiking_lm.data import Tokenizer
    from spiking_lm.hardware import Program


def command(
    program: Path = typer.Argument(..., help="A program folder, or a run that deployed.", show_default=False),
    text: str | None = typer.Option(None, "--text", help="Run it on this text."),
    file: Path | None = typer.Option(None, "--file", metavar="FILE", help="Run it on this UTF-8 text file."),
    tokens: int = typer.Option(256, "--tokens", min=1, help="Tokens of the embedded corpus, or most of FILE's."),
    json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Run a program: how well it predicts, and what it would cost.

    It runs on the simulator of its backend, without torch; with neither TEXT nor FILE it reads the embedded corpus.
    """
    from spiking_lm.cli._output import console, print_json
    from spiking_lm.deployment import embedded_tokens, render, run_program
    from spiking_lm.errors import UsageError
    from spiking_lm.hardware import load_program

    if text is not None and file is not None:
        raise UsageError("--text and --file are two texts", hint="give one of them")
    folder = _folder(program)
    loaded = load_program(folder)
    tokenizer = _tokenizer(folder, loaded)
    if text is not None:
        ids, words = tokenizer.encode(text), "the given text"
    elif file is not None:
        ids, words = tokenizer.encode(_read(file))[: tokens + 1], file.name
    else:
        ids, words = embedded_tokens(tokenizer, tokens + 1), "the embedded corpus austen3 (validation part)"
    account, _ = run_program(loaded, ids, words)
    if json:
        print_json({"program": str(folder), **account})
    else:
        console.print(render(account))


def _folder(path: Path) -> Path:
    """Return the program folder that ``path`` means: itself, or that of a run."""
    from spiking_lm.rundir import RunDir

    is_run = (path / "manifest.json").is_file() or (path / "latest").is_file()
    return RunDir.open(path).path / "program" if is_run else path


def _tokenizer(folder: Path, program: Program) -> Tokenizer:
    """Load the tokenizer that was saved with a program; bytes stand in for one that a 256-token program lacks."""
    from spiking_lm.data import create_tokenizer, load_tokenizer
    from spiking_lm.errors import CheckpointError

    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    if program.vocab_size != 256:
        raise CheckpointError(
            f"{folder} has no tokenizer.json", hint="lower a model that has one, or use Program.run in Python"
        )
    return create_tokenizer({"type": "byte"})


def _read(file: Path) -> str:
    from spiking_lm.errors import DataError

    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
