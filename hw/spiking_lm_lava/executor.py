"""Running a network in Lava itself, in a worker process that cannot disturb this one and leaves nothing behind.

The worker is started in a session of its own, talks JSON lines over its standard input and output, and reads and writes
rows in ``.npy`` files that both sides map. It ends when asked, when this process ends, and when it takes too long; then
its whole group is killed, and the shared memory that it named is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spiking_lm.errors import DataError, LoweringError, PluginError
from spiking_lm_lava.cell import Cell
from spiking_lm_lava.floating import FloatLIF
from spiking_lm_lava.install import Lava, find
from spiking_lm_lava.network import Network
from spiking_lm_lava.process import Sink, Source, State
from spiking_lm_lava.simulator import NetworkState, Rows, checked_inputs, watched_states

MAIN = Path(__file__).resolve().parent / "worker" / "main.py"

TIMEOUT = 600.0
"""Seconds that the worker may take to start, or for one request."""
STEPS_AT_ONCE = 200
"""Of a long run, between which progress is reported."""

_GRACE = 3.0
"""Seconds for a clean stop, after which the worker's group is killed."""
_LOOK_EVERY = 0.5
_LOG_LINES = 12
_SHARED_MEMORY = Path("/dev/shm")


@dataclass
class LavaRun:
    """What Lava gave."""

    sinks: dict[str, Rows]
    """By sink, what arrived, (T, size)."""
    watched: dict[str, Rows] = field(default_factory=dict)
    """By ``"node.state"``, after each step."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds: ``import``, ``build``, ``first`` (Lava compiles, starts, makes first steps), ``run``, ``stop``."""
    versions: dict[str, str] = field(default_factory=dict)


Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


class LavaExecutor:
    """Runs networks in the Lava that was found."""

    def __init__(self, lava: Lava) -> None:
        self.lava = lava

    @classmethod
    def find(cls) -> LavaExecutor:
        """Return an executor. Raises: PluginError, with the command that sets Lava up, where there is none."""
        return cls(find())

    def run(
        self,
        network: Network,
        inputs: Mapping[str, Rows],
        *,
        state: NetworkState | None = None,
        watch: Iterable[str] = (),
        timeout: float = TIMEOUT,
        progress: Progress | None = None,
    ) -> LavaRun:
        """Run ``inputs`` (source -> rows), going on from ``state``, and keep the states named in ``watch``.

        Raises: DataError for inputs that do not fit, PluginError when the worker fails or takes too long.
        """
        rows, steps = checked_inputs(network, inputs)
        with LavaSession(self.lava, network, steps, state=state, watch=watch, timeout=timeout) as session:
            for start in range(0, steps, STEPS_AT_ONCE):
                session.advance({name: given[start : start + STEPS_AT_ONCE] for name, given in rows.items()})
                if progress is not None:
                    progress(session.done, steps)
        return session.result()


class LavaSession:
    """One network in one worker, whose state goes on from call to call; a context manager that ends the worker."""

    def __init__(
        self,
        lava: Lava,
        network: Network,
        steps: int,
        *,
        state: NetworkState | None = None,
        watch: Iterable[str] = (),
        timeout: float = TIMEOUT,
    ) -> None:
        """Start a worker that can make up to ``steps`` steps in all, from ``state``: that of a simulator's run.

        Only cells can be given a state; all other processes of ``state`` must be as they are before the first step.

        Raises: LoweringError for a network that Lava cannot run as one, DataError, PluginError.
        """
        self.network, self.steps, self.timeout, self.done = network, steps, timeout, 0
        _one_piece(network)
        self._given = {} if state is None else _of_cells(network, state)
        self._watch = watched_states(network, watch)
        self._folder = tempfile.TemporaryDirectory(prefix="spiking-lm-lava-", ignore_cleanup_errors=True)
        self._job = Path(self._folder.name)
        self._prefix = f"sl{secrets.token_hex(3)[:5]}"
        self._files: dict[str, Rows] = {}
        self._result: LavaRun | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self._unread = b""
        try:
            self._prepare()
            self._worker = self._start(lava)
            if "ready" not in self._answer():
                raise self._failed("answered something else than that it is ready")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LavaSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def advance(self, rows: Mapping[str, Rows]) -> dict[str, Rows]:
        """Make as many steps as ``rows`` (source -> rows) has; return what arrived at the sinks in them.

        Raises: DataError for rows that do not fit or are more than the session was made for, PluginError.
        """
        given, count = checked_inputs(self.network, rows)
        if self._worker is None:
            raise DataError("the session with Lava has ended")
        if self.done + count > self.steps:
            raise DataError(f"{self.done + count} steps, the session was made for {self.steps}")
        now = slice(self.done, self.done + count)
        for name, values in given.items():
            self._files[name][now] = values
        if count:
            self._ask({"run": count})
            self.done += count
            if self._answer().get("done") != self.done:
                raise self._failed(f"did not answer that it made {self.done} steps")
        return {node.name: np.array(self._files[node.name][now]) for node in self.network.of_kind(Sink)}

    def result(self) -> LavaRun:
        """Return everything up to now; timings and versions are known once the session has ended."""
        run = self._result or LavaRun({})
        run.sinks = {node.name: np.array(self._files[node.name][: self.done]) for node in self.network.of_kind(Sink)}
        run.watched = {name: np.array(self._files[name][: self.done]) for name in self._watch}
        return run

    def close(self) -> None:
        """End the worker, kindly first, and remove all that it wrote. Raises: PluginError if it failed while ending."""
        worker, self._worker = self._worker, None
        if worker is None:
            self._folder.cleanup()
            return
        try:
            if worker.poll() is None:
                with contextlib.suppress(OSError):
                    assert worker.stdin is not None
                    worker.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(_GRACE)
            with contextlib.suppress(OSError, ValueError):
                record = json.loads((self._job / "result.json").read_text(encoding="utf-8"))
                self._result = LavaRun({}, {}, record.get("timings", {}), record.get("versions", {}))
        finally:
            self._kill(worker)
            # Maps outlive the files; what was read stays readable.
            self._folder.cleanup()

    # -- the worker ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Write the job and make the files of all ends, which both sides map."""
        record, arrays = self.network.to_record()
        for cell, values in zip(self.network.nodes, record["nodes"], strict=True):
            if isinstance(cell, Cell):
                values["layout"] = cell.layout()
                held = self._given.get(cell.name, cell.initial())
                arrays |= {f"{cell.name}.initial.{name}": value for name, value in held.items()}
        np.savez(self._job / "arrays.npz", **arrays)  # type: ignore[arg-type]
        paths = {}
        ends = [node for node in self.network.nodes if isinstance(node, (Source, Sink))]
        sizes: dict[str, tuple[int, Any]] = {
            node.name: (node.size, np.int32 if isinstance(node, Source) else np.int64) for node in ends
        }
        for name, (node, state) in self._watch.items():
            real = isinstance(self.network[node], FloatLIF)
            sizes[name] = (self.network[node].watchable[state], np.float64 if real else np.int64)
        for number, (name, (size, dtype)) in enumerate(sizes.items()):
            path = self._job / f"{number}.npy"
            shape = (max(self.steps, 1), size)  # an empty file cannot be mapped
            self._files[name] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            paths[name] = str(path)
        (self._job / "tmp").mkdir()
        task = {"network": record, "files": paths, "shared_memory": self._prefix}
        (self._job / "job.json").write_text(json.dumps(task), encoding="utf-8")

    def _start(self, lava: Lava) -> subprocess.Popen[bytes]:
        # One thread per Lava process is enough, and more would only get in each other's way.
        environment = {
            **os.environ,
            "TMPDIR": str(self._job / "tmp"),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with open(self._job / "log.txt", "wb") as log:
            try:
                return subprocess.Popen(
                    [*lava.command, str(MAIN), str(self._job), *map(str, lava.paths)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=self._job,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise PluginError(f"Lava's worker cannot be started: {error}", hint="spiking-lm doctor lava") from error

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._worker is not None
        assert self._worker.stdin is not None
        try:
            self._worker.stdin.write(json.dumps(request).encode() + b"\n")
            self._worker.stdin.flush()
        except OSError as error:
            raise self._failed("is gone") from error

    def _answer(self) -> dict[str, Any]:
        """Return the worker's next line. Raises: PluginError when it fails or takes too long."""
        assert self._worker is not None
        assert self._worker.stdout is not None
        ends = time.monotonic() + self.timeout
        while b"\n" not in self._unread:
            left = max(ends - time.monotonic(), 0)
            ready, _, _ = select.select([self._worker.stdout], [], [], min(left, _LOOK_EVERY))
            if not ready:
                if not left:
                    raise self._failed(f"gave no answer within {self.timeout:g} seconds and was ended", gone=False)
                if self._worker.poll() is not None:  # what it started may hold its output open
                    raise self._failed("ended")
                continue
            chunk = os.read(self._worker.stdout.fileno(), 65536)
            if not chunk:
                raise self._failed("ended")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._failed(f"answered {line[:80]!r}")
        if "error" in answer:
            raise self._failed("failed")
        return answer

    def _failed(self, what: str, *, gone: bool = True) -> PluginError:
        """Return the error of a broken worker: what it says was wrong, and the end of its log."""
        assert self._worker is not None
        if gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._worker.wait(_GRACE)
        else:
            self._kill(self._worker)
        reason = ""
        with contextlib.suppress(OSError, ValueError):
            error = json.loads((self._job / "result.json").read_text(encoding="utf-8")).get("error")
            reason = f": {error}" if error else ""
        log = ""
        with contextlib.suppress(OSError):
            lines = (self._job / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            log = "".join(f"\n  | {line}" for line in lines[-_LOG_LINES:])
        code = self._worker.poll()
        how = "" if code is None else f" (exit code {code})" if code >= 0 else f" (signal {-code})"
        return PluginError(f"Lava's worker {what}{how}{reason}{log}", hint="spiking-lm doctor lava")

    def _kill(self, worker: subprocess.Popen[bytes]) -> None:
        """End whatever is left of the worker's group, and the shared memory that nobody removed."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            for _ in range(100):  # until the last one is gone; where nobody collects the dead, not for ever
                os.killpg(worker.pid, 0)
                time.sleep(0.01)
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        if sys.platform.startswith("linux"):
            for left in _SHARED_MEMORY.glob(f"{self._prefix}*"):
                with contextlib.suppress(OSError):
                    left.unlink()


def _of_cells(network: Network, state: NetworkState) -> dict[str, State]:
    """Return the states of cells. Raises: DataError where another process holds something."""
    for node in network.nodes:
        now, rest = state.nodes[node.name], node.initial()
        if not isinstance(node, Cell) and any(not np.array_equal(now[name], rest[name]) for name in rest):
            raise DataError(f"Lava cannot start with what {node.kind} {node.name!r} holds in this state")
    return {node.name: state.nodes[node.name] for node in network.nodes if isinstance(node, Cell)}


def _one_piece(network: Network) -> None:
    """Lava finds processes by following connections. Raises: LoweringError for a network in several parts."""
    joined = {node.name: {node.name} for node in network.nodes}
    for edge in network.edges:
        a, b = joined[edge.source.partition(".")[0]], joined[edge.target.partition(".")[0]]
        if a is not b:
            a |= b
            for name in b:
                joined[name] = a
    parts = {id(part): sorted(part) for part in joined.values()}
    if len(parts) > 1:
        firsts = ", ".join(repr(part[0]) for part in parts.values())
        raise LoweringError(
            f"the network has {len(parts)} parts without a connection (of {firsts}); Lava runs one",
            hint="run each by itself",
        )
