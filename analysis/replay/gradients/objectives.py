"""The objective of a store, and its values by document."""

from __future__ import annotations

from typing import Any

import torch

from analysis.replay.engine.forward_hooks import ForwardResult
from flexcache.errors import AnalysisError, MismatchError
from flexcache.identity.store_tokenizer import store_tokenizer
from flexcache.provenance import select_fingerprint
from flexcache.recording.arguments import objective_of
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.objective import (
    LogitDifference,
    NextTokenLoss,
    Objective,
    check_value,
    describe_objective,
    recorded_objective,
)
from flexcache.site import GRADIENT
from flexcache.store.read.store import Store


def stored_objective(store: Store, objective: Objective | None) -> Objective:
    """Return the objective whose gradients a store holds, after a comparison with its record.

    Parameters
    ----------
    objective
        By default that of the capture, if it was the loss of the next token or a `LogitDifference`. Any is accepted for
        a store without gradients.

    Raises
    ------
    MismatchError
        The store's gradients are those of another objective, or of one that has to be passed.
    """
    if isinstance(objective, LogitDifference) and str in (type(objective.token), type(objective.other)):
        objective = objective_of(objective, store_tokenizer(store))
    recorded = store.spec.objective
    if recorded is None and not any(name.endswith(GRADIENT) for name in store.arrays):
        return NextTokenLoss() if objective is None else objective
    own = recorded_objective(recorded)
    if objective is None and own is not None:
        return own
    expected = select_fingerprint(recorded or describe_objective(NextTokenLoss())) or {}
    if objective is not None and select_fingerprint(describe_objective(objective)) == expected:
        return objective
    function = str(expected.get("function", "")).rpartition(".")[2]
    raise MismatchError(
        "the gradients of the store are those of another objective",
        where=str(store.path),
        expected=f"{function}, as in the capture" if own is None else repr(own),
        found="no objective, and the record cannot be made into one" if objective is None else repr(objective)[:80],
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
