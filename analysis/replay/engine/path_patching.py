"""Path patching: the effect of an edit that reaches the output by way of one receiver only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.replay.edits.heads import head_mask
from analysis.replay.engine.engine import Engine
from analysis.replay.engine.forward_hooks import ForwardResult, GivenValues, PlacedEdit
from analysis.replay.engine.receiver import WRITERS, Receiver
from flexcache.errors import SiteError
from flexcache.hooks.locate.head_count import count_heads
from flexcache.recording.forward.batch import Batch
from flexcache.virtual.plan import Start

Key = tuple[str, int | None]
Tokens = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class PathForwards:
    """Two forwards of a batch for each edit: one to record a receiver, one to change only the receiver.

    An edit's first forward keeps everything that is added to the residual stream between edit and receiver as it is
    without the edit, and records the receiver; the second one changes nothing but the receiver.

    Attributes
    ----------
    unchanged : mapping from (site, layer) to Tensor of shape (lines, longest, features)
        The receiver and the frozen terms, without an edit.
    tokens : tuple of ndarray
        Lines and positions that receive.
    """

    engine: Engine
    receiver: Receiver
    batch: Batch
    unchanged: dict[Key, torch.Tensor]
    tokens: Tokens

    @classmethod
    def prepare(cls, engine: Engine, receiver: Receiver, batch: Batch, tokens: Tokens) -> PathForwards:
        """Run a batch without an edit."""
        keys: list[Key] = [(receiver.site, receiver.layer), *receiver.sites_between("resid_pre", 0)]
        keys = [key for key in keys if _has_site(engine, key)]
        last = batch.attention_mask().sum(1, keepdims=True).astype(np.int64) - 1
        return cls(engine, receiver, batch, engine.run(batch, read=last, points=keys).residuals, tokens)

    def run_path(self, start: Start, placed: PlacedEdit, **options: Any) -> ForwardResult:
        """Run an edit along its path; *options* are those of `Engine.run`."""
        key = (self.receiver.site, self.receiver.layer)
        sender = placed.point
        assert sender.layer is not None
        between = self.receiver.sites_between(sender.array, sender.layer)
        mask = self.batch.attention_mask()
        kept = [self._give(one, np.nonzero(mask)) for one in between if one in self.unchanged]
        last = mask.sum(1, keepdims=True).astype(np.int64) - 1
        moved = self.engine.run(self.batch, start, [placed, *kept], read=last, points=[key])
        result = self.engine.run(self.batch, start, [self._give(key, self.tokens, moved.residuals[key])], **options)
        outside = set(range(len(mask))) - set(self.tokens[0].tolist())
        result.left_out |= moved.left_out | outside
        return result

    def _give(self, key: Key, tokens: Any, moved: torch.Tensor | None = None) -> PlacedEdit:
        """Return the edit that inserts the unchanged values at a site, or those of *moved* in the receiving heads."""
        index = tuple(torch.from_numpy(np.asarray(part)) for part in tokens)
        values = self.unchanged[key][index]
        if moved is not None and self.receiver.heads is None:
            values = moved[index]
        elif moved is not None:
            heads = count_heads(self.engine.model, self.receiver.site, int(key[1] or 0))
            values = torch.where(head_mask(values, self.receiver.heads, heads), moved[index], values)
        return PlacedEdit(self.engine.point(*key), GivenValues(values), tuple(tokens))


def _has_site(engine: Engine, key: Key) -> bool:
    """Return False for cross-attention in a model without it; raise SiteError for other missing sites."""
    try:
        engine.point(*key)
    except SiteError:
        if key[0] != WRITERS[1]:
            raise
        return False
    return True
