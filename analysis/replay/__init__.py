"""Replay: change a cached activation, and run only the rest of the model."""

from __future__ import annotations

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
from analysis.replay.engine import Engine, Placed, Start
from analysis.replay.identity import identity_error
from analysis.replay.leace import Erase
from analysis.replay.obstacles import obstacles

__all__ = [
    "Alternatives",
    "ByLayer",
    "Chain",
    "Clamp",
    "Edit",
    "Engine",
    "Erase",
    "Function",
    "Identity",
    "Interchange",
    "Interpolate",
    "Mean",
    "Noise",
    "NormMatched",
    "Patch",
    "Placed",
    "ProjectOut",
    "Resample",
    "Scale",
    "SetNeurons",
    "Start",
    "Steer",
    "Zero",
    "identity_error",
    "obstacles",
    "same_length",
]
