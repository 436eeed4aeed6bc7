"""Rows that a growing store has already, with which the unit that it shares with new documents begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flexcache.store.format.ledger import UnitRecord, check_file
from flexcache.store.format.shard import shard_name
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store

BLOCK = 4 << 20

EXISTING_ROWS = "carried"
"""In a fingerprint: the conditions of the rows at the front of a unit, where they are not those of the others."""


class ExistingRows:
    """The rows of a store, as bytes, for the store that it grows into.

    Parameters
    ----------
    store
        Opened before it grew.

    Attributes
    ----------
    stop : int
        The row after the last that is there.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.stop = store.n_rows

    def rows(self, unit: int) -> int:
        """Return how many rows of a unit are there."""
        return max(0, self.stop - unit * self._store.shard_rows)

    def blocks(self, key: ArrayKey, unit: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the rows of a unit that are there as bytes, with their number, after a check of their shard.

        Raises
        ------
        DamagedError
            The shard is not as it was written.
        """
        name, layer = key
        if not self.rows(unit):
            return
        shard = shard_name(name, layer, unit)
        record, path = self._record(unit).files[shard], self._store.path / shard
        check_file(path, record, "run flexcache repair and the capture that began the store, then extend it")
        reader = self._store.reader(name)
        step = max(1, BLOCK // reader.layout.row_bytes)
        for start in range(unit * self._store.shard_rows, self.stop, step):
            values = reader.scan(layer, start, min(start + step, self.stop), raw=True)
            yield np.ascontiguousarray(values).view(np.uint8).reshape(-1), len(values)

    def fingerprint(self, unit: int, now: dict[str, Any], batch_tokens: int) -> dict[str, Any]:
        """Return the fingerprint of a unit that is computed now, behind the rows that are there."""
        if not self.rows(unit):
            return now
        before = self._record(unit)
        if before.fingerprint == now and before.batch_tokens == batch_tokens:
            return now
        return {**now, EXISTING_ROWS: {"fingerprint": before.fingerprint, "batch_tokens": before.batch_tokens}}

    def _record(self, unit: int) -> UnitRecord:
        return self._store.ledger.read(unit)
