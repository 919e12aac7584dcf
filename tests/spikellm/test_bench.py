"""The benchmark of forward passes, on sizes that take no time."""

from __future__ import annotations

from spiking_lm import registry
from spiking_lm_spikellm.bench import FORMS


def test_every_form_is_measured_against_the_float_model() -> None:
    forward = registry.get("benchmarks", "spikellm/forward").load("function")
    rows = forward(1, tokens=8, n_layer=1, n_embd=24, n_inner=40, n_head=4, n_kv_head=2)
    assert [row.name for row in rows] == [f"spikellm/forward-{name}" for name in FORMS]
    for row in rows:
        assert row.value is not None
        assert row.value > 0
        ours, peer = (float(part.split()[0]) for part in row.note.replace("float ", "").split("; "))
        assert abs(row.value - ours / peer) < 0.2 * row.value + 0.1 / peer
    assert [row.target for row in rows] == [target for _, target in FORMS.values()]
