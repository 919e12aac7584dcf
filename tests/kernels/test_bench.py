"""The benchmarks measure what they say; their figures depend on the machine and are not tested here."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spiking_lm import bench, bench_training, hookimpl, kernels, registry
from spiking_lm.bench import Row
from spiking_lm.errors import MissingExtraError, UnknownNameError
from spiking_lm.records import BenchmarkSpec

needs_snntorch = pytest.mark.skipif(importlib.util.find_spec("snntorch") is None, reason="snntorch is not installed")


def test_targets_are_lower_or_upper_bounds() -> None:
    assert Row("a", "a", 5.0, target=5.0).passed is True
    assert Row("a", "a", 4.9, target=5.0).passed is False
    assert Row("a", "a", 1.1, target=1.1, at_most=True).passed is True
    assert Row("a", "a", 1.2, target=1.1, at_most=True).passed is False
    assert Row("a", "a", 1.2).passed is None
    assert Row("a", "a", None, target=1.0).to_dict()["passed"] is None


def test_candidates_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.03)

    times = bench.interleaved({"slow": slow, "fast": lambda: order.append("fast")}, 3)
    assert order == ["slow", "fast"] * 4
    assert {name: len(values) for name, values in times.wall.items()} == {"slow": 3, "fast": 3}
    assert min(times.wall["slow"]) >= 20
    assert max(times.cpu["slow"]) < 15, "sleeping costs no processor time"


@pytest.mark.parametrize(("count", "clock"), [(1, "processor time"), (2, "wall clock")])
def test_the_clock_follows_the_threads(count: int, clock: str) -> None:
    before = torch.get_num_threads()
    with bench.threads(count):
        assert torch.get_num_threads() == count
        assert bench.interleaved({"a": lambda: None}, 1).to_dict()["clock"] == clock
    assert torch.get_num_threads() == before


CORE = [
    "lif/1024x1x2048",
    "lif/128x32x512",
    "wkv/1x1024x512",
    "spikegpt/train-fp32",
    "spikegpt/train-bf16",
    "spikegpt/generate",
    "spikegpt/constant-time",
]


class Offers:
    """A plugin that offers one benchmark."""

    def __init__(self, name: str, function: str) -> None:
        self.spec = BenchmarkSpec(name=name, function=function)

    @hookimpl
    def spiking_lm_benchmarks(self, register: Any) -> None:
        register(self.spec)


def several(repeats: int) -> list[Row]:
    times = bench.interleaved({"job": lambda: None}, repeats)
    timed = Row("demo/time", "a time", 1.0, target=1e9, details=times.to_dict())
    return [timed, Row("demo/figure", "a figure", 7.0, unit="PEs")]


def broken(repeats: int) -> Row:
    raise ZeroDivisionError("no row today")


def lacking(repeats: int) -> Row:
    raise MissingExtraError("model 'spikegpt'", "spikegpt")


def nothing(repeats: int) -> list[Row]:
    return []


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Callable[[int], Any]], None]]:
    """Put benchmarks in the place of those that are installed."""
    module = ModuleType("bench_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    previous = registry.set_manager(registry.PluginManager(discover=False))

    def add(name: str, function: Callable[[int], Any]) -> None:
        setattr(module, function.__name__, function)
        target = f"{module.__name__}:{function.__name__}"
        plugin = registry.manager().register(Offers(name, target), name.replace("/", "-"), distribution="demo")
        assert plugin.status == "active", plugin.error

    yield add
    registry.set_manager(previous)


def test_the_core_offers_its_rows_in_their_order_and_first() -> None:
    assert bench.available()[: len(CORE)] == CORE


def test_what_takes_long_runs_only_when_it_is_named() -> None:
    unasked = (*bench.select([]), *bench.select([], "cuda"))
    left_out = [name for name in bench.available() if name not in unasked]
    assert "spikellm-memory/synthetic" in left_out  # gigabytes of disk, and minutes
    assert all(bench.select([name]) == [name] for name in left_out)
    assert bench.select(["spikellm-memory"]) == ["spikellm-memory/synthetic"]


def test_every_benchmark_that_is_offered_can_be_loaded() -> None:
    for name in bench.available():
        assert callable(registry.get("benchmarks", name).load("function"))


def test_rows_are_chosen_by_name_or_group() -> None:
    assert bench.select(["wkv", "lif/128x32x512"]) == ["lif/128x32x512", "wkv/1x1024x512"]
    with pytest.raises(UnknownNameError, match="did you mean 'spikegpt'"):
        bench.select(["spikegtp"])
    with pytest.raises(UnknownNameError):
        bench.select(["l"])


def test_the_loop_that_wkv_is_timed_against_computes_wkv() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 20, 5, generator=generator, dtype=torch.float64)
    decay, first = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(bench.wkv_loop(decay, first, k, v), kernels.wkv(decay, first, k, v)[0])


@pytest.mark.parametrize("name", list(bench.LIF_PEERS))
@pytest.mark.filterwarnings("ignore")
def test_peers_run_the_same_neuron(name: str) -> None:
    """All of them are SpikeGPT's neuron, so that the comparison is one of speed alone."""
    package, build = bench.LIF_PEERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    x = 2 * torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0))
    expected, _ = kernels.lif_scan(x, beta=0.5, gain=0.5, threshold=1.0)
    assert torch.equal(build()(x.requires_grad_()).detach(), expected)


@needs_snntorch
@pytest.mark.filterwarnings("ignore")
def test_a_peer_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from snntorch import SpikingNeuron

    known = len(SpikingNeuron.instances)
    monkeypatch.setitem(bench.LIF_PEERS, "other LIF", ("no_such_package_xyz", bench.LIF_PEERS.__getitem__))
    row = bench.bench_lif((8, 1, 16), {"torch": 5.0}, 1)
    assert "other LIF (not installed)" in row.note
    assert row.value is not None
    assert row.details["peers"]["other LIF"] == "not installed"
    assert len(SpikingNeuron.instances) == known, "a user's utils.reset() must not meet our neuron"


def test_without_any_peer_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LIF_PEERS", {"other LIF": ("no_such_package_xyz", lambda: None)})
    row = bench.bench_lif((8, 1, 16), {"torch": 5.0}, 1)
    assert row.value is None
    assert row.passed is None
    assert "no peer is installed" in row.note


def test_the_products_are_those_of_every_linear_layer() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2, bias=False))
    job = bench_training.matrix_products(model, 7, torch.float32)
    with FlopCounterMode(display=False) as counter:
        job()
    assert counter.get_total_flops() == 3 * 2 * 7 * (3 * 5 + 5 * 2)


@needs_snntorch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_row(dtype: torch.dtype) -> None:
    sizes = {"n_layer": 2, "n_embd": 16, "vocab_size": 20, "length": 12}
    row = bench_training.bench_step(dtype, {"torch": 1.3}, 1, **sizes)
    assert (row.at_most, row.target) == (True, 1.3), "so few elements are not compiled"
    ms = row.details["ms"]
    assert row.value == pytest.approx(ms.pop("model") / min(ms.values()))
    assert set(ms) == ({"torch"} if dtype == torch.bfloat16 else {"torch", "oneDNN"})


@needs_snntorch
def test_generation_row_compares_the_tokens() -> None:
    row = bench.bench_generation(1, n_layer=2, n_embd=16, vocab_size=80, new_tokens=20)
    assert row.details["identical"] is True
    assert len(row.details["tokens"]["cached"]) == 20


@needs_snntorch
def test_constant_time_row() -> None:
    row = bench.bench_constant_time(1, n_layer=2, n_embd=16, vocab_size=20, near=4, far=30)
    assert row.at_most
    assert row.value is not None


def test_a_benchmark_that_cannot_run_leaves_the_others(offer: Any) -> None:
    offered = {"a/lacking": lacking, "b/broken": broken, "c/nothing": nothing, "d/several": several}
    for name, function in offered.items():
        offer(name, function)
    rows = [row for measured in bench.run(bench.select([]), repeats=1) for row in measured]
    assert [row.name for row in rows] == ["a/lacking", "b/broken", "c/nothing", "demo/time", "demo/figure"]
    assert [row.value is None for row in rows] == [True, True, True, False, False]
    assert "pip install 'spiking-lm[spikegpt]'" in rows[0].note
    assert "ZeroDivisionError: no row today" in rows[1].note
    assert "plugin 'b-broken'" in rows[1].note
    assert "not a spiking_lm.bench.Row or a list of rows" in rows[2].note


def test_the_verb_prints_a_table_and_writes_json(tmp_path: Path, offer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from spiking_lm.cli.bench import command

    offer("demo/several", several)
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(command)
    target = tmp_path / "new" / "bench.json"
    result = CliRunner().invoke(app, ["--json", str(target), "--repeats", "2"])
    assert result.exit_code == 0, result.output
    assert "MISSED" in result.stdout
    written = json.loads(target.read_text())
    assert written["threads"] == 1
    assert torch.__version__.startswith(written["versions"]["torch"].partition("+")[0])
    assert written["hardware"]["cpu"]
    row, figure = written["rows"]
    assert figure["value"] == 7.0
    assert row["passed"] is False, "1 is not a billion"
    assert row["details"]["clock"] == "processor time"
    printed = CliRunner().invoke(app, ["--json", "-", "--repeats", "1"])
    assert json.loads(printed.stdout)["rows"][0]["name"] == "demo/time"
