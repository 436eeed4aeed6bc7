"""The layer curve as SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

from analysis import probes
from analysis.plot_style import INK, SOFT
from analysis.probes import Sweep
from analysis.probes.plot import COLOURS
from analysis.report.drawing import themed

VARIABLES = {INK: "--ink", SOFT: "--soft", **{colour: f"--{arm}" for arm, colour in COLOURS.items()}}


def pictures(sweep: Sweep) -> list[tuple[str, str]]:
    """Return confusion and calibration, each with what it shows, where they were measured."""
    found = []
    theme = {INK: "--ink", SOFT: "--soft", COLOURS["probe"]: "--probe"}
    if "confidence" in sweep.results:
        text = "Calibration: how often the likeliest class is right, by its probability; points by the samples in them."
        found.append((text, themed(probes.calibration(sweep), "calibration", "calibration", theme)))
    if "confusion" in sweep.results and sweep.results.sizes["truth"] <= 30:
        text = "Confusion: of each true class, which share is said to be which."
        found.append((text, themed(probes.confusion(sweep), "confusion", "confusion of classes", theme)))
    return found


def svg(sweep: Sweep, metric: str) -> str:
    """Return an ``<svg>`` element with no background; every colour is a CSS variable, text stays text."""
    return themed(sweep.plot(metric=metric), metric, f"{metric} by layer", VARIABLES)
