"""The style of figures: colours, a frame without decoration, and saving to a file."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexcache.paths import local_path

INK, SOFT, PAPER = "#24292f", "#6e7781", "#ffffff"


def frame(axes: Axes) -> None:
    """Draw faint horizontal grid lines and only the left and bottom spines, in the soft colour."""
    axes.grid(axis="y", color=SOFT, alpha=0.2, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=SOFT, labelcolor=SOFT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SOFT)


def save_figure(figure: Figure, path: str | Path | None) -> Figure:
    """Write a figure to *path* (PNG, SVG or PDF), unless that is None, and return it; folders are made."""
    if path is not None:
        target = local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=160)
    return figure
