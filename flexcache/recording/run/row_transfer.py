"""Move the kept rows of activations from the device of a model into slabs."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.batch_rows import rows_of
from flexcache.store.write.shard_file import copy_bytes
from flexcache.store.write.slabs import Slab, anonymous_slab

Rows = tuple[Any, list[tuple[int, int]]]
"""Bytes, one-dimensional and on any device, and the spans of (start, count) bytes that are rows."""


class RowTransfer:
    """Copies rows in the memory of the host, at once; a subclass copies them from another device."""

    def allocate(self, size: int) -> Slab:
        """Return a slab of *size* bytes of page-aligned memory."""
        return anonymous_slab(size)

    def rows_of(self, batch: Batch, values: Any, dtype: np.dtype) -> list[Rows]:
        """Return the rows of padded activations, as `flexcache.recording.forward.batch_rows.rows_of` does."""
        return [*rows_of(batch, values, dtype)]

    def copy(self, slab: Slab, at: int, source: Any, start: int, count: int) -> None:
        """Copy bytes *start* to *start + count* of rows to *at* in a slab."""
        copy_bytes(slab, at, source, start, count)
