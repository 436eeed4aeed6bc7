"""Segments of documents in sequences, and the rows of each segment. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Segments:
    """Runs of a document's tokens inside sequences, sorted by sequence and by place in it.

    Attributes
    ----------
    sequence : ndarray of int64, shape (segments,)
        Index of the sequence among those that were asked for.
    document : ndarray of int64, shape (segments,)
        Index of the document in the corpus.
    start, length, offset : ndarray of int64, shape (segments,)
        First token in the document, number of tokens, and place of the first token in the sequence.
    first_row, rows : ndarray of int64, shape (segments,)
        First of the document's rows that the segment keeps, and how many it keeps.
    """

    sequence: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offset: np.ndarray
    first_row: np.ndarray
    rows: np.ndarray


class Segmentation(Protocol):
    """The sequences of a corpus, in corpus order."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence: int32, shape (sequences,)."""

    @property
    def kept(self) -> np.ndarray:
        """Rows of each sequence: int32, shape (sequences,)."""

    @property
    def linked(self) -> np.ndarray | None:
        """True for a sequence that continues the last document of the one before: shape (sequences,); None for none."""

    def segments(self, sequences: np.ndarray) -> Segments:
        """Return the segments of sequences, given by index."""


class WholeDocuments:
    """A segmentation in which each document is one sequence.

    >>> WholeDocuments(np.array([3, 5]), np.array([3, 1])).segments(np.array([1])).length.tolist()
    [5]
    """

    linked = None

    def __init__(self, lengths: np.ndarray, kept: np.ndarray) -> None:
        self.lengths, self.kept = lengths, kept

    def segments(self, sequences: np.ndarray) -> Segments:
        """Return the segments of sequences, given by index: one each."""
        zero = np.zeros(len(sequences), np.int64)
        lengths, kept = (values[sequences].astype(np.int64) for values in (self.lengths, self.kept))
        return Segments(np.arange(len(sequences)), sequences, zero, lengths, zero, zero, kept)


class SlidingWindows:
    """A segmentation of documents into overlapping windows; a token's row belongs to the first window that has it.

    A window without rows is left out. Documents are added in batches, with `append_documents`.

    >>> windows = SlidingWindows(length=4, stride=2)
    >>> windows.append_documents(np.array([6]), None)
    >>> windows.lengths.tolist(), windows.kept.tolist(), windows.linked.tolist()
    ([4, 4], [4, 2], [False, True])
    """

    def __init__(self, length: int, stride: int) -> None:
        self._length, self._stride = length, stride
        self._documents = 0
        self._parts: list[tuple[np.ndarray, ...]] = []

    def append_documents(self, lengths: np.ndarray, kept: np.ndarray | None) -> None:
        """Add documents.

        Parameters
        ----------
        lengths : ndarray of int, shape (documents,)
        kept : ndarray of bool, shape (tokens,), or None
            True for each token that becomes a row, document after document; None if all do.
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

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window: int32, shape (windows,)."""
        return self._column(2)

    @property
    def kept(self) -> np.ndarray:
        """Rows of each window: int32, shape (windows,)."""
        return self._column(4)

    @property
    def linked(self) -> np.ndarray:
        """True for a window of the same document as the one before: shape (windows,)."""
        return np.diff(self._column(0), prepend=-1) == 0

    def segments(self, sequences: np.ndarray) -> Segments:
        """Return the segments of windows, given by index: one each."""
        document, start, length, first, rows = (self._column(n)[sequences].astype(np.int64) for n in range(5))
        return Segments(np.arange(len(sequences)), document, start, length, np.zeros_like(start), first, rows)

    def _column(self, number: int) -> np.ndarray:
        if len(self._parts) != 1:
            joined = [np.concatenate(parts) for parts in zip(*self._parts)] or [np.zeros(0, np.int64)] * 5
            self._parts = [(joined[0], *(column.astype(np.int32) for column in joined[1:]))]
        return self._parts[0][number]
