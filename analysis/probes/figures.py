"""Figures of a sweep in addition to the layer curve: confusion, calibration, layer × position, transfer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.plot_style import INK, PAPER, SOFT, frame, save_figure
from analysis.probes.results import Sweep
from analysis.probes.table import NAMES, interval, number
from flexcache.errors import AnalysisError

BLUE = "#0a6ebd"
MOST = 24
"""Rows or columns up to which every tick has a label; maps of up to a quarter of its square also show numbers."""


def confusion(sweep: Sweep, path: str | Path | None = None) -> Figure:
    """Draw the confusion matrix of the nested predictions, as shares of the true class.

    ::

        probes.confusion(sweep, "confusion.svg")

    Raises
    ------
    AnalysisError
        The target has no classes.
    """
    if "confusion" not in sweep.results:
        raise AnalysisError("a regression has no confusion of classes")
    table = sweep.results["confusion"]
    counts = table.values.astype(float)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [str(name)[:24] for name in table["truth"].values]
    figure, axes = _new(max(4.5, 0.5 * len(names) + 2.5))
    _map(axes, share, names, names, "said", "truth", (0.0, 1.0))
    return _titled(figure, axes, f"{sweep.results.attrs['target']}: shares of each true class", path)


def calibration(sweep: Sweep, path: str | Path | None = None) -> Figure:
    """Draw the accuracy of the most likely class against its probability; points are sized by their samples.

    The figure names the calibration error of these bins, and the debiased error with its interval.

    ::

        probes.calibration(sweep, "calibration.svg")

    Raises
    ------
    AnalysisError
        The probe gives no probabilities.
    """
    if "confidence" not in sweep.results:
        raise AnalysisError("the probe gives no probabilities", remedy="use probes.Logistic or probes.LDA")
    data = sweep.results
    figure, axes = _new(5.0)
    sizes = data["samples_in_bin"].values
    x, y = data["confidence"].values, data["accuracy_in_bin"].values
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (3, 3)))
    full = sizes > 0
    axes.plot(x[full], y[full], color=BLUE, linewidth=1.6)
    axes.scatter(x[full], y[full], s=12 + 200 * sizes[full] / sizes.max(), color=BLUE, alpha=0.7)
    if "ece_debiased" in data["metric"]:
        plain, debiased, *ends = (
            float(data[f"best_{name}"].sel(metric=metric))
            for name, metric in (("pooled", "ece"), *((end, "ece_debiased") for end in ("pooled", "ci_low", "ci_high")))
        )
        text = f"calibration error {number(plain)}\nwithout noise {number(debiased)} {interval(*ends)}"
        axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=9, color=INK)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("probability of the most likely class", color=INK)
    axes.set_ylabel("share that is right", color=INK)
    frame(axes)
    return _titled(figure, axes, f"{data.attrs['target']}: calibration, size by samples", path)


def heat_map(found: xr.Dataset, path: str | Path | None = None) -> Figure:
    """Draw scores by layer and position, as `analysis.probes.by_position` returns them.

    ::

        found = probes.by_position(store, "label", "resid_post", positions=[0, 1, -1])
        probes.heat_map(found, "positions.svg")
    """
    metric = str(found.attrs["metric"])
    figure, axes = _new(6.5)
    values = found["pooled"].transpose("layer", "position").values
    layers = [str(layer) for layer in found["layer"].values]
    positions = [str(position) for position in found["position"].values]
    _map(axes, values, layers, positions, "position", "layer", (np.nanmin(values), np.nanmax(values)))
    axes.invert_yaxis()  # the first layer at the bottom
    ends = f"from {np.nanmin(values):.2f}, pale, to {np.nanmax(values):.2f}"
    return _titled(figure, axes, f"{found.attrs['target']}: {NAMES[metric]}, {ends}", path)


def transfer_map(found: xr.Dataset, path: str | Path | None = None) -> Figure:
    """Draw scores by training and test data, as `analysis.probes.transfer_matrix` returns them.

    ::

        found = probes.transfer_matrix({"reviews": sweep}, {"products": (other, "label")})
        probes.transfer_map(found, "transfer.svg")
    """
    figure, axes = _new(5.5)
    rows, columns = ([str(name) for name in found[dim].values] for dim in ("trained", "tested"))
    values = found["score"].values
    _map(axes, values, rows, columns, "tested on", "trained on", (np.nanmin(values), np.nanmax(values)))
    return _titled(figure, axes, f"transfer: {NAMES[str(found.attrs['metric'])]}", path)


def _new(width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 0.78 * width), layout="constrained", facecolor=PAPER)
    return figure, figure.subplots()


def _map(
    axes: Axes, values: np.ndarray, rows: list[str], columns: list[str], x: str, y: str, ends: tuple[float, float]
) -> None:
    low, high = ends if ends[1] > ends[0] else (ends[0] - 0.5, ends[1] + 0.5)
    for (i, j), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        share = 0.03 + 0.77 * (value - low) / (high - low)
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=BLUE, alpha=share, linewidth=0))
        if values.size <= MOST**2 / 4:
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=INK)
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        step = -(-len(names) // MOST)
        axis.set_ticks(range(0, len(names), step), names[::step])
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(which="both", color=SOFT, labelcolor=SOFT)
    axes.tick_params(axis="x", rotation=45 if max(map(len, columns)) > 3 and len(columns) > 3 else 0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _titled(figure: Figure, axes: Axes, title: str, path: str | Path | None) -> Figure:
    axes.set_title(title, loc="left", color=INK, fontsize=11, parse_math=False)
    return save_figure(figure, path)
