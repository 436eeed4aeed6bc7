"""The objective of a store, and its values by document."""

from __future__ import annotations

from typing import Any

import torch

from analysis.replay.engine.forward_hooks import ForwardResult
from flexcache.errors import AnalysisError, MismatchError
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.objective import NextTokenLoss, Objective, check_value, describe_objective
from flexcache.site import GRADIENT
from flexcache.store.read.store import Store


def stored_objective(store: Store, objective: Objective | None) -> Objective:
    """Return the objective whose gradients a store holds, after a comparison with its record.

    Parameters
    ----------
    objective
        By default the loss of the next token, if the store was made with it. A store without gradients accepts any.

    Raises
    ------
    MismatchError
        The store's gradients are those of another objective.
    """
    given: Any = objective if objective is not None else NextTokenLoss()
    described, recorded = describe_objective(given), store.spec.objective
    if recorded is None and any(name.endswith(GRADIENT) for name in store.arrays):
        recorded = describe_objective(NextTokenLoss())  # what a capture without objective differentiates
    if recorded in (None, described):
        return given
    name = str(recorded.get("function", "")).rpartition(".")[2]
    same = recorded.get("function") == described["function"]
    raise MismatchError(
        "the gradients of the store are those of another objective",
        where=str(store.path),
        expected=f"{name}, as in the capture" + (", with the same settings" if same else ""),
        found=f"{given!r}"[:80] + (" by default" if objective is None else ""),
        remedy="pass objective= as it was passed to the capture (in a file: attribution.objective)",
    )


def sum_by_document(objective: Objective, ran: ForwardResult, batch: Batch) -> torch.Tensor:
    """Return an objective's value for each document of a batch, summed over its tokens: float64, shape (documents,).

    Raises
    ------
    AnalysisError
        The objective returns one number for the whole batch.
    """
    output: Any = ModelOutput(ran.logits)
    value = check_value(objective(output, batch), batch)
    if value.ndim == 0:
        raise AnalysisError(
            "the objective returns one number for a whole batch, so that effects on single documents are not known",
            expected=f"a tensor of shape {batch.shape} or ({batch.shape[0]},)",
            found="a scalar",
        )
    return value.double().reshape(batch.shape[0], -1).sum(1)


class ModelOutput:
    """The part of a model's output that an objective reads.

    >>> ModelOutput(torch.zeros(1, 2, 5)).logits.shape
    torch.Size([1, 2, 5])
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
