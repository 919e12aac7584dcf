"""The pictures of a report: drawn once with matplotlib, kept as PNG for people and as inline SVG for the page.

The SVG takes its colours from the page's variables, so that it follows the reader's light or dark setting, and its
text stays text. Colours are Okabe and Ito's, told apart by people with any colour vision; shapes differ as well.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from spiking_lm.graph import layer_pattern
from spiking_lm.raster import Raster
from spiking_lm.report.collect import Collected
from spiking_lm.report.tables import CLASS_NAMES, count

INK, MUTED, LINE = "#1c2024", "#687076", "#d7dbdf"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#b3589a", "#e69f00", "#56b4e9"
GREY = "#b9bfc4"

VARIABLES = {
    INK: "ink", MUTED: "muted", LINE: "line", BLUE: "blue", VERMILLION: "vermillion", GREEN: "green",
    PURPLE: "purple", ORANGE: "orange", SKY: "sky", GREY: "grey",
}  # fmt: skip
"""The page's style sheet names these colours, in a light and a dark form."""

SERIES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"), (MUTED, "X"))
CLASS_COLOURS = {"AC": GREEN, "integer-AC": SKY, "MAC": ORANGE, "other": GREY}

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the report's style, whatever the user's matplotlib settings are."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", **_margins(figure))
    return buffer.getvalue()


def _margins(figure: Figure) -> dict[str, Any]:
    # A figure that lays itself out fits already; measuring it again would double the time.
    return {} if figure.get_layout_engine() is not None else {"bbox_inches": "tight", "pad_inches": 0.15}


def to_svg(figure: Figure, title: str) -> str:
    """Return the figure as an inline SVG element without background, its colours being the page's variables."""
    matplotlib.rcParams["svg.hashsalt"] = title  # ids differ between the figures of a page, and not between runs
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None}, **_margins(figure))
    svg = buffer.getvalue()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, name in VARIABLES.items():
        svg = re.sub(colour, f"var(--{name})", svg, flags=re.IGNORECASE)
    svg = svg.replace("'DejaVu Sans'", "var(--sans)").replace("DejaVu Sans", "var(--sans)")
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg, count=1
    )


# --- Learning ---------------------------------------------------------------------------------------------------------


def loss_figure(run: Collected, baselines: Mapping[str, float], baseline_unit: str) -> Figure | None:
    """Draw training and validation loss over the steps, with baselines, and the learning rate below; None without."""
    numbers = (run.evaluation or {}).get("task") == "regression"
    loss = "loss (squared error)" if numbers else "loss (nats)"
    units = {"bpb": "bits per byte", "perplexity": "perplexity", "loss": loss}
    name = next((name for name in units if run.curve("train", name)[0]), "loss")
    unit = units[name]
    train, valid = run.curve("train", name), run.curve("valid", name)
    if not train[0] and not valid[0]:
        return None
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    rates = run.curve("train", "lr")
    if rates[0]:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
        below.plot(*rates, color=MUTED, linewidth=1.3)
        below.set(ylabel="learning\nrate", xlabel="optimizer step", ylim=(0, None))
        below.yaxis.set_major_locator(MaxNLocator(2))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes = figure.subplots()
        axes.set_xlabel("optimizer step")
    marker = "o" if len(train[0]) < 3 else ""
    axes.plot(*train, color=BLUE, alpha=0.85, linewidth=1.2, marker=marker, label="training (one batch)")
    if valid[0]:
        axes.plot(*valid, color=VERMILLION, marker="o", markersize=4.5, label="validation")
    values = [*train[1], *valid[1]]
    if unit == baseline_unit and baselines:
        best, value = min(baselines.items(), key=lambda item: item[1])
        axes.axhline(value, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label=f"{best}: {value:.2f}")
        values.append(value)
    axes.set(ylabel=unit)
    _logarithmic(axes, min(values), max(values))
    axes.legend(loc="upper right")
    return figure


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis with round ticks: the first steps and the last hundredths are both to be seen."""
    if low <= 0:
        return
    axes.set_yscale("log")
    axes.set_ylim(low * 0.96, high * 1.04)
    steps = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8] if high / low < 8 else [1, 2, 5]
    ticks = [m * 10.0**e for e in range(-6, 6) for m in steps]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


# --- Firing -----------------------------------------------------------------------------------------------------------


def final_rates_figure(rates: Mapping[str, float]) -> Figure:
    """Draw the firing rate of every site, by layer."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    draw_final_rates(figure.subplots(), rates)
    return figure


def training_rates_figure(run: Collected) -> Figure | None:
    """Draw how firing rates moved while training; None when nothing was logged."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    return figure if draw_training_rates(figure.subplots(), run) else None


def rates_figure(run: Collected, rates: Mapping[str, float]) -> Figure | None:
    """Draw both, side by side, for the PNG."""
    panels = [panel for panel, there in (("final", bool(rates)), ("training", bool(_logged_rates(run)))) if there]
    if not panels:
        return None
    figure = Figure(figsize=(6.2 * len(panels), 3.8), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        if panel == "final":
            draw_final_rates(axes, rates)
            axes.set_title("Firing rate by layer")
        else:
            draw_training_rates(axes, run)
            axes.set_title("Firing rate over training")
    return figure


def draw_final_rates(axes: Axes, rates: Mapping[str, float]) -> None:
    """Draw one series per kind of site along the layers; a site outside the layers has a place of its own."""
    places = {site: _place(site) for site in rates}
    named = dict.fromkeys(place for place in places.values() if not place.isdigit())
    layers = sorted({place for place in places.values() if place.isdigit()}, key=int)
    order = [*named, *layers]
    for (pattern, sites), (colour, marker) in zip(_by_pattern(rates).items(), _cycle_series(), strict=False):
        x = [order.index(places[site]) for site in sites]
        axes.plot(
            x, [rates[site] for site in sites], color=colour, marker=marker, label=_series_name(pattern), linewidth=1.2
        )
    shown = range(0, len(order), max(1, len(order) // 24))
    axes.set_xticks(list(shown), [order[i] for i in shown])
    axes.set(xlabel="layer", xlim=(-0.5, len(order) - 0.5))
    _rate_axis(axes)


def draw_training_rates(axes: Axes, run: Collected) -> bool:
    """Draw the mean of each kind of site over the steps, in a band from its lowest to its highest layer."""
    logged = _logged_rates(run)
    if not logged:
        return False
    sites = dict.fromkeys(site for _, rates in logged for site in rates)
    for (pattern, members), (colour, marker) in zip(_by_pattern(sites).items(), _cycle_series(), strict=False):
        points = [(step, [rates[s] for s in members if s in rates]) for step, rates in logged]
        points = [(step, values) for step, values in points if values]
        steps = [step for step, _ in points]
        low, high = [min(values) for _, values in points], [max(values) for _, values in points]
        mean = [sum(values) / len(values) for _, values in points]
        every = max(1, len(steps) // 6)
        axes.plot(
            steps, mean, color=colour, label=_series_name(pattern), marker=marker, markevery=every, markersize=4.5
        )
        if len(members) > 1:
            axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.set_xlabel("optimizer step")
    _rate_axis(axes)
    return True


def _rate_axis(axes: Axes) -> None:
    axes.set(ylabel="share of channels firing", ylim=(0, min(1.02, 1.08 * axes.get_ylim()[1])))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _, labels = axes.get_legend_handles_labels()
    axes.legend(loc="best", ncols=2 if len(labels) > 4 else 1, fontsize=9)


def _logged_rates(run: Collected) -> list[tuple[float, dict[str, float]]]:
    found = []
    for entry in run.train:
        rates = entry.get("rates")
        if isinstance(rates, dict):
            numbers = {site: float(rate) for site, rate in rates.items() if isinstance(rate, (int, float))}
            found += [(float(entry["step"]), numbers)] if numbers else []
    return found


def _place(site: str) -> str:
    number = re.search(r"(?<![^.])\d+(?![^.])", site)
    return number.group() if number else site


def _by_pattern(sites: Mapping[str, Any]) -> dict[str, list[str]]:
    patterns: dict[str, list[str]] = {}
    for site in sites:
        patterns.setdefault(layer_pattern(site), []).append(site)
    return patterns


def _series_name(pattern: str) -> str:
    return pattern.rpartition("*.")[2] or pattern


def _cycle_series() -> Iterator[tuple[str, str]]:
    while True:
        yield from SERIES


# --- Operations -------------------------------------------------------------------------------------------------------


def operations_figure(bars: Sequence[tuple[str, Mapping[str, float]]]) -> Figure:
    """Draw stacked bars, each scaled to its whole: ``(title, {class: amount})`` for AC, integer-AC, MAC and other."""
    figure = Figure(figsize=(9, 0.85 * len(bars) + 1.1), layout="constrained")
    axes = figure.subplots()
    for row, (_, parts) in enumerate(bars):
        whole, left = sum(parts.values()) or 1.0, 0.0
        for name, amount in parts.items():
            share = amount / whole
            axes.barh(row, share, left=left, height=0.62, color=CLASS_COLOURS[name], edgecolor="white", linewidth=0.8)
            if share > 0.07:
                colour = "white" if name == "AC" else INK
                axes.text(
                    left + share / 2,
                    row,
                    f"{share:.0%}\n{count(amount)}",
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=9,
                )
            left += share
    used = [name for name in CLASS_COLOURS if any(parts.get(name) for _, parts in bars)]
    handles = [Patch(color=CLASS_COLOURS[name], label=CLASS_NAMES[name]) for name in used]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(2, len(used)), borderaxespad=0.2)
    axes.set_yticks(range(len(bars)), [title for title, _ in bars])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set(xlim=(0, 1), xlabel="share")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.invert_yaxis()
    return figure


# --- Placement --------------------------------------------------------------------------------------------------------


_COLUMNS, _CHIPS, _NAMED = 16, 8, 14
"""Cores in a row of a chip, chips that are drawn, and parts that the legend names."""


def cores_figure(cores: Sequence[Mapping[str, Any]], per_chip: int) -> Figure:
    """Draw chips as squares of cores, each filled as far as it is used; ``cores`` are the fields of ``CoreUse``.

    Parts of identical layers have one colour. Of many chips the first ones are drawn, and the title says so.
    """
    chips = 1 + max(use["chip"] for use in cores)
    drawn, rows = min(chips, _CHIPS), -(-per_chip // _COLUMNS)
    across = min(drawn, 2)
    figure = Figure(figsize=(5.2 * across + 3, 2.6 * -(-drawn // across) + 0.4), layout="constrained")
    grid = np.atleast_1d(figure.subplots(-(-drawn // across), across)).ravel()
    patterns = dict.fromkeys(layer_pattern(use["what"]) for use in cores)
    colours = {pattern: SERIES[i % len(SERIES)][0] for i, pattern in enumerate(patterns)}
    for chip, axes in enumerate(grid):
        axes.set_axis_off()
        if chip >= drawn:
            continue
        filled: dict[int, float] = {}
        for core in range(per_chip):
            x, y = core % _COLUMNS, core // _COLUMNS
            axes.add_patch(Rectangle((x, y), 0.9, 0.9, facecolor="none", edgecolor=LINE, linewidth=0.6))
        for use in (use for use in cores if use["chip"] == chip):
            core, below = use["core"], filled.get(use["core"], 0.0)
            height = 0.9 * min(use["share"], 1 - below)
            corner = (core % _COLUMNS, core // _COLUMNS + 0.9 - 0.9 * below - height)
            axes.add_patch(Rectangle(corner, 0.9, height, color=colours[layer_pattern(use["what"])], linewidth=0))
            filled[core] = below + use["share"]
        axes.set(xlim=(-0.1, _COLUMNS), ylim=(rows, -0.1), aspect="equal")
        more = f" of {chips:,}" if chips > drawn and chip == drawn - 1 else ""
        axes.set_title(f"chip {chip + 1}{more}: {len(filled)} of {per_chip} cores")
    named = list(patterns)[:_NAMED]
    handles = [Patch(color=colours[pattern], label=pattern) for pattern in named]
    if len(patterns) > _NAMED:
        handles.append(Patch(color="none", label=f"and {len(patterns) - _NAMED} more"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


# --- Raster -----------------------------------------------------------------------------------------------------------


_LINES, _GAP = 40, 5
"""Channels drawn per site (more would be thinner than a pixel), and the empty lines between two sites."""


def raster_figure(raster: Raster, text: Sequence[str], sites: Sequence[str], tokens: int = 120) -> Figure:
    """Draw the spikes of some sites over the first tokens, with the text below."""
    tokens = min(tokens, len(text))
    picture = np.zeros(((_LINES + _GAP) * len(sites) - _GAP, tokens, 4), dtype=np.uint8)
    figure = Figure(figsize=(13, 0.0175 * len(picture) + 0.8))
    axes = figure.subplots()
    for row, site in enumerate(sites):
        spikes = raster.spikes[site][:tokens]
        n = spikes.shape[1]
        chosen = np.linspace(0, n - 1, min(n, _LINES)).round().astype(int)
        lines = np.repeat(spike_image(spikes[:, chosen], BLUE), _LINES // len(chosen), axis=0)
        top = row * (_LINES + _GAP)
        lines[lines[..., 3] == 0] = [0xF0, 0xF2, 0xF3, 0xFF]
        picture[top : top + len(lines)] = lines
        label = f"{site}\n{len(chosen)} of {raster.channels[site]} channels"
        axes.text(-1.5, top + len(lines) / 2, label, ha="right", va="center", fontsize=9)
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(-0.5, tokens - 0.5, len(picture), 0))
    upright = all(len(piece) <= 1 for piece in text[:tokens])
    for x, piece in enumerate(text[:tokens]):
        turn = 0 if upright else 90
        axes.text(
            x, len(picture) + 2, piece, ha="center", va="top", family="DejaVu Sans Mono", fontsize=7.5, rotation=turn
        )
    axes.set_axis_off()
    return figure


def spike_image(spikes: np.ndarray[Any, Any], colour: str) -> np.ndarray[Any, Any]:
    """Return ``spikes (T, C)`` as an RGBA picture ``(C, T, 4)``: opaque where a channel fired, stronger for more."""
    spikes = np.abs(spikes.astype(np.int32))  # of either sign
    largest = max(1, int(spikes.max(initial=0)))
    strength = np.where(spikes > 0, 0.35 + 0.65 * spikes / largest, 0.0).T
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    image = np.empty((*strength.shape, 4), dtype=np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = red, green, blue
    image[..., 3] = np.round(255 * strength)
    return image


def png_of(image: np.ndarray[Any, Any]) -> bytes:
    """Return an RGBA picture as a PNG, one pixel per element."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return buffer.getvalue()
