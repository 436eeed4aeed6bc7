"""Charts of a sweep: heat maps of layer × position or head, and curves over strengths and layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plot_style import INK, PAPER, SOFT, frame, save_figure
from analysis.replay.sweeps.effects import estimate_effects
from analysis.replay.sweeps.metric_names import NAMES
from analysis.replay.sweeps.table import tested_baselines
from analysis.sweep_results import check_metric, names_along

CURVES = ("#0a6ebd", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#cf222e", "#bf3989", "#1b7c83")
STYLES: dict[str, tuple[int, tuple[float, ...]]] = {
    "edit": (0, ()),
    "identity": (0, (1, 2)),
    "random_direction": (0, (6, 3)),
    "norm_matched": (0, (3, 2, 1, 2)),
}
PLACES = 6
"""Number of places that have a curve over strengths."""
NUMBERED = 40
"""Number of cells up to which a heat map shows numbers."""
LEVEL = 0.05
WIDTH, HEIGHT = 4.6, 3.4
"""Inches of a panel."""


Scale = tuple[str, float, float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes of a chart.

    Attributes
    ----------
    draw : function of Axes
        Draws the panel, without its title.
    """

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Chart:
    """Panels with one scale and one legend, side by side in a figure or one by one on a page.

    Attributes
    ----------
    legend : tuple of (label, colour, dashes)
        Lines of the curves; empty for heat maps.
    columns : int
        Panels in a row of a figure.
    scale : (colour map, least, most), or None
        Colours of heat maps.
    """

    title: str
    caption: str
    label: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, str, tuple[float, ...]], ...] = ()
    columns: int = 3
    scale: Scale | None = None


def make_charts(effect: xr.Dataset, metric: str | None = None) -> list[Chart]:
    """Return the charts of one metric: those of the dims that a sweep has.

    With edits of single heads: heat maps of layer × head. With several positions: heat maps of layer × position. With
    several strengths: curves over strengths. With one position: curves over layers, at the largest strength of each
    edit.

    Parameters
    ----------
    effect
        What `Sweep.effect` returned.
    metric
        The first metric by default.

    Raises
    ------
    AnalysisError
        The metric was not measured.
    """
    metric = check_metric(effect, metric)
    tested = tested_baselines(effect, metric)
    effect = effect.sel(metric=metric)
    sizes = effect.sizes
    if "head" in effect.coords:
        return [_heat_maps(_by_head(effect), "head", metric, tested)]
    by_edit = {edit: effect.sel(edit=edit) for edit in names_along(effect, "edit")}
    found = [_heat_maps(by_edit, "position", metric, tested)] if sizes["position"] > 1 else []
    if sizes["alpha"] > 1 and any(_made(effect.sel(edit=edit)).sum() > 1 for edit in effect["edit"].values):
        found.append(_curves_over_strengths(effect, metric))
    if sizes["position"] == 1 and (sizes["layer"] > 1 or not found):
        found.append(_curves_over_layers(effect, metric))
    return found


def draw_figure(chart: Chart) -> Figure:
    """Return all panels of a chart in one figure, with the legend on their right; pyplot is not used."""
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    size = (WIDTH * columns + 2.2, HEIGHT * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=not chart.scale)
    for axes, panel in zip(grid.flat, chart.panels):
        _draw_panel(axes, panel)
    for axes in grid.flat[len(chart.panels) :]:
        axes.remove()
    for axes in grid[:, 0] if not chart.scale else ():
        axes.set_ylabel(chart.label, color=INK)
    figure.suptitle(chart.title, x=0.01, ha="left", color=INK, fontsize=11)
    if chart.scale:
        _draw_scale(figure, list(grid.flat[: len(chart.panels)]), chart)
    if chart.legend:
        lines = [Line2D([], [], color=c, linestyle=(0, dash), linewidth=1.8) for _, c, dash in chart.legend]
        names = [label for label, _, _ in chart.legend]
        legend = figure.legend(lines, names, loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def draw_panels(chart: Chart) -> list[Figure]:
    """Return each panel of a chart as a figure of its own, without the legend."""
    found = []
    for panel in chart.panels:
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor=PAPER)
        axes = figure.subplots()
        _draw_panel(axes, panel)
        if chart.scale:
            _draw_scale(figure, [axes], chart)
        else:
            axes.set_ylabel(chart.label, color=INK)
        found.append(figure)
    return found


def plot(results: xr.Dataset, path: str | Path | None = None, metric: str | None = None) -> Figure:
    """Draw the first chart of `make_charts` for a metric, and write it to *path*: PNG, SVG or PDF."""
    check_metric(results, metric)
    return save_figure(draw_figure(make_charts(estimate_effects(results), metric)[0]), path)


def _heat_maps(effects: dict[str, xr.Dataset], across: str, metric: str, tested: list[str]) -> Chart:
    """Return the change by layer and position or head: a row for each edit, the edit and its controls side by side."""
    arms = [arm for arm in names_along(next(iter(effects.values())), "arm") if arm != "identity"]
    ends = np.array(
        [[f(one["change"].sel(arm=arms), initial=0.0) for f in (np.nanmin, np.nanmax)] for one in effects.values()]
    )
    most, signed = float(np.abs(ends).max()), bool(ends.min() < 0)
    scale = ("RdBu_r", -most, most) if signed else ("Blues", 0.0, most or 1.0)
    panels = []
    for edit, at in effects.items():
        strongest = at.isel(alpha=int(np.flatnonzero(_made(at))[-1]) if _made(at).any() else 0)
        strength = f", strength {float(strongest['alpha']):g}" if _made(at).sum() > 1 else ""
        for arm in arms:
            cells = strongest.sel(arm=arm)
            if arm == "edit" or np.isfinite(cells["change"]).any():
                title = f"{edit}{strength}" if arm == "edit" else f"{arm.replace('_', ' ')} for {edit}{strength}"
                dots = _undecided(cells, tested, arm).transpose("layer", across).values
                panels.append(Panel(title, _map_drawer(cells, across, scale, dots)))
    marked = (
        f"a cell that does not differ from {tested[0].replace('_', ' ')} (adjusted p of at least {LEVEL:g})"
        if tested
        else "a cell whose change is within the noise floor"
    )
    caption = f"Mean change of {metric} over documents, less the value without an edit. A dot marks {marked}."
    return Chart(
        f"{_name(metric)}, by layer and {across}", caption, f"change of {metric}", tuple(panels), (), len(arms), scale
    )


def _by_head(effect: xr.Dataset) -> dict[str, xr.Dataset]:
    """Return the effects by head of each edit and position, with a title; the heads of an edit follow each other."""
    heads, names = effect["head"].values, names_along(effect, "edit")
    count, found = len(set(heads.tolist())), {}
    for first in range(0, len(names), count):
        one = effect.isel(edit=slice(first, first + count)).swap_dims(edit="head")
        title = names[first].rpartition(" head ")[0]
        for number, position in enumerate(names_along(effect, "position")):
            label = title if effect.sizes["position"] == 1 else f"{title}, position {position}"
            found[label if label not in found else f"{label} {first // count + 1}"] = one.isel(position=number)
    return found


def _undecided(cells: xr.Dataset, tested: list[str], arm: str) -> xr.DataArray:
    if arm == "edit" and tested:
        return cells[f"p_adjusted_{tested[0]}"] >= LEVEL
    inside: xr.DataArray = abs(cells["change"]) <= cells["noise_floor"]
    return inside & (arm == "edit")


def _map_drawer(cells: xr.Dataset, across: str, scale: Scale, dots: np.ndarray) -> Callable[[Axes], None]:
    values = cells["change"].transpose("layer", across).values
    layers, columns = names_along(cells, "layer"), names_along(cells, across)
    colours, least, most = scale

    def draw(axes: Axes) -> None:
        axes.imshow(values, cmap=colours, vmin=least, vmax=most, aspect="auto", origin="lower")
        for (layer, position), value in np.ndenumerate(values):
            text = f"{value:.2g}" if values.size <= NUMBERED and np.isfinite(value) else ""
            text = f"{text} •".strip() if dots[layer, position] else text
            dark = np.isfinite(value) and abs(value) > 0.6 * most
            axes.text(position, layer, text, ha="center", va="center", color=PAPER if dark else INK, fontsize=8)
        for axis, names, label in ((axes.yaxis, layers, "layer"), (axes.xaxis, columns, across)):
            step = -(-len(names) // 12)
            axis.set_ticks(range(0, len(names), step), names[::step])
            axis.set_label_text(label, color=INK)
        axes.tick_params(length=0, labelcolor=SOFT)
        axes.spines[:].set_visible(False)

    return draw


def _curves_over_strengths(effect: xr.Dataset, metric: str) -> Chart:
    """Return the metric over strengths at up to `PLACES` layers and positions, with all baselines."""
    layers, positions = effect["layer"].values, names_along(effect, "position")
    places = [(layer, position) for layer in layers for position in positions]
    chosen = [
        places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(PLACES, len(places))).round().astype(int))
    ]
    colours = edit_colours(names_along(effect, "edit"))
    panels = []
    for layer, position in chosen:
        title = "edit of a module" if layer < 0 else f"layer {layer}"
        title += f", position {position}" if len(positions) > 1 else ""
        at = effect.sel(layer=layer, position=position)
        panels.append(Panel(title, _curve_drawer(at, "alpha", "strength", colours)))
    some = f"{len(chosen)} of {len(places)} places. " if len(chosen) < len(places) else ""
    caption = f"{some}An edit without strengths is a horizontal line. {_bands()}"
    return Chart(f"{_name(metric)}, by strength", caption, _name(metric), tuple(panels), _legend(effect, colours))


def _curves_over_layers(effect: xr.Dataset, metric: str) -> Chart:
    """Return the metric over layers for each edit at its largest strength, with all baselines."""
    colours = edit_colours(names_along(effect, "edit"))
    panel = Panel("", _curve_drawer(effect.isel(position=0), "layer", "layer", colours))
    several = effect.sizes["alpha"] > 1
    caption = f"{'Each edit at its largest strength. ' if several else ''}{_bands()}"
    return Chart(f"{_name(metric)}, by layer", caption, _name(metric), (panel,), _legend(effect, colours))


def _curve_drawer(effect: xr.Dataset, dim: str, label: str, colours: dict[str, str]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for number, (edit, colour) in enumerate(colours.items()):
            for arm in names_along(effect, "arm"):
                if arm == "identity" and number:  # the same for every edit
                    continue
                at = effect.sel(edit=edit, arm=arm)
                made = np.flatnonzero(_made(effect.sel(edit=edit)))
                if dim == "layer" and len(made):
                    at = at.isel(alpha=int(made[-1]))
                known = np.isfinite(at["mean"].values)
                x, mean = at[dim].values[known], at["mean"].values[known]
                style: Any = {"color": SOFT if arm == "identity" else colour, "linestyle": STYLES[arm]}
                if dim == "alpha" and len(made) == 1 and len(mean):
                    axes.axhline(mean[0], linewidth=1.4, **style)
                elif len(mean):
                    axes.plot(x, mean, linewidth=1.8, marker="o", markersize=3, **style)
                    if arm == "edit":
                        low, high = (at[name].values[known] for name in ("ci_low", "ci_high"))
                        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(label, color=INK)
        if dim == "layer":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        frame(axes)

    return draw


def edit_colours(edits: tuple[str, ...]) -> dict[str, str]:
    """Return a colour for each edit, each once.

    >>> edit_colours(("Zero", "Steer"))
    {'Zero': '#0a6ebd', 'Steer': '#bc4c00'}
    """
    more = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(edits)))
    chosen = CURVES if len(edits) <= len(CURVES) else map(to_hex, more)
    return dict(zip(edits, chosen))


def _legend(effect: xr.Dataset, colours: dict[str, str]) -> tuple[tuple[str, str, tuple[float, ...]], ...]:
    """Return a line for each edit in its colour, and one for each baseline in its dashes."""
    arms = names_along(effect, "arm")[1:]
    baselines = [arm for arm in arms if np.isfinite(effect["mean"].sel(arm=arm)).any()]
    return (
        *((edit, colour, ()) for edit, colour in colours.items()),
        *((arm.replace("_", " "), SOFT, STYLES[arm][1]) for arm in baselines),
    )


def _draw_panel(axes: Axes, panel: Panel) -> None:
    panel.draw(axes)
    axes.set_title(panel.title, loc="left", color=INK, fontsize=10, parse_math=False, wrap=True)


def _draw_scale(figure: Figure, axes: list[Axes], chart: Chart) -> None:
    assert chart.scale is not None
    colours, least, most = chart.scale
    bar = figure.colorbar(ScalarMappable(Normalize(least, most), colours), ax=axes, shrink=0.8)
    bar.set_label(chart.label, color=INK)
    bar.ax.tick_params(color=SOFT, labelcolor=SOFT)


def _made(effect: xr.Dataset) -> np.ndarray:
    """Return True for each strength at which an edit has a value."""
    mean = effect["mean"].sel(arm="edit").transpose("alpha", ...).values
    return np.isfinite(mean.reshape(len(mean), -1)).any(1)


def _bands() -> str:
    return "Means over documents; bands are 95 % intervals. Baselines have the colour of their edit, and dashes."


def _name(metric: str) -> str:
    return NAMES.get(metric, metric)
