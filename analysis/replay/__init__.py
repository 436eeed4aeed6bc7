"""Replay: change a cached activation, and run only the rest of the model."""

from __future__ import annotations

from analysis.replay.edits.donors import Interchange, Interpolate, Patch, Resample, same_length
from analysis.replay.edits.edit import Alternatives, Chain, Edit
from analysis.replay.edits.erase import Erase
from analysis.replay.edits.standard import (
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
from analysis.replay.engine.compatibility import obstacles
from analysis.replay.engine.engine import Engine, Start
from analysis.replay.engine.hooking import Placed
from analysis.replay.engine.identity import identity_error
from analysis.replay.engine.rest import load_rest
from analysis.replay.sweeps.attribution import attribution, verify
from analysis.replay.sweeps.grid import Grid, grid
from analysis.replay.sweeps.metrics import Metric, Outcome, projection
from analysis.replay.sweeps.results import Sweep, load
from analysis.replay.sweeps.sweep import sweep

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
