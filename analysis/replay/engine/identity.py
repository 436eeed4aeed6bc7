"""The identity check: a replay that changes nothing must give what the whole forward gives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from analysis.replay.engine.engine import Engine
from flexcache.errors import AnalysisError
from flexcache.recording.forward.batch import Batch
from flexcache.store.read.store import Store
from flexcache.virtual.plan import Start

ROUNDING = 0.05
"""Largest relative root mean square, in units of the logits' spread, that a replay of an inexact store may have."""


@dataclass(frozen=True)
class Discrepancy:
    """Distance of a replay from the forward: the largest difference of logits, and the relative root mean square."""

    largest: float
    relative: float

    def __or__(self, other: Discrepancy) -> Discrepancy:
        return Discrepancy(max(self.largest, other.largest), max(self.relative, other.relative))


def identity_error(
    store: Store,
    model: nn.Module,
    site: str = "resid_post",
    layer: int = 0,
    *,
    documents: Collection[str] | None = None,
    accept: Collection[str] = (),
    processor: Any = None,
) -> float:
    """Return the largest difference between the logits of complete forwards and of replays that change nothing.

    It is exactly 0.0 if the storage dtype is the compute dtype and the conditions are the capture's. For a model
    without a head, the last hidden states are compared. ::

        replay.identity_error(store, model, layer=12)  # 0.0

    Parameters
    ----------
    layer
        Layer after which the replay starts; negative from the end.
    documents
        Ids; all committed documents by default.
    accept
        Incompatibilities to ignore, by name: ``"weights"``, ``"behavior"``, ``"attention"``, ``"int8"``.
    processor
        As for `Engine`.

    Raises
    ------
    MismatchError
        The store cannot be replayed with this model.
    AnalysisError
        The residual stream is not stored there, or the model fails when blocks are skipped.
    """
    engine = Engine(store, model, accept, processor)
    start = engine.start_at(site, layer % engine.depth)
    chosen = None if documents is None else [engine.source.numbers[name] for name in documents]
    worst = Discrepancy(0.0, 0.0)
    for batch in engine.batches(chosen):
        worst |= measure_discrepancy(engine, batch, start, engine.run(batch).logits)
    return worst.largest


def measure_discrepancy(engine: Engine, batch: Batch, start: Start, logits: torch.Tensor) -> Discrepancy:
    """Return the distance of a replay that changes nothing from the *logits* of the batch's complete forward."""
    return compare_logits(engine.run(batch, start).logits, logits, batch)


def compare_logits(
    replayed: torch.Tensor, logits: torch.Tensor, batch: Batch, read: np.ndarray | None = None
) -> Discrepancy:
    """Return the distance between logits, without padding."""
    real = torch.from_numpy(batch.attention_mask() if read is None else np.ones(read.shape)).bool()
    if replayed.ndim == 2:  # scores of whole sequences, such as classes of images
        replayed, logits, real = replayed[:, None], logits[:, None], torch.ones((len(replayed), 1), dtype=torch.bool)
    largest, square, spread = 0.0, 0.0, 0.0
    for line in range(len(replayed)):  # a sequence at a time: logits are large
        ours, theirs = (values[line][real[line].to(values.device)].float() for values in (replayed, logits))
        difference = ours - theirs
        largest = max(largest, float(difference.abs().max()))
        square += float(difference.square().sum(dtype=torch.float64))
        spread += float((theirs - theirs.mean(-1, keepdim=True)).square().sum(dtype=torch.float64))
    return Discrepancy(largest, (square / spread) ** 0.5 if spread else float(largest > 0))


def check_discrepancy(
    engine: Engine, start: Start, found: Discrepancy, notes: Collection[str], copies: int = 1
) -> None:
    """Raise AnalysisError if a replay differs from the forward; if it is not exact, by more than `ROUNDING`.

    A replay from int8 rows, which a user has to accept, may differ by any finite amount.
    """
    exact = not notes and copies == 1
    stored = engine.store.arrays.get(start.site)  # None for a forward from the tokens
    allowed = np.inf if stored is not None and stored.dtype == "int8" else ROUNDING
    if not np.isfinite(found.relative) or (found.largest > 0 if exact else found.relative > allowed):
        raise AnalysisError(
            "the replay of an unchanged store is not the model's own forward",
            where=f"{type(engine.model).__name__}, the first {start.skipped} blocks skipped",
            expected="equal logits, bit for bit" if exact else f"logits to {ROUNDING:.0%} of their spread",
            found=f"largest difference {found.largest:.3g}, {found.relative:.2%} of the spread",
            remedy="the model's blocks pass on more than the residual stream, or your own hooks change it",
        )
