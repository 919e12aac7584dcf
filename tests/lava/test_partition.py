"""A partition has every neuron on one core and passes no limit; what does not fit is refused with numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lava_nets import int8, networks, normalised, recurrent, three_layers

from spiking_lm.errors import LoweringError
from spiking_lm.hardware import Constant
from spiking_lm_lava.constants import LOIHI1, LOIHI2, TARGETS, Target
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.partition import Partition, partition
from spiking_lm_lava.process import Sink, Source, Synapse


def limited(target: Target, **limits: int) -> Target:
    """The target with other limits."""
    changed = {name: Constant(name, value, "", "a test", "assumed") for name, value in limits.items()}
    return replace(target, **changed)  # type: ignore[arg-type]


def check(network: Network, found: Partition) -> None:
    """Every law of a partition, from the definition."""
    target = found.target
    placed: dict[str, np.ndarray] = {}
    for node in network.nodes:
        if isinstance(node, (Source, Sink)):
            assert not found.of(node.name)
            continue
        owner = found.owner.get(node.name, node.name)
        placed[owner] = np.zeros(network[owner].size, int)
    for piece in found.pieces:
        placed[piece.population][piece.first : piece.last] += 1
    assert placed.keys() == found.populations.keys()
    for name, times in placed.items():
        assert (times == 1).all(), f"{name}: every neuron is on exactly one core"
    for core in range(found.cores):
        words = neurons = in_axons = 0
        for piece in found.pieces:
            if piece.core == core:
                neurons += piece.last - piece.first
                for wire, axons in zip(found.populations[piece.population].wires, piece.axons, strict=True):
                    for fan in axons.fan.tolist():
                        in_axons += fan > 0
                        words += (1 + -(-fan * wire.bits // 32)) if fan else 0
        assert neurons > 0, "no core without neurons"
        assert (words, neurons, in_axons) == (found.words[core], found.neurons[core], found.in_axons[core])
        assert words <= target.words_per_core.value
        assert neurons <= target.neurons_per_core.value
        if target.axons_per_core is not None:
            assert in_axons <= target.axons_per_core.value
            assert found.out_axons[core] <= target.axons_per_core.value
    stored = sum(
        node.num_weight_bits * (np.count_nonzero(node.weight) if node.form == "sparse" else node.weight.size)
        for node in network.of_kind(Synapse)
        if isinstance(node, Synapse)
    )
    assert 32 * found.words.sum() >= stored, "no fewer words than the weights have"
    for node in network.of_kind(Synapse):
        assert isinstance(node, Synapse)
        into = {edge.source for edge in network.arriving(node.name, "s_in")}
        kept = sum(axons.fan.sum() for piece in found.of(node.name) for axons in piece.axons if axons.port in into)
        every = np.count_nonzero(node.weight) if node.form == "sparse" else node.weight.size
        assert kept >= len(into) * every, "no synapse is lost"


@settings(max_examples=60)
@given(networks(), st.integers(40, 400), st.integers(1, 6))
def test_every_neuron_is_on_one_core_and_no_limit_is_passed(network: Network, words: int, neurons: int) -> None:
    target = limited(LOIHI2, words_per_core=words, neurons_per_core=neurons, axons_per_core=60)
    found = partition(network, target)
    check(network, found)
    again = partition(network, target)
    assert [(p.population, p.core, p.first, p.last) for p in again.pieces] == [
        (p.population, p.core, p.first, p.last) for p in found.pieces
    ]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_three_layers_on_both_chips(target: Target) -> None:
    network = three_layers(512)
    found = partition(network, target)
    check(network, found)
    # 512 in-axons of 1 + n / 4 words each
    neurons = {"loihi1": 4 * (32768 // 512 - 1), "loihi2": 4 * (12000 // 512 - 1)}[target.name]
    assert found.neurons[0] == neurons
    assert found.cores == 3 * -(-512 // neurons)
    assert (found.chips, found.board) == (1, target.boards[0])
    assert found.where("n0") == found.where("w0") == f"cores 0-{found.cores // 3 - 1}"
    assert found.where("x") == ""


def test_small_populations_share_a_core() -> None:
    found = partition(recurrent(), LOIHI1)
    assert (found.cores, found.where("lif", "r")) == (1, "core 0")
    found = partition(normalised(), LOIHI2)
    assert (found.cores, int(found.neurons.sum())) == (1, 4 + 1), "two synapses belong to what reads them"


def test_sums_that_several_read_have_accumulators_of_their_own() -> None:
    network = Network(
        (
            Source("x", 4),
            Synapse.int8("w", np.ones((4, 4), int)),
            LIF("a", 4),
            LIF("b", 4),
            Sink("s", 4),
        ),
        (Edge("x", "w"), Edge("w", "a"), Edge("w", "b"), Edge("a", "s"), Edge("b", "s")),
    )
    found = partition(network, LOIHI2)
    check(network, found)
    assert [piece.population for piece in found.pieces] == ["w", "a", "b"]
    assert [piece.words for piece in found.pieces] == [4 * 2, 4 * 2, 4 * 2]


def test_sparse_weights_take_the_words_of_those_that_there_are() -> None:
    rng = np.random.default_rng(0)
    weight = int8(rng, 64, 64) * (rng.random((64, 64)) < 0.1)
    words = {}
    for form in ("dense", "sparse"):
        network = Network(
            (Source("x", 64), Synapse.int8("w", weight, form=form), LIF("n", 64), Sink("s", 64)),
            (Edge("x", "w"), Edge("w", "n"), Edge("n", "s")),
        )
        found = partition(network, LOIHI2)
        check(network, found)
        words[form] = int(found.words.sum())
    fan = (weight != 0).sum(0)
    assert words == {"dense": 64 * (1 + 64 * 8 // 32), "sparse": int((1 + -(-fan * 14 // 32))[fan > 0].sum())}


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    network = three_layers(512)
    small = limited(LOIHI2, cores_per_chip=4)
    assert partition(network, small).chips == 5
    with pytest.raises(LoweringError, match=r"takes 18 cores, 5 chips; oheo-gulch has 1 chips of 4 cores") as error:
        partition(network, small, board="oheo-gulch")
    assert error.value.hint == "board kapoho-point"
    with pytest.raises(LoweringError, match="no board 'ohio-gulch'"):
        partition(network, LOIHI2, board="ohio-gulch")
    with pytest.raises(
        LoweringError, match=r"neuron 0 of 'n0' alone takes 1,024 words and 512 in-axons; a core .* 900"
    ):
        partition(network, limited(LOIHI2, words_per_core=900))


def test_loihi_1_has_no_payloads_and_no_programs() -> None:
    for network, words in (
        (normalised(), "'norm' is a neuron of a program of its own"),
        (
            Network((Source("x", 2), Synapse.int8("w", [[1, 1]]), Sink("s", 1)), (Edge("x", "w"), Edge("w", "s"))),
            "'w' sends sums to something else",
        ),
        (
            Network(
                (Source("x", 2, 0, 9), Synapse.int8("w", [[1, 1]], graded=True), LIF("n", 1), Sink("s", 1)),
                (Edge("x", "w"), Edge("w", "n"), Edge("n", "s")),
            ),
            "'w' reads spikes with a payload",
        ),
    ):
        with pytest.raises(LoweringError, match=words):
            partition(network, LOIHI1)


def test_populations_are_halved_until_no_core_has_too_many_out_axons() -> None:
    rng = np.random.default_rng(0)
    network = Network(
        (
            Source("x", 8),
            Synapse.int8("few", int8(rng, 8, 8)),
            LIF("a", 8),
            Synapse.int8("many", int8(rng, 256, 8)),
            LIF("b", 256),
            Sink("s", 256),
        ),
        (Edge("x", "few"), Edge("few", "a"), Edge("a", "many"), Edge("many", "b"), Edge("b", "s")),
    )
    free = partition(network, limited(LOIHI1, words_per_core=16))
    assert [len(free.of(name)) for name in ("a", "b")] == [2, 64], "4 neurons to a core, which 64 cores read"
    assert free.out_axons.max() == 4 * 64
    tight = partition(network, limited(LOIHI1, words_per_core=16, axons_per_core=100))
    check(network, tight)
    assert [len(tight.of(name)) for name in ("a", "b")] == [8, 64]
    with pytest.raises(LoweringError, match=r"a core would have 64 out-axons; one of Loihi 1 has 60"):
        partition(network, limited(LOIHI1, words_per_core=16, axons_per_core=60))


def test_the_picture_has_every_core_filled_as_far_as_it_is() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.patches import Rectangle

    from spiking_lm_lava.figures import cores_in_use, placement_figure

    network = three_layers(512)
    small = limited(LOIHI2, cores_per_chip=10)
    found = partition(network, small)
    figure = placement_figure(found)
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["chip 1: 10 of 10 cores", "chip 2: 8 of 10 cores"]
    for chip, axes in enumerate((first, second)):
        filled = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_linewidth() == 0]
        shares = sorted(patch.get_height() / 0.9 for patch in filled)
        words = found.words[10 * chip : 10 * chip + 10]
        assert shares == pytest.approx(sorted(words / 12000))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["n0", "n1", "n2"]
    assert sum(use.share for use in cores_in_use(found)) == pytest.approx(found.words.sum() / 12000)


def test_the_report_of_a_run_shows_the_cores(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from spiking_lm.report import write_report
    from spiking_lm.report.collect import Collected
    from spiking_lm.report.page import cores_of
    from spiking_lm_lava.figures import report_of

    found = partition(recurrent(), LOIHI2)
    report = report_of(model="toy", placement=[], partition=found, operations={}).to_dict()
    kept = json.loads(json.dumps(report))
    uses, per_chip = cores_of(Collected(tmp_path, deployment={"report": kept})) or ([], 0)
    assert (len(uses), per_chip, uses[0]["what"]) == (1, 120, "lif")
    account = {
        "backend": "lava", "protocol": "a test", "tokens": 1, "perplexity": 2.0, "tokens_per_s": 1.0, "report": kept,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "deployment.json").write_text(json.dumps(account))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'aria-label="Cores in use by part of the model"' in page
    assert "chip 1: 1 of 120 cores" in page
    assert (tmp_path / "report" / "cores.png").stat().st_size > 1000
    for broken in ({"report": 3}, {"report": {}}, {"report": {**kept, "cores": [{"chip": 0}]}}, {}):
        assert cores_of(Collected(tmp_path, deployment=broken)) is None
