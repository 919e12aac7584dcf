"""What the page says about stages that not every run has, each from the file that the stage wrote."""

from __future__ import annotations

from typing import Any

from spiking_lm.report import tables
from spiking_lm.report.collect import Collected


def compared(run: Collected) -> dict[str, Any] | None:
    """Return the section "Compared": what came out of each variant, and whether its spikes were the same."""
    comparison = run.comparison
    if comparison is None:
        return None
    spikes = comparison.get("spikes")
    return {
        "results": tables.results_grid(comparison),
        "changes": [(one["name"], tables.changes_of(one)) for one in comparison["runs"] if one["changes"]],
        "spikes": tables.spikes_grid(spikes) if spikes else None,
        "spikes_words": tables.spikes_words(spikes) if spikes else None,
    }


def converted(run: Collected) -> dict[str, Any] | None:
    """Return the section "Conversion": what was made of another tool's model, and what that did to its matrices."""
    conversion = run.conversion
    if conversion is None:
        return None
    return {
        "source": conversion["source"],
        "summary": list(conversion["summary"].items()),
        "matrices": tables.conversion_grid(conversion),
        "notes": list(conversion["notes"]),
    }


def pruned(run: Collected) -> dict[str, Any] | None:
    """Return the section "Pruning": what is left of each matrix, and how well the model did before and after."""
    pruning = run.pruning
    if pruning is None or "matrices" not in pruning:
        return None
    before = (pruning.get("before") or {}).get("metrics", {})
    after = (run.evaluation or {}).get("metrics", {})
    scores = [
        [tables.metric_name(name), tables.metric_value(name, value), tables.metric_value(name, after.get(name))]
        for name, value in before.items()
    ]
    return {
        "share": tables.percent(pruning["sparsity"]),
        "words": (
            f"the same share of every matrix goes, over {pruning['steps']:,} steps"
            if pruning["scope"] == "uniform"
            else f"one magnitude for all matrices, over {pruning['steps']:,} steps"
        ),
        "matrices": tables.pruning_grid(pruning),
        "scores": (["metric", ">before", ">after"], scores) if scores else None,
    }


def deployed(run: Collected) -> dict[str, Any] | None:
    """Return the section "Hardware": how the program did, what it costs, where it runs, and what that rests on."""
    account = run.deployment
    if account is None:
        return None
    report = account["report"]
    return {
        "backend": account["backend"],
        "protocol": account["protocol"],
        "run": tables.run_grid(account),
        "figures": tables.figures_grid(report),
        "placement": tables.placement_grid(report),
        "constants": tables.constants_grid(report),
        "warnings": list(report["warnings"]),
    }
