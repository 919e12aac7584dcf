"""The report of a run: one self-contained HTML page, pictures, and the tables of ``explain``."""

from __future__ import annotations

import os
from pathlib import Path


def write_report(run_path: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``report/*.png`` from the files of a run directory; return the page's path.

    Missing pieces (no evaluation, an interrupted run, a torn line of metrics) are said to be missing.
    Raises: DataError where there is no run, MissingExtraError without matplotlib or jinja2.
    """
    from spiking_lm.report.page import write  # drawing is slow to import, and the tables need none of it

    return write(run_path)


__all__ = ["write_report"]
