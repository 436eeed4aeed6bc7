"""The layer curve as SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import io
import re

import matplotlib

from analysis.probes import Sweep
from analysis.probes.plot import COLOURS, INK, SOFT

VARIABLES = {INK: "--ink", SOFT: "--soft", **{colour: f"--{arm}" for arm, colour in COLOURS.items()}}


def svg(sweep: Sweep, metric: str) -> str:
    """Return an ``<svg>`` element with no background; every colour is a CSS variable, text stays text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flexcache"}):
        figure = sweep.plot(metric=metric)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.S)
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{metric}-", drawn)  # a page may hold several charts
    for colour, variable in VARIABLES.items():
        drawn = drawn.replace(colour, f"var({variable})")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{metric} by layer"', 1)
