"""``spiking-lm chat``: text in turns, from one state."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import typer

from spiking_lm.cli.generate import MAX_TOKENS, MODEL, SEED, TEMPERATURE, TOP_K, TOP_P, write


def command(
    model: Path = MODEL,
    max_tokens: int = MAX_TOKENS,
    temperature: float = TEMPERATURE,
    top_k: int | None = TOP_K,
    top_p: float = TOP_P,
    seed: int = SEED,
) -> None:
    """Write text with a model, turn by turn, keeping its state between turns.

    A language model that was trained on plain text goes on with what you type; it does not answer. An empty line
    lets it go on, /reset forgets everything, /quit or Ctrl-D leaves, Ctrl-C ends a turn.
    """
    from spiking_lm.cli.generate import load_model_and_tokenizer

    network, tokenizer = load_model_and_tokenizer(model)
    typer.echo("This model continues text; it was not trained to answer. /reset forgets, /quit leaves.", err=True)
    with contextlib.suppress(ImportError):  # lines can then be edited and recalled; Windows has it built in
        import readline  # noqa: F401
    talk = Conversation(
        network, tokenizer, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    while True:
        line = _ask()
        if line is None or line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            talk.reset()
            typer.echo("(forgotten)", err=True)
            continue
        if line.startswith("/"):
            typer.echo(f"unknown command {line.split()[0]}; there are /reset and /quit", err=True)
            continue
        try:
            talk.turn(line, write)
        except KeyboardInterrupt:
            typer.echo(" (stopped)", nl=False, err=True)
        if talk.full:
            taken = f" (all {talk.positions:,} positions that the model knows are taken: /reset)"
            typer.echo(taken, nl=False, err=True)
        write("\n")


def _ask() -> str | None:
    """Read a line; None when the user leaves."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        typer.echo(err=True)
        return None


class Conversation:
    """A text that user and model write in turns; only the model's state of constant size is kept."""

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int, seed: int, **sampling: Any) -> None:
        from spiking_lm.interfaces import longest_text

        self.model, self.tokenizer, self.max_tokens, self.sampling = model, tokenizer, max_tokens, sampling
        self.seed = seed
        self.positions = longest_text(model) or sys.maxsize
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.state: Any = None
        self.unread: list[int] = []
        self.at_line_start = True
        self.turns = 0
        self.read = 0

    @property
    def full(self) -> bool:
        """Whether the model has no position left for another turn."""
        return self.read + len(self.unread) > self.positions

    def turn(self, line: str, show: Any) -> None:
        """Go on from ``line``; ``show`` receives the text as it comes. An interrupted turn keeps what was shown.

        Where the model's positions end, so does the turn; a line for which there is no room is not read at all.
        """
        import torch

        from spiking_lm.data import stream_decoder
        from spiking_lm.generation import iterate

        text = line if self.at_line_start or not line else "\n" + line
        unread = self.unread + [int(token) for token in self.tokenizer.encode(text)]
        if not unread:
            unread = [int(token) for token in self.tokenizer.encode("\n")]
        room = self.positions - self.read
        if len(unread) > room:
            if not self.full:
                typer.echo(f"({len(unread)} tokens for the {room} positions that are left: /reset)", nl=False, err=True)
            return
        decoder = stream_decoder(self.tokenizer, unread)
        prompt = torch.tensor([unread], device=next(self.model.parameters()).device)
        tokens = iterate(self.model, prompt, state=self.state, seed=self.seed + self.turns, **self.sampling)
        self.turns += 1
        for _ in range(min(self.max_tokens, room + 1 - len(unread))):  # the last one is not read in this turn
            # The state is the one before this token, so the token is the first that the next turn has to feed.
            token, self.state = next(tokens)
            self.read, unread = self.read + len(unread), [int(token)]
            self.unread = unread
            piece = decoder.feed(self.unread)
            self.at_line_start = piece.endswith("\n") if piece else self.at_line_start
            show(piece)
        show(decoder.flush())
