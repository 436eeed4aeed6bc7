"""Design matrix of linear probes: in memory, or read in blocks at each pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Read = Callable[[slice], NDArray[np.floating]]

BLOCK = 8192
"""Largest number of rows that are computed with at once."""
CELLS = 2**21
"""Largest number of values of a block, float64: 16 MiB."""


class Design:
    """Rows of one layer, (rows, features), read in blocks at each pass and computed with in float64.

    Solvers use *common units*: `middle` subtracted and divided by `unit`, both of all rows. Mean and deviation of a
    single training set are applied by the caller.

    Parameters
    ----------
    rows
        A matrix; or, with *shape*, a function that reads a slice of its rows. Then one block is in memory at a time.
    """

    def __init__(self, rows: NDArray[np.floating] | Read, shape: tuple[int, int] | None = None) -> None:
        self._read: Read = (lambda part: rows[part]) if isinstance(rows, np.ndarray) else rows
        self.shape = (rows.shape[0], rows.shape[1]) if isinstance(rows, np.ndarray) else shape or (0, 0)

    @property
    def single(self) -> bool:
        """True if all rows are one block."""
        return self.shape[0] <= BLOCK

    def blocks(self, columns: int = 0) -> Iterator[tuple[slice, NDArray[np.floating]]]:
        """Yield blocks of rows with their slices, as they are read; *columns* further values a row limit their size."""
        size = min(BLOCK, max(64, CELLS // max(self.shape[1], columns, 1)))
        for first in range(0, self.shape[0], size):
            part = slice(first, min(first + size, self.shape[0]))
            yield part, self._read(part)

    def parts(self, part_of: Ints, columns: int = 0) -> Iterator[tuple[Ints, int, Floats]]:
        """Yield the rows of one part of a block at a time: their numbers, the part, and the rows minus `middle`."""
        for place, block in self.blocks(columns):
            inside = part_of[place]
            order = np.argsort(inside, kind="stable")
            for at in np.split(order, np.flatnonzero(np.diff(inside[order])) + 1):
                yield place.start + at, int(inside[at[0]]), np.subtract(block[at], self.middle, dtype=np.float64)

    @cached_property
    def middle(self) -> Floats:
        """Mean of all rows, (features,)."""
        return np.asarray(sum(block.sum(0, dtype=np.float64) for _, block in self.blocks()) / self.shape[0])

    @cached_property
    def unit(self) -> Floats:
        """Standard deviation of all rows, (features,); 1 for constant features."""
        centred = (block - self.middle for _, block in self.blocks())
        square = sum(np.einsum("nd,nd->d", rows, rows) for rows in centred) / self.shape[0]
        return np.where(square > self._floor(self.middle), np.sqrt(square), 1.0)

    @cached_property
    def standardised(self) -> Floats:
        """All rows in common units, (rows, features), kept in memory."""
        return np.concatenate([(block - self.middle) / self.unit for _, block in self.blocks()])

    @cached_property
    def principal(self) -> tuple[Floats, NDArray[np.float32]]:
        """Eigenvalues and eigenvectors of the covariance in common units, (features,) and (features, features).

        Computed in single precision, for preconditioners.
        """
        gram = np.zeros((self.shape[1], self.shape[1]))
        for _, block in self.blocks():
            common = ((block - self.middle) / self.unit).astype(np.float32)
            gram += common.T @ common
        values, vectors = np.linalg.eigh(gram / self.shape[0])
        return np.maximum(values, 0.0), vectors.astype(np.float32)

    def spread(self, sets: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of the features in each set, (sets, features); 1 for constant features."""
        kinds, part_of = split_rows(sets)
        total, square = np.zeros((2, kinds.shape[1], self.shape[1]))
        for _, part, rows in self.parts(part_of):
            total[part] += rows.sum(0)
            square[part] += np.einsum("nd,nd->d", rows, rows)
        share = kinds / sets.sum(1, keepdims=True)
        away = share @ total
        square, mean = share @ square - away**2, away + self.middle
        constant = square <= self._floor(mean)
        return mean, np.where(constant, 1.0, np.sqrt(np.where(constant, 1.0, square)))

    def product(self, w: Floats) -> Floats:
        """Return the rows in common units times vectors: (features, n) to (rows, n)."""
        return np.concatenate([((block - self.middle) / self.unit) @ w for _, block in self.blocks()])

    def _floor(self, mean: Floats) -> Floats:
        """Return the variance up to which a feature counts as constant: the rounding error of its mean."""
        return np.asarray((10 * np.finfo(np.float64).eps * np.abs(mean)) ** 2)


def split_rows(sets: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Ints]:
    """Split the rows into parts of those that belong to the same sets, (sets, rows) to (sets, parts) and (rows,).

    For a cross-validation with single folds and pairs of folds left out, the parts are the folds.

    >>> kinds, part_of = split_rows(np.array([[True, True, False], [True, False, True]]))
    >>> kinds[:, part_of].tolist()
    [[True, True, False], [True, False, True]]
    """
    packed = np.packbits(sets, axis=0)
    wide = np.zeros((-(-len(packed) // 8) * 8, sets.shape[1]), np.uint8)
    wide[: len(packed)] = packed
    keys = np.ascontiguousarray(wide.T).view(np.uint64)
    keys = keys[:, 0] if keys.shape[1] == 1 else keys
    _, first, part_of = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return sets[:, first], part_of.reshape(-1).astype(np.int64)
