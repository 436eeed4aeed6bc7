"""A few rows of one site and layer, with what is known about each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import ml_dtypes
import numpy as np

PIECE = 1 << 16  # values; as float64 they stay in a core's cache


class RowBlock:
    """Rows of one site and layer, as stored, and their coordinates.

    Attributes
    ----------
    stored : ndarray of shape (rows, features)
        In the storage dtype; valid until the next block is read.
    rows, position, token_id, document : ndarray of shape (rows,)
        Row number, and the coordinates of each row.
    """

    def __init__(
        self, stored: np.ndarray, rows: np.ndarray, position: np.ndarray, token_id: np.ndarray, document: np.ndarray
    ) -> None:
        self.stored = stored
        self.rows, self.position, self.token_id, self.document = rows, position, token_id, document

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def features(self) -> int:
        """Length of a row."""
        return int(self.stored.shape[1])

    @cached_property
    def float64(self) -> np.ndarray:
        """All values as float64, exactly."""
        return widen(self.stored).astype(np.float64)

    def pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (place, float64 values) a few rows at a time; values may be overwritten by whoever reads them."""
        step = max(1, PIECE // max(1, self.features))
        for start in range(0, len(self), step):
            place = slice(start, min(start + step, len(self)))
            yield place, widen(self.stored[place]).astype(np.float64)

    def select_rows(self, chosen: np.ndarray) -> RowBlock:
        """Return some of the rows, by mask or number."""
        return RowBlock(
            self.stored[chosen],
            self.rows[chosen],
            self.position[chosen],
            self.token_id[chosen],
            self.document[chosen],
        )


def widen(values: np.ndarray) -> np.ndarray:
    """Return stored values as float32, exactly; a shift of bits is four times as quick as a cast of bfloat16."""
    if values.dtype == ml_dtypes.bfloat16:
        bits = values.view(np.uint16).astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    return values.astype(np.float32, copy=False)
