"""Figure of attributed effects against exact replays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plot_style import INK, PAPER, SOFT, frame, save_figure

MARKERS = {"top": "^", "uniform": "o", "first": "s"}
NAMES = {"uniform": "cells drawn uniformly", "top": "largest estimates", "first": "first tokens"}


def scatter(exact: xr.Dataset, path: str | Path | None = None) -> Figure:
    """Draw attributed against exact effects, as `verify` returns them; first tokens have axes of their own."""
    drawn, layers = exact["drawn"].values, exact["layer"].values
    panels = [[name for name in ("uniform", "top") if (drawn == name).any()], ["first"]]
    panels = [names for names in panels if names and np.isin(drawn, names).any()]
    figure = Figure(figsize=(0.8 + 4.6 * len(panels), 4.8), layout="constrained", facecolor=PAPER)
    axes: list[Axes] = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for one, names in zip(axes, panels):
        part = exact.isel(cell=np.flatnonzero(np.isin(drawn, names)))
        both = np.concatenate([part["attributed"].values, part["exact"].values])
        span = [both.min(), both.max()]
        one.plot(span, span, color=SOFT, linewidth=1, linestyle=(0, (1.5, 2)))
        for name in names:
            cell = part.isel(cell=np.flatnonzero(part["drawn"].values == name))
            points = one.scatter(
                cell["attributed"].values,
                cell["exact"].values,
                c=cell["layer"].values,
                cmap="viridis",
                vmin=layers.min(),
                vmax=max(layers.max(), layers.min() + 1),
                s=22,
                marker=MARKERS[name],
                label=NAMES[name],
            )
        one.set_title("\n".join(rank_texts(exact, names)), loc="left", color=INK, fontsize=10)
        one.set_xlabel("attributed, from gradients", color=INK)
        one.set_ylabel("exact, by replay", color=INK)
        if len(names) > 1:
            one.legend(frameon=False, fontsize=8, labelcolor=INK)
        frame(one)
    bar = figure.colorbar(points, ax=axes)
    bar.set_label("layer", color=INK)
    return save_figure(figure, path)


def rank_texts(exact: xr.Dataset, names: Sequence[str] = tuple(NAMES)) -> list[str]:
    """Return the number of cells and the rank correlation of each of the draws *names*, in words."""
    counts = {name: int((exact["drawn"] == name).sum()) for name in names}
    keys = {name: "rank_correlation" if name == "uniform" else f"rank_correlation_{name}" for name in names}
    return [f"{counts[name]} {NAMES[name]}: rank correlation {exact.attrs[keys[name]]:.2f}" for name in names]


def describe_ranks(exact: xr.Dataset) -> str:
    """Return the agreement of attributed and exact effects in one line."""
    return f"attribution ({exact.attrs['method']}) against exact: " + "; ".join(rank_texts(exact))
