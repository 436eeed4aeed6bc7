"""Order of an epoch: the rows of each batch, and the runs of rows that are read together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Ints = NDArray[np.int64]
LANES = 64
"""Largest number of lanes of an order."""
LANE_RUNS = 4
"""Whole runs that a pool of one lane has room for, so that it mixes rows that are not neighbours."""


@dataclass(frozen=True)
class Pool:
    """Rows that are read together, and the batches that are made of them.

    Attributes
    ----------
    runs : ndarray of int64, (runs, 2)
        Start and end (excluded) of each run as indices into `Order.rows`, in reading order.
    batches : list of ndarray of int64
        Places of the rows of each batch among the rows of the runs.
    """

    runs: Ints
    batches: list[Ints]


@dataclass(frozen=True)
class Order:
    """Batches of an epoch as a function of the rows, the seed and the epoch, whoever reads them.

    The runs of consecutive rows are put into random order, and that sequence of rows is divided into *lanes* of equal
    length. A batch takes as many rows from each lane. Each lane is shuffled pool by pool, so that several consumers can
    share a batch and each reads its own lanes only: consumer *c* of *n* has the n-th part of every batch.

    >>> order = Order(np.arange(100), unit_rows=50, run_rows=8, pool_rows=32, batch_size=10, seed=0)
    >>> order.count_batches(), order.count_batches(drop_last=True)
    (10, 10)
    >>> parts = [next(order.read_pools(epoch=0, consumer=c, consumers=2)) for c in range(2)]
    >>> [len(part.batches[0]) for part in parts]
    [5, 5]

    Attributes
    ----------
    rows : ndarray of int64, sorted
        The rows to give, each once per epoch.
    unit_rows : int
        Rows of a unit; no run crosses units.
    run_rows, pool_rows : int
        Largest number of rows of a run, and of a pool over all lanes unless a batch is larger.
    batch_size : int
        Rows of a batch over all consumers.
    seed : int
    """

    rows: Ints
    unit_rows: int
    run_rows: int
    pool_rows: int
    batch_size: int
    seed: int

    @cached_property
    def rows_digest(self) -> str:
        """XXH3-128 of the row numbers."""
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self.rows, "<i8").data)

    def describe(self) -> dict[str, Any]:
        """Return everything that determines the order of an epoch, as plain values."""
        sizes = {"batch_rows": self.batch_size, "run_rows": self.run_rows, "pool_rows": self.pool_rows}
        return {"seed": self.seed, **sizes, "unit_rows": self.unit_rows, "rows_xxh3_128": self.rows_digest}

    @cached_property
    def runs(self) -> Ints:
        """Start and end (excluded) of each run as indices into `rows`, (runs, 2)."""
        piece = self.rows // self.unit_rows * self.unit_rows
        piece = piece + (self.rows - piece) // self.run_rows * self.run_rows
        cuts = np.flatnonzero(np.diff(piece)) + 1
        ends = np.concatenate([[0], cuts, [len(self.rows)]]) if len(self.rows) else np.zeros(1, np.int64)
        return np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int64)

    @cached_property
    def lanes(self) -> int:
        """Number of lanes: the divisor of the batch size that most numbers of consumers divide."""
        most = min(LANES, self.pool_rows // (LANE_RUNS * self.run_rows))
        usable = [number for number in range(1, most + 1) if self.batch_size % number == 0] or [1]
        return max(usable, key=lambda number: (sum(number % other == 0 for other in usable), number))

    @property
    def lane_rows(self) -> int:
        """Rows that a batch takes from a lane."""
        return self.batch_size // self.lanes

    @property
    def pool_batches(self) -> int:
        """Batches of a pool."""
        return max(1, self.pool_rows // self.batch_size)

    @cached_property
    def bounds(self) -> Ints:
        """First row of each lane in the order of an epoch, and the end of the last, (lanes + 1,)."""
        return np.arange(self.lanes + 1) * len(self.rows) // self.lanes

    def count_batches(self, drop_last: bool = False, consumer: int = 0, consumers: int = 1) -> int:
        """Return the number of batches of a consumer in an epoch: it may have no row of the last, smaller one."""
        whole = len(self.rows) // self.lanes // self.lane_rows
        left = np.diff(self.bounds) - whole * self.lane_rows
        ends = [
            [part * left[lane] // self.lane_rows for part in share] for lane, share in self._shares(consumer, consumers)
        ]
        return whole + (not drop_last and any(low < high for low, high in ends))

    def read_pools(self, epoch: int, consumer: int = 0, consumers: int = 1, first: int = 0) -> Iterator[Pool]:
        """Yield the pools of a consumer from batch *first* on; of the last batch it may have no row."""
        runs = self.runs[np.random.default_rng([self.seed, epoch]).permutation(len(self.runs))]
        starts = np.concatenate([[0], np.cumsum(np.diff(runs, axis=1)[:, 0])])
        count = self.count_batches()
        for pool in range(first // self.pool_batches, -(-count // self.pool_batches)):
            begin, end = pool * self.pool_batches, min((pool + 1) * self.pool_batches, count)
            pieces = [runs[:0]]
            chosen = [[np.zeros(0, np.int64)] for _ in range(max(begin, first), end)]
            held = 0
            for lane, share in self._shares(consumer, consumers):
                at = self.bounds[lane] + begin * self.lane_rows
                until = min(at + self.pool_batches * self.lane_rows, self.bounds[lane + 1])
                pieces.append(_cut_runs(runs, starts, int(at), int(until)))
                mixed = np.random.default_rng([self.seed, epoch, lane, pool, 1]).permutation(int(until - at)) + held
                held += len(mixed)
                for number, places in enumerate(chosen, max(begin, first)):
                    mine = mixed[(number - begin) * self.lane_rows :][: self.lane_rows]
                    places.append(mine[slice(*(part * len(mine) // self.lane_rows for part in share))])
            yield Pool(np.concatenate(pieces), [np.concatenate(places) for places in chosen])

    def _shares(self, consumer: int, consumers: int) -> list[tuple[int, tuple[int, int]]]:
        """Return each lane of a consumer, with the first and last (excluded) of its rows in a batch that it gives."""
        low, high = (part * self.batch_size // consumers for part in (consumer, consumer + 1))
        lanes = range(low // self.lane_rows, -(-high // self.lane_rows)) if low < high else ()
        starts = {lane: lane * self.lane_rows for lane in lanes}
        return [(lane, (max(low - at, 0), min(high - at, self.lane_rows))) for lane, at in starts.items()]


def _cut_runs(runs: Ints, starts: Ints, low: int, high: int) -> Ints:
    """Return the runs of rows *low* to *high* of a sequence of runs that begin at *starts*; the outer ones are cut."""
    if low >= high:
        return runs[:0]
    first, last = np.searchsorted(starts, low, "right") - 1, np.searchsorted(starts, high, "left")
    found = runs[first:last].copy()
    found[0, 0] += low - starts[first]
    found[-1, 1] -= starts[last] - high
    return found
