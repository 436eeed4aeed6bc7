"""Which part of which document is in which sequence, and which rows are of which part. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Pieces:
    """Runs of a document's tokens inside of sequences, in the order of the sequences and within them.

    Attributes
    ----------
    line : ndarray of int64, shape (pieces,)
        Place of the sequence among those that were asked for.
    document : ndarray of int64, shape (pieces,)
        Number of the document in the corpus.
    start, length, offset : ndarray of int64, shape (pieces,)
        First token of the document, number of tokens, and place of the first in the sequence.
    kept_from, rows : ndarray of int64, shape (pieces,)
        Which of the document's rows this piece keeps: so many from that one on.
    """

    line: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offset: np.ndarray
    kept_from: np.ndarray
    rows: np.ndarray


class Cuts(Protocol):
    """The sequences of a corpus, in corpus order."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each: int32, shape (sequences,)."""

    @property
    def kept(self) -> np.ndarray:
        """Rows of each: int32, shape (sequences,)."""

    @property
    def linked(self) -> np.ndarray | None:
        """Whether each goes on with the document that the one before it ends with; None where none does."""

    def pieces(self, sequences: np.ndarray) -> Pieces:
        """Return the pieces of sequences, by their numbers."""


class Whole:
    """Each document is a sequence."""

    linked = None

    def __init__(self, lengths: np.ndarray, kept: np.ndarray) -> None:
        self.lengths, self.kept = lengths, kept

    def pieces(self, sequences: np.ndarray) -> Pieces:
        """Return the pieces of sequences, by their numbers: one each."""
        none = np.zeros(len(sequences), np.int64)
        lengths, kept = (values[sequences].astype(np.int64) for values in (self.lengths, self.kept))
        return Pieces(np.arange(len(sequences)), sequences, none, lengths, none, none, kept)


class Windowed:
    """Windows of documents; each keeps the rows of the tokens that no window before it has.

    Made by `append`, a batch of documents at a time. A window without rows is left out.
    """

    def __init__(self, length: int, stride: int) -> None:
        self._length, self._stride = length, stride
        self._documents = 0
        self._parts: list[tuple[np.ndarray, ...]] = []

    def append(self, lengths: np.ndarray, kept: np.ndarray | None) -> None:
        """Add documents.

        Parameters
        ----------
        lengths : ndarray of int, shape (documents,)
        kept : ndarray of bool, shape (tokens,), or None
            Which of their tokens, one document after the other, are rows; None where all are.
        """
        lengths = lengths.astype(np.int64)
        counts = 1 + np.maximum(0, -(-(lengths - self._length) // self._stride))
        document = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = number * self._stride
        stop = np.minimum(start + self._length, lengths[document])
        own = np.where(number == 0, 0, start - self._stride + self._length)
        if kept is None:
            first, last = own, stop
        else:
            before = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
            begin = (np.cumsum(lengths) - lengths)[document]
            first, last = (before[begin + at] - before[begin] for at in (own, stop))
        some = last > first
        columns = (document + self._documents, start, stop - start, first, last - first)
        self._parts.append(tuple(column[some] for column in columns))
        self._documents += len(lengths)

    def _column(self, number: int) -> np.ndarray:
        if len(self._parts) != 1:
            joined = [np.concatenate(parts) for parts in zip(*self._parts)] or [np.zeros(0, np.int64)] * 5
            self._parts = [(joined[0], *(column.astype(np.int32) for column in joined[1:]))]
        return self._parts[0][number]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window."""
        return self._column(2)

    @property
    def kept(self) -> np.ndarray:
        """Rows of each window."""
        return self._column(4)

    @property
    def linked(self) -> np.ndarray:
        """Whether a window is of the document of the one before it."""
        return np.diff(self._column(0), prepend=-1) == 0

    def pieces(self, sequences: np.ndarray) -> Pieces:
        """Return the pieces of windows, by their numbers: one each."""
        document, start, length, first, rows = (self._column(n)[sequences].astype(np.int64) for n in range(5))
        return Pieces(np.arange(len(sequences)), document, start, length, np.zeros_like(start), first, rows)
