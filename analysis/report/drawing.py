"""Draw charts as SVG with the colours of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plot_style import INK, SOFT, frame

PALETTE = {"--one": "#0a6ebd", "--two": "#bc4c00", "--three": "#1a7f37", "--four": "#8250df"}

NUMBERED = 10
"""Rows of a heat map up to which its cells show their numbers."""


def themed(figure: Figure, prefix: str, label: str, variables: Mapping[str, str]) -> str:
    """Return a figure as an ``<svg>`` element without background; colours are CSS variables, text stays text.

    Parameters
    ----------
    prefix
        Prefix of the ids, because a page may hold several charts.
    label
        Description for screen readers.
    variables
        CSS variables by colour.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flexcache"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.S)
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", drawn)
    for colour, variable in variables.items():
        drawn = drawn.replace(colour, f"var({variable})")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def curves(
    name: str,
    x: Sequence[float] | np.ndarray,
    ys: Mapping[str, np.ndarray],
    *,
    label: str,
    xlabel: str = "layer",
    ylabel: str = "",
    log: bool = False,
    log_x: bool = False,
) -> str:
    """Return up to four curves over one axis as SVG, named in a legend below."""
    x = np.asarray(x, float)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for (text, y), colour in zip(ys.items(), PALETTE.values()):
        marker = "o" if len(x) <= 64 else None
        axes.plot(x, np.asarray(y, float), color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=text)
    positive = np.concatenate([np.asarray(y, float) for y in ys.values()])
    if log and np.nanmin(positive) > 0:
        axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    frame(axes)
    if len(ys) > 1:
        axes.legend(
            frameon=False, labelcolor=INK, fontsize=9, ncols=len(ys), loc="upper left", bbox_to_anchor=(0, 1.16)
        )
    variables = {INK: "--ink", SOFT: "--soft", **{colour: variable for variable, colour in PALETTE.items()}}
    return themed(figure, name, label, variables)


def heatmap(values: np.ndarray, names: Sequence[str], label: str) -> str:
    """Return a square matrix of numbers from 0 to 1 as SVG: larger numbers are darker, and a bar shows the colours.

    Up to `NUMBERED` rows, cells show their numbers; otherwise tooltips do.
    """
    n = len(values)
    cell = 30 if n <= NUMBERED else 16
    left, top = 34, 6
    right, bottom = left + n * cell, top + n * cell
    parts = []
    for i in range(n):
        for j in range(n):
            share = round(100 * float(np.clip(values[i, j], 0, 1)))
            x, y, number = left + j * cell, top + i * cell, f"{values[i, j]:.3f}"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" style="fill: {_shade(share)}">'
                f"<title>{escape(names[i])} and {escape(names[j])}: {number}</title></rect>"
            )
            if n <= NUMBERED:
                ink = "var(--page)" if share > 55 else "var(--ink)"
                text = f"{values[i, j]:.2f}".replace("0.", ".", 1)
                parts.append(_text(x + cell / 2, y + cell / 2 + 3, text, "middle", ink))
    step = max(1, n // 15)
    for i in range(0, n, step):
        middle = i * cell + cell / 2
        parts.append(_text(left - 5, top + middle + 3, names[i], "end"))
        parts.append(_text(left + middle, bottom + 12, names[i], "middle"))
    height = n * cell / 20
    parts += [
        f'<rect x="{right + 10}" y="{top + i * height:.2f}" width="9" height="{height + 0.5:.2f}" '
        f'style="fill: {_shade(100 - 5 * i)}"/>'
        for i in range(20)
    ]
    parts += [_text(right + 22, top + 8, "1", "start"), _text(right + 22, bottom, "0", "start")]
    width = right + 32
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {bottom + 14}" '
        f'style="max-width: {max(width * 1.2, 240):.0f}px">{"".join(parts)}</svg>'
    )


def _shade(share: int) -> str:
    return f"color-mix(in srgb, var(--one) {share}%, var(--panel))"


def _text(x: float, y: float, text: str, anchor: str, colour: str = "var(--soft)") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="9" style="fill: {colour}">{escape(text)}</text>'
