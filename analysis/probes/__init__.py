"""Probes: how well a label can be read from each layer, compared with baselines that need no model."""

from __future__ import annotations

from analysis.probes.best_layer import Best
from analysis.probes.comparison import compare
from analysis.probes.direction import Direction, load_direction
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
from analysis.probes.evaluation import score
from analysis.probes.figures import calibration, confusion, heat_map, transfer_map
from analysis.probes.options import SweepOptions
from analysis.probes.results import Sweep, load, save_dataset
from analysis.probes.sweep import sweep, sweeps
from analysis.probes.transfer import by_position, transfer, transfer_matrix

__all__ = [
    "INLP",
    "LDA",
    "MLP",
    "AttentionPooled",
    "Best",
    "Direction",
    "LinearProbe",
    "Logistic",
    "MassMean",
    "NearestCentroid",
    "Ridge",
    "Sweep",
    "SweepOptions",
    "by_position",
    "calibration",
    "compare",
    "confusion",
    "heat_map",
    "load",
    "load_direction",
    "save_dataset",
    "score",
    "sweep",
    "sweeps",
    "transfer",
    "transfer_map",
    "transfer_matrix",
]
