"""Order of an epoch: runs of rows that are read together, and the order of rows in batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Runs of consecutive rows in random order, shared by consumers, and shuffled pool by pool.

    Everything is a function of the rows, the seed and the epoch. Consumer *c* of *n* takes every n-th run of the random
    order. A *pool* is as many runs as fit into it; its rows are given in random order, `batch_size` at a time. Batches
    cross pools: the remaining rows of a pool start the next batch.

    >>> order = Order(np.arange(100), unit_rows=50, run_rows=8, pool_rows=32, batch_size=10, seed=0)
    >>> order.count_batches(epoch=0, consumer=0, consumers=1)
    10

    Attributes
    ----------
    rows : ndarray of int64, sorted
        The rows to give, each once per epoch.
    unit_rows : int
        Rows of a unit; no run crosses units.
    run_rows, pool_rows : int
        Largest number of rows of a run and of a pool.
    batch_size : int
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
        sizes = {"batch_size": self.batch_size, "run_rows": self.run_rows, "pool_rows": self.pool_rows}
        return {"seed": self.seed, **sizes, "unit_rows": self.unit_rows, "rows_xxh3_128": self.rows_digest}

    @cached_property
    def runs(self) -> Ints:
        """Start and end (excluded) of each run as indices into `rows`, (runs, 2)."""
        piece = self.rows // self.unit_rows * self.unit_rows
        piece = piece + (self.rows - piece) // self.run_rows * self.run_rows
        cuts = np.flatnonzero(np.diff(piece)) + 1
        ends = np.concatenate([[0], cuts, [len(self.rows)]]) if len(self.rows) else np.zeros(1, np.int64)
        return np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int64)

    def runs_of(self, epoch: int, consumer: int, consumers: int) -> Ints:
        """Return the runs of a consumer in an epoch, as indices into `runs`, in reading order."""
        drawn = np.random.default_rng([self.seed, epoch]).permutation(len(self.runs))
        return np.asarray(drawn[consumer::consumers])

    def pools_of(self, epoch: int, consumer: int, consumers: int) -> list[Ints]:
        """Return the runs of each pool of a consumer."""
        mine = self.runs_of(epoch, consumer, consumers)
        sizes = np.diff(self.runs[mine], axis=1)[:, 0]
        cuts, filled = [], 0
        for place, size in enumerate(sizes.tolist()):
            if filled and filled + size > self.pool_rows:
                cuts.append(place)
                filled = 0
            filled += size
        return np.split(mine, cuts) if len(mine) else []

    def mixing_order(self, epoch: int, consumer: int, pool: int, size: int) -> Ints:
        """Return the random order of the rows of a pool, as indices (size,)."""
        return np.random.default_rng([self.seed, epoch, consumer, pool, 1]).permutation(size)

    def count_batches(self, epoch: int, consumer: int, consumers: int, drop_last: bool = False) -> int:
        """Return the number of batches of a consumer in an epoch."""
        mine = self.runs[self.runs_of(epoch, consumer, consumers)]
        count = int(np.diff(mine, axis=1).sum())
        return count // self.batch_size if drop_last else -(-count // self.batch_size)


def turns(totals: list[int], given: int) -> list[int]:
    """Return the number of batches that each worker has given after *given* batches in turns.

    A worker without further batches is skipped, as in torch's DataLoader.

    >>> turns([3, 1, 2], given=4)
    [2, 1, 1]
    """
    done = [0] * len(totals)
    while given > 0 and (left := [worker for worker, total in enumerate(totals) if done[worker] < total]):
        rounds = min(totals[worker] - done[worker] for worker in left)
        rounds, rest = (rounds, 0) if given >= rounds * len(left) else divmod(given, len(left))
        for turn, worker in enumerate(left):
            done[worker] += rounds + (turn < rest)
        given -= rounds * len(left) + rest
    return done
