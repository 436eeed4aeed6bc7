"""Notes of a sweep: which values are missing, cannot be compared, or did not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.replay.edits.edit import label_edits
from analysis.replay.edits.held_out import describe_split, iterate_fitted
from analysis.replay.engine.engine import Engine
from analysis.replay.metrics import MEANS
from analysis.replay.sweeps.grid import has_readout
from analysis.replay.sweeps.sweep_plan import SweepPlan

STEPS = ("flips", "flips_mean", "flips_sum", "rank")
"""Metrics that count: weak edits may leave them as they are."""
SHOWN = 12


def sweep_notes(
    engine: Engine,
    plan: SweepPlan,
    documents: NDArray[np.int64],
    values: NDArray[np.float64],
    changed: NDArray[np.bool_],
) -> list[str]:
    """Return notes on the values of a sweep, each one sentence.

    Parameters
    ----------
    documents
        Lines of the documents in the store, shape (documents,).
    values
        Of the shape of `SweepPlan.shape`.
    changed
        True where an edit changed a metric in any document at any strength, shape (layers, positions, edits, metrics).
    """
    measured = np.isfinite(values[0]).any(axis=(3, 4))
    starts = [engine.start_at(plan.site, layer, stored=layer is not None) for layer in plan.layers]
    notes = _readout_notes(plan, engine.source.lengths[documents])
    notes += [
        f"{metric.name} has no value in any document."
        for metric, any_value in zip(plan.metrics, measured.any((0, 1, 2)), strict=True)
        if not any_value and measured.any()
    ]
    notes += _unchanged_notes(plan, measured, changed)
    notes += [*engine.notes, *dict.fromkeys(note for start in starts for note in engine.notes_on(start))]
    if plan.copies > 1:
        notes.append(f"{plan.copies} edits went through each forward, so bits may differ from the capture's.")
    for label, found in zip(plan.positions, measured.any((0, 3)), strict=True):
        missing = [name for name, any_value in zip(label_edits(plan.edits), found, strict=True) if not any_value]
        if missing:
            why = "no document could be edited, or no metric has a value"
            notes.append(f"At position {label} every value is NaN ({why}): {', '.join(missing)}.")
    if plan.excluded:
        notes.append(f"{plan.excluded} of the named documents are left out, because an edit was fitted to them.")
    fits = dict.fromkeys(iterate_fitted(plan.edits))
    return notes + [describe_split(part, len(documents)) for part in fits if not part.held_out]


def _readout_notes(plan: SweepPlan, lengths: NDArray[np.int64]) -> list[str]:
    missing = int((~has_readout(plan.readout, lengths)).sum())
    if missing:
        asked = _listed(plan.readout)
        return [f"{missing} of {len(lengths)} documents lack a token of the readout ({asked}): their values are NaN."]
    means = [metric.name for metric in plan.metrics if metric.name in (*MEANS, "cosine") and metric.name != "loss"]
    if not means or plan.readout != "all" or len(np.unique(lengths)) < 2:
        return []
    instead = ['readout "last"', *(f"{name}_sum" for name in means if name in MEANS)]
    return [
        f"Means over all tokens of a document, which depend on its length: {', '.join(means)}."
        f" Independent of it: {', '.join(instead)}."
    ]


def _unchanged_notes(plan: SweepPlan, measured: NDArray[np.bool_], changed: NDArray[np.bool_]) -> list[str]:
    """Return a note for each metric and set of layers: at which positions no edit changed it."""
    unchanged: NDArray[np.bool_] = np.any(measured, axis=2) & ~np.any(changed, axis=2)
    everywhere: NDArray[np.bool_] = np.all(unchanged, axis=0)
    notes = []
    for number, metric in enumerate(plan.metrics):
        found: dict[tuple[Any, ...], list[str]] = {}
        for position, label in enumerate(plan.positions):
            layers = tuple(np.array(plan.layers, object)[unchanged[:, position, number]].tolist())
            if layers and (everywhere[position, number] or metric.name not in STEPS):
                found.setdefault(() if everywhere[position, number] else layers, []).append(label)
        for layers, labels in found.items():
            where = f"position {_listed(labels)}" + (f" of layer {_listed(layers)}" if layers else "")
            notes.append(
                f"{metric.name} did not change in any document by edits at {where}: none reaches what it reads."
            )
    return notes


def _listed(values: Sequence[Any] | str) -> str:
    """Return values with commas, the first of many."""
    if isinstance(values, str):
        return values
    shown = ", ".join(map(str, values[:SHOWN]))
    return shown if len(values) <= SHOWN else f"{shown}, … {len(values)} in all"
