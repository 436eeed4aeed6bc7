"""The units of a store that are not committed, as far as one process knows."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from flexcache.store.read.store import Store

FEW = 1000
"""Units left, of which each is looked at by itself."""
QUICK = 0.02
"""Seconds that a listing of the ledger may take to be made at any time."""
SELDOM = 100.0
"""Longer ones are made after so many times the seconds that the last took."""


class PendingUnits:
    """What is left to do in a store that others may fill as well.

    A process marks what it commits itself, and asks for the record of a unit before it takes it. So the ledger need not
    be listed for each unit, which would take a time that grows with the square of the units; a short one is, a long one
    now and then.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._listed = self._seconds = 0.0

    def look(self) -> bool:
        """List the ledger for what others have committed, unless that is slow and was done lately; whether it was."""
        began = time.perf_counter()
        if self._seconds > QUICK and began < self._listed + SELDOM * self._seconds:
            return False
        self._store.refresh()
        self._listed = time.perf_counter()
        self._seconds = self._listed - began
        return True

    def mark(self, unit: int) -> None:
        """Note that a unit is committed."""
        self._store.committed[unit] = True

    def has(self, unit: int) -> bool:
        """Whether a unit is committed, by its own record."""
        if not self._store.committed[unit] and self._store.ledger.has(unit):
            self.mark(unit)
        return bool(self._store.committed[unit])

    def __iter__(self) -> Iterator[int]:
        """Yield units that have no record at this moment, in order."""
        return (unit for unit in map(int, np.flatnonzero(~self._store.committed)) if not self.has(unit))

    def units(self) -> list[int]:
        """Return the units that are not committed, in order; if many are left, as of the last listing."""
        self.look()
        left: list[int] = np.flatnonzero(~self._store.committed).tolist()
        return left if len(left) > FEW else list(self)

    @property
    def rows_done(self) -> int:
        """Rows of the units that are committed."""
        committed, shard_rows = self._store.committed, self._store.shard_rows
        missing = self._store.n_units * shard_rows - self._store.n_rows  # of the last unit, which may be part empty
        return int(np.count_nonzero(committed)) * shard_rows - missing * int(committed[-1])
