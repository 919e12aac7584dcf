"""What is shown of a conversion while it runs."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Display:
    """The progress of a conversion: a live line, or plain lines where there is no terminal."""

    def __init__(self, console: Console, blocks: int) -> None:
        self.console, self.blocks = console, blocks
        fields = (TextColumn("{task.fields[left]}"), TextColumn("{task.fields[what]}"))
        self.bar = Progress(
            TextColumn("converting"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            *fields,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=blocks, what="", left="")
        self.first, self.index, self.what = 0, -1, ""
        self.began = time.monotonic()

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, index: int, what: str) -> None:
        """Say what is done to which block; ``what`` of learning tells epoch and loss."""
        plain = not self.console.is_terminal
        if plain and self.what.startswith("learning") and not what.startswith("learning"):
            self.console.print(f"  {self.what}", highlight=False)
        if index != self.index:
            if self.index < 0:  # the first of this call, which may go on from an earlier one
                self.first, self.began = index, time.monotonic()
            self.index = index
            left = self._left()
            self.bar.update(self.task, completed=index, left=left)
            if plain:
                self.console.print(f"block {index + 1}/{self.blocks}{left and f', {left}'}", highlight=False)
        self.what = what
        self.bar.update(self.task, what=what)

    def _left(self) -> str:
        """Return in words how long the rest will take, judging by the blocks that this call has done."""
        done = self.index - self.first
        if not done:
            return ""
        seconds = round((time.monotonic() - self.began) / done * (self.blocks - self.index))
        return f"about {timedelta(seconds=seconds)} left"
