"""A seeded sample of the documents that every worker can compute on its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DocumentSample:
    """A sample of whole documents, each chosen by a hash of its number and a seed.

    With the same seed, a sample of a smaller share is contained in one of a larger share.

    >>> sample = DocumentSample.of_rows(100, n_rows=1000, skip=1)
    >>> sample.share, sample.skip
    (0.1, 1)

    Attributes
    ----------
    share : float
        Share of the documents, from 0 to 1.
    seed : int
    skip : int
        Number of first tokens of each document that are left out. Their activations are of another kind and would
        dominate any measure that is not robust (Sun et al. 2024, arXiv 2402.17762).
    """

    share: float
    seed: int = 0
    skip: int = 0

    @classmethod
    def of_rows(cls, rows: int | None, n_rows: int, seed: int = 0, skip: int = 0) -> DocumentSample | None:
        """Return a sample of about *rows* of *n_rows* rows; None if that is all of them."""
        if rows is None or rows >= n_rows:
            return cls(1.0, seed, skip) if skip else None
        return cls(rows / max(1, n_rows), seed, skip)

    def __call__(self, document: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return a mask of the rows in the sample, from their document numbers and positions."""
        with np.errstate(over="ignore"):
            x = document.astype(np.uint64) + np.uint64(self.seed % 2**32) * np.uint64(0xD1342543DE82EF95)
            x = x + np.uint64(0x9E3779B97F4A7C15)  # splitmix64 (Steele, Lea & Flood 2014)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
        return ((x >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.share) & (position >= self.skip)
