"""How pictures look: the inks, and a frame without what carries no data."""

from __future__ import annotations

from matplotlib.axes import Axes

INK, SOFT, PAPER = "#24292f", "#6e7781", "#ffffff"


def frame(axes: Axes) -> None:
    """Leave faint horizontal lines and two spines, in the soft ink."""
    axes.grid(axis="y", color=SOFT, alpha=0.2, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=SOFT, labelcolor=SOFT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SOFT)
