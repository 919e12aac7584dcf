"""What a network refuses, with the bound and the node named; and that it comes back from the disk as it was."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from lava_nets import networks, normalised, recurrent, three_layers

from spiking_lm.errors import CheckpointError, LoweringError, UsageError
from spiking_lm_lava.graded import Delta, GradedVec, InvSqrt, NormVecDelay, ProdNeuron, Sigma
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.neurons import LIF, ResonateAndFire
from spiking_lm_lava.process import Process, Sink, Source, Synapse

EYE = np.eye(2, dtype=np.int64)


def chain(*nodes: Process, low: int = 0, high: int = 1) -> Network:
    """A source, ``nodes`` one after the other, a sink."""
    every = (Source("x", nodes[0].port_size(nodes[0].reads[0]), low, high), *nodes, Sink("s", nodes[-1].size))
    return Network(every, tuple(Edge(a.name, b.name) for a, b in itertools.pairwise(every)))


def weights(*values: int, **options: Any) -> Synapse:
    return Synapse("w", 1, np.array([values]), graded=True, **options)


REFUSED: dict[str, tuple[Callable[[], Network], str]] = {
    "odd mixed weight": (
        lambda: chain(weights(2, 3)),
        r"'w': weight 3 at \(0, 1\) would become 2.*2q with weight_exp -1",
    ),
    "weight too large": (lambda: chain(weights(256)), r"weight 256 at \(0, 0\) would become 254"),
    "wrong sign": (lambda: chain(weights(-1, 5, sign_mode="EXCITATORY")), r"weight -1 at \(0, 0\) would become 0"),
    "bits not kept": (
        lambda: chain(weights(7, sign_mode="EXCITATORY", num_weight_bits=6)),
        r"weight 7 at \(0, 0\) would become 4: 6 bits",
    ),
    "automatic sign mode": (lambda: chain(weights(2, sign_mode="auto")), "'w': sign_mode is 'auto'"),
    "exponent": (lambda: chain(weights(2, weight_exp=9)), "'w': weight_exp is 9, and hardware holds -8 to 7"),
    "delay": (
        lambda: chain(weights(2, form="delay", delay=np.array([[64]]))),
        "'w': delay is 64, and hardware holds 0 to 63",
    ),
    "sum": (lambda: chain(weights(*[254] * 300), high=2**17), r"'w': a sum may reach 9,987,686,400.*2,147,483,648"),
    "message": (lambda: chain(weights(*[254] * 3), high=2**17), r"'w': a sum may reach 99,876,864.*8,388,608"),
    "decay": (lambda: chain(LIF("n", 1, du=4096)), "'n': du is 4096, and hardware holds -1 to 4095"),
    "threshold": (lambda: chain(LIF("n", 1, vth=2**17)), "'n': vth is 131072, and hardware holds 0 to 131071"),
    "bias": (
        lambda: chain(LIF("n", 2, bias_mant=np.array([0, -4097]))),
        "'n': bias_mant is -4097, and hardware holds -4096 to 4095",
    ),
    "current": (lambda: chain(LIF("n", 1, du=31), high=1100), "'n': the current u may reach 9,011,200, and a 24-bit"),
    "endless current": (lambda: chain(LIF("n", 1, du=-1)), "'n': du = -1 adds up currents without end"),
    "product": (
        lambda: Network(
            (Source("x", 1, -(2**20), 2**20), ProdNeuron("p", 1, exp=12), Sink("s", 1)),
            (Edge("x", "p.a_in1"), Edge("x", "p.a_in2"), Edge("p", "s")),
        ),
        "'p': a product may reach 1,099,511,627,776",
    ),
    "square": (
        lambda: Network(
            (Source("x", 1, 0, 3000), NormVecDelay("n", 1), Sink("s", 1)),
            (Edge("x", "n.a_in1"), Edge("x", "n.a_in2"), Edge("n.s_out", "s")),
        ),
        "'n': a square may reach 9,000,000",
    ),
    "root of a negative": (lambda: chain(InvSqrt("r", 1), low=-1), "'r': what arrives may be -1, which has no root"),
    "endless sum": (lambda: chain(Sigma("n", 1)), "'n': the sum of all that arrives has no bound"),
    "lossy deltas": (
        lambda: chain(Delta("d", 1, state_exp=6), Sigma("n", 1)),
        "'n': the sum of all that arrives has no bound",
    ),
    "undamped rotation": (
        lambda: Network(
            (Source("x", 1), ResonateAndFire("r", 1, cos_decay=4096), Sink("s", 1)),
            (Edge("x", "r.a_real_in"), Edge("x", "r.a_imag_in"), Edge("r", "s")),
        ),
        "'r': the rotation loses nothing",
    ),
    "growing loop": (
        lambda: Network(
            (
                Source("x", 1),
                GradedVec("g", 1, vth=0),
                Synapse.int8("w", [[100]], graded=True, weight_exp=-5),
                Sink("s", 1),
            ),
            (Edge("x", "g"), Edge("g", "w"), Edge("w", "g"), Edge("g", "s")),
        ),
        "may reach .* and a 24-bit",
    ),
    "slowly growing loop": (
        lambda: Network(
            (Source("x", 1), GradedVec("g", 1, vth=0), Synapse.int8("w", [[1]], graded=True), Sink("s", 1)),
            (Edge("x", "g"), Edge("g", "w"), Edge("w", "g"), Edge("g", "s")),
        ),
        "'[gw]' sends grows from step to step without end",
    ),
    "payload lost": (
        lambda: chain(Synapse.int8("w", EYE), high=2),
        "values from 0 to 2 may arrive at 'w'.*graded=True",
    ),
    "spikes that meet": (
        lambda: Network(
            (Source("x", 2), Source("y", 2), Synapse.int8("w", EYE), Sink("s", 2)),
            (Edge("x", "w"), Edge("y", "w"), Edge("w", "s")),
        ),
        "2 spikes at once may arrive at 'w'",
    ),
    "width": (
        lambda: Network((Source("x", 1, 0, 200), Sink("s", 1)), (Edge("x", "s", bits=8),)),
        "values from 0 to 200 do not fit messages of 8 bits",
    ),
    "source": (lambda: chain(GradedVec("y", 1), low=5, high=3), "values run from 5 to 3"),
    "loop without synapse": (
        lambda: Network(
            (Source("x", 1), GradedVec("a", 1), GradedVec("b", 1), GradedVec("after", 1), Sink("s", 1)),
            (Edge("x", "a"), Edge("a", "b"), Edge("b", "a"), Edge("b", "after"), Edge("after", "s")),
        ),
        "the loop (a -> b -> a|b -> a -> b) has no synapse.*deadlock",
    ),
    "two of one name": (lambda: chain(GradedVec("x", 1)), "two nodes are named 'x'"),
    "missing node": (
        lambda: Network((Source("input", 1), Sink("s", 1)), (Edge("imput", "s"),)),
        r"imput -> s: there is no node 'imput'.*did you mean 'input'",
    ),
    "missing port": (
        lambda: Network((Source("x", 1), Sink("s", 1)), (Edge("x.out", "s"),)),
        "source 'x' has no port 'out'",
    ),
    "which port": (
        lambda: Network((Source("x", 1), ProdNeuron("p", 1)), (Edge("x", "p"),)),
        "'p' has the ports a_in1, a_in2: name one",
    ),
    "nothing arrives": (lambda: Network((Source("x", 1), Sink("s", 1)), ()), r"nothing arrives at 's\.a_in'"),
    "sizes": (lambda: Network((Source("x", 2), Sink("s", 1)), (Edge("x", "s"),)), "'x' sends 2 values, 's' reads 1"),
    "float weights": (lambda: chain(Synapse("w", 1, np.array([[0.5]]))), r"'w': weight is float64 \(1, 1\)"),
    "float bias": (lambda: chain(LIF("n", 1, bias_mant=np.array([0.5]))), "'n': bias_mant is float64"),
    "bias of another size": (lambda: chain(LIF("n", 3, bias_mant=np.array([1, 2]))), r"bias_mant is int64 \(2,\)"),
    "text as a number": (lambda: chain(LIF("n", 1, du="fast")), "'n': du is 'fast', not a whole number"),  # type: ignore[arg-type]
    "no neurons": (lambda: Network((Source("x", 0),), ()), "size is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(LoweringError) as caught:
        make()
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)


def test_one_below_each_bound_passes() -> None:
    most = (2**23 - 1) // 64 * 4096 // 4096
    assert chain(LIF("n", 1), high=most).bounds["n"].states["u"].most == most * 64
    with pytest.raises(LoweringError, match="current u"):
        chain(LIF("n", 1), high=most + 1)
    resetting = LIF("n", 1, du=-1, reset_interval=8)
    assert chain(resetting, high=100).bounds["n"].states["u"].most == 8 * 100 * 64
    assert chain(Synapse.int8("w", [[-128, 127]], graded=True), low=-9, high=9).bounds["w"].sends[0].most == 9 * 255


def test_a_membrane_that_may_saturate_is_said() -> None:
    assert chain(LIF("n", 1, dv=0), low=-1).bounds["n"].saturates == ("v",)
    assert chain(LIF("n", 1, dv=100), low=-1).bounds["n"].saturates == ()
    assert chain(LIF("n", 1, dv=0, vth_lo=-5), low=-1).bounds["n"].saturates == ()


def test_widths_are_as_few_bits_as_the_values_need() -> None:
    network = chain(Synapse.int8("w", [[100, -28]], graded=True), GradedVec("g", 1), low=-1, high=1)
    assert [edge.bits for edge in network.edges] == [2, 9, 9]
    assert [edge.bits for edge in recurrent().edges if edge.source.startswith(("x", "lif"))] == [0, 0, 0]


def test_paths_of_different_lengths_are_named() -> None:
    nodes = (Source("x", 2), Synapse.int8("w", EYE), Synapse.int8("d", EYE), GradedVec("g", 2), Sink("s", 2))
    skip = Network(
        nodes, (Edge("x", "w"), Edge("x", "d"), Edge("x", "g"), Edge("w", "g"), Edge("d", "g"), Edge("g", "s"))
    )
    assert skip.uneven() == {"g": {"x.s_out -> g.a_in": 0, "w.a_out -> g.a_in": 1, "d.a_out -> g.a_in": 1}}
    assert recurrent().uneven() == {}
    later = Synapse.int8("d", EYE, form="delay", delay=np.array([[2, 3], [4, 2]]))
    network = chain(later)
    assert network.arrival() == {"x": 0, "d": 0, "s": 3}


@settings(max_examples=25)
@given(networks())
def test_a_network_comes_back_as_it_was(network: Network) -> None:
    record, arrays = network.to_record()
    again = Network.from_record(json.loads(json.dumps(record)), arrays)
    assert again.edges == network.edges
    second, others = again.to_record()
    assert second == record
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name])
        assert array.dtype == others[name].dtype


def test_a_folder_holds_it_and_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    network = three_layers(8)
    network.save(folder)
    network.save(folder)  # over itself
    loaded = Network.load(folder)
    assert loaded.to_record()[0] == network.to_record()[0]
    np.testing.assert_array_equal(loaded["w1"].prepared, network["w1"].prepared)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="no such folder"):
        Network.load(tmp_path / "nothing")
    for name in ("network.json", "arrays.npz"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-40])
        with pytest.raises(CheckpointError, match=f"{name} is not what was saved"):
            Network.load(folder)
        (folder / name).write_bytes(content)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("")
    with pytest.raises(UsageError, match=r"diary\.txt"):
        network.save(tmp_path / "other")


def test_a_sealed_folder_of_nonsense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = normalised()
    record, arrays = network.to_record()

    def changed(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
        new, more = json.loads(json.dumps(record)), dict(arrays)
        change(new, more)
        monkeypatch.setattr(Network, "to_record", lambda self: (new, more))
        network.save(tmp_path / "net")
        Network.load(tmp_path / "net")

    changed(lambda r, a: None)
    for change, words in (
        (lambda r, a: r.update(format=2), "format 2"),
        (lambda r, a: r.pop("nodes"), "KeyError"),
        (lambda r, a: r["nodes"][1].update(kind="sorcery"), "no process of the kind 'sorcery'"),
        (lambda r, a: r["nodes"][1].update(colour=3), "colour"),
        (lambda r, a: r["nodes"][1].update(vth=2**30), "hardware holds"),
        (lambda r, a: r["edges"][2].update(latency=5), "a latency of 5 is written"),
        (lambda r, a: r["edges"][2].update(source="nobody"), "no node 'nobody'"),
        (lambda r, a: a.pop("sum.weight"), "weight is"),
        (lambda r, a: a.update(stray=np.zeros(2)), "'stray' belongs to no node"),
        (lambda r, a: r.update(nodes=3), "TypeError"),
    ):
        with pytest.raises(CheckpointError) as caught:
            changed(change)
        assert words in str(caught.value)
