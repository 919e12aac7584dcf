"""A language model whose log-likelihoods a few lines of plain Python give, and questions in every published layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from spiking_lm.config import ModelConfig
from spiking_lm.graph import LMGraph
from spiking_lm.interfaces import LMOutput, SpikeSite, SpikingLanguageModel

PERIOD = 11

_generator = np.random.default_rng(7)
LOGITS = np.round(_generator.normal(0, 2, (PERIOD, 256)), 3).astype(np.float32)
"""The logits after a text whose hash is 0, 1, ...: a model that remembers all of a text, and hardly anything of it."""


def folded(text: bytes) -> int:
    """Return the hash of a text: what the model's state is after it."""
    value = 0
    for byte in text:
        value = (3 * value + byte) % PERIOD
    return value


def log_likelihood(context: str, continuation: str) -> tuple[float, bool]:
    """Return the log-likelihood of a continuation, byte by byte, and whether each byte is the likeliest."""
    text, start = (context + continuation).encode(), len(context.encode())
    total, greedy = 0.0, True
    for place in range(start, len(text)):
        logits = [float(x) for x in LOGITS[folded(text[:place])]]
        total += logits[text[place]] - math.log(sum(map(math.exp, logits)))
        greedy = greedy and max(range(256), key=lambda byte: logits[byte]) == text[place]
    return total, greedy


class PocketConfig(ModelConfig):
    """Nothing to choose."""

    model_type: ClassVar[str] = "pocket"
    vocab_size: int = 256


class Pocket(SpikingLanguageModel):
    """The same as :func:`log_likelihood`, as a model: its state is the hash."""

    config: PocketConfig

    def __init__(self, config: PocketConfig | None = None) -> None:
        super().__init__()
        self.config = config or PocketConfig()
        self.table = nn.Parameter(torch.from_numpy(LOGITS.copy()))
        self.read: list[tuple[int, int]] = []
        """The shape of every batch that was read."""

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> Any:
        return (torch.zeros(batch_size, dtype=torch.long, device=device),)

    def forward(self, tokens: Tensor, state: Any = None, *, return_spikes: bool = False) -> LMOutput:
        self.read.append((tokens.shape[0], tokens.shape[1]))
        (value,) = self.init_state(len(tokens), device=tokens.device) if state is None else state
        values = []
        for token in tokens.unbind(1):
            value = (3 * value + token) % PERIOD
            values.append(value)
        return LMOutput(self.table[torch.stack(values, 1)], (value,), {} if return_spikes else None)

    def spike_sites(self) -> list[SpikeSite]:
        return []

    def graph(self) -> LMGraph:
        return LMGraph(())


WORDS = ["a", "river", "stone", "opens", "slowly", "under", "the", "old", "bridge", "while", "nobody", "counts", "why"]


def words(generator: np.random.Generator, least: int, most: int) -> str:
    """Return a few random words."""
    return " ".join(generator.choice(WORDS, generator.integers(least, most + 1)))


def make_lines(task: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``n`` questions as the Hugging Face datasets export them."""
    generator = np.random.default_rng(seed)
    some = lambda least=1, most=6: words(generator, least, most)  # noqa: E731
    lines: list[dict[str, Any]] = []
    for i in range(n):
        if task == "piqa":
            lines.append({"goal": some(), "sol1": some(), "sol2": some(), "label": int(generator.integers(2))})
        elif task == "arc":
            labels = [["A", "B", "C", "D"], ["1", "2", "3"], ["A", "B", "C", "D", "E"]][i % 3]
            choices = {"text": [some() for _ in labels], "label": labels}
            key = labels[generator.integers(len(labels))]
            lines.append({"id": f"q{i}", "question": f"{some()}?", "choices": choices, "answerKey": key})
        elif task == "boolq":
            answer = bool(generator.integers(2))
            lines.append({"question": some(), "passage": some(5, 30), "answer": answer})
        elif task == "hellaswag":
            lines.append(
                {
                    "ind": i,
                    "activity_label": some(1, 2),
                    "ctx_a": f"[header] {some()} [title] {some()}",
                    "ctx_b": some(0, 3),
                    "endings": [f"{some()} [substeps] {some()}." for _ in range(4)],
                    "label": str(generator.integers(4)),
                }
            )
        else:
            sentence = f"{some(0, 4)} _ {some(2, 5)}."
            answer = str(generator.integers(1, 3))
            lines.append({"sentence": sentence, "option1": some(1, 2), "option2": some(1, 2), "answer": answer})
    return lines


TASKS = ("piqa", "arc", "boolq", "hellaswag", "winogrande")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
