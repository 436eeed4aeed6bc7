"""Draw the scores of a probe sweep by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plot_style import INK, PAPER, frame, save_figure
from analysis.probes.best_layer import best_layer
from analysis.probes.table import NAMES, arm_name
from analysis.sweep_results import check_metric, names_along

COLOURS = {
    "probe": "#0a6ebd",
    "shuffled": "#8c959f",
    "random": "#57606a",
    "control": "#8250df",
    "tfidf": "#bc4c00",
    "tokens": "#9a6700",
    "length": "#1a7f37",
    "majority": "#6e7782",
}
DASHES = {"tfidf": (0, (6, 3)), "tokens": (0, (4, 2)), "length": (0, (2, 2)), "majority": (0, (1.5, 2))}


def plot(results: xr.Dataset, to: str | Path | Axes | None = None, *, metric: str | None = None) -> Figure:
    """Draw score against layer, see `Sweep.plot`; pyplot is not used, so no display is needed and no state changes."""
    metric = check_metric(results, metric)
    if isinstance(to, Axes):
        _draw(results, to, metric)
        figure = to.figure
        assert isinstance(figure, Figure)
        return figure
    figure = Figure(figsize=(8, 4.4), layout="constrained", facecolor=PAPER)
    _draw(results, figure.subplots(), metric)
    return save_figure(figure, to)


def _draw(results: xr.Dataset, axes: Axes, metric: str) -> None:
    data = results.sel(metric=metric)
    layers, best = data["layer"].values, best_layer(results)
    ends: list[tuple[float, str, str]] = []
    for arm in reversed(names_along(results, "arm")):
        at, colour = data.sel(arm=arm), COLOURS[arm]
        middle, low, high = (at[name].values for name in ("pooled", "ci_low", "ci_high"))
        if np.isnan(middle).all():
            continue
        if arm in DASHES:
            axes.axhline(middle[0], color=colour, linewidth=1.3, linestyle=DASHES[arm])
            if arm == "tfidf" and np.isfinite(low[0]):
                axes.axhspan(low[0], high[0], color=colour, alpha=0.08, linewidth=0)
        elif len(layers) == 1:
            axes.errorbar(layers, middle, [middle - low, high - middle], color=colour, marker="o", capsize=4)
        else:
            axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
            if arm == "probe":
                for edge in ("band_low", "band_high"):
                    axes.plot(layers, data[edge].values, color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
            width, size = (2.0, 4.5) if arm == "probe" else (1.3, 2.5)
            axes.plot(layers, middle, color=colour, linewidth=width, marker="o", markersize=size)
        ends.append((float(middle[-1]), arm_name(results, arm), colour))
    if best.layer is not None and len(layers) > 1 and metric == best.metric:
        top = float(data["pooled"].sel(arm="probe", layer=best.layer))
        axes.plot([best.layer], [top], marker="o", markersize=10, markerfacecolor="none", color=COLOURS["probe"])
        axes.annotate(
            f"layer {best.layer}",
            (best.layer, np.nanmax([top, float(data["band_high"].sel(layer=best.layer))])),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=COLOURS["probe"],
            weight="bold",
        )
    _label(axes, ends)
    asked = results.attrs
    axes.set_title(f"{asked['target']} in {asked['site']}", loc="left", color=INK, fontsize=11, parse_math=False)
    axes.set_xlabel("layer" if best.layer is not None else "", color=INK)
    axes.set_ylabel(f"{NAMES[metric]}, {asked['cv']} folds", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(layers) == 1:
        axes.set_xticks(layers if best.layer is not None else [])
        axes.set_xlim(layers[0] - 1, layers[0] + 1)
    else:
        axes.margins(x=0.02)
    frame(axes)


def _label(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write the name of each curve at its right end, moved apart if names would overlap."""
    low, high = axes.get_ylim()
    side = axes.get_yaxis_transform()
    gap = 0.062 * (high - low)
    ends = sorted(ends)
    places = np.array([value for value, _, _ in ends])
    for _ in range(100):
        for i in range(1, len(places)):
            if (short := gap - (places[i] - places[i - 1])) > 1e-12:
                places[i - 1 : i + 1] += -short / 2, short / 2
    for place, (_, name, colour) in zip(places, ends):
        axes.text(1.015, place, name, transform=side, color=colour, fontsize=9, va="center", clip_on=False)
    axes.set_ylim(min(low, places.min() - gap / 2), max(high, places.max() + gap / 2))
