"""Replay: change a cached activation, and run only the rest of the model."""

from __future__ import annotations

from analysis.replay.attribution import attribution, verify
from analysis.replay.donors import Interchange, Interpolate, Patch, Resample, same_length
from analysis.replay.edit import Alternatives, Chain, Edit
from analysis.replay.edits import (
    ByLayer,
    Clamp,
    Function,
    Identity,
    Mean,
    Noise,
    NormMatched,
    ProjectOut,
    Scale,
    SetNeurons,
    Steer,
    Zero,
)
from analysis.replay.engine import Engine, Start
from analysis.replay.grid import Grid, grid
from analysis.replay.hooking import Placed
from analysis.replay.identity import identity_error
from analysis.replay.leace import Erase
from analysis.replay.metrics import Metric, Outcome, projection
from analysis.replay.obstacles import obstacles
from analysis.replay.rest import load_rest
from analysis.replay.results import Sweep, load
from analysis.replay.sweep import sweep

__all__ = [
    "Alternatives",
    "ByLayer",
    "Chain",
    "Clamp",
    "Edit",
    "Engine",
    "Erase",
    "Function",
    "Grid",
    "Identity",
    "Interchange",
    "Interpolate",
    "Mean",
    "Metric",
    "Noise",
    "NormMatched",
    "Outcome",
    "Patch",
    "Placed",
    "ProjectOut",
    "Resample",
    "Scale",
    "SetNeurons",
    "Start",
    "Steer",
    "Sweep",
    "Zero",
    "attribution",
    "grid",
    "identity_error",
    "load",
    "load_rest",
    "obstacles",
    "projection",
    "same_length",
    "sweep",
    "verify",
]
