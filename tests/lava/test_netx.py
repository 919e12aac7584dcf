"""Networks as netx files: the same integers after reading them back, in our simulator and, through lava-dl, in Lava."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lava_nets import int8, normalised, recurrent, rows, three_layers

from spiking_lm.errors import DataError, LoweringError, PluginError
from spiking_lm_lava import install
from spiking_lm_lava.graded import Delta, GradedVec, Sigma, SigmaDelta
from spiking_lm_lava.install import find_lava_dl
from spiking_lm_lava.lava_dl import NetxFile, run_netx
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.netx import NetxSettings, main, read_netx, stated_settings, write_netx
from spiking_lm_lava.netx_format import netx_synapse
from spiking_lm_lava.neurons import LIF
from spiking_lm_lava.process import Process, Sink, Source, Synapse
from spiking_lm_lava.simulator import Simulator

UNIT = 1 << 12
"""Of thresholds and biases of sigma-delta neurons in a file."""


@pytest.fixture(scope="module")
def lava_dl() -> None:
    """lava-dl, where it is set up."""
    try:
        find_lava_dl()
    except PluginError as error:
        pytest.skip(f"{error.message}: {error.hint}")


def chain(*nodes: Process, loops: dict[str, str] | None = None, checked: bool = True) -> Network:
    """Join nodes one after the other; ``loops`` has the neuron of each recurrent synapse, which is left out of that."""
    loops = loops or {}
    line = [node.name for node in nodes if node.name not in loops]
    edges = [Edge(a, b) for a, b in itertools.pairwise(line)]
    edges += [edge for again, neuron in loops.items() for edge in (Edge(neuron, again), Edge(again, neuron))]
    return Network(nodes, tuple(edges), checked=checked)


def feed_forward() -> Network:
    rng = np.random.default_rng(0)
    return chain(
        Source("x", 20),
        Synapse.int8("w0", int8(rng, 30, 20)),
        LIF("n0", 30, du=1000, dv=500, vth=300, bias_mant=rng.integers(-50, 50, 30), bias_exp=7, reset_interval=16),
        Synapse("w1", 12, int8(rng, 12, 30) & ~1, form="delay", delay=rng.integers(0, 9, (12, 30))),
        LIF("n1", 12, dv=2000, vth=200, reset_interval=16, reset_offset=1),
        Sink("y", 12),
    )


def with_loops() -> Network:
    rng = np.random.default_rng(1)
    return chain(
        Source("x", 20, -9, 9),
        Synapse.int8("w0", int8(rng, 30, 20), graded=True),
        LIF("n0", 30, du=1000, dv=500, vth=1000),
        Synapse.int8("r0", int8(rng, 30, 30)),
        Synapse("w1", 12, rng.integers(0, 120, (12, 30)), sign_mode="EXCITATORY"),
        LIF("n1", 12, dv=2000, vth=900),
        Synapse.int8("r1", int8(rng, 12, 12)),
        Sink("y", 12),
        loops={"r0": "n0", "r1": "n1"},
    )


def sigma_delta() -> Network:
    rng = np.random.default_rng(2)
    scales = {"spike_exp": 6, "state_exp": 6}
    return chain(
        Source("x", 20, -9, 9),
        Delta("d", 20, vth=UNIT, **scales),
        Synapse.int8("w0", int8(rng, 30, 20), graded=True),
        SigmaDelta("n0", 30, vth=7 * UNIT, bias=rng.integers(-9, 9, 30) * UNIT, **scales),
        Synapse.int8("w1", int8(rng, 12, 30), graded=True),
        Sigma("n1", 12),
        Sink("y", 12),
        checked=False,
    )


EXAMPLES = {"feed-forward": feed_forward, "recurrent": with_loops, "sigma-delta": sigma_delta}


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_file_is_the_same_network_in_our_simulator_and_through_lava_dl_in_lava(
    example: str, tmp_path: Path, lava_dl: None
) -> None:
    network, path = EXAMPLES[example](), tmp_path / "n.net"
    write_netx(network, path)
    inputs = rows(network, 60, 1)
    (mine,) = Simulator(network).run(inputs).sinks.values()
    (again,) = Simulator(read_netx(path)).run(inputs).sinks.values()
    np.testing.assert_array_equal(again, mine)
    np.testing.assert_array_equal(run_netx(path, inputs["x"]), mine)
    assert (mine != 0).mean() > 0.1
    assert mine.std() > 0


@st.composite
def chains(draw: st.DrawFn) -> Network:
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    size, interval = draw(st.integers(1, 6)), draw(st.sampled_from((0, 5)))
    offset = draw(st.integers(0, 7))
    high = draw(st.sampled_from((1, 500)))
    nodes: list[Process] = [Source("x", size, 0, high)]
    loops: dict[str, str] = {}
    for k in range(draw(st.integers(1, 3))):
        form = draw(st.sampled_from(("dense", "sparse", "delay")))
        delays = {"delay": rng.integers(0, 63, (size, size))} if form == "delay" else {}
        graded = k == 0 and high > 1
        most = draw(st.sampled_from((1, 3, 90, 128)))
        weight = rng.integers(-most, min(most, 127) + 1, (size, size))
        nodes.append(Synapse.int8(f"w{k}", weight, graded=graded, form=form, weight_exp=0, **delays))
        du, dv = draw(st.sampled_from((50, 4095))), draw(st.sampled_from((0, 300, 4096)))
        resets = {"reset_interval": interval, "reset_offset": offset + k} if interval else {}
        bias = rng.integers(-9, 9, size)
        nodes.append(
            LIF(f"n{k}", size, du=du, dv=dv, vth=draw(st.integers(0, 300)), bias_mant=bias, bias_exp=6, **resets)
        )
        if form != "delay" and draw(st.booleans()):
            loops[f"r{k}"] = f"n{k}"
            nodes.append(Synapse.int8(f"r{k}", int8(rng, size, size)))
    return chain(*nodes, Sink("y", size), loops=loops)


@settings(max_examples=60)
@given(data=st.data())
def test_what_is_written_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        network = data.draw(chains())
    except LoweringError:  # it might overflow
        return
    path = tmp_path_factory.mktemp("netx") / "n.net"
    try:
        write_netx(network, path)
    except LoweringError as refused:
        changed = "would make" in refused.message or "all weights are 0" in refused.message
        if not changed:
            raise
        return
    again = read_netx(path)
    assert [node.name for node in again.nodes if node.name not in network] == []
    inputs = rows(network, 40, data.draw(st.integers(0, 2)))
    np.testing.assert_array_equal(Simulator(again).run(inputs).sinks["y"], Simulator(network).run(inputs).sinks["y"])


@pytest.mark.parametrize(
    ("weight", "shifted", "exponent", "bits"),
    [
        ([[3, -5, 127, -128]], [[6, -10, 254, -256]], -1, 8),
        ([[64, -128]], [[128, -256]], -1, 2),
        ([[-255, -3]], [[-255, -3]], 0, 8),
        ([[1, 0]], [[128, 0]], -7, 1),
        ([[0, 255]], [[0, 255]], 0, 8),
        ([[-3, 0]], [[-192, 0]], -6, 3),
    ],
)
def test_weights_are_scaled_as_lava_dl_scales_them(
    weight: list[list[int]], shifted: list[list[int]], exponent: int, bits: int
) -> None:
    """The values are those that lava-dl 0.6.0's ``optimize_weight_bits`` returned."""
    made = netx_synapse("w", weight)
    assert (made.weight.tolist(), made.weight_exp, made.num_weight_bits) == (shifted, exponent, bits)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([[0, 0]], "all weights are 0, which netx cannot read"),
        ([[255, -1]], "weights from -1 to 255 do not fit"),
        ([[300, 1]], "weights from 1 to 300 do not fit"),
        ([[-256, -2]], r"netx would make -254 of the weight -256 at \(0, 0\)"),
        ([[-1, 0]], r"netx would make -0\.5 of the weight -1 at \(0, 0\)"),
        ([[-255, 3]], "num_weight_bits is 9"),
    ],
)
def test_weights_that_netx_would_change_are_refused(weight: list[list[int]], message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        netx_synapse("w", weight)


def simple(*, synapse: Any = None, neuron: Any = None, source: Any = None, checked: bool = True) -> Network:
    return chain(
        source or Source("x", 2),
        synapse or Synapse.int8("w", np.array([[1, 2], [3, -4]])),
        neuron or LIF("n", 2, vth=3),
        Sink("y", 2),
        checked=checked,
    )


def two_inputs() -> Network:
    w = np.array([[2]])
    nodes = (Source("x", 1), Synapse("a", 1, w), Source("z", 1), Synapse("b", 1, w), LIF("n", 1), Sink("y", 1))
    edges = [("x", "a"), ("a", "n"), ("z", "b"), ("b", "n"), ("n", "y")]
    return Network(nodes, tuple(Edge(a, b) for a, b in edges))


def skip() -> Network:
    w = np.array([[2]])
    nodes = (Source("x", 1), Synapse("a", 1, w), LIF("n", 1), Synapse("b", 1, w), LIF("m", 1), Synapse("c", 1, w))
    edges = [("x", "a"), ("a", "n"), ("n", "b"), ("b", "m"), ("x", "c"), ("c", "m"), ("m", "y")]
    return Network((*nodes, Sink("y", 1)), tuple(Edge(a, b) for a, b in edges))


def wide_loop() -> Network:
    w = np.array([[2]])
    nodes = (Source("x", 1), Synapse("a", 1, w), LIF("n", 1), Synapse("b", 1, w), LIF("m", 1), Synapse("c", 1, w))
    edges = [("x", "a"), ("a", "n"), ("n", "b"), ("b", "m"), ("m", "c"), ("c", "n"), ("m", "y")]
    return Network((*nodes, Sink("y", 1)), tuple(Edge(a, b) for a, b in edges))


def two_outputs() -> Network:
    network = simple()
    return Network((*network.nodes, Sink("z", 2)), (*network.edges, Edge("n", "z")))


REFUSED: dict[str, tuple[Any, str]] = {
    "cell": (normalised, "'norm': netx has no such process"),
    "graded": (lambda: simple(neuron=GradedVec("n", 2)), "graded 'n': netx has no such process"),
    "inputs": (two_inputs, r"2 sources \('x', 'z'\): netx has one of each"),
    "skip": (skip, "source 'x': it feeds 'a', 'c': in netx every layer feeds the next one alone"),
    "outputs": (two_outputs, r"2 sinks \('y', 'z'\)"),
    "wide loop": (wide_loop, "lif 'n': it reads .*: netx has no layer with several inputs"),
    "readout": (
        lambda: chain(Source("x", 1), Synapse("w", 1, np.array([[2]])), Sink("y", 1)),
        "synapse 'w': it does not feed one layer of neurons alone",
    ),
    "no layers": (lambda: chain(Source("x", 1), Sink("y", 1)), "source 'x': it feeds the sink"),
    "delay": (
        lambda: simple(
            synapse=Synapse.int8("w", np.array([[1, 2], [3, -4]]), form="delay", delay=np.array([[0, 63], [1, 2]]))
        ),
        "synapse 'w': a delay of 63, and lava-dl clamps those above 62",
    ),
    "delays in a loop": (
        lambda: chain(
            Source("x", 1),
            Synapse("w", 1, np.array([[2]])),
            LIF("n", 1),
            Synapse("r", 1, np.array([[2]]), form="delay", delay=np.array([[1]])),
            Sink("y", 1),
            loops={"r": "n"},
        ),
        "synapse 'r': delays in a layer with a recurrent synapse",
    ),
    "fraction": (
        lambda: simple(synapse=Synapse("w", 2, np.array([[2, 4], [6, 8]]), weight_exp=-2)),
        r"synapse 'w': weight 2 at \(0, 0\) with weight_exp -2 is no whole number",
    ),
    "zeros": (lambda: simple(synapse=Synapse("w", 2, np.zeros((2, 2), int))), "'w': all weights are 0"),
    "great": (
        lambda: simple(synapse=Synapse("w", 2, np.array([[254, -2], [0, 0]]), weight_exp=1)),
        "'w': weights from -4 to 508 do not fit",
    ),
    "ternary": (lambda: simple(neuron=LIF("n", 2, vth_lo=-3)), "lif 'n': it is ternary"),
    "start": (lambda: simple(neuron=LIF("n", 2, v=np.array([1, 0]))), "lif 'n': it starts with currents or membranes"),
    "bias": (lambda: simple(neuron=LIF("n", 2, bias_mant=np.array([0, 65]))), "lif 'n': a bias of 65: netx counts in"),
    "great bias": (
        lambda: simple(neuron=LIF("n", 2, bias_mant=np.array([0, 4095]), bias_exp=7)),
        "lif 'n': a bias of 8190 times 64: above 13 bits",
    ),
    "resets": (
        lambda: chain(
            Source("x", 1),
            Synapse("w", 1, np.array([[2]])),
            LIF("n", 1, reset_interval=4),
            Synapse("w2", 1, np.array([[2]])),
            LIF("m", 1, reset_interval=4),
            Sink("y", 1),
        ),
        "lif 'm': it resets every 4 steps, at 0; .* here every 4 steps, at 1",
    ),
    "payload": (
        lambda: chain(
            Source("x", 1, 0, 9),
            Delta("d", 1, vth=UNIT, spike_exp=6, state_exp=6),
            Synapse("w", 1, np.array([[2]])),
            Sigma("n", 1),
            Sink("y", 1),
            checked=False,
        ),
        "synapse 'w': it reads only whether there is a spike",
    ),
    "unit": (
        lambda: chain(Source("x", 1), Delta("d", 1, vth=7, spike_exp=6, state_exp=6), Sink("y", 1)),
        "delta 'd': vth 7 is no multiple of 4096",
    ),
    "scale": (
        lambda: chain(Source("x", 1), Delta("d", 1, vth=UNIT, spike_exp=6), Sink("y", 1)),
        "delta 'd': state_exp 0, cum_error False, relu True: netx has 6, False, True",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_netx_cannot_say_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(LoweringError, match=message):
        write_netx(make(), tmp_path / "n.net")
    assert not list(tmp_path.iterdir())


def test_what_lava_dl_is_told_is_noted_and_can_be_stated(tmp_path: Path) -> None:
    path = tmp_path / "n.net"
    noted = write_netx(feed_forward(), path)
    assert noted == stated_settings(path) == NetxSettings(reset_interval=16, reset_offset=15)
    plain = read_netx(path, NetxSettings())
    assert [node.reset_interval for node in plain.of_kind(LIF) if isinstance(node, LIF)] == [0, 0]
    assert write_netx(with_loops(), path).input_message_bits == 24


def test_a_file_of_another_writer_needs_no_note(tmp_path: Path) -> None:
    """As lava-dl writes: floating-point weights, one delay per row, no input layer."""
    path, weight = tmp_path / "n.net", np.array([[2.0, -4.9], [6.0, 8.0]], np.float32)
    with h5py.File(path, "w") as file:
        group = file.create_group("layer/0")
        group.create_dataset("type", (1,), "S10", [b"dense"])
        group["shape"], group["weight"], group["delay"] = np.array([2]), weight, np.array([1.0, 3.0])
        group.create_dataset("neuron/type", data=b"LOIHI")
        for name, value in (("iDecay", 1024), ("vDecay", 128), ("vThMant", 80)):
            group[f"neuron/{name}"] = value
    network = read_netx(path)
    synapse, neurons = network["synapse0"], network["neurons0"]
    assert isinstance(synapse, Synapse)
    assert isinstance(neurons, LIF)
    assert (synapse.weight / 2.0**-synapse.weight_exp).tolist() == [[2, -4], [6, 8]]
    assert synapse.delay.tolist() == [[1, 1], [3, 3]]
    assert (neurons.du, neurons.dv, neurons.vth) == (1023, 128, 80)


def edited(path: Path, edit: Any) -> Path:
    write_netx(simple(), path)
    with h5py.File(path, "a") as file:
        edit(file)
    return path


def retype(name: str, text: bytes) -> Any:
    def edit(file: Any) -> None:
        file[name][0] = text

    return edit


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (retype("layer/1/type", b"conv"), LoweringError, "layer 1 is 'conv'"),
        (retype("layer/1/neuron/type", b"RF"), LoweringError, "has 'RF' neurons"),
        (lambda file: file["layer/1"].pop("neuron"), LoweringError, "/layer/1 has no neurons"),
        (lambda file: file.pop("layer"), DataError, "not a netx file: KeyError"),
        (lambda file: file["layer/1"].pop("weight"), LoweringError, "complex weights"),
        (lambda file: file["layer/1"].__setitem__("delay", np.array([70, 1])), LoweringError, "delays beyond 0 to 62"),
        (lambda file: file.attrs.__setitem__("spiking_lm", "{"), DataError, "not a netx file: JSONDecodeError"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(edit: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        read_netx(edited(tmp_path / "n.net", edit))
    assert "n.net" in str(caught.value)


def test_what_is_no_file_of_hdf5_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"n\.net: no such file"):
        read_netx(tmp_path / "n.net")
    (tmp_path / "n.net").write_text("nothing")
    with pytest.raises(DataError, match=r"n\.net: not a netx file: OSError"):
        read_netx(tmp_path / "n.net")


def test_a_file_in_lava_is_not_for_the_simulator() -> None:
    node = NetxFile("file", 2, inputs=3, file="n.net")
    assert (node.port_size("inp"), node.port_size("out")) == (3, 2)
    with pytest.raises(LoweringError, match="netx 'file': lava-dl runs it"):
        node.step({}, 1, np.zeros(3))
    nodes = (Source("x", 3), node, Sink("y", 2))
    with pytest.raises(LoweringError, match="not known here"):
        Network(nodes, (Edge("x", "file"), Edge("file", "y")))


def test_the_command_writes_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = recurrent()
    network.save(tmp_path / "network")
    assert main([str(tmp_path / "network"), str(tmp_path / "n.net")]) == 0
    assert main([str(tmp_path / "n.net"), str(tmp_path / "again")]) == 0
    inputs = rows(network, 30, 1)
    again = Simulator(Network.load(tmp_path / "again")).run(inputs).sinks
    np.testing.assert_array_equal(again["out"], Simulator(network).run(inputs).sinks["out"])
    three_layers(4).save(tmp_path / "three")
    assert main([str(tmp_path / "three"), str(tmp_path / "three.net")]) == 0
    assert main(["nothing", str(tmp_path / "n")]) == 4
    assert main([str(tmp_path / "three")]) == 2
    seen = capsys.readouterr()
    assert "no such file" in seen.err
    assert "two paths are needed" in seen.err


def test_the_command_compares_with_lava(tmp_path: Path, lava_dl: None, capsys: pytest.CaptureFixture[str]) -> None:
    recurrent().save(tmp_path / "network")
    assert main([str(tmp_path / "network"), str(tmp_path / "n.net"), "--lava", "30"]) == 0
    assert "in Lava: the same integers" in capsys.readouterr().out


def test_without_lava_dl_the_command_that_sets_it_up_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lava_dl: None
) -> None:
    monkeypatch.setattr("spiking_lm_lava.install.LAVA_DL", "lava-dl==0.0.0")
    with pytest.raises(PluginError, match="lava-dl, which reads netx files into Lava, is not set up here") as caught:
        find_lava_dl()
    assert caught.value.hint == "python -m spiking_lm_lava.netx --setup"


def test_lava_dl_is_set_up_without_its_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its metadata asks for torch 2.3, CUDA and OpenCV, none of which reading a file needs."""
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[command.index("--target") + 2 :])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install, "find", lambda: install.Lava(("python",), (tmp_path,), "here"))
    monkeypatch.setenv("SPIKING_LM_CACHE", str(tmp_path))
    monkeypatch.delenv(install.PYTHON_VARIABLE, raising=False)
    assert main(["--setup"]) == 0
    assert asked == [
        ["--no-deps", *install.LAVA_DL_NEEDS],
        ["--no-deps", "--ignore-requires-python", "lava-dl==0.6.0"],
    ]
    assert main(["--setup"]) == 0
    assert len(asked) == 2
    assert "is here already" in capsys.readouterr().err
    assert find_lava_dl().paths == (tmp_path, install.packages_folder(install.LAVA_DL))


def test_lava_dl_of_an_interpreter_or_an_environment_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(install.PYTHON_VARIABLE, sys.executable)
    assert find_lava_dl().command == (sys.executable, "-I")
    monkeypatch.delenv(install.PYTHON_VARIABLE)
    monkeypatch.setattr(install, "find", lambda: install.Lava(("python", "-I"), (), "lava-nc of this environment"))
    monkeypatch.setattr(install.importlib.metadata, "version", lambda name: {"lava-dl": "0.6.0"}[name])
    found = find_lava_dl()
    assert (found.paths, found.origin) == ((), "lava-nc of this environment with lava-dl 0.6.0")


def test_without_h5py_the_extra_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['h5py'] = None\nfrom spiking_lm_lava.netx import main\nsys.exit(main(sys.argv[1:]))"
    recurrent().save(tmp_path / "network")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "network"), str(tmp_path / "n.net")], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "needs the extra 'lava'" in done.stderr


def test_resonators_are_left_to_slayer(tmp_path: Path, lava_dl: None) -> None:
    """What stands in for SLAYER in the worker says so when it is asked."""
    path = edited(tmp_path / "n.net", lambda file: None)
    network = NetxFile("file", 2, inputs=2, file=str(path))
    with h5py.File(path, "a") as file:
        del file["layer/1/neuron/type"]
        file["layer/1/neuron"].create_dataset("type", (1,), "S10", [b"RF"])
    from spiking_lm_lava.executor import LavaExecutor

    whole = Network((Source("x", 2), network, Sink("y", 2)), (Edge("x", "file"), Edge("file", "y")), checked=False)
    with pytest.raises(PluginError, match=r"resonate-and-fire neurons of a \.net file need SLAYER"):
        LavaExecutor(find_lava_dl()).run(whole, {"x": np.ones((3, 2), int)})
