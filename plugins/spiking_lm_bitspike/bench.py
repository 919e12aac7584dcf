"""How far simulated rates are from the clamp network that is trained, in each mode."""

from __future__ import annotations

from typing import Any

import torch

from spiking_lm.bench import Row
from spiking_lm_bitspike.config import BitspikeConfig
from spiking_lm_bitspike.model import Bitspike

SIZES: dict[str, Any] = {
    "vocab_size": 500, "n_layer": 4, "n_embd": 64, "n_head": 4, "n_hidden": 128, "ctx_len": 32
}  # fmt: skip
STEPS = (4, 8, 16, 32, 64, 256)
FORMS: dict[str, dict[str, Any]] = {
    "released, charge 0 (the released code)": {"mode": "released", "charge": 0.0},
    "released": {"mode": "released"},
    "rate-consistent": {"mode": "rate-consistent"},
    "sequential": {"mode": "sequential"},
}


def gap(repeats: int) -> list[Row]:
    """Measure a random model of four blocks: the mean distance of the last population's rates, at T = 16."""
    rows = []
    for form, options in FORMS.items():
        found = {steps: _distance(steps, options) for steps in STEPS}
        told = ", ".join(f"{found[steps]:.3f} at T = {steps}" for steps in STEPS)
        what = f"bitspike, {form}: mean distance of the last population's rates from the clamp network, T = 16"
        details = {str(steps): value for steps, value in found.items()}
        rows.append(Row("bitspike/gap", what, found[16], unit="", note=told, details=details))
    return rows


def _distance(steps: int, options: dict[str, Any]) -> float:
    torch.manual_seed(0)
    model = Bitspike(BitspikeConfig(**SIZES, **options, steps=steps)).eval()
    tokens = torch.randint(model.config.vocab_size, (8, 32))
    gaps = model.rate_gap(tokens, torch.full((8,), 32))
    return gaps[model.chain.ends()[-1]]
