"""Charts of several panels: all in one figure, or each panel as a figure of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.plot_style import INK, PAPER, SOFT

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


def _draw_panel(axes: Axes, panel: Panel) -> None:
    panel.draw(axes)
    axes.set_title(panel.title, loc="left", color=INK, fontsize=10, parse_math=False, wrap=True)


def _draw_scale(figure: Figure, axes: list[Axes], chart: Chart) -> None:
    assert chart.scale is not None
    colours, least, most = chart.scale
    bar = figure.colorbar(ScalarMappable(Normalize(least, most), colours), ax=axes, shrink=0.8)
    bar.set_label(chart.label, color=INK)
    bar.ax.tick_params(color=SOFT, labelcolor=SOFT)
