"""The worker: ``python -I main.py JOB [PACKAGES]`` runs one network in Lava, in a process of its own.

Importing Lava fixes how a process starts others, and Lava starts one for each of its processes; neither is for the
process that trains a model. The folder JOB holds ``job.json`` (a network's record, files of inputs, outputs and watched
states) and ``arrays.npz``. The host writes one JSON line per request to standard input, ``{"run": STEPS}``; the answer
on standard output is ``{"done": STEPS}``, with the steps so far, and the first line of all is ``{"ready": true}``. When
standard input ends, or a SIGTERM arrives, the worker stops Lava and leaves. ``result.json``, written last, has status,
error, timings and versions.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
_GRACE = 10.0
"""Seconds to stop Lava in once the host has gone."""
_LOOK_EVERY = 0.2
"""Seconds between two looks at Lava's processes."""
DISTRIBUTIONS = ("lava-nc", "numpy", "scipy", "networkx", "asteval")


class Stopped(BaseException):
    """The host, or a signal, ends the worker."""


def main() -> NoReturn:
    """Serve one network, and exit: 1 after an error, else 0."""
    job, packages = Path(sys.argv[1]), sys.argv[2:]
    sys.path[:0] = [*packages, str(HERE), str(HERE / "ends")]
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anyone prints belongs to the log
    signal.signal(signal.SIGTERM, _stop)
    requests = _requests()
    timings: dict[str, float] = {}
    result: dict[str, Any] = {"status": "ok", "error": None, "timings": timings}
    process = None
    try:
        started = time.perf_counter()
        task = json.loads((job / "job.json").read_text(encoding="utf-8"))
        _name_shared_memory(task["shared_memory"])
        with _mended():
            from building import build  # type: ignore[import-not-found]
            from lava.magma.core.run_conditions import RunSteps
        timings["import"] = time.perf_counter() - started
        result["versions"] = _versions()

        import numpy as np

        with open(job / "arrays.npz", "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            process, configuration = build(task["network"], dict(arrays), task["files"], task.get("loihi2"))
        timings["build"] = time.perf_counter() - started - timings["import"]
        print(json.dumps({"ready": True}), file=answers)
        _note_children()
        threading.Thread(target=_watch, daemon=True).start()
        done, timings["run"] = 0, 0.0
        while (request := requests.get()) is not None:
            begun = time.perf_counter()
            _busy.set()
            process.run(condition=RunSteps(num_steps=request["run"]), run_cfg=configuration)
            _busy.clear()
            timings["run" if done else "first"] = timings["run"] * bool(done) + time.perf_counter() - begun
            done += request["run"]
            print(json.dumps({"done": done}), file=answers)
        _leaving.set()
    except Stopped:
        result |= {"status": "error", "error": _failures[0]} if _failures else {"status": "stopped"}
    except BaseException as error:
        result |= {"status": "error", "error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    _leaving.set()
    begun = time.perf_counter()
    if process is not None and not _failures:  # without one of its processes Lava waits for ever
        try:
            process.stop()
        except BaseException:
            traceback.print_exc()
    timings["stop"] = time.perf_counter() - begun
    temporary = job / "result.tmp"
    temporary.write_text(json.dumps(result), encoding="utf-8")
    os.replace(temporary, job / "result.json")
    if result["status"] == "error":
        print(json.dumps({"error": result["error"]}), file=answers)
    # Not by return: Python would first join what Lava started, and what is stuck would hold it up.
    sys.stderr.flush()
    os._exit(int(result["status"] == "error"))


def _requests() -> SimpleQueue[dict[str, Any] | None]:
    """Read requests in a thread, which also notices when the host is gone: then SIGTERM interrupts what is running."""
    queue: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def read() -> None:
        left = b""
        while chunk := os.read(0, 65536):  # no file object: nothing here holds a lock while Lava forks
            *lines, left = (left + chunk).split(b"\n")
            for line in lines:
                queue.put(json.loads(line))
        queue.put(None)
        if _busy.is_set():
            os.kill(_PID, signal.SIGTERM)
        time.sleep(_GRACE)  # still here: something is stuck, and perhaps there is nobody left who would end us
        for memory in Path("/dev/shm").glob(f"{_PREFIX[0]}*") if _PREFIX else ():
            memory.unlink(missing_ok=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    return queue


def _note_children() -> None:
    """Keep every process that is started from here on, as multiprocessing forgets those that have ended."""
    start = multiprocessing.Process.start

    def noted(self: Any) -> None:
        _children.append(self)
        start(self)

    multiprocessing.Process.start = noted  # type: ignore[method-assign]


def _watch() -> None:
    """Notice when one of Lava's processes ends while it should run: Lava itself would wait for its answer for ever."""
    while not _leaving.is_set():
        time.sleep(_LOOK_EVERY)
        for child in tuple(_children):
            if _busy.is_set() and child.exitcode is not None:
                reason = f"a process of Lava ended (exit code {child.exitcode})"
                pipe = getattr(child, "_pconn", None)
                if pipe is not None and not pipe.closed and pipe.poll() and (sent := pipe.recv()):
                    error, text = sent
                    reason = f"in a process of Lava: {type(error).__name__}: {error}"
                    print(text, file=sys.stderr, flush=True)
                _failures.append(reason)
                os.kill(_PID, signal.SIGTERM)
                return


def _stop(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _PID:  # Lava's own processes inherit the handler
        os._exit(1)
    if not _leaving.is_set():
        _leaving.set()
        raise Stopped


_PID = os.getpid()
_PREFIX: list[str] = []
_busy = threading.Event()
"""Lava runs."""
_leaving = threading.Event()
"""Signals have nothing more to say."""
_children: list[Any] = []
_failures: list[str] = []
"""What ended Lava's processes."""


def _mended() -> Any:
    from hashes import hashable_dataclasses  # type: ignore[import-not-found]

    return hashable_dataclasses()


def _name_shared_memory(prefix: str) -> None:
    """Let shared memory begin with ``prefix``, so that the host finds what is left if we are killed."""
    from multiprocessing import shared_memory

    if hasattr(shared_memory, "_SHM_NAME_PREFIX"):
        shared_memory._SHM_NAME_PREFIX = f"/{prefix}"
        _PREFIX.append(prefix)


def _versions() -> dict[str, str]:
    from importlib.metadata import distributions

    found = {item.name: item.version for item in distributions(path=sys.path) if item.name in DISTRIBUTIONS}
    return {"python": sys.version.split()[0], **found}


if __name__ == "__main__":
    main()
