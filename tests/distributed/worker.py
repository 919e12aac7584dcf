"""One of several processes that run the jobs of a file, one after the other: ``python worker.py RANK JOBS.json``.

A job is {"recipe", "set", "out", "resume", "size", "port"}; a process whose rank is beyond the job's size is not in it.
Starting Python and torch takes longer than the jobs, so that all of them share the processes.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from spiking_lm import distributed
from spiking_lm.errors import SpikingLMError
from spiking_lm.runs import run_recipe


def do(rank: int, number: int, job: dict[str, Any]) -> str:
    """Take part in a job; return what became of it."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(job["size"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"])
    )
    distributed._times_joined = iter([number])  # type: ignore[assignment]  # the same for those who left jobs out
    try:
        run_recipe(job["recipe"], job["set"], out=job["out"], resume=job["resume"], console=Console(file=io.StringIO()))
    except SpikingLMError as error:
        return f"{type(error).__name__}: {error}"
    except SystemExit as end:
        return f"exit {end.code}"
    return "ok"


def main(rank: int, jobs: Path) -> None:
    """Do all of them; the answers are written beside the file."""
    answers = [
        do(rank, number, job) if rank < job["size"] else ""
        for number, job in enumerate(json.loads(jobs.read_text(encoding="utf-8")))
    ]
    jobs.with_suffix(f".{rank}").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
