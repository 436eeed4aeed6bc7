"""The plan: which documents form which units and batches, and which row is which token. Pure arithmetic.

Documents come in corpus order until a unit is full. Inside a unit they are ordered into batches of similar
length, the batches are shuffled by a seed, and *then* rows are numbered, so that rows are in the order in which
they are computed and shards only ever grow at the end. A document that straddles a unit boundary is run by both
units, alone in a batch, so that both see the same bits; it is the last of the one and the first of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

RowSelection = Literal["all", "last", "first", "mean"]

SHARD_BYTES = 256 << 20
UNITS_AT_LEAST = 32
UNIT_TOKENS = 1 << 20
LONGEST_DOCUMENTS = 8
BATCHES_AT_LEAST = 4


def rows_kept(lengths: np.ndarray, rows: RowSelection) -> np.ndarray:
    """Return how many rows each document of *lengths* tokens keeps, as int64."""
    return lengths.astype(np.int64) if rows == "all" else np.ones(len(lengths), dtype=np.int64)


def unit_rows(n_rows: int, longest: int, tokens: int, widest_row: int, batch_tokens: int) -> int:
    """Return R, the rows of a unit and of its shards: a power of two.

    The largest for which the widest shard has at most 256 MiB, there are at least 32 units, and a unit runs at
    most 2²⁰ tokens; but at least eight times the rows of the longest document, and enough for four full batches,
    without which batches would be part empty. The lower bounds win.

    Parameters
    ----------
    n_rows, longest
        Rows of all documents together, and of the one that keeps most.
    tokens
        Tokens of all documents together.
    widest_row
        Bytes of a row of the widest array.
    batch_tokens
        Most tokens of a batch.
    """
    rows_of_tokens = n_rows / max(1, tokens)
    most = min(SHARD_BYTES // widest_row, n_rows // UNITS_AT_LEAST, int(UNIT_TOKENS * rows_of_tokens))
    fill = min(n_rows, SHARD_BYTES // widest_row, int(BATCHES_AT_LEAST * batch_tokens * rows_of_tokens))
    return max(_power_below(max(most, fill)), _power_above(LONGEST_DOCUMENTS * longest))


def _power_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


def _power_above(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True)
class UnitPlan:
    """The forwards of one unit, a line for each document that runs in it, in row order.

    Attributes
    ----------
    unit : int
    documents : ndarray of int64, shape (lines,)
        Corpus index of each document (the n-th that was read and not skipped).
    batches : ndarray of int32, shape (lines,)
        Number of the batch within the unit; never decreasing.
    keep_start, n_rows : ndarray of int32, shape (lines,)
        Which of the document's tokens become rows of this unit: the slice from *keep_start*. A mean has one row.
    row_start : ndarray of int64, shape (lines,)
    begins : ndarray of bool, shape (lines,)
        Whether the document's first row is in this unit; a straddling document begins in the earlier one.
    """

    unit: int
    documents: np.ndarray
    batches: np.ndarray
    keep_start: np.ndarray
    n_rows: np.ndarray
    row_start: np.ndarray
    begins: np.ndarray


@dataclass(frozen=True)
class Plan:
    """A corpus cut into units.

    Attributes
    ----------
    lengths : ndarray of int32, shape (documents,)
        Tokens of each document, in corpus order.
    rows : str
        Which tokens become rows.
    shard_rows : int
        Rows of a unit, R.
    batch_tokens : int
        Most tokens of a batch, padding included; a longer document is a batch of its own.
    seed : int
        Of the order of the batches inside each unit.
    first_row, first_batch : int
        Where the corpus comes after others: the row it begins with, and the number of its first batch in the unit of
        that row.
    """

    lengths: np.ndarray
    rows: RowSelection
    shard_rows: int
    batch_tokens: int
    seed: int
    first_row: int = 0
    first_batch: int = 0

    @property
    def n_rows(self) -> int:
        """The row after the last: rows of the whole plan, and of what came before."""
        return int(self._ends[-1]) if len(self.lengths) else self.first_row

    @property
    def n_units(self) -> int:
        """Units of the whole plan, and of what came before."""
        return -(-self.n_rows // self.shard_rows)

    @property
    def _ends(self) -> np.ndarray:
        return self.first_row + np.cumsum(rows_kept(self.lengths, self.rows))

    def units(self) -> Iterator[UnitPlan]:
        """Yield the units in order, from that of the first row; memory is the columns of all documents and of one."""
        ends = self._ends
        starts = ends - rows_kept(self.lengths, self.rows)
        for unit in range(self.first_row // self.shard_rows, self.n_units):
            low, high = max(unit * self.shard_rows, self.first_row), (unit + 1) * self.shard_rows
            first = int(np.searchsorted(ends, low, side="right"))
            stop = int(np.searchsorted(starts, high, side="left"))
            yield self._unit(unit, first, starts[first:stop], ends[first:stop], low, high)

    def tokens_run(self) -> tuple[int, int]:
        """Return the tokens of all forwards, without and with padding."""
        run = padded = 0
        for unit in self.units():
            lengths = self.lengths[unit.documents]
            run += int(lengths.sum(dtype=np.int64))
            padded += padded_tokens(lengths, unit.batches)
        return run, padded

    def _unit(self, unit: int, first: int, starts: np.ndarray, ends: np.ndarray, low: int, high: int) -> UnitPlan:
        lengths = self.lengths[first : first + len(starts)]
        inward = int(starts[0] < low)
        outward = int(ends[-1] > high and len(starts) > inward)
        body = slice(inward, len(starts) - outward)
        order, numbers = order_batches(lengths[body], self.batch_tokens, (self.seed, unit))
        lines = np.concatenate([np.arange(inward), inward + order, np.arange(len(starts) - outward, len(starts))])
        batches = np.concatenate(
            [
                np.zeros(inward, np.int32),
                inward + numbers,
                np.full(outward, inward + _count(numbers), np.int32),
            ]
        )
        kept_from = np.maximum(starts, low) - starts
        kept = np.minimum(ends, high) - np.maximum(starts, low)
        offset = lengths - 1 if self.rows == "last" else np.zeros_like(lengths)
        if low == self.first_row:
            batches = batches + self.first_batch
        n_rows = kept[lines].astype(np.int32)
        return UnitPlan(
            unit=unit,
            documents=first + lines.astype(np.int64),
            batches=batches.astype(np.int32),
            keep_start=(kept_from + offset)[lines].astype(np.int32),
            n_rows=n_rows,
            row_start=low + np.cumsum(n_rows, dtype=np.int64) - n_rows,
            begins=(starts >= low)[lines],
        )


def _count(numbers: np.ndarray) -> int:
    return int(numbers[-1]) + 1 if len(numbers) else 0


def order_batches(lengths: np.ndarray, batch_tokens: int, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Order documents into batches of similar length, and the batches by a seed.

    A batch closes when another document would exceed the budget, or would be padded by more than an eighth
    while the batch already holds a sixteenth of the budget. (On VADER's short texts: 6–8 % padding.)

    Returns
    -------
    order, numbers : ndarray of int64, shape (documents,)
        The documents in the order of the batches, and the number of each one's batch.
    """
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    by_length = np.argsort(-lengths.astype(np.int64), kind="stable")
    sorted_lengths = lengths[by_length].tolist()
    cuts = [0]
    widest = sorted_lengths[0]
    for index, length in enumerate(sorted_lengths):
        held = (index - cuts[-1]) * widest
        if index > cuts[-1] and (
            held + widest > batch_tokens or (8 * length < 7 * widest and 16 * held >= batch_tokens)
        ):
            cuts.append(index)
            widest = length
    groups = np.split(by_length, cuts[1:])
    shuffled = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    numbers = np.repeat(np.arange(len(shuffled)), [len(group) for group in shuffled])
    return np.concatenate(shuffled), numbers


def padded_tokens(lengths: np.ndarray, batches: np.ndarray) -> int:
    """Return the tokens that batches run, padding included; *batches* numbers each document's batch, sorted."""
    if not len(lengths):
        return 0
    begins = np.flatnonzero(np.diff(batches, prepend=-1))
    widest = np.maximum.reduceat(lengths.astype(np.int64), begins)
    sizes = np.diff(np.append(begins, len(lengths)))
    return int((widest * sizes).sum())


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return ``starts[0], …, starts[0] + counts[0] - 1, starts[1], …`` as one int64 array.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    counts = counts.astype(np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(starts.astype(np.int64) - before, counts) + np.arange(int(counts.sum()))
