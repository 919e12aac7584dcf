"""Real Lava in its worker: the same integers, clear errors, and nothing left behind whatever happens."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from lava_nets import normalised, recurrent, rows, three_layers

from spiking_lm.errors import DataError, LoweringError, PluginError
from spiking_lm_lava.cases import read_case
from spiking_lm_lava.conformance import compare, conformance, read_folder
from spiking_lm_lava.executor import LavaExecutor, LavaSession
from spiking_lm_lava.graded import GradedVec
from spiking_lm_lava.install import PYTHON_VARIABLE, find
from spiking_lm_lava.network import Edge, Network
from spiking_lm_lava.process import Sink, Source, Synapse
from spiking_lm_lava.simulator import Simulator


@pytest.fixture(scope="module")
def lava() -> LavaExecutor:
    try:
        return LavaExecutor.find()
    except PluginError as error:
        pytest.skip(f"{error.message}: {error.hint}")


def left(word: str) -> list[str]:
    """Processes with ``word`` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in command and path.parent.name != str(os.getpid()):
                found.append(command)
    return found


@contextlib.contextmanager
def leaving_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LavaSession]]:
    """Check of the sessions that are made meanwhile that nothing of them is left."""
    made: list[LavaSession] = []
    prepare = LavaSession._prepare

    def noted(self: LavaSession) -> None:
        made.append(self)
        prepare(self)

    monkeypatch.setattr(LavaSession, "_prepare", noted)
    yield made
    assert made
    for session in made:
        assert left(session._folder.name) == []
        assert not Path(session._folder.name).exists()
        assert list(Path("/dev/shm").glob(f"{session._prefix}*")) == []


@pytest.mark.slow
def test_every_golden_case_is_exact_in_lava(lava: LavaExecutor, shared: Path) -> None:
    cases = read_folder(shared / "golden" / "lava")
    exact, wrong = conformance(cases, {"lava": lambda case: lava.run(case.network, case.inputs, watch=case.watch)})
    assert [str(mismatch) for _, mismatch in wrong] == []
    assert exact == 33


def test_lava_and_the_simulator_give_one_result_in_pieces(lava: LavaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    network = recurrent()
    inputs = rows(network, 60, 1)
    expected = Simulator(network).run(inputs, watch=["lif.v"])
    with leaving_nothing(monkeypatch), LavaSession(lava.lava, network, 60, watch=["lif.v"]) as session:
        for piece in (slice(0, 1), slice(1, 1), slice(1, 41), slice(41, 60)):
            got = session.advance({"x": inputs["x"][piece]})
            np.testing.assert_array_equal(got["out"], expected.sinks["out"][piece])
        with pytest.raises(DataError, match="61 steps, the session was made for 60"):
            session.advance({"x": inputs["x"][:1]})
    run = session.result()
    np.testing.assert_array_equal(run.watched["lif.v"], expected.watched["lif.v"])
    assert expected.sinks["out"].any()
    assert run.versions["lava-nc"] == "0.10.0"
    assert run.timings.keys() >= {"import", "build", "first", "run", "stop"}


def test_progress_is_reported_and_an_interrupt_in_it_leaves_nothing(
    lava: LavaExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = normalised()
    seen = []

    def progress(done: int, steps: int) -> None:
        seen.append((done, steps))
        if done == 400:
            raise KeyboardInterrupt

    with leaving_nothing(monkeypatch), pytest.raises(KeyboardInterrupt):
        lava.run(network, rows(network, 700, 1), progress=progress)
    assert seen == [(200, 700), (400, 700)]


def test_an_error_in_a_process_of_lava_is_reported_at_once(lava: LavaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lava itself would wait for ever for the process that is gone."""
    late = Synapse("w", 1, np.array([[2]]), form="delay", delay=np.array([[70]]))
    network = Network((Source("x", 1), late, Sink("s", 1)), (Edge("x", "w"), Edge("w", "s")), checked=False)
    began = time.monotonic()
    with leaving_nothing(monkeypatch), pytest.raises(PluginError) as caught:
        lava.run(network, {"x": np.ones((5, 1), np.int64)})
    assert "ValueError: DelayDense Process 'delays' expects values between 0 and 63" in caught.value.message
    assert "run_spk" in caught.value.message  # the log
    assert time.monotonic() - began < 60


def test_what_takes_too_long_is_ended(lava: LavaExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    network = three_layers(64)
    with leaving_nothing(monkeypatch), pytest.raises(PluginError, match=r"no answer within 0\.1 seconds and was ended"):
        LavaSession(lava.lava, network, 10, timeout=0.1)
    with leaving_nothing(monkeypatch), LavaSession(lava.lava, network, 20_000) as session:
        session.advance(rows(network, 1, 1))
        session.timeout = 0.3
        with pytest.raises(PluginError, match=r"no answer within 0\.3 seconds"):
            session.advance(rows(network, 19_000, 1))


HOST = """
import sys
sys.path.insert(0, sys.argv[1])
from lava_nets import rows, three_layers
from spiking_lm_lava.executor import LavaSession
from spiking_lm_lava.install import find
network = three_layers(32)
with LavaSession(find(), network, 30_001) as session:
    session.advance(rows(network, 1, 1))
    print(session._folder.name, session._prefix, flush=True)
    session.advance(rows(network, 30_000, 1))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_when_the_host_is_interrupted_or_killed_nothing_goes_on(
    lava: LavaExecutor, number: signal.Signals, interruptible: Callable[[], None] | None
) -> None:
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=interruptible,
    )
    assert host.stdout is not None
    folder, prefix = host.stdout.readline().decode().split()
    assert left(folder)
    time.sleep(0.5)
    host.send_signal(number)
    _, errors = host.communicate(timeout=60)
    if number == signal.SIGINT:
        assert b"KeyboardInterrupt" in errors
        assert not Path(folder).exists()
        assert list(Path("/dev/shm").glob(f"{prefix}*")) == []
    deadline = time.monotonic() + 30  # a killed host ends nothing: the worker notices by itself
    while left(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left(folder) == []
    shutil.rmtree(folder, ignore_errors=True)  # the folder of a killed host is left to whoever cleans temporary files


def test_a_python_without_lava_is_named_with_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    if importlib.util.find_spec("lava") is not None:
        pytest.skip("this environment has lava-nc itself")
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    network = recurrent()
    with leaving_nothing(monkeypatch), pytest.raises(PluginError, match="No module named 'lava'") as caught:
        LavaExecutor(find()).run(network, rows(network, 3, 1))
    assert caught.value.hint == "spiking-lm doctor lava"


def test_a_network_in_parts_is_refused_before_anything_starts(lava: LavaExecutor) -> None:
    nodes = (Source("x", 1), Sink("s", 1), Source("y", 1), GradedVec("g", 1), Sink("t", 1))
    network = Network(nodes, (Edge("x", "s"), Edge("y", "g"), Edge("g", "t")))
    with pytest.raises(LoweringError, match=r"2 parts without a connection \(of 's', 'g'\)"):
        lava.run(network, rows(network, 3, 1))


def test_a_case_can_be_checked_alone(lava: LavaExecutor, shared: Path) -> None:
    case = read_case(shared / "golden" / "lava" / "normvec_invsqrt.npz")
    run: Callable[..., object] = lava.run
    assert compare(case, run(case.network, case.inputs, watch=case.watch)) == []  # type: ignore[arg-type]
