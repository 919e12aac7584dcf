"""Timings of SpikeLLM: what it costs to compute with spike counts where the float model computes with real numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from spiking_lm.bench import Row, interleaved
from spiking_lm.generation import evaluating
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.model import SpikeLLM

SIZES: dict[str, Any] = {"vocab_size": 512, "n_layer": 4, "n_embd": 576, "n_inner": 1536, "n_head": 9, "n_kv_head": 3}
"""Blocks of SmolLM2-135M's, four of them, and hardly any head: it is real in every form."""

FOUR_BITS: dict[str, Any] = {"weights": {"bits": 4}, "activations": {"bits": 4}}
SALIENT: dict[str, Any] = {**FOUR_BITS, "activations": {"bits": 4, "salient": {"rate": 0.1, "steps": 2}}}

FORMS: dict[str, tuple[dict[str, Any], float | None]] = {
    "w4a4": (FOUR_BITS, 1.2),
    "w4a4-salient": (SALIENT, None),
    "w4a4kv4-salient": ({**SALIENT, "cache": {"bits": 4}}, None),
    "w4a4-salient-spikes": ({**SALIENT, "mode": "spike"}, None),
}
"""Name -> what differs from the float model, and the ratio that was aimed at."""


def forward(repeats: int, *, tokens: int = 256, **sizes: Any) -> list[Row]:
    """Time the forward pass of one sequence in each form against the float model of the same sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {"float": SpikeLLM(SpikeLLMConfig(**{**SIZES, **sizes}))}
        for name, (changes, _) in FORMS.items():
            models[name] = SpikeLLM(SpikeLLMConfig.model_validate({**SIZES, **sizes, **changes}))
            _mark_tenth(models[name])
        text = torch.randint(models["float"].config.vocab_size, (1, tokens))

    def run(model: SpikeLLM) -> None:
        with evaluating(model):
            model(text)

    times = interleaved({name: partial(run, model) for name, model in models.items()}, 2 * repeats)
    found = times.ms()
    size = models["float"].config.n_embd
    return [
        Row(
            f"spikellm/forward-{name}",
            f"SpikeLLM, hidden {size}, {tokens} tokens, {name}: time of a forward pass over the float model's",
            found[name] / found["float"],
            target=target,
            at_most=True,
            note=f"{found[name]:.1f} ms; float {found['float']:.1f} ms",
            details=times.to_dict(),
        )
        for name, (_, target) in FORMS.items()
    ]


def _mark_tenth(model: SpikeLLM) -> None:
    """Make every tenth channel salient, as a conversion would by saliency."""
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2].startswith("salient"):
            buffer.view(-1)[::10] = True
