"""The deploy stage: a model lowered to a program, saved, run on held-out text, and compared with itself in float.

Running a program needs no torch; only the comparison with the model does.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import DataError, UsageError
from spiking_lm.hardware import Program, ProgramResult, load_program, lower, score
from spiking_lm.recipe import Recipe, split_choice

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spiking_lm.data import Data, Tokenizer
    from spiking_lm.interfaces import SpikingLanguageModel
    from spiking_lm.rundir import RunDir

_TOKENS_PER_CALL = 256
"""Of the float model, which is fed as a program is: one stream, the state carried on."""


def deploy(run: RunDir, recipe: Recipe, model: SpikingLanguageModel, data: Data) -> dict[str, Any]:
    """Lower ``model`` as ``recipe.deploy`` says, save the program as ``<run>/program``, run it and the model.

    Returns the JSON-able account: what :func:`run_program` gives, the model's perplexity on the very same tokens, and
    how far the program is from the model; of a backend that quantises, the perplexity of the quantised model in torch,
    and how far the program is from that.

    Raises: LoweringError naming the op that cannot be placed; DataError when the split has not two tokens,
    UsageError when the data is no text.
    """
    from spiking_lm.preparation import sample_tokens

    assert recipe.deploy is not None
    if not hasattr(data.test, "tokens"):
        raise UsageError(
            f"the deploy stage runs language models, and the dataset {data.name!r} holds examples to classify",
            hint="leave out deploy, or choose a text",
        )
    backend, options = split_choice(recipe.deploy, "backend")
    split = recipe.evaluate.split if recipe.evaluate is not None else "test"
    tokens = sample_tokens(data, split, options["tokens"] + 1)
    folder = run.path / "program"
    program = lower(model, backend, text=lambda n: sample_tokens(data, "train", n), **options)
    program.save(folder, files={"tokenizer.json": data.tokenizer.to_json()})
    program = load_program(folder)
    account, result = run_program(program, tokens, f"the {split} split")
    # Where a program rounds to spikes as its model does, the last bits of a sum decide: they are compared in its own.
    same = model if program.reals == "float32" else copy.deepcopy(model).double()
    logits = model_logits(same, tokens[:-1])
    difference = np.abs(logits - result.logits)
    quantised = program.reference_logits(tokens[:-1])
    if quantised is not None:
        account |= {
            "quantised_perplexity": float(np.exp(score(ProgramResult(quantised, None), tokens).mean())),
            "quantised_difference": float(np.abs(quantised - result.logits).max()),
        }
    return {
        **account,
        "options": options,
        "split": split,
        "model_perplexity": float(np.exp(score(ProgramResult(logits, None), tokens).mean())),
        "largest_difference": float(difference.max()),
        "same_guess": float((logits.argmax(-1) == result.logits.argmax(-1)).mean()),
    }


def run_program(program: Program, tokens: NDArray[Any], words: str) -> tuple[dict[str, Any], ProgramResult]:
    """Run a program on ``tokens[:-1]``, from rest, and score ``tokens[1:]``; return a JSON-able account and the result.

    ``words`` say what the tokens are of. Raises: DataError for fewer than two tokens, or ids beyond the vocabulary.
    """
    if len(tokens) < 2:
        raise DataError(f"{words} has {len(tokens)} tokens; a program needs at least 2", hint="give it more text")
    program.check_tokens(tokens)
    start = time.perf_counter()
    result = program.run(tokens[:-1])
    seconds = time.perf_counter() - start
    n = len(tokens) - 1
    account = {
        "backend": program.backend,
        "tokens": n,
        "protocol": f"{n:,} tokens of {words}, as one stream, state carried from token to token",
        "perplexity": float(np.exp(score(result, tokens).mean())),
        "seconds": seconds,
        "tokens_per_s": n / seconds,
        "counters": result.counters,
        "report": program.report(result).to_dict(),
    }
    return account, result


def embedded_tokens(tokenizer: Tokenizer, n: int, part: Literal["train", "valid"] = "valid") -> NDArray[np.int64]:
    """Return the first ``n`` tokens (or all, where it has fewer) of a part of the embedded corpus austen3."""
    from spiking_lm import data

    corpus: Any = data.load({"type": "austen3", "tokenizer": {"type": "byte"}})
    text = bytes(getattr(corpus, part).tokens).decode("utf-8")
    size = 8 * n
    while len(ids := tokenizer.encode(text[:size])) <= n and size < len(text):
        size *= 2  # the last token may be cut, so there must be one more than is taken
    return np.asarray(ids[:n]).astype(np.int64)


def model_logits(model: SpikingLanguageModel, tokens: NDArray[Any]) -> NDArray[np.float32]:
    """Return the logits ``(S, V)`` of the float model for one stream of ``tokens (S,)``, state carried."""
    import torch

    from spiking_lm.generation import evaluating

    device = next(model.parameters()).device
    ids = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(device)
    parts, state = [], None
    with evaluating(model):
        for piece in torch.split(ids, _TOKENS_PER_CALL):
            output = model(piece[None], state)
            state = output.state
            parts.append(output.logits[0].float().cpu())
    logits: NDArray[np.float32] = torch.cat(parts).numpy()
    return logits


def render(account: dict[str, Any]) -> RenderableType:
    """Return the tables of what :func:`deploy` or :func:`run_program` gave."""
    from spiking_lm.report.tables import run_tables

    return run_tables(account)
