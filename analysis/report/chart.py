"""Figures of a probe sweep as SVG with the colours of the page, light or dark."""

from __future__ import annotations

from analysis import probes
from analysis.plot_style import INK, SOFT
from analysis.probes import Sweep
from analysis.probes.plot import COLOURS
from analysis.report.drawing import themed

VARIABLES = {INK: "--ink", SOFT: "--soft", **{colour: f"--{arm}" for arm, colour in COLOURS.items()}}


def result_figures(sweep: Sweep) -> list[tuple[str, str]]:
    """Return the figures of calibration and confusion that were measured, each with its caption."""
    found = []
    theme = {INK: "--ink", SOFT: "--soft", COLOURS["probe"]: "--probe"}
    if "confidence" in sweep.results:
        text = "Calibration: how often the most likely class is right, by its probability; points are sized by samples."
        found.append((text, themed(probes.calibration(sweep), "calibration", "calibration", theme)))
    if "confusion" in sweep.results and sweep.results.sizes["truth"] <= 30:
        text = "Confusion: shares of the predicted classes for each true class."
        found.append((text, themed(probes.confusion(sweep), "confusion", "confusion of classes", theme)))
    return found


def svg(sweep: Sweep, metric: str) -> str:
    """Return the layer curve as an ``<svg>`` element without background; colours are CSS variables, text stays text."""
    return themed(sweep.plot(metric=metric), metric, f"{metric} by layer", VARIABLES)
