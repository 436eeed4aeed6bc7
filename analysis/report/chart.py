"""The layer curve as SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

from analysis.probes import Sweep
from analysis.probes.plot import COLOURS
from analysis.report.drawing import themed
from analysis.style import INK, SOFT

VARIABLES = {INK: "--ink", SOFT: "--soft", **{colour: f"--{arm}" for arm, colour in COLOURS.items()}}


def svg(sweep: Sweep, metric: str) -> str:
    """Return an ``<svg>`` element with no background; every colour is a CSS variable, text stays text."""
    return themed(sweep.plot(metric=metric), metric, f"{metric} by layer", VARIABLES)
