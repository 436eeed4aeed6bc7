"""Replay: edit cached activations and run only the rest of the model."""

from __future__ import annotations

from analysis.replay.edits.by_layer import ByLayer
from analysis.replay.edits.directions import ProjectOut, Steer
from analysis.replay.edits.donors import Interchange, Interpolate, Patch, Resample, same_length
from analysis.replay.edits.edit import Alternatives, Chain, Edit
from analysis.replay.edits.erase import Erase
from analysis.replay.edits.features import Clamp, Identity, Mean, Scale, SetNeurons, Zero
from analysis.replay.edits.function import Function
from analysis.replay.edits.heads import OnHeads
from analysis.replay.edits.held_out import Fitted
from analysis.replay.edits.noise import Noise, NormMatched
from analysis.replay.engine.compatibility import find_incompatibilities
from analysis.replay.engine.engine import Engine
from analysis.replay.engine.forward_hooks import PlacedEdit
from analysis.replay.engine.identity import identity_error
from analysis.replay.engine.partial_loading import load_rest
from analysis.replay.engine.receiver import Receiver
from analysis.replay.gradients.attribution import attribution
from analysis.replay.gradients.verification import verify
from analysis.replay.metrics import Metric, Outcome, projection
from analysis.replay.sweeps.execution_options import ExecutionOptions
from analysis.replay.sweeps.grid import Grid, grid
from analysis.replay.sweeps.results import Sweep, load
from analysis.replay.sweeps.sweep import sweep
from flexcache.virtual.plan import Start

# Earlier names
Placed, obstacles = PlacedEdit, find_incompatibilities

__all__ = [
    "Alternatives",
    "ByLayer",
    "Chain",
    "Clamp",
    "Edit",
    "Engine",
    "Erase",
    "ExecutionOptions",
    "Fitted",
    "Function",
    "Grid",
    "Identity",
    "Interchange",
    "Interpolate",
    "Mean",
    "Metric",
    "Noise",
    "NormMatched",
    "OnHeads",
    "Outcome",
    "Patch",
    "Placed",
    "PlacedEdit",
    "ProjectOut",
    "Receiver",
    "Resample",
    "Scale",
    "SetNeurons",
    "Start",
    "Steer",
    "Sweep",
    "Zero",
    "attribution",
    "find_incompatibilities",
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
