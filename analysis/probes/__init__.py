"""Probes: what of a label can be read from each layer, and what could be read without the model."""

from __future__ import annotations

from analysis.probes.logistic import Logistic
from analysis.probes.results import Best, Sweep, load
from analysis.probes.ridge import Ridge
from analysis.probes.sweep import sweep

__all__ = ["Best", "Logistic", "Ridge", "Sweep", "load", "sweep"]
