"""The identity check: a replay that changes nothing must give what the whole forward gives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from analysis.replay.engine.engine import Engine, Start
from flexcache.errors import AnalysisError
from flexcache.recording.forward.batch import Batch
from flexcache.store.read.store import Store

ROUNDING = 0.05
"""Where the store is not exact: the most that differences may be, as root mean squares, of the logits' own spread."""


@dataclass(frozen=True)
class Discrepancy:
    """How far a replay is from the forward: the largest difference of logits, and the relative root mean square."""

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
    """Return the largest difference between logits of whole forwards and of those that go on from the store.

    It is 0.0 exactly wherever the storage dtype is the compute dtype and the conditions are the capture's. Of a model
    without a head, its last hidden states are compared.

    Parameters
    ----------
    layer
        Where the replay begins; negative from the end.
    documents
        Ids; by default all that are committed.
    accept
        Obstacles to ignore, by name: ``"weights"``, ``"attention"``.
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
        worst |= misfit(engine, batch, start, engine.run(batch).logits)
    return worst.largest


def misfit(engine: Engine, batch: Batch, start: Start, logits: torch.Tensor) -> Discrepancy:
    """Return how far a replay of a batch that changes nothing is from *logits* of its whole forward."""
    return compare(engine.run(batch, start).logits, logits, batch)


def compare(mine: torch.Tensor, logits: torch.Tensor, batch: Batch, read: np.ndarray | None = None) -> Discrepancy:
    """Return how far logits are from others, padding aside."""
    real = torch.from_numpy(batch.attention_mask() if read is None else np.ones(read.shape)).bool()
    if mine.ndim == 2:  # scores of whole sequences, such as classes of images
        mine, logits, real = mine[:, None], logits[:, None], torch.ones((len(mine), 1), dtype=torch.bool)
    largest, square, spread = 0.0, 0.0, 0.0
    for line in range(len(mine)):  # a sequence at a time: logits are large
        ours, theirs = (values[line][real[line].to(values.device)].float() for values in (mine, logits))
        difference = ours - theirs
        largest = max(largest, float(difference.abs().max()))
        square += float(difference.square().sum(dtype=torch.float64))
        spread += float((theirs - theirs.mean(-1, keepdim=True)).square().sum(dtype=torch.float64))
    return Discrepancy(largest, (square / spread) ** 0.5 if spread else float(largest > 0))


def refuse_misfit(engine: Engine, start: Start, found: Discrepancy, notes: Collection[str], copies: int = 1) -> None:
    """Refuse a model whose replay is not its forward.

    Raises
    ------
    AnalysisError
        With the error that was found: of any size where the replay should be exact, else beyond `ROUNDING`.
    """
    exact = not notes and copies == 1
    if not np.isfinite(found.relative) or (found.largest > 0 if exact else found.relative > ROUNDING):
        raise AnalysisError(
            "the replay of an unchanged store is not the model's own forward",
            where=f"{type(engine.model).__name__}, the first {start.skipped} blocks skipped",
            expected="equal logits, bit for bit" if exact else f"logits to {ROUNDING:.0%} of their spread",
            found=f"largest difference {found.largest:.3g}, {found.relative:.2%} of the spread",
            remedy="the model's blocks hand on more than the residual stream, or hooks of yours change it",
        )
