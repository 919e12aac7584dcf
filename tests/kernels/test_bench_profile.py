"""Profiles and the benchmarks of long texts, on small sizes: what they say of a run is so; speed is not tested."""

from __future__ import annotations

import time

import pytest
import torch

from spiking_lm import bench_lengths, bench_profile, kernels
from spiking_lm.bench import Row

SMALL = {
    "spikegpt": ("spikegpt", {"vocab_size": 64, "n_layer": 1, "n_embd": 16, "ctx_len": 16}, 1, 16),
    "spikelm": (
        "spikelm",
        {"vocab_size": 64, "n_layer": 1, "n_embd": 16, "n_head": 2, "ctx_len": 16, "num_classes": 2},
        2,
        16,
        True,
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_profile_shares_out_the_whole_time(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(f"spiking_lm_{name}")
    monkeypatch.setitem(bench_profile.SUBJECTS, name, bench_profile.Subject(*SMALL[name]))  # type: ignore[arg-type]
    rows = bench_profile.bench_profile(name, repeats=1)
    assert [row.name for row in rows][:2] == [f"profile/{name}-training", f"profile/{name}-inference"]
    for row in rows:
        assert row.value is not None
        assert row.value > 0
        assert sum(row.details["shares"].values()) == pytest.approx(1)
        assert all(share >= 0 for share in row.details["shares"].values())
    assert capfd.readouterr().err == ""
    told = bench_profile.tables({"rows": [row.to_dict() for row in rows]})
    assert told.count("| share |") == len(rows)


def test_time_within_an_op_is_that_of_the_op() -> None:
    x = torch.zeros(400, 64, requires_grad=True)

    def job() -> None:
        with kernels.use(lif_scan="reference"):
            spikes, _ = kernels.lif_scan(x, beta=0.5, gain=0.5, threshold=1.0)
        time.sleep(0.001)
        (spikes.sum() * torch.ones(2, 2).mm(torch.ones(2, 2)).sum()).detach()

    _, shares = bench_profile.shares(job, 1)
    assert shares["lif_scan"] > 0.5
    assert 0 < shares[bench_profile.PRODUCTS] < 0.2


def test_lengths_are_read_in_processes_of_their_own() -> None:
    pytest.importorskip("spiking_lm_spikegpt")
    seconds, memory = bench_lengths.bench_lengths("spikegpt", 1, lengths=(16, 32), chunk=8)
    assert seconds.value is not None
    assert seconds.value > 0
    assert memory.value is None or 0.5 < memory.value < 2
    assert list(memory.details) == ["16 tokens", "32 tokens"]


def test_growth_is_the_last_over_the_first_and_nothing_where_memory_is_not_told() -> None:
    rows: list[Row] = [
        bench_lengths._flat("a", "a", found, "MB") for found in ({"1": 10.0, "2": 99.0, "3": 12.0}, {"1": None})
    ]
    assert rows[0].value == pytest.approx(1.2)
    assert rows[0].passed is False
    assert rows[1].value is None
    assert rows[1].passed is None


def test_a_document_is_scored_as_the_command_line_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spiking_lm_spikegpt")
    monkeypatch.setattr(bench_lengths, "alone", lambda function, *args: function(*args))
    row = bench_lengths.bench_document(1, sizes=(1024, 2048), window=64)
    assert list(row.details) == ["1 KiB", "2 KiB"]
    memory = bench_lengths.peak_memory()
    assert memory is None or row.details["1 KiB"] <= row.details["2 KiB"] <= memory
