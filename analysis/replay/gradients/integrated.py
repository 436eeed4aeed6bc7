"""Integrated gradients: the model's gradients at points between the activations of a document and its donor."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.replay.engine.engine import Engine
from analysis.replay.engine.forward_hooks import GivenValues, PlacedEdit
from analysis.replay.gradients.objectives import sum_by_document
from flexcache.errors import AnalysisError
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.objective import Objective


def integrate_gradients(
    engine: Engine,
    objective: Objective,
    at: tuple[str, int | None],
    rows: NDArray[np.int64],
    theirs: NDArray[np.int64],
    steps: int,
) -> tuple[NDArray[np.float64], float]:
    """Return the mean gradient of each token times its difference to the donor, and the largest completeness error.

    All tokens of a document move together, by the midpoint rule: the gradients at (k + ½) / *steps* of the way. The
    completeness error of a document is the distance of the sum over its tokens from the change of its objective.

    Parameters
    ----------
    at
        Site and layer.
    rows, theirs
        Rows of the tokens, and of their donors, shape (tokens,).

    Raises
    ------
    AnalysisError
        The objective does not depend on the activation.
    """
    document = np.asarray(engine.store.coordinates["document"].values)[rows]
    position = np.asarray(engine.store.coordinates["position"].values)[rows].astype(np.int64)
    found, worst = np.full(len(rows), np.nan), 0.0
    for batch in engine.batches(set(document.tolist())):
        place = {int(one): line for line, one in enumerate(batch.documents)}
        mine = np.flatnonzero(np.isin(document, batch.documents))
        lines = np.array([place[int(one)] for one in document[mine]], np.int64)
        own = engine.source.read_rows(*at, rows[mine]).float()
        away = engine.source.read_rows(*at, theirs[mine]).float() - own
        tokens = (lines, position[mine])
        slope = torch.zeros(own.shape, dtype=torch.float64)
        for step in range(steps):
            values = (own + (step + 0.5) / steps * away).requires_grad_()
            value = _run_with_values(engine, objective, at, batch, values, tokens)
            if not value.requires_grad:
                raise AnalysisError("the objective does not depend on the activation", where=f"{at[0]}, layer {at[1]}")
            slope += torch.autograd.grad(value.sum(), values)[0].double()
        found[mine] = (slope / steps * away.double()).sum(-1).numpy()
        with torch.no_grad():
            ends = [_run_with_values(engine, objective, at, batch, one, tokens) for one in (own, own + away)]
        change = (ends[1] - ends[0]).cpu().numpy()
        error = np.bincount(lines, found[mine], len(change)) - change
        worst = max(worst, float(np.abs(error[np.unique(lines)]).max()))
    return found, worst


def _run_with_values(
    engine: Engine,
    objective: Objective,
    at: tuple[str, int | None],
    batch: Batch,
    values: torch.Tensor,
    tokens: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> torch.Tensor:
    """Return the objective of each document with *values* as the activations of *tokens*."""
    placed = PlacedEdit(engine.point(*at), GivenValues(values), tokens)
    ran = engine.run(batch, engine.start_at(*at), [placed], gradients=values.requires_grad)
    return sum_by_document(objective, ran, batch)
