"""Design matrix of linear probes: in memory, or read in blocks at each pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Read = Callable[[slice], NDArray[np.floating]]

BLOCK = 8192
"""Rows of a block that is read at each pass."""


class Design:
    """Rows of one layer, (rows, features), for products with many vectors at once.

    Products use the rows in *common units*: `middle` subtracted and divided by `unit`, both of all rows. Mean and
    deviation of a single training set are applied by the caller.

    Parameters
    ----------
    rows
        A matrix; or, with *shape*, a function that reads a slice of its rows. Then one block is in memory at a time,
        and every product is a pass over the rows.
    """

    def __init__(self, rows: NDArray[np.floating] | Read, shape: tuple[int, int] | None = None) -> None:
        self._read: Read = (lambda part: rows[part]) if isinstance(rows, np.ndarray) else rows
        self.shape = (rows.shape[0], rows.shape[1]) if isinstance(rows, np.ndarray) else shape or (0, 0)
        self._whole = np.asarray(rows, np.float64) if isinstance(rows, np.ndarray) else None
        self._common: Floats | None = None

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        """Yield blocks of rows with their slices, in float64, not standardised."""
        if self._whole is not None:
            yield slice(0, self.shape[0]), self._whole
            return
        for first in range(0, self.shape[0], BLOCK):
            part = slice(first, min(first + BLOCK, self.shape[0]))
            yield part, np.asarray(self._read(part), np.float64)

    @cached_property
    def middle(self) -> Floats:
        """Mean of all rows, (features,)."""
        return np.asarray(sum(block.sum(0) for _, block in self.blocks()) / self.shape[0])

    @cached_property
    def unit(self) -> Floats:
        """Standard deviation of all rows, (features,); 1 for constant features."""
        square = sum(((block - self.middle) ** 2).sum(0) for _, block in self.blocks()) / self.shape[0]
        return np.where(square > self._floor(self.middle), np.sqrt(square), 1.0)

    @cached_property
    def principal(self) -> tuple[Floats, Floats]:
        """Eigenvalues and eigenvectors of the covariance in common units, (features,) and (features, features)."""
        gram = sum(common.T @ common for _, common in self._commons()) / self.shape[0]
        values, vectors = np.linalg.eigh(gram)
        return np.maximum(values, 0.0), vectors

    def spread(self, sets: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of the features in each set, (sets, features); 1 for constant features."""
        share = sets / sets.sum(1, keepdims=True)
        mean = sum(share[:, part] @ (block - self.middle) for part, block in self.blocks())
        square = sum(share[:, part] @ (block - self.middle) ** 2 for part, block in self.blocks()) - mean**2
        mean = mean + self.middle
        constant = square <= self._floor(mean)
        return np.asarray(mean), np.where(constant, 1.0, np.sqrt(np.where(constant, 1.0, square)))

    def product(self, w: Floats) -> Floats:
        """Return the rows in common units times vectors: (features, n) to (rows, n)."""
        if self._whole is not None:
            return np.asarray(self._in_memory() @ w)
        found = np.empty((self.shape[0], w.shape[1]))
        for part, common in self._commons():
            found[part] = common @ w
        return found

    def transposed(self, values: Floats) -> Floats:
        """Return the transposed rows in common units times vectors: (rows, n) to (features, n)."""
        if self._whole is not None:
            return np.asarray(self._in_memory().T @ values)
        return np.asarray(sum(common.T @ values[part] for part, common in self._commons()))

    def _commons(self) -> Iterator[tuple[slice, Floats]]:
        if self._whole is not None:
            yield slice(0, self.shape[0]), self._in_memory()
            return
        for part, block in self.blocks():
            yield part, (block - self.middle) / self.unit

    def _in_memory(self) -> Floats:
        if self._common is None:
            assert self._whole is not None
            self._common = (self._whole - self.middle) / self.unit
        return self._common

    def _floor(self, mean: Floats) -> Floats:
        """Return the variance up to which a feature counts as constant: the rounding error of its mean."""
        return np.asarray((10 * np.finfo(np.float64).eps * np.abs(mean)) ** 2)
