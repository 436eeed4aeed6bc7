"""A block of rows of one site and layer, with their coordinates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import ml_dtypes
import numpy as np

PIECE = 1 << 16
"""Values of a piece; as float64 they fit into the cache of a core."""


class RowBlock:
    """Rows of one site and layer, as stored, with their coordinates.

    >>> numbers = np.arange(3)
    >>> block = RowBlock(np.ones((3, 2), np.float32), numbers, numbers, numbers, numbers)
    >>> len(block), block.features
    (3, 2)

    Attributes
    ----------
    stored : ndarray of shape (rows, features)
        Values in the storage dtype, or float32 if that is int8; valid until the next block is read.
    rows, position, token_id, document : ndarray of shape (rows,)
        Number and coordinates of each row.
    other : ndarray of shape (rows, other features), or None
        Values of the same rows in another store, if two are read together.
    """

    def __init__(
        self, stored: np.ndarray, rows: np.ndarray, position: np.ndarray, token_id: np.ndarray, document: np.ndarray
    ) -> None:
        self.stored = stored
        self.other: np.ndarray | None = None
        self.rows, self.position, self.token_id, self.document = rows, position, token_id, document

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def features(self) -> int:
        """Number of features of a row."""
        return int(self.stored.shape[1])

    @cached_property
    def float64(self) -> np.ndarray:
        """All values as float64, without rounding."""
        return widen(self.stored).astype(np.float64)

    def float64_pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (slice, float64 values) for a few rows at a time; the caller may overwrite the values."""
        step = max(1, PIECE // max(1, self.features))
        for start in range(0, len(self), step):
            place = slice(start, min(start + step, len(self)))
            yield place, widen(self.stored[place]).astype(np.float64)

    def select_rows(self, chosen: np.ndarray) -> RowBlock:
        """Return a block of some of the rows, by mask or index."""
        found = RowBlock(
            self.stored[chosen],
            self.rows[chosen],
            self.position[chosen],
            self.token_id[chosen],
            self.document[chosen],
        )
        found.other = None if self.other is None else self.other[chosen]
        return found


def widen(values: np.ndarray) -> np.ndarray:
    """Return stored values as float32 without rounding; a bit shift is four times as fast as a cast of bfloat16."""
    if values.dtype == ml_dtypes.bfloat16:
        bits = values.view(np.uint16).astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    return values.astype(np.float32, copy=False)
