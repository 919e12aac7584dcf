"""Benchmarks of training: SpikeGPT against its matrix products alone, and bfloat16 against float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from io import StringIO
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from spiking_lm.bench import Job, Row, Targets, chosen_for, interleaved
from spiking_lm.kernels import dense
from spiking_lm.runs import run_recipe

if TYPE_CHECKING:
    from spiking_lm.interfaces import SpikingLanguageModel


def spikegpt(n_layer: int, n_embd: int, vocab_size: int, ctx_len: int = 1024) -> SpikingLanguageModel:
    """Return a SpikeGPT of these sizes with random weights, always the same."""
    from spiking_lm.models import create_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model("spikegpt", vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd, ctx_len=ctx_len)


def matrix_products(model: nn.Module, tokens: int, dtype: torch.dtype, linear: Any = F.linear) -> Job:
    """Return a job that does the forward and backward products of the model's linear layers, and nothing else.

    ``linear`` says by which library, as ``F.linear`` does.
    """
    work = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            x = torch.randn(tokens, layer.in_features, dtype=dtype).requires_grad_()
            weight = layer.weight.detach().to(dtype).requires_grad_()
            work.append((x, weight, torch.randn(tokens, layer.out_features, dtype=dtype)))

    def job() -> None:
        for x, weight, gradient in work:
            torch.autograd.grad(linear(x, weight), (x, weight), gradient)

    return job


LIBRARIES = {"torch": F.linear, "oneDNN": dense.linear}
"""What may do the products; bfloat16 goes to oneDNN by itself."""


def bench_step(
    dtype: torch.dtype,
    targets: Targets,
    repeats: int,
    *,
    n_layer: int = 12,
    n_embd: int = 512,
    vocab_size: int = 5458,
    length: int = 1024,
) -> Row:
    """Time SpikeGPT on one row of ``length`` tokens, loss included, over its matrix products alone.

    Those are done by each library that torch brings, and the fastest counts.
    """
    model = spikegpt(n_layer, n_embd, vocab_size)
    text = torch.randint(vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(text[:, :-1]).logits
        torch.autograd.backward(F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten()))

    libraries = {"torch": F.linear} if dtype == torch.bfloat16 else LIBRARIES
    peers = {name: matrix_products(model, length, dtype, linear) for name, linear in libraries.items()}
    times = interleaved({"model": step, **peers}, repeats)
    found = times.ms()
    best = min(peers, key=found.__getitem__)
    rates = {name: 1e3 * length / ms for name, ms in found.items()}
    x = torch.empty(length, 1, n_embd).requires_grad_()
    chosen = chosen_for("lif_scan", x, beta=0.5, gain=0.5, threshold=1.0)
    label = "bf16 autocast" if dtype == torch.bfloat16 else "fp32"
    return Row(
        f"spikegpt/train-{'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        f"SpikeGPT {n_layer}x{n_embd}, V {vocab_size}, T {length}, B 1: forward + backward, {label}, over its matrix "
        "products alone",
        found["model"] / found[best],
        target=targets.get(chosen),
        at_most=True,
        note=f"{rates['model']:.0f} tokens/s with kernels by {chosen}; its matrix products alone, by {best}, "
        f"{rates[best]:.0f} tokens/s",
        details={**times.to_dict(), "tokens_per_s": rates, "implementation": chosen},
    )


train_fp32 = partial(bench_step, torch.float32, {"numba": 1.3, "torch": 1.3})
train_bf16 = partial(bench_step, torch.bfloat16, {"numba": 1.6, "torch": 1.6})

# -- bfloat16 ----------------------------------------------------------------------------------------------------------

SMOOTHED = 50
"""Steps over which losses are averaged: a step's own loss is mostly that of its text."""


def bf16_curve(repeats: int, *, steps: int = 500, changes: Sequence[str] = ()) -> Row:
    """Train ``spikegpt/quickstart`` in float32 and under bfloat16 autocast, once each, and compare the losses.

    Seed, data and schedule are the same; only so many steps are trained. ``changes`` are further ones of the recipe.
    """
    losses = {}
    for precision in ("fp32", "bf16"):
        overrides = [f"train.precision={precision}", f"train.steps={steps}", "train.log_every=1"]
        overrides += [f"train.{name}=0" for name in ("eval_every", "save_every")]
        overrides += [f"{stage}=null" for stage in ("evaluate", "generate", "explain", "report")]
        with TemporaryDirectory(prefix="bf16-") as folder:
            quiet = Console(file=StringIO())
            run = run_recipe("spikegpt/quickstart", [*overrides, *changes], out=folder, console=quiet)
            losses[precision] = [entry["loss"] for entry in run.metrics() if entry["split"] == "train"]
    width = min(SMOOTHED, steps)
    window = np.ones(width) / width
    smooth = {name: np.convolve(values, window, "valid") for name, values in losses.items()}
    apart = 100 * np.abs(smooth["bf16"] / smooth["fp32"] - 1)
    last = {name: float(values[-1]) for name, values in smooth.items()}
    return Row(
        "bf16/loss",
        f"SpikeGPT of the quickstart, {steps} steps: training loss under bf16 autocast away from fp32, averaged "
        f"over {width} steps, at most",
        float(apart.max()),
        unit="%",
        target=1.0,
        at_most=True,
        note=f"{apart.mean():.2f} % on average; the last {width} steps: {last['bf16']:.4f} against {last['fp32']:.4f}",
        details={"losses": losses, "apart_percent": apart.tolist()},
    )
