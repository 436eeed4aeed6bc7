"""The rows of a store that is extended, at the front of the unit that they share with new documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flexcache.store.format.ledger import UnitRecord, check_file, digests_of
from flexcache.store.format.shard import shard_name
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store

BLOCK = 4 << 20
EXISTING_ROWS = "carried"
"""Key in a fingerprint: the conditions of the rows at the front of a unit, if the other rows had others."""


class ExistingRows:
    """The rows of a store as bytes, for the store that extends it, whose new rows begin at *stop*.

    By default they begin after its rows; at 0 where it is extended by sites, so that every row is computed.
    """

    def __init__(self, store: Store, stop: int | None = None) -> None:
        self.store = store
        self.stop = store.n_rows if stop is None else stop

    def rows_in(self, unit: int) -> int:
        """Return the number of existing rows in a unit."""
        return max(0, self.stop - unit * self.store.shard_rows)

    def read_blocks(self, key: ArrayKey, unit: int) -> Iterator[tuple[np.ndarray, int]]:
        """Check the shard of a unit, and yield its existing rows as bytes, with their number."""
        name, layer = key
        if not self.rows_in(unit):
            return
        shard = shard_name(name, layer, unit)
        record, path = self._record(unit).files[shard], self.store.path / shard
        check_file(path, record, "run flexcache repair and the capture that began the store, then extend it")
        reader = self.store.reader(name)
        step = max(1, BLOCK // reader.layout.row_bytes)
        for start in range(unit * self.store.shard_rows, self.stop, step):
            values = reader.scan(layer, start, min(start + step, self.stop), raw=True)
            yield np.ascontiguousarray(values).view(np.uint8).reshape(-1), len(values)

    def digests(self, key: ArrayKey, unit: int) -> tuple[str, ...]:
        """Return the digests of the existing rows of a virtual shard."""
        return digests_of(self._record(unit), key) if self.rows_in(unit) else ()

    def combine_fingerprints(self, unit: int, now: dict[str, Any], batch_tokens: int) -> dict[str, Any]:
        """Return the fingerprint of a unit whose other rows are computed under the conditions *now*."""
        if not self.rows_in(unit):
            return now
        before = self._record(unit)
        if before.fingerprint == now and before.batch_tokens == batch_tokens:
            return now
        return {**now, EXISTING_ROWS: {"fingerprint": before.fingerprint, "batch_tokens": before.batch_tokens}}

    def _record(self, unit: int) -> UnitRecord:
        return self.store.ledger.read_record(unit)
