"""Draw how far two stores are apart, by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plot_style import INK, PAPER, frame, save_figure
from analysis.probes.plot import COLOURS
from analysis.probes.table import NAMES

LINES = ("#0a6ebd", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#57606a")
DASHES = {"first": "-", "second": (0, (5, 2)), "first on second": (0, (1.5, 1.5))}


def plot(results: Mapping[str, xr.Dataset], provenance: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """Draw relative error, cosine, CKA and the scores of probes against the layer; see `StoreComparison.plot`."""
    probed = any("score" in data for data in results.values())
    figure = Figure(figsize=(9.5, 6.4), layout="constrained", facecolor=PAPER)
    names: list[Any] = [["error", "apart"], ["cka", "score"]] if probed else [["error", "apart"], ["cka", "cka"]]
    axes = figure.subplot_mosaic(names)
    colours = {site: LINES[number % len(LINES)] for number, site in enumerate(results)}
    for site, data in results.items():
        layers, colour = data["layer"].values, colours[site]
        line: dict[str, Any] = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 3.5}
        if "error" in data:
            axes["error"].fill_between(layers, data["error_median"], data["error_high"], color=colour, alpha=0.15, lw=0)
            axes["error"].plot(layers, data["error_median"], **line)
            axes["apart"].fill_between(
                layers, 1 - data["cosine"], 1 - data["cosine_low"], color=colour, alpha=0.15, lw=0
            )
            axes["apart"].plot(layers, 1 - data["cosine"], **line)
        axes["cka"].plot(layers, data["cka"], label=site, **line)
        if "score" in data:
            for trial in map(str, data["trial"].values):
                at = data.sel(trial=trial)
                if trial != "second":
                    axes["score"].fill_between(layers, at["score_low"], at["score_high"], color=colour, alpha=0.1, lw=0)
                axes["score"].plot(layers, at["score"], **{**line, "linestyle": DASHES[trial]})
    _label(axes["error"], "relative error of a row: median, up to 99 %", "‖a − b‖ ÷ ‖a‖")
    _label(axes["apart"], "1 − cosine of a row: mean, up to 99 %", "1 − cosine")
    _label(axes["cka"], "debiased CKA", "CKA")
    for name in ("error", "apart"):
        shown = np.concatenate([line.get_ydata() for line in axes[name].lines] or [np.ones(1)])
        if np.nanmin(shown, initial=np.inf) > 0:
            axes[name].set_yscale("log")
    axes["cka"].set_ylim(top=1)
    axes["cka"].legend(frameon=False, labelcolor=INK, fontsize=9)
    if probed:
        about = next(data for data in results.values() if "score" in data)
        _label(
            axes["score"],
            f"probe of {provenance['target']}",
            f"{NAMES[about.attrs['metric']]}, {about.attrs['cv']} folds",
        )
        for trial, dashes in DASHES.items():
            axes["score"].plot([], [], color=COLOURS["random"], linestyle=dashes, label=trial)
        axes["score"].legend(frameon=False, labelcolor=INK, fontsize=9)
    figure.suptitle(" and ".join(provenance["stores"]), x=0.01, ha="left", color=INK, fontsize=11, parse_math=False)
    return save_figure(figure, path)


def _label(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10, parse_math=False)
    axes.set_ylabel(ylabel, color=INK)
    axes.set_xlabel("layer", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    frame(axes)
