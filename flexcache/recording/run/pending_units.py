"""The units of a store that are not committed, as far as one process knows."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from flexcache.store.read.store import Store

FEW = 1000
"""Up to this many pending units are checked one by one against the ledger."""
QUICK = 0.02
"""A listing of the ledger that takes at most so many seconds may be repeated at any time."""
SELDOM = 100.0
"""A slower one is repeated after so many times the seconds that it took."""


class PendingUnits:
    """The units that are left in a store that several processes may fill.

    A process marks the units that it commits, and reads the record of a unit before it starts on it. Listing the ledger
    for each unit would take a time that grows with the square of their number, so a long ledger is listed seldom.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._mask: np.ndarray | None = None
        self._listed = self._seconds = 0.0

    @property
    def _committed(self) -> np.ndarray:
        if self._mask is None:
            self._mask = self._store.committed.copy()
        return self._mask

    def follow(self, store: Store) -> None:
        """Take the units of the same store, whose plan has grown."""
        self._store, self._mask = store, None

    def refresh(self) -> None:
        """List the ledger."""
        began = time.perf_counter()
        self._store.refresh()
        self._mask = self._store.committed.copy()
        self._listed = time.perf_counter()
        self._seconds = self._listed - began

    def refresh_if_due(self) -> bool:
        """List the ledger unless that is slow and was done lately; return True if it was listed."""
        if self._seconds > QUICK and time.perf_counter() < self._listed + SELDOM * self._seconds:
            return False
        self.refresh()
        return True

    def mark_committed(self, unit: int) -> None:
        """Note that a unit is committed."""
        self._committed[unit] = True

    def is_committed(self, unit: int) -> bool:
        """Return True if a unit is committed, by its own record."""
        if not self._committed[unit] and self._store.ledger.has(unit):
            self.mark_committed(unit)
        return bool(self._committed[unit])

    def __iter__(self) -> Iterator[int]:
        """Yield units that have no record at this moment, in order."""
        return (unit for unit in map(int, np.flatnonzero(~self._committed)) if not self.is_committed(unit))

    def list_units(self) -> list[int]:
        """Return the units that are not committed, in order; if many are left, as of the last listing."""
        self.refresh_if_due()
        left: list[int] = np.flatnonzero(~self._committed).tolist()
        return left if len(left) > FEW else list(self)

    @property
    def none_left(self) -> bool:
        """True if all documents are planned and every unit is committed, as far as is known."""
        return not self._store.growing and bool(self._committed.all())

    @property
    def rows_done(self) -> int:
        """Rows of the committed units."""
        committed, shard_rows = self._committed, self._store.shard_rows
        missing = self._store.n_units * shard_rows - self._store.n_rows  # of the last unit, which may be part empty
        return int(np.count_nonzero(committed)) * shard_rows - missing * int(committed[-1])
