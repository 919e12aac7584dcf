"""Write the report of a run: ``report.html``, which needs nothing else, and its pictures in ``report/``."""

from __future__ import annotations

import base64
import json
import os
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spiking_lm import __version__
from spiking_lm.errors import MissingExtraError
from spiking_lm.files import atomic_write
from spiking_lm.report import sections, tables
from spiking_lm.report.collect import Collected, collect

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What reading a JSON file of another shape than ours can raise; the report names the file instead of stopping."""

_RASTER_COLOUR = "#2b87c8"  # reads on white and on black
_RASTER_HEIGHT = 760
_MOST_SITES = 24


def write(run_path: str | os.PathLike[str]) -> Path:
    """Do what :func:`spiking_lm.report.write_report` says."""
    run = collect(run_path)
    try:
        import jinja2

        from spiking_lm.report import figures
    except ImportError as error:
        raise MissingExtraError("the report", "report", detail=f"{error.name} is not installed") from None
    with figures.style():
        svgs = {
            name: None if figure is None else figures.to_svg(figure, title)
            for name, (title, figure) in _pictures(run).items()
        }
        pngs = {name: figures.to_png(figure) for name, figure in _files(run).items()}
    for name, content in pngs.items():
        atomic_write(run.path / "report" / f"{name}.png", content)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spiking_lm.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(count=tables.count, percent=tables.percent)
    html = environment.get_template("template.html").render(
        run=run, svgs=svgs, version=__version__, **_view(run), problems=run.problems
    )
    page = run.path / "report.html"
    atomic_write(page, html.encode("utf-8", errors="replace"))
    return page


# --- Pictures ---------------------------------------------------------------------------------------------------------


def _pictures(run: Collected) -> dict[str, tuple[str, Any]]:
    """Return the figures of the page: name -> (what it shows, figure, or None when there is nothing to show)."""
    from spiking_lm.report import figures

    rates = rates_of(run)
    return {
        "loss": (
            "Training and validation loss over the steps",
            figures.loss_figure(run, baselines_of(run), baseline_unit(run)),
        ),
        "rates_final": ("Firing rate by layer", figures.final_rates_figure(rates) if rates else None),
        "rates_training": ("Firing rates over training", figures.training_rates_figure(run)),
        "cores": (
            "Cores in use by part of the model",
            figures.cores_figure(*cores) if (cores := cores_of(run)) else None,
        ),
    }


def _files(run: Collected) -> dict[str, Any]:
    """Return the figures that are kept as PNG."""
    from spiking_lm.report import figures

    raster = run.raster
    found = {
        "loss": _loss_figure(run),
        "rates": figures.rates_figure(run, rates_of(run)),
        "operations": figures.operations_figure(bars) if (bars := operation_bars(run)) else None,
        "raster": figures.raster_figure(raster, [shown(piece) for piece in raster.text], _chosen_sites(raster))
        if raster is not None and raster.text and raster.spikes
        else None,
        "cores": figures.cores_figure(*cores) if (cores := cores_of(run)) else None,
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def cores_of(run: Collected) -> tuple[list[dict[str, Any]], int] | None:
    """Return the cores that the deployed program uses, and those of a chip; None where nothing is said of them."""
    report = (run.deployment or {}).get("report")
    cores, per_chip = (report.get("cores"), report.get("cores_per_chip")) if isinstance(report, dict) else (None, None)
    if not isinstance(cores, list) or not cores or not isinstance(per_chip, int) or per_chip < 1:
        return None
    kinds: dict[str, Any] = {"chip": int, "core": int, "what": str, "share": (int, float)}
    for use in cores:
        if not isinstance(use, dict) or not all(isinstance(use.get(name), kind) for name, kind in kinds.items()):
            return None
    return cores, per_chip


def _loss_figure(run: Collected) -> Any:
    from spiking_lm.report import figures

    return figures.loss_figure(run, baselines_of(run), baseline_unit(run))


def baselines_of(run: Collected) -> dict[str, float]:
    """Return the baselines of the evaluation: name -> value in :func:`baseline_unit`."""
    given = (run.evaluation or {}).get("baselines")
    if not isinstance(given, dict):
        return {}
    return {str(name): float(bits) for name, bits in given.items() if isinstance(bits, (int, float))}


def baseline_unit(run: Collected) -> str:
    """Return what the baselines count: ``"bits per byte"`` or ``"perplexity"``."""
    return str((run.evaluation or {}).get("baseline_unit") or "bits per byte")


def rates_of(run: Collected) -> dict[str, float]:
    """Return the firing rate of every site: measured by explain, else as last logged in training."""
    try:
        if run.explanation is not None:
            return {str(site["name"]): float(site["rate"]) for site in run.explanation["sites"]}
    except MALFORMED:
        pass  # the view names the file
    logged = [entry["rates"] for entry in run.train if isinstance(entry.get("rates"), dict)]
    last = logged[-1] if logged else {}
    return {str(site): float(rate) for site, rate in last.items() if isinstance(rate, (int, float))}


def operation_bars(run: Collected) -> list[tuple[str, dict[str, float]]]:
    """Return the stacked bars of the operation classes: parameters, operations if dense, operations really made."""
    if run.explanation is None:
        return []
    try:
        classes = run.explanation["classes"]
        other_ops = float(sum(run.explanation["other_ops"].values()))
        rows = (
            ("parameters", "weights", float(run.explanation["other_parameters"])),
            ("operations per token,\nif nothing is skipped", "dense", other_ops),
            ("operations per token,\nzeros skipped", "effective", other_ops),
        )
        return [
            (title, {**{name: float(share[key]) for name, share in classes.items()}, "other": other})
            for title, key, other in rows
        ]
    except MALFORMED:
        return []


def _chosen_sites(raster: Any) -> list[str]:
    """Choose at most so many sites for the picture: every kind of site, in layers evenly over the depth."""
    sites = list(raster.spikes)
    if len(sites) <= _MOST_SITES:
        return sites
    groups = tables.group_layers([{"name": site} for site in sites])
    each = max(1, _MOST_SITES // len(groups))
    chosen = {
        str(group[round(i * (len(group) - 1) / max(1, each - 1))]["name"])
        for group in groups[:_MOST_SITES]
        for i in range(min(each, len(group)))
    }
    return [site for site in sites if site in chosen]


def shown(piece: str) -> str:
    """Make one token visible: a line break as an arrow, control characters as their pictures, a space as itself."""
    names = {"\n": "↵", "\t": "→", "\r": "␍"}
    return "".join(
        names.get(c) or (chr(0x2400 + ord(c)) if ord(c) < 32 else "�" if unicodedata.category(c)[0] == "C" else c)
        for c in piece
    )


# --- What the page says -----------------------------------------------------------------------------------------------


def _view(run: Collected) -> dict[str, Any]:
    """Return everything that the template shows, as text and numbers."""
    manifest, recipe = run.manifest, run.recipe
    view: dict[str, Any] = {
        "title": str(recipe.get("name") or manifest.get("recipe") or run.path.name),
        "description": str(recipe.get("description") or ""),
        "state": _state(run),
        "lead": _lead(run),
        "rates_source": "measured on held-out text" if run.explanation else "last training batch that was logged",
        "sample": "".join(c if c in "\n\t" else shown(c) for c in run.sample) if run.sample else None,
        "temperature": _get(recipe, "generate", "temperature"),
        "commands": _commands(run),
        "facts": _facts(run),
        "manifest_text": json.dumps(manifest, indent=2, ensure_ascii=False) if manifest else None,
        **dict.fromkeys(("score", "explained", "raster", "compared", "converted", "pruned", "deployed")),
    }
    for key, build, name in (
        ("score", _score, "evaluation.json"),
        ("explained", _explained, "explanation.json"),
        ("raster", _raster, "raster.npz"),
        ("compared", sections.compared, "compare.json"),
        ("converted", sections.converted, "conversion.json"),
        ("pruned", sections.pruned, "pruning.json"),
        ("deployed", sections.deployed, "deployment.json"),
    ):
        try:
            view[key] = build(run)
        except MALFORMED as error:  # noqa: PERF203
            run.problems.append(f"{name} is not of the form that this version reads ({type(error).__name__}: {error})")
    view["cards"] = _cards(view)
    return view


def _get(value: Any, *path: str) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _state(run: Collected) -> dict[str, str] | None:
    """Return a banner for a run that is not complete."""
    status, stage = run.manifest.get("status"), run.manifest.get("stage")
    if not run.manifest:
        return {"tone": "bad", "text": "This run has no manifest: what it was made with is not known."}
    if status == "complete" or (status == "running" and stage == "report"):
        return None
    step = max((entry["step"] for entry in [*run.train, *run.valid]), default=0)
    steps = _get(run.recipe, "train", "steps")
    where = f" after step {step:,} of {steps:,}" if isinstance(steps, int) and step < steps else ""
    resume = shlex.join(["spiking-lm", "run", "--resume", str(run.path)])
    if status == "failed":
        return {"tone": "bad", "text": f"This run failed{where}: {run.manifest.get('error') or 'see log.txt'}"}
    word = "was interrupted" if status == "interrupted" else "is not complete"
    return {"tone": "warn", "text": f"This run {word}{where}. It goes on with: {resume}"}


def _lead(run: Collected) -> str:
    """Say in a sentence what was trained, on what, and for how long."""
    kind = _get(run.manifest, "model", "type") or _get(run.recipe, "model", "type") or _get(run.explanation, "model")
    parameters = _get(run.manifest, "model", "parameters")
    data = _get(run.manifest, "data", "dataset") or _get(run.recipe, "data", "type")
    # The manifest times the last process alone; a resumed run has trained for longer than that.
    seconds = max(run.curve("train", "elapsed_s")[1], default=None)
    step = max((entry["step"] for entry in run.train), default=None)
    noun = "classifier of clips" if _get(run.manifest, "data", "task") == "clips" else "language model"
    words = f"A {kind} {noun}" if kind else f"A {noun}"
    if isinstance(parameters, int):
        words += f" with {tables.count(parameters)} parameters"
    if step is not None:
        words += f", trained for {int(step):,} steps" + (f" on {data}" if data else "")
        words += f" in {duration(seconds)}" if seconds is not None else ""
    elif data:
        words += f" for {data}, not trained in this run"
    return words + "."


def duration(seconds: float) -> str:
    """Write a time span: ``45 s``, ``4 min 10 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _cards(view: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the figures that stand at the top, each with the words that it needs."""
    cards = []
    score, explained = view["score"], view["explained"]
    if score:
        name, value = score["headline"]
        note = f"{score['split']} split" + (f"; {score['compare']}" if score["compare"] else "")
        cards.append({"value": value, "name": name, "note": note})
    if explained:
        cards += [
            {
                "value": explained["driven"],
                "name": "of matrix weights driven by spikes",
                "note": explained["driven_note"],
            },
            {"value": explained["rate"], "name": "of spiking channels fire at a token", "note": explained["rate_note"]},
            {
                "value": explained["ratio"],
                "name": "of the dense twin's arithmetic energy",
                "note": explained["ratio_note"],
            },
        ]
    return cards


_COUNTED: dict[str, tuple[str, Any, str]] = {
    "text": (
        "the best n-gram",
        min,
        "shorter is better. The n-grams are interpolated, counted on the same training text and scored on the same "
        "tokens.",
    ),
    "accuracy": (
        "a bag of words",
        max,
        "longer is better. The bag of words was fitted to the same training texts and scored on the same ones.",
    ),
    "mean squared error": ("the same number for all", min, "shorter is better."),
}
"""What a run is compared with, which of several is the best, and what the bars show."""


def _bars(values: dict[str, float], metric: str, unit: str) -> list[dict[str, Any]]:
    """Return one bar per name, sorted; its width in percent of the widest."""

    def text(value: float) -> str:
        if unit == "accuracy":
            return tables.metric_value(metric, value)
        return f"{value:.{1 if unit == 'perplexity' else 3}f}"

    widest = max(values.values()) or 1.0
    return [
        {"name": name, "value": text(value), "width": round(100 * value / widest, 2), "own": name == "this model"}
        for name, value in sorted(values.items(), key=lambda item: item[1])
    ]


def _score(run: Collected) -> dict[str, Any] | None:
    if run.evaluation is None:
        return None
    metrics = {
        name: float(value) for name, value in run.evaluation["metrics"].items() if isinstance(value, (int, float))
    }
    first = tables.headline_metric(metrics)
    if first is None:
        return None
    baselines, unit = baselines_of(run), baseline_unit(run)
    bars: list[dict[str, Any]] = []
    compare = caption = ""
    if first == unit.replace(" ", "_") and baselines:
        bars = _bars({"this model": metrics[first], **baselines}, first, unit)
        counted, better, caption = _COUNTED.get(unit, _COUNTED["text"])
        best, value = better(baselines.items(), key=lambda item: item[1])
        gap, side = metrics[first] - value, "below" if metrics[first] < value else "above"
        if unit == "accuracy":
            compare = f"{100 * abs(gap):.1f} points {side} {counted} ({best}, {value:.1%})"
        else:
            digits = 0 if unit == "perplexity" else 2
            compare = f"{abs(gap):.{digits}f} {side} {counted} ({best}, {value:.{digits}f})"
    shown = [(tables.metric_name(name), tables.metric_value(name, value)) for name, value in metrics.items()]
    if shuffled := run.evaluation.get("shuffled"):
        shown.append(
            (
                "with its words shuffled",
                f"perplexity {shuffled['perplexity']:.3f}, {shuffled['ratio']:.1f} times as high",
            )
        )
    return {
        "headline": (tables.metric_name(first), tables.metric_value(first, metrics[first])),
        "split": {"valid": "validation"}.get(run.evaluation["split"], str(run.evaluation["split"])),
        "protocol": str(run.evaluation["protocol"]),
        "compare": compare,
        "unit": unit,
        "bars": bars,
        "caption": caption,
        "metrics": shown,
    }


def _explained(run: Collected) -> dict[str, Any] | None:
    explanation = run.explanation
    if explanation is None:
        return None
    classes, sites, built = explanation["classes"], explanation["sites"], explanation["energy"][1]
    driven = classes["AC"]["weight_share"] + classes["integer-AC"]["weight_share"]
    channels = sum(site["channels"] for site in sites)
    whole = tables.percent(1 / built["ratio_with_other"]) if built["ratio_with_other"] else "–"
    others = ", ".join(f"{kind.replace('_', ' ')} {tables.count(n)}" for kind, n in explanation["other_ops"].items())
    bench = explanation["neurobench"]
    per_token = bench["synaptic_operations_per_token"]
    neurobench = [
        ("synaptic operations, dense", f"{tables.count(per_token['Dense'])} per token"),
        ("effective ACs", f"{tables.count(per_token['Effective_ACs'])} per token"),
        ("effective MACs", f"{tables.count(per_token['Effective_MACs'])} per token"),
        ("activation sparsity", tables.percent(bench["activation_sparsity"])),
        ("connection sparsity", tables.percent(bench["connection_sparsity"])),
        ("membrane updates", _per_token(bench["membrane_updates_per_token"])),
        ("parameters", f"{bench['parameter_count']:,}"),
        ("footprint", tables.bytes_of(bench["footprint_bytes"])),
    ]
    return {
        "answer": explanation["answer"],
        "sample": explanation["sample"],
        "driven": tables.percent(driven),
        "driven_note": "every input of these matrices is a spike" if driven else "no matrix reads spikes of one size",
        "rate": tables.percent(sum(site["rate"] * site["channels"] for site in sites) / channels) if channels else "–",
        "rate_note": f"{tables.count(explanation['spikes_per_token'])} spikes per token"
        if channels
        else "nothing spikes",
        "ratio": tables.percent(1 / built["ratio"]) if built["ratio"] else "–",
        "ratio_note": f"in its matrix products ({whole} with all operations); {explanation['energy_words']}",
        "bars": _html_bars(operation_bars(run)),
        "matrices": [_matrix_row(group) for group in _matrix_groups(explanation)],
        "sites": [_site_row(group) for group in _site_groups(sites)],
        "others": others,
        "neurobench": neurobench,
        "energy": [
            {
                "label": row["label"],
                "synaptic": tables.energy_of(row["synaptic_pj"]),
                "ratio": tables.ratio_of(row["ratio"]),
                "total": tables.energy_of(row["synaptic_pj"] + row["other_pj"]),
                "ratio_total": tables.ratio_of(row["ratio_with_other"]),
            }
            for row in explanation["energy"]
        ],
        "energy_words": explanation["energy_words"],
        "constants": tables.constants(explanation),
        "notes": explanation["notes"],
        "class_names": tables.CLASS_NAMES,
    }


def _per_token(value: float | None) -> str:
    return "not measured" if value is None else f"{tables.count(value)} per token"


def _html_bars(bars: Sequence[tuple[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    return [
        {
            "title": title.replace("\n", " "),
            "parts": [
                {
                    "name": name,
                    "width": round(100 * amount / (sum(parts.values()) or 1), 3),
                    "amount": tables.count(amount),
                }
                for name, amount in parts.items()
                if amount
            ],
        }
        for title, parts in bars
    ]


def _matrix_groups(explanation: Mapping[str, Any]) -> list[list[tables.Row]]:
    return tables.group_layers(tables.matrices_of(explanation), "fed_with", "op_class", "runs_on")


def _matrix_row(group: Sequence[tables.Row]) -> dict[str, str]:
    first = group[0]
    return {
        "name": tables.name_of_group(group),
        "fed_with": first["fed_with"],
        "zeros": tables.span([op["input_zeros"] for op in group]),
        "weights": tables.count(sum(op["weights"] for op in group)),
        "dense": tables.count(sum(op["dense"] for op in group)),
        "effective": tables.count(sum(op["effective_acs"] + op["effective_macs"] for op in group)),
        "op_class": first["op_class"],
        "runs_on": first["runs_on"],
    }


def _site_groups(sites: Sequence[tables.Row]) -> list[list[tables.Row]]:
    return (
        [[site] for site in sites] if len(sites) <= _MOST_SITES else tables.group_layers(sites, "kind", "feeds_kinds")
    )


def _site_row(group: Sequence[tables.Row]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return sum(float(site[name]) for site in group) / len(group)

    silent, saturated = mean("silent"), mean("saturated")
    return {
        "name": tables.name_of_group(group),
        "kind": group[0]["kind"],
        "feeds": tables.feeds_of(group[0]),
        "channels": f"{sum(site['channels'] for site in group):,}",
        "rate": tables.span([site["rate"] for site in group]),
        "rate_width": round(100 * mean("rate"), 2),
        "silent": tables.span([site["silent"] for site in group]),
        "saturated": tables.span([site["saturated"] for site in group]),
        "silent_width": round(100 * silent, 2),
        "active_width": round(100 * (1 - silent - saturated), 2),
        "saturated_width": round(100 * saturated, 2),
    }


def _raster(run: Collected) -> dict[str, Any] | None:
    """Lay the raster out: one picture per site, and below it the text, aligned to the tokens."""
    from spiking_lm.report import figures

    raster = run.raster
    if raster is None or not raster.text or not raster.spikes:
        return None
    sites = _chosen_sites(raster)
    height = max(20, min(88, _RASTER_HEIGHT // len(sites)))
    rows = []
    for site in sites:
        spikes = raster.spikes[site]
        keep = min(spikes.shape[1], height // 2)  # two pixels per channel
        image = spikes[:, [round(i * (spikes.shape[1] - 1) / max(1, keep - 1)) for i in range(keep)]]
        picture = base64.b64encode(figures.png_of(figures.spike_image(image, _RASTER_COLOUR))).decode()
        drawn = (
            f"{raster.channels[site]:,} channels"
            if keep == raster.channels[site]
            else f"{keep} of {raster.channels[site]:,}"
        )
        rows.append({"site": site, "picture": picture, "height": 2 * keep if keep > 10 else 20, "drawn": drawn})
    text = [shown(piece) for piece in raster.text]
    single = all(len(piece) <= 1 for piece in text)
    return {
        "rows": rows,
        "text": text,
        "single": single,
        "cell": 8 if single else 13,
        "tokens": len(text),
        "left_out": len(raster.spikes) - len(sites),
    }


def _commands(run: Collected) -> list[tuple[str, str]]:
    """Return (what it does, command line) to make this run again."""
    manifest = run.manifest
    versions = manifest.get("versions") if isinstance(manifest.get("versions"), dict) else {}
    lines: list[tuple[str, str]] = []
    command = manifest.get("command")
    if isinstance(command, list) and command:
        lines.append(("what was run", shlex.join(str(word) for word in command)))
    if run.recipe_text:
        lines.append(
            ("the same from the resolved recipe", shlex.join(["spiking-lm", "run", str(run.path / "recipe.yaml")]))
        )
    if versions:
        named = {name: versions[name] for name in ("spiking-lm", "torch", "snntorch", "norse") if name in versions}
        pins = [f"{name}=={str(version).partition('+')[0]}" for name, version in named.items()]
        lines.append(
            (f"with these versions (Python {versions.get('python', '?')})", shlex.join(["pip", "install", *pins]))
        )
    return lines


def _facts(run: Collected) -> list[tuple[str, str]]:
    """Return the manifest's main entries, in words."""
    manifest = run.manifest
    hardware, data = manifest.get("hardware") or {}, manifest.get("data") or {}
    facts: list[tuple[str, Any]] = [
        ("run", run.path.name),
        ("status", manifest.get("status")),
        ("started", manifest.get("started")),
        ("ended", manifest.get("ended")),
        ("seed", manifest.get("seed")),
    ]
    stages = manifest.get("stages")
    if isinstance(stages, dict) and stages:
        times = {name: _get(stage, "seconds") for name, stage in stages.items()}
        facts.append(
            ("stages", ", ".join(f"{n} {duration(s)}" for n, s in times.items() if isinstance(s, (int, float))))
        )
    if isinstance(data, dict) and data:
        name, tokenizer = data.get("dataset"), _get(data, "tokenizer", "type") or data.get("tokenizer")
        read = f"{name}, tokens: {tokenizer}" if tokenizer else name
        facts += [("data", read), ("data SHA-256", data.get("sha256"))]
    if isinstance(hardware, dict) and hardware:
        memory = hardware.get("memory_bytes")
        accelerators = ", ".join(map(str, hardware.get("accelerators") or [])) or "no accelerator"
        size = f", {tables.bytes_of(memory)} memory" if isinstance(memory, int) else ""
        facts.append(("machine", f"{hardware.get('cpu')}, {hardware.get('usable_cores')} cores{size}, {accelerators}"))
        facts.append(("system", hardware.get("system")))
    versions, git = manifest.get("versions"), manifest.get("git")
    if isinstance(versions, dict):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    for place, revision in (git if isinstance(git, dict) else {}).items():
        state = " with local changes" if _get(revision, "dirty") else ""
        facts.append((f"revision of {place.replace('_', ' ')}", f"{_get(revision, 'revision')}{state}"))
    plugins = manifest.get("plugins")
    if isinstance(plugins, list):
        facts.append(
            ("plugins", ", ".join(f"{_get(p, 'name')} {_get(p, 'version')} ({_get(p, 'status')})" for p in plugins))
        )
    return [(name, str(value)) for name, value in facts if value not in (None, "")]
