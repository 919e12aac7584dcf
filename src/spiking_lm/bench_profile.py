"""Profiles: where the time of a training step and of inference goes, per model, by what torch's profiler sees.

``spiking-lm bench profile --json FILE`` measures, ``python -m spiking_lm.bench_profile FILE`` writes the table of
docs/profiles.md. An event counts with the time that none of its own parts took; what runs within one of the package's
ops belongs to that op. What is left of the whole is Python, and torch's way from Python to its operations.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from spiking_lm import decoding
from spiking_lm.bench import Row
from spiking_lm.generation import evaluating
from spiking_lm.interfaces import SpikingLanguageModel, detach_state
from spiking_lm.kernels import compiled_linear, linear_ops, ops
from spiking_lm.kernels.decode_run import Compiled
from spiking_lm.models import create_model

Job = Callable[[], Any]

PRODUCTS = "matrix products"
OVERHEAD = "Python and dispatch"

FUNCTIONS = {
    "_LIFScan": "lif_scan",
    "_WKV": "wkv",
    "_EGRUScan": "egru_scan",
    "_EGRU": "egru_scan",
    "_Elastic": "elastic_scan",
    "_ElasticLinears": "neurons and matrices in one pass",
    "_Attention": "attention",
    "_Quantize": "gif_linear: neurons",
    "_Dense": PRODUCTS,
    "_Linears": PRODUCTS,
}
"""Autograd Functions of the package, whose time includes compiled code that torch does not see."""

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (PRODUCTS, ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot",
                "mkldnn::", "aten::mkldnn", "aten::_embedding_bag")),
    ("attention of torch", ("aten::_scaled_dot", "aten::scaled_dot")),
    ("norms", ("aten::native_layer_norm", "aten::native_batch_norm", "aten::rms_norm", "aten::_fused_rms")),
    ("softmax and loss", ("aten::_softmax", "aten::_log_softmax", "aten::nll_loss")),
    ("copies and casts", ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_", "aten::stack")),
    ("embedding and indexing", ("aten::embedding", "aten::index", "aten::gather", "aten::scatter", "aten::nonzero")),
    ("optimizer", ("Optimizer.",)),
)  # fmt: skip


def group_of(name: str) -> str | None:
    """Return what an event of the profiler is counted as; None: as what it runs within, else as elementwise."""
    if name.startswith("op: "):
        return name[4:]
    function = name.removesuffix("Backward")
    if function in FUNCTIONS:
        return FUNCTIONS[function]
    return next((group for group, beginnings in GROUPS if name.startswith(beginnings)), None)


def shares(job: Job, repeats: int) -> tuple[float, dict[str, float]]:
    """Return milliseconds of ``job``, the median, and the share of each group in what was profiled of one run."""
    job()
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        job()
        times.append(1e3 * (time.process_time() - begun))
    with _named_ops(), _silent(), profile(activities=[ProfilerActivity.CPU]) as watched, record_function("whole"):
        job()
    taken: Counter[str] = Counter()
    inner = (ops_ for ops_ in watched.events() if ops_.self_cpu_time_total > 0)
    for event in inner:
        taken[_owner(event)] += event.self_cpu_time_total
    total = sum(taken.values())
    return statistics.median(times), {name: value / total for name, value in taken.most_common()}


def _owner(event: Any) -> str:
    """Return the group of an event: that of the outermost op of the package around it, else its own, else a default."""
    own, outermost, above = None, None, event
    while above is not None:
        group = group_of(above.name)
        own = own or group
        if above.name.startswith("op: ") or above.name.removesuffix("Backward") in FUNCTIONS:
            outermost = group
        above = above.cpu_parent
    if outermost is not None and not (outermost == "gif_linear" and own == PRODUCTS):
        return outermost
    if own is not None:
        return own
    return "elementwise and others" if event.name.startswith("aten::") else OVERHEAD


def _named_ops() -> AbstractContextManager[Any]:
    """Make every call of an op, and of the compiled product that is none, an event of the profiler."""

    def named(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(op: str, *args: Any, **kwargs: Any) -> Any:
            with record_function(f"op: {op}"):
                return call(op, *args, **kwargs)

        return run

    def dense(*args: Any) -> Tensor:
        with record_function(f"op: {PRODUCTS}"):
            return product(*args)

    product = compiled_linear.dense_linear
    stack = ExitStack()
    stack.enter_context(patch.object(compiled_linear, "dense_linear", dense))
    for module in (ops, linear_ops):
        stack.enter_context(patch.object(module, "call", named(module.call)))
    return stack


@contextmanager
def _silent() -> Iterator[None]:
    """Close the standard error for a while: torch's profiler writes there when it begins and ends."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# -- what is profiled --------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model of a size at which a step takes some milliseconds, and how it is trained and used."""

    model: str
    config: dict[str, Any]
    batch: int
    tokens: int
    reads_both_sides: bool = False
    """An encoder: it learns classes, and inference is the classification of one text."""


SUBJECTS = {
    "spikegpt": Subject("spikegpt", {"vocab_size": 5458, "n_layer": 12, "n_embd": 512, "ctx_len": 1024}, 1, 1024),
    "egru": Subject("egru", {"vocab_size": 5458, "n_layer": 3, "n_embd": 384, "n_hidden": 650}, 16, 70),
    "spikelm": Subject(
        "spikelm",
        {"vocab_size": 5458, "n_layer": 4, "n_embd": 128, "n_hidden": 512, "ctx_len": 64, "num_classes": 4},
        32, 64, True,
    ),
    "bitspike": Subject(
        "bitspike",
        {"vocab_size": 5458, "n_layer": 4, "n_embd": 128, "n_head": 4, "n_hidden": 512, "ctx_len": 64,
         "num_classes": 4},
        8, 64, True,
    ),
    "spikellm": Subject(
        "spikellm",
        {"vocab_size": 5458, "n_layer": 4, "n_embd": 576, "n_inner": 1536, "n_head": 9, "n_kv_head": 3,
         "activations": {"bits": 4, "salient": {"rate": 0.1, "steps": 2}}},
        1, 256,
    ),
}  # fmt: skip
"""Four layers where more would only repeat themselves."""


def _built(subject: Subject) -> tuple[SpikingLanguageModel, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(subject.model, **subject.config)
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2].startswith("salient"):
                buffer.view(-1)[::10] = True
        text = torch.randint(subject.config["vocab_size"], (subject.batch, subject.tokens + 1))
    if calibrate := getattr(model, "calibrate", None):  # neurons that are not set by themselves in evaluation
        calibrate(text[:, 1:])
    return model, text


def _training(subject: Subject) -> Job:
    """Return a training step: forward, loss, backward and AdamW."""
    model, text = _built(subject)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lengths = torch.full((subject.batch,), subject.tokens)

    def step() -> None:
        if subject.reads_both_sides:
            loss = F.cross_entropy(model.classify(text[:, 1:], lengths), text[:, 0] % subject.config["num_classes"])
        else:
            loss = F.cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    return step


def _inference(subject: Subject, steps: int = 8) -> tuple[Job, str, int]:
    """Return inference on one stream, what it is, and how many steps a call has."""
    model, text = _built(subject)
    if subject.reads_both_sides:
        lengths = torch.full((1,), subject.tokens)

        def classify() -> None:
            with evaluating(model):
                model.classify(text[:1, 1:], lengths)

        return classify, f"one text of {subject.tokens} tokens", 1
    with evaluating(model):
        start = detach_state(model(text[:1, : subject.tokens // 2]).state)

    def decode() -> None:
        state = start
        with evaluating(model):
            for token in text[0, :steps]:
                _, state = model.step(token[None], state)

    return decode, "one token of one stream, model.step", steps


def _prepared(subject: Subject, repeats: int) -> tuple[float, dict[str, float]] | None:
    """Return milliseconds per token of prepared decoding and the shares of its instructions; None: not compiled here.

    Compiled code goes through all of them in one call. So those of each kind are run alone, and what is left of the
    whole is Python.
    """
    model, text = _built(subject)
    if decoding.refusal(model) is not None:
        return None
    decoder = decoding.prepare(model.eval())
    engine = decoder._run
    if not isinstance(engine, Compiled):
        return None
    tokens = text[0, :32].tolist()
    for token in tokens:
        decoder.feed(token)

    def ms(job: Callable[[int], Any]) -> float:
        times = []
        for _ in range(3 * repeats):
            begun = time.perf_counter()
            for token in tokens:
                job(token)
            times.append(1e3 * (time.perf_counter() - begun) / len(tokens))
        return statistics.median(times)

    whole, program, numbers = ms(decoder.feed), engine._program, engine._numbers
    taken: Counter[str] = Counter()
    kinds = [step.kind for step in decoder.plan.instructions]
    for kind in dict.fromkeys(kinds):
        chosen = [at for at, other in enumerate(kinds) if other == kind]
        some, its = program[chosen], numbers[chosen]
        counts = engine.counts[: len(chosen)].copy()
        taken[PRODUCTS if kind == "linear" else kind] += ms(  # type: ignore[assignment]
            lambda token, some=some, its=its, counts=counts: engine._jit.run(  # type: ignore[misc]
                some, its, engine._block, engine._active, counts, token
            )
        )
    taken[OVERHEAD] = max(0.0, whole - sum(taken.values()))  # type: ignore[assignment]
    total = sum(taken.values())
    return whole, {name: value / total for name, value in taken.most_common()}


def bench_profile(name: str, repeats: int) -> list[Row]:
    """Profile a training step and inference of a model."""
    subject = SUBJECTS[name]
    sizes = f"{subject.config['n_layer']} layers of {subject.config['n_embd']}"
    what = f"batch {subject.batch}, {subject.tokens} tokens"
    rows = [_row(f"{name}-training", f"{name}, {sizes}: training step, {what}", *shares(_training(subject), repeats))]
    job, told, steps = _inference(subject)
    ms, found = shares(job, repeats)
    rows.append(_row(f"{name}-inference", f"{name}, {sizes}: {told}", ms / steps, found))
    prepared = None if subject.reads_both_sides else _prepared(subject, repeats)
    if prepared is not None:
        rows.append(_row(f"{name}-decoding", f"{name}, {sizes}: one token of one stream, prepared", *prepared))
    return rows


def _row(name: str, what: str, ms: float, found: Mapping[str, float]) -> Row:
    largest = ", ".join(f"{group} {100 * share:.0f} %" for group, share in list(found.items())[:4])
    return Row(f"profile/{name}", what, ms, unit="ms", note=largest, details={"shares": dict(found)})


spikegpt = partial(bench_profile, "spikegpt")
egru = partial(bench_profile, "egru")
spikelm = partial(bench_profile, "spikelm")
bitspike = partial(bench_profile, "bitspike")
spikellm = partial(bench_profile, "spikellm")


def tables(result: Mapping[str, Any]) -> str:
    """Return what ``spiking-lm bench profile --json`` has written as Markdown, a table per row."""
    parts = []
    for row in result["rows"]:
        if row["name"].startswith("profile/") and row["value"] is not None:
            lines = [
                f"| {group} | {100 * share:.1f} % |"
                for group, share in row["details"]["shares"].items()
                if share >= 0.001
            ]
            parts.append(
                "\n".join([f"### {row['what']}: {row['value']:.3g} ms", "", "| | share |", "|---|---|", *lines])
            )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(tables(json.load(file)), end="")
