"""Find the start of a replay, and read the stored residual stream that it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from analysis.replay.edits.edit_context import StoreRows
from flexcache.errors import AnalysisError
from flexcache.recording.forward.batch import Batch
from flexcache.store.read.store import Store
from flexcache.virtual.plan import BEGINNING, Start


def find_start(store: Store, site: str, layer: int | None, *, stored: bool = True) -> Start:
    """Return the latest start that the store allows for an edit at a site and layer.

    Raises
    ------
    AnalysisError
        *stored* is True, and the store lacks the residual stream just before the site.
    """
    wanted = 0 if layer is None else layer + 1 if site == "resid_post" else layer
    for skipped in range(wanted, 0, -1):
        for name, number in (("resid_post", skipped - 1), ("resid_pre", skipped)):
            if name in store.arrays and number in store.layers(name):
                return Start(skipped, name, number)
        if stored:
            break
    if stored and wanted:
        raise AnalysisError(
            "the residual stream that the replay would start from is not stored",
            where=f"{site}, layer {layer}",
            expected=f"resid_post of layer {wanted - 1}, or resid_pre of layer {wanted}",
            found=", ".join(f"{name} {list(store.layers(name))}" for name in store.sites),
            remedy="capture it, or choose one of the stored layers",
        )
    return BEGINNING


def read_residual(source: StoreRows, batch: Batch, start: Start, dtype: torch.dtype) -> torch.Tensor:
    """Return the stored residual stream of a batch, padded with zeros: shape (sequences, longest, hidden)."""
    lengths = np.array([len(tokens) for tokens in batch.tokens])
    first = source.row_start[batch.documents]
    contiguous = len(lengths) == 1 or bool((first[1:] == (first + lengths)[:-1]).all())
    rows: Any = (
        slice(int(first[0]), int(first[0] + lengths.sum()))
        if contiguous
        else np.concatenate([np.arange(a, a + n) for a, n in zip(first, lengths, strict=True)])
    )
    values = source.read_rows(start.site, start.layer, rows)
    padded = torch.zeros((*batch.shape, values.shape[1]), dtype=dtype)
    padded[torch.from_numpy(batch.attention_mask()).bool()] = values.to(dtype)
    return padded


def stack_residuals(
    source: StoreRows, batch: Batch, starts: Sequence[Start], lines: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the residual streams of copies of a batch along the first dim, one copy for each start.

    A copy that skips no block gets zeros. The last copy's first line fills up to *lines*.
    """
    stored = {start: read_residual(source, batch, start, dtype) for start in dict.fromkeys(starts) if start.skipped}
    nothing = torch.zeros_like(next(iter(stored.values())))
    copies = [stored.get(start, nothing) for start in starts]
    return torch.cat([*copies, *[copies[-1][:1]] * (lines - len(starts) * batch.shape[0])])
