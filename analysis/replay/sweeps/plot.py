"""Figures of a sweep: heat maps, and curves over layers and strengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plot_style import INK, PAPER, SOFT, frame, save_figure
from analysis.replay.sweeps.effects import estimate_effects
from analysis.sweep_results import check_metric, names_along

CURVES = ("#0a6ebd", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#cf222e")
STYLES = {"edit": "-", "identity": (0, (1, 2)), "random_direction": (0, (6, 3)), "norm_matched": (0, (3, 2, 1, 2))}
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


def plot(results: xr.Dataset, path: str | Path | None = None, metric: str | None = None) -> Figure:
    """Draw the means of a metric; uses no pyplot.

    With edits of single heads: a heat map of layer × head for each edit and position, at the largest strength, with a
    dot in cells whose 95 % interval includes no effect. With several positions: the same of layer × position for each
    edit. With several strengths: a curve over strengths for up to six layers.
    Otherwise: curves over layers.

    Parameters
    ----------
    path
        File to write: PNG, SVG or PDF.
    metric
        The first metric by default.

    Raises
    ------
    AnalysisError
        The metric was not measured.
    """
    metric = check_metric(results, metric)
    sizes = results["value"].sizes
    if sizes["position"] > 1 or "head" in results.coords:
        figure = heat_maps(results, metric)
    elif sizes["alpha"] > 1:
        figure = dose_response(results, metric)
    else:
        figure = curves(results, metric)
    return save_figure(figure, path)


def heat_maps(results: xr.Dataset, metric: str) -> Figure:
    """Return a heat map of layer × position for each edit; of layer × head for edits of single heads."""
    effect = estimate_effects(results).sel(metric=metric, arm="edit")
    across = "head" if "head" in results.coords else "position"
    panels = (
        _by_head(effect) if across == "head" else {str(name): effect.sel(edit=name) for name in effect["edit"].values}
    )
    figure = Figure(figsize=(1.8 + 5.2 * len(panels), 5), layout="constrained", facecolor=PAPER)
    rows = figure.subplots(1, len(panels), squeeze=False)[0]
    reference = 0.0
    if "identity" in names_along(results, "arm"):
        unchanged = results["value"].sel(metric=metric, arm="identity")
        reference = float(unchanged.mean()) if np.isfinite(unchanged).any() else 0.0
    away = float(np.nan_to_num(np.abs(effect["mean"].values - reference)).max()) or 1.0
    for axes, (edit, panel) in zip(rows, panels.items()):
        at = _strongest(panel)
        values = at["mean"].transpose("layer", across).values - reference
        image = axes.imshow(values, cmap="RdBu_r", vmin=-away, vmax=away, aspect="auto", origin="lower")
        inside = (at["ci_low"] <= reference) & (at["ci_high"] >= reference)
        for layer, position in zip(*np.nonzero(inside.transpose("layer", across).values)):
            axes.text(position, layer, "·", ha="center", va="center", color=SOFT, fontsize=8)
        _ticks(axes, at, across)
        axes.set_title(edit, loc="left", color=INK, fontsize=10, parse_math=False, wrap=True)
    bar = figure.colorbar(image, ax=list(rows), shrink=0.8)
    bar.set_label(f"{_name(metric)}" + (", less that without an edit" if reference else ""), color=INK)
    bar.ax.tick_params(color=SOFT, labelcolor=SOFT)
    return figure


def _by_head(effect: xr.Dataset) -> dict[str, xr.Dataset]:
    """Return the effects by head of each edit and position, with a title; the heads of an edit follow each other."""
    heads, names = effect["head"].values, [str(name) for name in effect["edit"].values]
    count, found = len(set(heads.tolist())), {}
    for first in range(0, len(names), count):
        one = effect.isel(edit=slice(first, first + count)).swap_dims(edit="head")
        title = names[first].rpartition(" head ")[0]
        for number, position in enumerate(map(str, effect["position"].values)):
            label = title if effect.sizes["position"] == 1 else f"{title}, position {position}"
            found[label if label not in found else f"{label} {first // count + 1}"] = one.isel(position=number)
    return found


def dose_response(results: xr.Dataset, metric: str) -> Figure:
    """Return the metric over strengths for up to six layers, with the controls of the middle layer."""
    effect = estimate_effects(results).sel(metric=metric).isel(position=0)
    figure = Figure(figsize=(8, 4.4), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    layers = effect["layer"].values
    shown = layers[np.unique(np.linspace(0, len(layers) - 1, min(6, len(layers))).round().astype(int))]
    middle = shown[len(shown) // 2]
    edits = [str(name) for name in effect["edit"].values]
    for number, (edit, layer) in enumerate((edit, layer) for edit in edits for layer in shown):
        for arm in names_along(results, "arm") if layer == middle else ("edit",):
            if arm == "identity":  # a flat line at the value of strength 0
                continue
            at = effect.sel(edit=edit, layer=layer, arm=arm)
            label = f"layer {layer}" if arm == "edit" else arm.replace("_", " ")
            label += f", {edit}" if len(edits) > 1 else ""
            _curve(axes, at["alpha"].values, at, CURVES[number % len(CURVES)], STYLES[arm], label)
    axes.set_xlabel("strength", color=INK)
    _finish(axes, results, metric)
    return figure


def curves(results: xr.Dataset, metric: str) -> Figure:
    """Return the metric over layers for each edit and its controls."""
    effect = estimate_effects(results).sel(metric=metric).isel(position=0)
    figure = Figure(figsize=(8, 4.4), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    for number, edit in enumerate(map(str, effect["edit"].values)):
        for arm in names_along(results, "arm"):
            if arm == "identity" and number:
                continue
            at = _strongest(effect.sel(edit=edit, arm=arm))
            label = edit if arm == "edit" else f"{arm.replace('_', ' ')}"
            _curve(axes, at["layer"].values, at, CURVES[number % len(CURVES)], STYLES[arm], label)
    axes.set_xlabel("layer", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, results, metric)
    return figure


def _curve(axes: Axes, x: Any, at: xr.Dataset, colour: str, style: Any, label: str) -> None:
    mean = at["mean"].values
    known = np.isfinite(mean)
    if not known.any():
        return
    axes.plot(
        x[known], mean[known], color=colour, linestyle=style, linewidth=1.8, marker="o", markersize=3, label=label
    )
    if style == "-":
        axes.fill_between(
            x[known], at["ci_low"].values[known], at["ci_high"].values[known], color=colour, alpha=0.15, linewidth=0
        )


def _strongest(effect: xr.Dataset) -> xr.Dataset:
    """Return an edit's effects at the largest strength for which there are values."""
    made = np.flatnonzero(
        np.isfinite(effect["mean"].transpose("alpha", ...).values).reshape(effect.sizes["alpha"], -1).any(1)
    )
    return effect.isel(alpha=int(made[-1]) if len(made) else 0)


def _ticks(axes: Axes, at: xr.Dataset, across: str) -> None:
    layers, positions = at["layer"].values, [str(name) for name in at[across].values]
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    step = max(1, len(positions) // 12)
    axes.set_xticks(range(0, len(positions), step), positions[::step])
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel("layer", color=INK)
    axes.tick_params(length=0, labelcolor=SOFT)
    axes.spines[:].set_visible(False)


def _finish(axes: Axes, results: xr.Dataset, metric: str) -> None:
    axes.set_ylabel(_name(metric), color=INK)
    asked = results.attrs["question"]
    axes.set_title(f"edits of {asked['site']}", loc="left", color=INK, fontsize=11, parse_math=False)
    legend = axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
    frame(axes)


def _name(metric: str) -> str:
    return NAMES.get(metric, metric)
