"""Turn the padded activations of a batch into the bytes of stored rows, and move these into slabs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flexcache.recording.forward.batch import Batch
from flexcache.store.write.row_encoding import (
    FLOAT32,
    EncodedRows,
    encode_bytes,
    encode_int8,
    host,
    is_torch,
    single_piece,
)
from flexcache.store.write.shard_file import copy_bytes
from flexcache.store.write.slabs import Slab, anonymous_slab

Rows = tuple[Any, list[tuple[int, int]]]
"""Bytes, one-dimensional and on any device, and the spans of (start, count) bytes that are rows."""


class RowTransfer:
    """Copies rows in the memory of the host, at once; a subclass copies them from another device."""

    def allocate(self, size: int) -> Slab:
        """Return a slab of *size* bytes of page-aligned memory."""
        return anonymous_slab(size)

    def rows_of(self, batch: Batch, values: Any, dtype: np.dtype, outliers: int = 0) -> list[Rows]:
        """Return the rows of padded activations, as `rows_of` does."""
        return [*rows_of(batch, values, dtype, outliers)]

    def copy(self, slab: Slab, at: int, source: Any, start: int, count: int) -> None:
        """Copy bytes *start* to *start + count* of rows to *at* in a slab."""
        copy_bytes(slab, at, source, start, count)


def rows_of(batch: Batch, values: Any, dtype: np.dtype, outliers: int = 0) -> list[EncodedRows]:
    """Return the rows of padded activations, shape (sequences, longest, …), as bytes in the storage dtype.

    This runs inside hooks, so nothing is copied unless it is cast or averaged: the bytes are then those of the
    activations, padding included, and the spans say which of them are rows. For int8, a second piece has the scales.

    Raises
    ------
    Unstorable
        See `encode_rows`.
    """
    if dtype == np.int8:
        return encode_int8(_rows_of(batch, values, FLOAT32), math.prod(values.shape[2:]), outliers)
    return [_rows_of(batch, values, dtype)]


def _rows_of(batch: Batch, values: Any, dtype: np.dtype) -> EncodedRows:
    same = str(values.dtype).removeprefix("torch.") == dtype.name
    if batch.mean:
        return single_piece(encode_bytes(batch.kept(host(values) if is_torch(values) else values), dtype))
    if same and batch.spans is not None:
        content = encode_bytes(values, dtype)
        width = len(content) // (batch.shape[0] * batch.shape[1])
        return content, [(start * width, count * width) for start, count in batch.spans]
    if is_torch(values):
        import torch

        return single_piece(
            encode_bytes(torch.cat([values[line][kept] for line, kept in enumerate(batch.kept_positions)]), dtype)
        )
    return single_piece(encode_bytes(batch.kept(values), dtype))
