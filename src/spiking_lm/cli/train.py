"""``spiking-lm train``: the training stage of a recipe."""

from __future__ import annotations

from pathlib import Path

from spiking_lm.cli.run import DRY_RUN, JSON, OUT, RECIPE, RESUME, SET, execute


def command(
    recipe: str | None = RECIPE,
    settings: list[str] = SET,
    out: Path = OUT,
    resume: str | None = RESUME,
    dry_run: bool = DRY_RUN,
    json: bool = JSON,
) -> None:
    """Train the model of a recipe, and stop there.

    The later stages can follow with 'spiking-lm eval', 'generate', 'explain' and 'report' on the run directory.
    """
    from spiking_lm.stages import STAGES

    only = [f"{stage}=null" for stage in STAGES if stage != "train"]
    execute(recipe, [*settings, *only] if recipe else settings, out, resume, dry_run=dry_run, as_json=json)
