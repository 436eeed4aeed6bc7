"""The plan of a store: it assigns sequences to units and batches, and tokens to rows. Pure arithmetic.

Sequences fill a unit in corpus order. Inside a unit they are sorted into batches of similar length, the batches are
shuffled by a seed, and then the rows are numbered. So rows are in the order of their computation, and shards only ever
grow at the end. A sequence that straddles a unit boundary is run by both units, alone in a batch, so that both compute
the same bits; it is the last sequence of the one and the first of the other. Sequences that share a document stay
together, in order, so that the rows of the document are consecutive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from typing import Literal, NamedTuple

import numpy as np

SHARD_BYTES = 256 << 20
UNITS_AT_LEAST = 32
UNIT_TOKENS = 1 << 20
LONGEST_SEQUENCES = 8
BATCHES_AT_LEAST = 4

Batching = Literal["padded", "equal_lengths", "single"]
"""Rules for sharing a batch: sequences of similar length, padded; of equal length; one sequence alone."""


def batch_groups(batching: Batching, sides: np.ndarray) -> np.ndarray | None:
    """Return a group number for each sequence; only sequences of one group may share a batch. None allows any.

    Parameters
    ----------
    sides : ndarray of int, shape (sequences, sides)
        Tokens of each sequence; for an encoder-decoder model, of encoder and decoder.

    >>> batch_groups("equal_lengths", np.array([[5], [3], [5]])).tolist()
    [1, 0, 1]
    """
    if batching == "padded":
        return None
    if batching == "single":
        return np.arange(len(sides))
    return np.unique(sides, axis=0, return_inverse=True)[1].reshape(-1)


def unit_rows(n_rows: int, longest: int, tokens: int, widest_row: int, batch_tokens: int) -> int:
    """Return R, the rows of a unit and of its shards: a power of two.

    R is the largest power of two for which the widest shard has at most 256 MiB, there are at least 32 units, and a
    unit runs at most 2²⁰ tokens. It is at least eight times the rows of the longest sequence, and enough for four full
    batches; otherwise batches would be partly empty. The lower bounds take precedence.

    Parameters
    ----------
    n_rows, longest
        Rows of all sequences, and of the sequence with the most rows.
    tokens
        Tokens of all sequences.
    widest_row
        Bytes of a row of the widest array.
    batch_tokens
        Tokens of a batch, at most.
    """
    rows_of_tokens = n_rows / max(1, tokens)
    most = min(SHARD_BYTES // widest_row, n_rows // UNITS_AT_LEAST, int(UNIT_TOKENS * rows_of_tokens))
    fill = min(n_rows, SHARD_BYTES // widest_row, int(BATCHES_AT_LEAST * batch_tokens * rows_of_tokens))
    return max(_power_below(max(most, fill)), _power_above(LONGEST_SEQUENCES * longest))


def _power_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


def _power_above(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True)
class UnitPlan:
    """The forward passes of one unit, with a line for each sequence in row order.

    Attributes
    ----------
    unit : int
    sequences : ndarray of int64, shape (lines,)
        Number of each sequence in corpus order.
    batches : ndarray of int32, shape (lines,)
        Number of the batch within the unit; never decreasing.
    skip, n_rows : ndarray of int32, shape (lines,)
        The rows of the sequence in this unit: *n_rows* rows, after *skip* rows of an earlier unit.
    row_start : ndarray of int64, shape (lines,)
        Number of the first of these rows.
    begins : ndarray of bool, shape (lines,)
        True if the first row of the sequence is in this unit; a straddling sequence begins in the earlier unit.
    """

    unit: int
    sequences: np.ndarray
    batches: np.ndarray
    skip: np.ndarray
    n_rows: np.ndarray
    row_start: np.ndarray
    begins: np.ndarray


class Largest(NamedTuple):
    """The batch with the most tokens, padding included: its unit, its number in the unit, and its tokens."""

    unit: int
    batch: int
    tokens: int


class Forwards(NamedTuple):
    """Tokens of all forward passes of a plan, without and with padding, and the largest batch."""

    run: int
    padded: int
    largest: Largest


@dataclass(frozen=True)
class Plan:
    """A plan: sequences split into units.

    Attributes
    ----------
    lengths : ndarray of int32, shape (sequences,)
        Tokens of each sequence, in corpus order.
    kept : ndarray of int, shape (sequences,)
        Rows of each sequence, at least one.
    shard_rows : int
        Rows of a unit, R.
    batch_tokens : int
        Tokens of a batch, padding included, at most; a longer sequence is a batch of its own.
    seed : int
        Seed of the order of the batches inside each unit.
    first_row, first_batch : int
        For a corpus that is added to others: its first row, and the number of its first batch in the unit of that row.
    linked : ndarray of bool, shape (sequences,), or None
        True if a sequence continues the document with which the sequence before it ends.
    groups : ndarray of int, shape (sequences,), or None
        Only sequences of one group share a batch, see `batch_groups`; None allows any.
    stop_unit : int or None
        For a plan that grows: the units before this one are final, and are all that it has.
    expected_rows : int or None
        Rows that are expected when the units are sized, for a corpus of several segments; None if all are known.
    """

    lengths: np.ndarray
    kept: np.ndarray
    shard_rows: int
    batch_tokens: int
    seed: int
    first_row: int = 0
    first_batch: int = 0
    linked: np.ndarray | None = None
    groups: np.ndarray | None = None
    stop_unit: int | None = None
    expected_rows: int | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows, including those before `first_row`."""
        if self.stop_unit is not None:
            return self.stop_unit * self.shard_rows
        return int(self._ends[-1]) if len(self.lengths) else self.first_row

    @property
    def n_units(self) -> int:
        """Number of units, including those before `first_row`."""
        return -(-self.n_rows // self.shard_rows)

    @property
    def _ends(self) -> np.ndarray:
        return self.first_row + np.cumsum(self.kept, dtype=np.int64)

    def with_final_units(self) -> Plan:
        """Return the plan of the units that stay as they are, whatever sequences follow.

        The last sequence may still grow, if documents are packed, and the first one of the next unit may be linked with
        it.
        """
        known = self.first_row + int(self.kept[:-1].sum(dtype=np.int64))
        return replace(self, stop_unit=known // self.shard_rows)

    def units(self) -> Iterator[UnitPlan]:
        """Yield the units in order, from that of the first row; memory: columns of all sequences and of one unit."""
        ends = self._ends
        starts = ends - self.kept
        for unit in range(self.first_row // self.shard_rows, self.n_units):
            low, high = max(unit * self.shard_rows, self.first_row), (unit + 1) * self.shard_rows
            first = int(np.searchsorted(ends, low, side="right"))
            stop = int(np.searchsorted(starts, high, side="left"))
            yield self._unit(unit, first, starts[first:stop], ends[first:stop], low, high)

    def forwards(self) -> Forwards:
        """Return the tokens of the forward passes of all units."""
        run = padded = 0
        largest = Largest(0, 0, 0)
        for unit in self.units():
            lengths = self.lengths[unit.sequences]
            sizes = padded_sizes(lengths, unit.batches)
            run += int(lengths.sum(dtype=np.int64))
            padded += int(sizes.sum())
            place = int(sizes.argmax())
            if sizes[place] > largest.tokens:
                largest = Largest(unit.unit, int(unit.batches[0]) + place, int(sizes[place]))
        return Forwards(run, padded, largest)

    def _unit(self, unit: int, first: int, starts: np.ndarray, ends: np.ndarray, low: int, high: int) -> UnitPlan:
        count = len(starts)
        lengths = self.lengths[first : first + count]
        inward = int(starts[0] < low)
        outward = int(ends[-1] > high and count > inward)
        linked = None if self.linked is None else self.linked[first : first + count + 1]
        groups = None if self.groups is None else self.groups[first : first + count]
        head, tail = _shared(linked, count, inward, outward)
        order, numbers = order_batches(
            lengths[head:tail],
            self.batch_tokens,
            (self.seed, unit),
            None if linked is None else linked[head:tail],
            None if groups is None else groups[head:tail],
        )
        front, back = slice(inward, head), slice(tail, count - outward)
        lines = np.concatenate([np.arange(head), head + order, np.arange(tail, count)])
        sizes = [
            *[1] * inward,
            *_part_sizes(lengths, self.batch_tokens, groups, front),
            *np.bincount(numbers).tolist(),
            *_part_sizes(lengths, self.batch_tokens, groups, back),
            *[1] * outward,
        ]
        batches = np.repeat(np.arange(len(sizes)), sizes)
        if low == self.first_row:
            batches = batches + self.first_batch
        n_rows = (np.minimum(ends, high) - np.maximum(starts, low))[lines].astype(np.int32)
        return UnitPlan(
            unit=unit,
            sequences=first + lines.astype(np.int64),
            batches=batches.astype(np.int32),
            skip=(np.maximum(starts, low) - starts)[lines].astype(np.int32),
            n_rows=n_rows,
            row_start=low + np.cumsum(n_rows, dtype=np.int64) - n_rows,
            begins=(starts >= low)[lines],
        )


def _shared(linked: np.ndarray | None, count: int, inward: int, outward: int) -> tuple[int, int]:
    """Return the range of the sequences of a unit that share no document with another unit.

    *linked* may have one entry more than the unit has sequences, for the first sequence of the next unit.
    """
    if linked is None:
        return inward, count - outward
    head = inward
    while head < count - outward and linked[head]:
        head += 1
    tail = count - outward
    if outward or (len(linked) > count and linked[count]):
        tail = count - 1
        while tail > head and linked[tail]:
            tail -= 1
    return head, max(head, tail)


def order_batches(
    lengths: np.ndarray,
    batch_tokens: int,
    seed: tuple[int, ...],
    linked: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sort sequences into batches of similar length, and shuffle the batches by a seed.

    A batch closes when another sequence would exceed the budget, or would be padded by more than an eighth
    while the batch already holds a sixteenth of the budget. (On VADER's short texts: 6–8 % padding.) Sequences that
    are linked stay together, in order; where they are more than a batch holds, in batches that follow each other.
    Sequences of different *groups* are never in one batch.

    Returns
    -------
    order, numbers : ndarray of int64, shape (sequences,)
        The sequences in the order of the batches, and the number of each one's batch.
    """
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    firsts = np.arange(len(lengths)) if linked is None else np.flatnonzero(~linked)
    widths = np.maximum.reduceat(lengths.astype(np.int64), firsts)
    members = np.diff(np.append(firsts, len(lengths)))
    leading = None if groups is None else groups[firsts]
    by_length = np.argsort(-widths, kind="stable") if leading is None else np.lexsort((leading, -widths))
    kinds = repeat(0) if leading is None else leading[by_length].tolist()
    cuts, held = [0], 0
    widest, last = int(widths[by_length[0]]), None
    for index, (width, count, kind) in enumerate(zip(widths[by_length].tolist(), members[by_length].tolist(), kinds)):
        full = held * widest
        loose = 8 * width < 7 * widest and 16 * full >= batch_tokens
        if held and (kind != last or full + count * widest > batch_tokens or loose):
            cuts.append(index)
            widest, held = width, 0
        last = kind
        held += count
    batches = np.split(by_length, cuts[1:])
    shuffled = [batches[i] for i in np.random.default_rng(seed).permutation(len(batches))]
    if linked is None:
        return np.concatenate(shuffled), np.repeat(np.arange(len(shuffled)), [len(batch) for batch in shuffled])
    lines = [ranges(firsts[batch], members[batch]) for batch in shuffled]
    sizes = [size for batch in lines for size in _part_sizes(lengths, batch_tokens, groups, batch)]
    return np.concatenate(lines), np.repeat(np.arange(len(sizes)), sizes)


def _part_sizes(lengths: np.ndarray, budget: int, groups: np.ndarray | None, chosen: np.ndarray | slice) -> list[int]:
    numbers = None if groups is None else groups[chosen].tolist()
    return [stop - start for start, stop in parts(lengths[chosen].tolist(), budget, numbers)]


def parts(lengths: list[int], budget: int | None, groups: list[int] | None = None) -> list[tuple[int, int]]:
    """Split consecutive sequences into parts whose count × longest length is at most *budget*.

    Sequences of different *groups* are never in one part.
    """
    if budget is None or not lengths:
        return [(0, len(lengths))] if lengths else []
    cuts, widest = [0], 0
    for line, length in enumerate(lengths):
        wider = max(widest, length)
        other = groups is not None and groups[line] != groups[line - 1]
        if line > cuts[-1] and (other or (line + 1 - cuts[-1]) * wider > budget):
            cuts.append(line)
            wider = length
        widest = wider
    return list(pairwise([*cuts, len(lengths)]))


def padded_sizes(lengths: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Return the tokens of each batch, padding included; *batches* holds the batch number of each sequence, sorted."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    begins = np.flatnonzero(np.diff(batches, prepend=-1))
    widest = np.maximum.reduceat(lengths.astype(np.int64), begins)
    return widest * np.diff(np.append(begins, len(lengths)))


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return ``starts[0], …, starts[0] + counts[0] - 1, starts[1], …`` as one int64 array.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    counts = counts.astype(np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(starts.astype(np.int64) - before, counts) + np.arange(int(counts.sum()))
