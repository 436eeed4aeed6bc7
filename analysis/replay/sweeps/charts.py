"""Charts of a sweep: heat maps of layer × position or head, and curves over strengths and layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plot_style import INK, PAPER, SOFT, frame, save_figure
from analysis.replay.sweeps.chart_figure import Chart, Panel, Scale, draw_figure
from analysis.replay.sweeps.effects import estimate_effects
from analysis.replay.sweeps.table import tested_baselines
from analysis.sweep_results import check_metric, names_along

NAMES = {
    "kl": "KL divergence, nats",
    "kl_mean": "KL divergence, nats, mean of the tokens",
    "kl_sum": "KL divergence, nats, sum of the tokens",
    "loss": "loss, nats",
    "loss_mean": "loss, nats, mean of the tokens",
    "loss_sum": "loss, nats, sum of the tokens",
    "loss_change": "change of loss, nats",
    "loss_change_mean": "change of loss, nats, mean of the tokens",
    "loss_change_sum": "change of loss, nats, sum of the tokens",
    "logit_diff": "logit difference",
    "logit_diff_change": "change of logit difference",
    "prob": "probability of the answer",
    "rank": "rank of the answer",
    "flips": "share of changed next tokens",
    "flips_mean": "share of changed next tokens",
    "flips_sum": "changed next tokens",
    "recovered": "recovered fraction",
    "cosine": "cosine of the last residual",
}
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


def plot(results: xr.Dataset, path: str | Path | None = None, metric: str | None = None) -> Figure:
    """Draw the first chart of `make_charts` for a metric, and write it to *path*: PNG, SVG or PDF."""
    check_metric(results, metric)
    return save_figure(draw_figure(make_charts(estimate_effects(results), metric)[0]), path)


def _heat_maps(effects: dict[str, xr.Dataset], across: str, metric: str, tested: list[str]) -> Chart:
    """Return the change by layer and position or head: a row for each edit, the edit and its controls side by side."""
    arms = [arm for arm in names_along(next(iter(effects.values())), "arm") if arm != "identity"]
    change = np.concatenate([one["change"].sel(arm=arms).values.ravel() for one in effects.values()])
    change = change[np.isfinite(change)]
    most, signed = float(np.abs(change).max(initial=0.0)), bool((change < 0).any())
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


def _made(effect: xr.Dataset) -> np.ndarray:
    """Return True for each strength at which an edit has a value."""
    mean = effect["mean"].sel(arm="edit").transpose("alpha", ...).values
    return np.isfinite(mean.reshape(len(mean), -1)).any(1)


def _bands() -> str:
    return "Means over documents; bands are 95 % intervals. Baselines have the colour of their edit, and dashes."


def _name(metric: str) -> str:
    return NAMES.get(metric, metric)
