"""Read rows of arrays with virtual layers while a model is attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flexcache.array_spec import ArraySpec
from flexcache.store.read.shard_reader import RowReader
from flexcache.store.read.store import Store

if TYPE_CHECKING:
    from flexcache.virtual.recomputation import Recomputation


class VirtualReader(RowReader):
    """Reads the layers on disk as `RowReader` does, and recomputes the rows of virtual layers when they are read."""

    mapped = False  # rows of virtual layers are read shard by shard, since each may have to be recomputed

    def __init__(self, attached: Recomputation, stored: RowReader, array: ArraySpec, virtual: tuple[int, ...]) -> None:
        super().__init__(stored.reference, array, stored.compressed, stored._units)
        self._attached, self._stored, self._virtual = attached, stored, virtual

    def __reduce__(self) -> tuple[Any, ...]:
        return _reader_of, (self._attached.store, self.array.name)

    def is_stored(self, layer: int | None) -> bool:
        """Return True if a layer is on disk."""
        return layer not in self._virtual

    def _gather(self, layer: int | None, rows: np.ndarray, raw: bool) -> np.ndarray:
        if self.is_stored(layer):
            return self._stored._gather(layer, rows, raw)
        return super()._gather(layer, rows, raw)

    def _gather_shard(
        self, layer: int | None, shard: int, rows: np.ndarray, out: np.ndarray, places: np.ndarray
    ) -> None:
        local = rows - shard * self.layout.shard_rows
        held = self._attached.cached_shard(self.array.name, layer, shard, local)
        out[places] = held.rows[local].view(self.dtype)

    def _scan_shard(self, layer: int | None, shard: int, first: int, out: np.ndarray) -> None:
        if self.is_stored(layer):
            self._stored._scan_shard(layer, shard, first, out)
            return
        local = np.arange(first, first + len(out))
        held = self._attached.cached_shard(self.array.name, layer, shard, local)
        rows = held.rows[first : first + len(out)]
        out[:] = rows if out.dtype == rows.dtype else rows.view(self.dtype)


def _reader_of(store: Store, name: str) -> RowReader:
    return store.reader(name)
