"""An explanation as text: rich tables for a terminal, and the grouping of identical layers that the page uses too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from spiking_lm.graph import layer_pattern

Row = Mapping[str, Any]

CLASS_NAMES = {
    "AC": "AC: fed by spikes, only adds",
    "integer-AC": "integer-AC: fed by counts, k additions each",
    "MAC": "MAC: fed by real numbers, multiplies and adds",
    "other": "other: norms, mixes, gates, neurons, tables",
}

METRICS = {
    "bits_per_byte": "bits per byte",
    "bits_per_character": "bits per character",
    "perplexity": "perplexity per token",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
}
"""What metrics are called, where the name in the registry would not do."""

COLOURS = {"AC": "green", "integer-AC": "cyan", "MAC": "yellow"}


def explanation_tables(explanation: Row, *, full: bool = False) -> RenderableType:
    """Return the tables of ``Explanation.to_dict()``, readable at 100 columns; ``full`` lists every op and site."""
    parts: list[RenderableType] = [
        Text.assemble(("Where are the spikes?  ", "bold"), str(explanation["answer"])),
        Text(f"{explanation['model']}, measured on {explanation['sample']}.", style="dim"),
        _matrices(explanation, full),
    ]
    if explanation["sites"]:
        parts.append(_sites(explanation, full))
    if full:
        parts.append(_others(explanation))
    parts += [_totals(explanation), _energy(explanation)]
    parts += [Text(f"Note: {note}.", style="dim") for note in explanation["notes"]]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def group_layers(rows: Iterable[Row], *same: str) -> list[list[Row]]:
    """Group rows whose names differ only in layer numbers and which agree in the fields ``same``; order is kept."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (layer_pattern(row["name"]), *(str(row[field]) for field in same))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def name_of_group(group: Sequence[Row]) -> str:
    """Name a group: its only member, or the pattern and how many there are."""
    if len(group) == 1:
        return str(group[0]["name"])
    return f"{layer_pattern(group[0]['name'])} ×{len(group)}"


def count(n: float) -> str:
    """Write a count with three significant digits and a unit: ``1.23 M``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= 0.9995 * size:
            return f"{n / size:.3g} {unit}" if abs(n) < 999.5 * size else f"{n / size:.0f} {unit}"
    return f"{n:.3g}" if n != int(n) else str(int(n))


def percent(share: float | None) -> str:
    """Write a share in percent with one decimal; only exactly 0 and 1 are written as ``0 %`` and ``100 %``."""
    if share is None:
        return "–"
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{share:.1%}".replace("%", " %")


def span(values: Sequence[float | None]) -> str:
    """Write the range of shares in a group: one value, or lowest to highest."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = percent(min(known)), percent(max(known))
    if low == high:
        return low
    return f"{low} to {high}" if low[0] == "<" or high[0] == ">" else f"{low.removesuffix(' %')}–{high}"


def bytes_of(n: float) -> str:
    """Write a size in binary units."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} bytes"


def energy_of(picojoules: float) -> str:
    """Write an energy."""
    for unit, size in (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3)):
        if picojoules >= size:
            return f"{picojoules / size:.3g} {unit}"
    return f"{picojoules:.3g} pJ"


def _table(title: str, *columns: str) -> Table:
    """Make a table whose columns are right-aligned when their name begins with ``>``."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def _matrices(explanation: Row, full: bool) -> Table:
    table = _table(
        "Weight matrices, by what feeds them (operations per token)",
        *("matrix", "fed with", ">zeros", ">dense", ">effective", "class", "can run on"),
    )
    linears = matrices_of(explanation)
    groups = [[op] for op in linears] if full else group_layers(linears, "fed_with", "op_class", "runs_on")
    for group in groups:
        first = group[0]
        table.add_row(
            name_of_group(group),
            first["fed_with"],
            span([op["input_zeros"] for op in group]),
            count(sum(op["dense"] for op in group)),
            count(sum(op["effective_acs"] + op["effective_macs"] for op in group)),
            Text(first["op_class"], style=COLOURS[first["op_class"]]),
            first["runs_on"],
        )
    return table


def matrices_of(explanation: Row) -> list[dict[str, Any]]:
    """Return the operations with a weight matrix, with ``fed_with``: the kind of their input in one word.

    It is the kind that was seen, except that values declared graded are called so even where fewer than half are zero.
    """
    return [
        {**op, "fed_with": "graded" if _is_graded(op) else op["seen_input"]}
        for op in explanation["ops"]
        if op["op_class"]
    ]


def _is_graded(op: Row) -> bool:
    return "graded" in op["declared_inputs"] and op["seen_input"] == "real"


def _sites(explanation: Row, full: bool) -> Table:
    table = _table("Spike sites", "site", "emits", "feeds", ">channels", ">firing rate", ">silent", ">always on")
    sites = explanation["sites"]
    for group in [[site] for site in sites] if full else group_layers(sites, "kind", "feeds_kinds"):
        table.add_row(
            name_of_group(group),
            group[0]["kind"],
            feeds_of(group[0]),
            "+".join(dict.fromkeys(count(site["channels"]) for site in group)),
            span([site["rate"] for site in group]),
            span([site["silent"] for site in group]),
            span([site["saturated"] for site in group]),
        )
    return table


def feeds_of(site: Row) -> str:
    """Say what kinds of operation a site feeds."""
    kinds = dict.fromkeys(site["feeds_kinds"])
    words = {"linear": "matrix", "residual": "real residual", "token_shift": "token shift"}
    return ", ".join(words.get(kind, kind) for kind in kinds) or "nothing"


def _others(explanation: Row) -> Table:
    table = _table("Other operations", "operation", "kind", "reads", "emits", ">zeros", ">per token", "can run on")
    for op in explanation["ops"]:
        if not op["op_class"]:
            table.add_row(
                op["name"],
                op["kind"],
                " + ".join(op["declared_inputs"]),
                op["seen_output"] or f"{op['emits']} (declared)",
                percent(op["output_zeros"]),
                count(op["other_ops"]),
                op["runs_on"],
            )
    return table


def _totals(explanation: Row) -> Table:
    bench = explanation["neurobench"]
    table = _table("Totals", "", ">", "")
    table.show_header = False
    for name, share in explanation["classes"].items():
        table.add_row(
            Text(name, style=COLOURS[name]),
            percent(share["weight_share"]),
            f"of matrix weights ({count(share['weights'])}); {percent(share['dense_share'])} of dense operations",
        )
    operations = bench["synaptic_operations_per_token"]
    per_token = [f"{count(operations[key])} {words}" for key, words in _OPERATIONS.items()]
    table.add_row("synaptic operations", "", ", ".join(per_token) + " per token (NeuroBench)")
    if bench["membrane_updates_per_token"] is not None:
        table.add_row("membrane updates", count(bench["membrane_updates_per_token"]), "per token")
    table.add_row("activation sparsity", percent(bench["activation_sparsity"]), "zeros among all activations")
    table.add_row("connection sparsity", percent(bench["connection_sparsity"]), "zeros among all weights")
    table.add_row("spikes", count(explanation["spikes_per_token"]), "per token")
    outside = f"of which {count(explanation['other_parameters'])} outside weight matrices"
    table.add_row("parameters", count(bench["parameter_count"]), outside)
    table.add_row("footprint", bytes_of(bench["footprint_bytes"]), "")
    others = ", ".join(f"{kind.replace('_', ' ')} {count(n)}" for kind, n in explanation["other_ops"].items())
    table.add_row("other operations", count(sum(explanation["other_ops"].values())), f"per token: {others or 'none'}")
    return table


_OPERATIONS = {"Dense": "dense", "Effective_MACs": "effective MACs", "Effective_ACs": "effective ACs"}


def _energy(explanation: Row) -> RenderableType:
    table = _table("Energy per token", "", *(">matrices", ">twin / this", ">all operations", ">twin / this"))
    for row in explanation["energy"]:
        total = row["synaptic_pj"] + row["other_pj"]
        whole = ratio_of(row["ratio_with_other"])
        table.add_row(row["label"], energy_of(row["synaptic_pj"]), ratio_of(row["ratio"]), energy_of(total), whole)
    return Group(table, Text(f"Energy: {explanation['energy_words']}; {constants(explanation)}.", style="dim"))


def ratio_of(ratio: float | None) -> str:
    """Write how many times less energy than the dense twin; None where nothing is left to compare."""
    return "–" if ratio is None else f"{ratio:.2f}×"


def constants(explanation: Row) -> str:
    """Write the constants that the energy was reckoned with."""
    return (
        f"{explanation['energy_constants']['mac_pj']} pJ per MAC, {explanation['energy_constants']['ac_pj']} pJ per "
        "accumulate (Horowitz, fp32); other operations priced as one MAC each, an upper bound"
    )


# --- Programs ---------------------------------------------------------------------------------------------------------


def program_tables(report: Row) -> RenderableType:
    """Return the tables of ``ProgramReport.to_dict()``: figures, placement, constants and warnings."""
    parts: list[RenderableType] = [
        Text(f"{report['model']} on {report['backend']}", style="bold"),
        _grid("Figures", figures_grid(report)),
        _grid("Placement", placement_grid(report)),
        _grid("Constants", constants_grid(report)),
    ]
    parts += [Text(f"Warning: {warning}", style="yellow") for warning in report["warnings"]]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def run_tables(account: Row) -> RenderableType:
    """Return the tables of a program's run, and of its report."""
    protocol = Padding(Text(f"{account['protocol']}.", style="dim"), (0, 0, 1, 0))
    return Group(_grid("Run", run_grid(account)), protocol, program_tables(account["report"]))


def run_grid(account: Row) -> Grid:
    """Return what a program's run gave: its perplexity, beside that of the model where it was compared."""
    rows = [["perplexity of the program", f"{account['perplexity']:.4f}", f"on {account['backend']}"]]
    if "model_perplexity" in account:
        before, after = account["model_perplexity"], account["perplexity"]
        rows += [
            ["perplexity of the model", f"{before:.4f}", "in float, on the very same tokens"],
            ["change", f"{round(after / before - 1, 5) + 0.0:+.3%}".replace("%", " %"), "program against model"],
            ["largest difference", f"{account['largest_difference']:.3g}", "of any logit"],
            ["same guess", percent(account["same_guess"]), "tokens at which both hold the same next one likeliest"],
        ]
    if "quantised_perplexity" in account:
        apart = account["quantised_difference"]
        remark = "quantised, in torch; its logits are " + ("the program's" if not apart else f"up to {apart:.3g} off")
        rows.insert(1, ["perplexity of the model, quantised", f"{account['quantised_perplexity']:.4f}", remark])
    runner = account.get("counters", {}).get("runner", "the simulator")
    rows.append([f"speed of {runner}", f"{account['tokens_per_s']:,.0f}", "tokens/s on this machine"])
    return ["figure", ">value", "remark"], rows


def pruning_grid(pruning: Row) -> Grid:
    """Return how many weights of each pruned matrix are left, those of identical layers joined, and of all together."""
    rows = []
    for group in group_layers(pruning["matrices"]):
        weights, nonzero = (sum(matrix[key] for matrix in group) for key in ("weights", "nonzero"))
        shares = span([matrix["sparsity"] for matrix in group])
        rows.append([name_of_group(group), count(weights), count(nonzero), shares])
    rows.append(["all", count(pruning["weights"]), count(pruning["nonzero"]), percent(pruning["sparsity"])])
    return ["matrix", ">weights", ">left", ">zeros"], rows


def pruning_table(pruning: Row) -> Table:
    """Return the table of a pruning."""
    return _grid(f"Pruned to {percent(pruning['target'])}, {pruning['scope']}", pruning_grid(pruning))


def figure_of(value: float | None, unit: str) -> str:
    """Write a figure with its unit: whole numbers and large ones whole, others with four significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    whole = (value == int(value) or abs(value) >= 1000) and abs(value) < 1e9
    number = f"{value:,.0f}" if whole else f"{value:.4g}"
    return f"{number} {unit}" if unit else number


def figures_grid(report: Row) -> Grid:
    """Return the figures of a program's report with their grades."""
    rows = [
        [figure["name"], figure_of(figure["value"], figure["unit"]), figure["grade"], figure["note"]]
        for figure in report["figures"]
    ]
    return ["figure", ">value", "grade", "remark"], rows


def placement_grid(report: Row) -> Grid:
    """Return where each operation of a program runs; operations of layers in one place and form are joined."""
    rows = []
    for group in group_layers(report["placement"], "kind", "runs_on", "where", "format"):
        weights, size = (sum(op[key] for op in group) for key in ("weights", "bytes"))
        place = [str(group[0][key]) for key in ("kind", "runs_on", "where", "format")]
        rows.append([name_of_group(group), *place, count(weights) if weights else "", bytes_of(size) if size else ""])
    return ["operation", "kind", "runs on", "where", "format", ">weights", ">memory"], rows


def constants_grid(report: Row) -> Grid:
    """Return the constants that a program's report rests on, with their sources."""
    rows = [
        [constant["name"], figure_of(constant["value"], constant["unit"]), constant["grade"], constant["source"]]
        for constant in report["constants"]
    ]
    return ["constant", ">value", "grade", "source"], rows


# --- Comparisons ------------------------------------------------------------------------------------------------------

Grid = tuple[list[str], list[list[str]]]
"""The head of a table, ``>`` marking a column of numbers, and its rows."""


def comparison_tables(comparison: Row) -> RenderableType:
    """Return the tables of ``compare.json``."""
    parts: list[RenderableType] = [_grid("Compared", results_grid(comparison))]
    if spikes := comparison.get("spikes"):
        parts += [_grid("The same weights", spikes_grid(spikes)), Text(f"{spikes_words(spikes)}.", style="dim")]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def headline_metric(metrics: Iterable[str]) -> str | None:
    """Choose the metric that stands for an evaluation; None where there is none."""
    given = list(metrics)
    first = ("bits_per_byte", "rouge_l", "perplexity", "accuracy", "mean_squared_error", *given)
    return next((name for name in first if name in given), None)


def metric_name(name: str) -> str:
    """Return what a metric is called."""
    return METRICS.get(name, name.replace("_", " "))


def metric_value(name: str, value: float | None) -> str:
    """Write a metric: shares in percent, other figures with three decimals."""
    if value is None:
        return "–"
    return percent(value) if name in ("accuracy", "macro_f1", "exact_match") else f"{value:.3f}"


def results_grid(comparison: Row) -> Grid:
    """Return what came out of each run, one row each."""
    runs = comparison["runs"]
    metric = headline_metric(dict.fromkeys(name for run in runs for name in run["metrics"]))
    head = ["run", "model", ">parameters", *([f">{metric_name(metric)}"] if metric else [])]
    trained = any(run["seconds"] is not None for run in runs)
    head += [">activity", *([">training tokens/s", ">seconds of training"] if trained else [])]
    rows = []
    for run in runs:
        model = f"{run['model']}, {run['neuron']}" if run["neuron"] else run["model"]
        row = [run["name"], model, count(run["parameters"])]
        row += [metric_value(metric, run["metrics"].get(metric))] if metric else []
        row += [percent(run["activity"]), *([_whole(run["tokens_per_s"]), _whole(run["seconds"])] if trained else [])]
        rows.append(row)
    return head, rows


def spikes_grid(spikes: Row) -> Grid:
    """Return, for the same weights in every run, whether its spikes are the same and how fast they come."""
    head = ["run", "spikes, by its own step", "spikes, as it is used", ">tokens/s, own step", ">tokens/s, as used"]
    rows = []
    for run in spikes["runs"]:
        ways = [run["step"], run["forward"]]
        found = ["–" if way is None else _difference(way["different"], spikes["spikes"]) for way in ways]
        rows.append([run["name"], *found, *("–" if way is None else _whole(way["tokens_per_s"]) for way in ways)])
    return head, rows


def spikes_words(spikes: Row) -> str:
    """Say what the spikes were compared on."""
    return (
        f"Every run was given this run's weights and {spikes['sample']}: {count(spikes['spikes'])} values at "
        f"{spikes['sites']} sites, {percent(spikes['rate'])} of them spikes; speeds are medians of turns on one thread"
    )


def changes_of(run: Row) -> str:
    """Write what a variant changes: ``path = value`` pairs."""
    return ", ".join(f"{path} = {value}" for path, value in run["changes"].items())


def _difference(different: int, values: int) -> str:
    return "equal" if different == 0 else f"{different:,} of {values:,} differ"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _grid(title: str, grid: Grid) -> Table:
    head, rows = grid
    table = _table(title, *head)
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: brackets are no markup
    return table


def conversion_tables(report: Row) -> RenderableType:
    """Return the tables of a conversion: what was done, and per kind of matrix what it came to."""
    facts = Table(title=f"converted from {report['source']}", title_justify="left", box=box.SIMPLE, show_header=False)
    for name, value in report["summary"].items():
        facts.add_row(name, str(value))
    head, rows = conversion_grid(report)
    table = Table(title="Matrices (means over the blocks)", title_justify="left", box=box.SIMPLE_HEAD)
    for name in head:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    for row in rows:
        table.add_row(*row)
    notes = [Text(f"Note: {note}.", style="dim") for note in report["notes"]]
    return Group(facts, table, *notes)


def conversion_grid(report: Row) -> tuple[list[str], list[list[str]]]:
    """Return heads (">" before a right-aligned one) and rows: a row per kind of matrix, averaged over the blocks."""

    def mean(group: Sequence[Row], field: str) -> float | None:
        values = [row[field] for row in group if row[field] is not None]
        return sum(values) / len(values) if values else None

    heads = ["matrix", ">bits per weight", ">salient inputs", ">error, nearest", ">error", ">zero weights"]
    rows = []
    for group in group_layers(report["layers"]):
        bits = mean(group, "bits_per_weight")
        shares = [percent(mean(group, field)) for field in ("salient", "error_nearest", "error", "zeros")]
        rows.append([name_of_group(group), "–" if bits is None else f"{bits:.2f}", *shares])
    return heads, rows
