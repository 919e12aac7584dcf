"""Sampling text, one token at a time from an explicit state of constant size."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spiking_lm.decoding import Decoder, Weights, prepare
from spiking_lm.errors import UsageError
from spiking_lm.interfaces import SpikingLanguageModel, State, longest_text
from spiking_lm.kernels.events import DEFAULT_RATES
from spiking_lm.stages import GenerateConfig

if TYPE_CHECKING:
    from spiking_lm.data import Tokenizer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and gradients off, and put the model's mode back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def sampling_weights(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Return the unnormalised sampling weights ``(..., V)`` of ``logits (..., V)``.

    Like the released SpikeGPT, the nucleus cut comes before the temperature, keeps the token that crosses ``top_p`` and
    everything tied with it. Unlike it, ``top_p=1.0`` cuts nothing (there it is greedy). ``temperature=0`` is greedy.
    """
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(torch.float32)
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    p = torch.softmax(logits.float(), -1)
    if top_p < 1.0:
        ordered = p.sort(-1, descending=True).values
        mass = ordered.cumsum(-1)
        crossing = (mass > top_p).to(torch.uint8).argmax(-1, keepdim=True)
        # Rounding can keep the whole mass at or below top_p; then nothing crosses and nothing is cut.
        crosses = mass[..., -1:] > top_p
        p = p.masked_fill((p < ordered.gather(-1, crossing)) & crosses, 0.0)
    return p if temperature == 1.0 else p ** (1.0 / temperature)


def iterate(
    model: SpikingLanguageModel,
    prompt_ids: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    state: State | None = None,
    weights: Weights | None = None,
) -> Iterator[tuple[Tensor, State]]:
    """Yield new tokens ``(B,)`` without end, each with the state *before* it was fed, after ``prompt_ids (B, S)``.

    ``seed`` None draws from torch's global generator. ``weights`` are as in :func:`generate`.
    """
    for token, state_now in _draw(model, prompt_ids, temperature, top_k, top_p, seed, state, weights):
        yield token, state_now()


def _draw(
    model: SpikingLanguageModel,
    prompt_ids: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | None,
    state: State | None,
    weights: Weights | None,
) -> Iterator[tuple[Tensor, Callable[[], State]]]:
    """Yield new tokens ``(B,)``, each with what gives the state before it was fed, if asked before the next one."""
    if prompt_ids.numel() == 0:
        raise UsageError("the prompt is empty", hint="give at least one token, for instance a word")
    generator = None if seed is None else torch.Generator(prompt_ids.device).manual_seed(seed)
    with evaluating(model):
        output = model(prompt_ids, state)
        logits, state = output.logits[:, -1], output.state
        decoder: Decoder | None = None
        tried = False
        while True:
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                chances = sampling_weights(logits, temperature, top_k, top_p)
                token = torch.multinomial(chances, 1, generator=generator)[:, 0]
            yield token, decoder.state if decoder is not None else partial(_same, state)
            if not tried:  # not before a second token is asked for
                decoder, tried = _prepared(model, len(prompt_ids), weights), True
                if decoder is not None:
                    decoder.load(state)
            if decoder is not None:
                logits = decoder.feed(int(token))[None]
            else:
                logits, state = model.step(token, state)


def _prepared(model: SpikingLanguageModel, rows: int, weights: Weights | None) -> Decoder | None:
    """Return what decodes one stream, or None where the model itself has to; ``weights`` that are asked for insist."""
    if weights is not None and rows != 1:
        raise UsageError(f"prepared weights are for one stream, not for {rows} rows", hint="leave weights out")
    if rows != 1:
        return None
    try:
        if weights is not None:
            return prepare(model, weights=weights)
        return prepare(model, rates=DEFAULT_RATES)  # same seed, same text: nothing is measured for it
    except UsageError:
        if weights is not None:
            raise
        return None


def _same(state: State) -> State:
    return state


def generate(
    model: SpikingLanguageModel,
    prompt_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: Callable[[Tensor], None] | None = None,
    state: State | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """Continue ``prompt_ids`` ``(S,)`` or ``(B, S)`` by ``max_new_tokens``; return prompt and continuation together.

    ``state`` is what went before the prompt, for instance ``model.read(source, lengths)``; None: nothing.
    ``stream`` is called with each new token (``()`` or ``(B,)``) as it is drawn. Same seed, same text.
    ``weights`` are those that tokens after the prompt are read with (:mod:`spiking_lm.decoding`): ``"float"`` or
    ``"int8"`` insist on prepared decoding, tuned to this machine by measured rates; None takes it for one stream, in
    float and by built-in rates, where the model can be prepared.
    Raises UsageError for an empty prompt, and for more tokens than the model has positions for.
    """
    prompt = torch.as_tensor(prompt_ids, dtype=torch.long, device=next(model.parameters()).device)
    single = prompt.ndim == 1
    batch = prompt[None] if single else prompt
    room = _room(model, batch.shape[1])
    if room is not None and max_new_tokens > room:
        raise UsageError(
            f"{batch.shape[1]} tokens and {max_new_tokens} new ones are more than the {longest_text(model)} positions "
            "that this model knows",
            hint=f"max_new_tokens is at most {room}" if room > 0 else "take a shorter prompt",
        )
    tokens = _draw(model, batch, temperature, top_k, top_p, seed, state, weights)
    new: list[Tensor] = []
    while len(new) < max_new_tokens:
        token, _ = next(tokens)
        new.append(token)
        if stream is not None:
            stream(token[0] if single else token)
    full = torch.cat([batch, torch.stack(new, 1)], 1) if new else batch
    return full[0] if single else full


def _room(model: SpikingLanguageModel, n: int) -> int | None:
    """Return how many tokens can be drawn after ``n``; None without end. The last one drawn is not read any more."""
    bound = longest_text(model)
    return None if bound is None else max(0, bound - n + 1)


def write_targets(
    model: SpikingLanguageModel, source: Tensor, lengths: Tensor, end: int, max_new_tokens: int
) -> list[list[int]]:
    """Return what a model of pairs writes for each row of right-padded ``source (B, S)``, the likeliest tokens.

    A target begins behind the token ``end`` and stops before the next one, or after ``max_new_tokens``.
    """
    with evaluating(model):
        state = model.read(source, lengths)
    begin = torch.full((len(source), 1), end, device=source.device)
    new: list[Tensor] = []
    ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    for token, _ in itertools.islice(iterate(model, begin, temperature=0, state=state), max_new_tokens):
        new.append(token)
        ended |= token == end
        if bool(ended.all()):
            break
    rows = torch.stack(new, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


@dataclass(frozen=True)
class GenerationResult:
    """A finished sample: the continuation (without the prompt), how many tokens, and how fast."""

    text: str
    tokens: int
    tokens_per_s: float
    stopped_by: str | None = None
    """The stop string that ended it."""
    positions: int | None = None
    """How many positions the model knows, where that ended the text."""


def sample_text(
    model: SpikingLanguageModel,
    tokenizer: Tokenizer,
    config: GenerateConfig,
    *,
    stream: Callable[[str], None] | None = None,
    weights: Weights | None = None,
) -> GenerationResult:
    """Continue ``config.prompt`` as text; ``stream`` receives each piece of text as soon as it is complete.

    The text also ends where the model knows no further positions. A stop string ends it and is not part of it; text
    that could still become one is held back from ``stream``. To a model of pairs the prompt is a source, and what it
    writes is the target, which ends where the model ends it. Raises UsageError for a model that generates nothing.
    """
    from spiking_lm.data import stream_decoder

    if not {"lm", "seq2seq"} & model.capabilities:
        raise UsageError(
            f"this {type(model).__name__} says nothing about what comes next (capabilities: "
            f"{sorted(model.capabilities)})"
        )
    state, end = None, None
    if "seq2seq" in model.capabilities:
        state, end = _read(model, tokenizer, config.prompt)
        prompt = torch.tensor([[end]])
    else:
        prompt = torch.as_tensor(tokenizer.encode(config.prompt).astype("int64"))[None]
    tokens = _draw(model, prompt, config.temperature, config.top_k, config.top_p, config.seed, state, weights)
    decoder = stream_decoder(tokenizer, [] if end is not None else prompt[0].tolist())
    room = _room(model, prompt.shape[1])
    most = config.max_new_tokens if not room else min(config.max_new_tokens, room)
    stops = [stop for stop in config.stop if stop]
    longest = max((len(stop) for stop in stops), default=0)
    text, shown, count, stopped_by = "", 0, 0, None
    start = time.perf_counter()
    last = False
    while not last and stopped_by is None:
        token, _ = next(tokens)
        ended = int(token) == end
        count += not ended
        last = ended or count == most
        if not ended:
            text += decoder.feed([int(token)])
        if last:
            text += decoder.flush()
        found = [(text.find(stop), stop) for stop in stops if stop in text]
        if found:
            at, stopped_by = min(found)
            text = text[:at]
        safe = len(text) if stopped_by or last else max(shown, len(text) - longest + 1)
        safe = safe if longest else len(text)
        if stream is not None and safe > shown:
            stream(text[shown:safe])
            shown = safe
    cut = count == most < config.max_new_tokens and stopped_by is None
    speed = count / max(time.perf_counter() - start, 1e-9)
    return GenerationResult(text, count, speed, stopped_by, longest_text(model) if cut else None)


def _read(model: SpikingLanguageModel, tokenizer: Tokenizer, source: str) -> tuple[State, int]:
    """Return the state of a model of pairs that has read a source, and the token that its target begins with."""
    from spiking_lm.data.pairs import encode_source, end_token

    ids = torch.as_tensor(encode_source(tokenizer, source.strip()).astype("int64"))[None]
    ids = ids.to(next(model.parameters()).device)
    with evaluating(model):
        return model.read(ids, torch.tensor([ids.shape[1]], device=ids.device)), end_token(tokenizer)
