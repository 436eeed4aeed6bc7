"""Probes: what of a label can be read from each layer, and what could be read without the model."""

from __future__ import annotations

from analysis.probes.estimators import (
    INLP,
    LDA,
    MLP,
    AttentionPooled,
    LinearProbe,
    Logistic,
    MassMean,
    NearestCentroid,
    Ridge,
)
from analysis.probes.results import Best, Sweep, load
from analysis.probes.sweep import sweep

__all__ = [
    "INLP",
    "LDA",
    "MLP",
    "AttentionPooled",
    "Best",
    "LinearProbe",
    "Logistic",
    "MassMean",
    "NearestCentroid",
    "Ridge",
    "Sweep",
    "load",
    "sweep",
]
