"""Copy units from stores into another one: byte for byte or converted, committed one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np

from flexcache.array_spec import DTYPES
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.store.format.int8 import SCALE, is_scale, outlier_count, scale_name
from flexcache.store.format.ledger import UnitRecord, check_file, digests_of
from flexcache.store.format.shard import ShardLayout, shard_name
from flexcache.store.manage.file_transfer import FileTransfer, start_transfer
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.path_safety import check_inside
from flexcache.store.write.election import claim_until_done, start_writer, working
from flexcache.store.write.range_error import locating_values
from flexcache.store.write.row_encoding import encode_rows
from flexcache.store.write.shard_file import ShardFile, WriterThread
from flexcache.store.write.slabs import SlabPool, size_slabs
from flexcache.store.write.worker import PARTIAL

BUFFER = 64 << 20
BLOCK = 4 << 20


class RowCopy:
    """Copy of the units that are committed in all *sources* into a target that was created for them.

    Any number of processes may work on one copy: each unit is claimed, and committed by its ledger record, as in a
    capture. Memory is 64 MB, and 4 MB for rows that are converted. *sources* has the store from which each layer of
    each array is copied; the digests of virtual layers are copied with the records.
    """

    def __init__(self, target: Store, sources: Mapping[ArrayKey, Store]) -> None:
        self.target, self.sources = target, dict(sources)
        self._stores = list({id(store): store for store in sources.values()}.values())
        self._layouts = {
            name: ShardLayout(target.n_rows, target.shard_rows, array.row_bytes)
            for name, array in target.arrays.items()
        }
        self._virtual = {key: store for key, store in self.sources.items() if key[1] in target.arrays[key[0]].virtual}
        self.sources = {key: store for key, store in self.sources.items() if key not in self._virtual}
        self._scales = {key: source for key, source in self.sources.items() if self._is_generated(key)}
        self.sources = {key: source for key, source in self.sources.items() if key not in self._scales}
        self._unit_bytes = sum(target.arrays[name].row_bytes for name, _ in self.sources)

    def available(self) -> list[int]:
        """Return the units that are committed in all sources."""
        units = set(range(self.target.n_units))
        for store in self._stores:
            store.refresh()
            units &= set(store.committed_units.tolist())
        return sorted(units)

    def pending(self) -> list[int]:
        """Return the units that are committed in all sources but not in the target."""
        self.target.refresh()
        return sorted(set(self.available()) - set(self.target.committed_units.tolist()))

    def run(self, progress: ProgressCallback = ignore_progress) -> None:
        """Copy all units that are pending; *progress* is called with the bytes of the rows copied so far, and in total.

        DamagedError if a file of a source is damaged, RangeError if a value does not fit the dtype of the target.
        """
        total = self._bytes(self.available())
        progress(total - self._bytes(self.pending()), total)
        left_over = (self.target.path / PARTIAL).exists()  # files in progress of a worker that ended
        if not self.pending() and not left_over:
            return
        with clear_errors(self.target.path), working(self.target.path, self._is_complete) as (worker, claims):

            def claim() -> str | None:
                worker.sweep()
                return claims.take_claim(self.pending())

            writer = None
            try:
                if converted := [key for key in self.sources if not self._is_unchanged(key)]:
                    writer = start_writer(worker, SlabPool(*self._slabs(converted)))
                for name in claim_until_done(claim, lambda: len(self.pending())):
                    if not self.target.ledger.has(int(name)):
                        with closing(start_transfer(worker)) as transfer:
                            self._copy_unit(int(name), transfer, writer)
                    claims.release(name)
                    progress(total - self._bytes(self.pending()), total)
            finally:
                if writer is not None:
                    writer.stop()

    # Private

    def _is_complete(self) -> bool:
        self.target.refresh()
        return self.target.complete

    def _copy_unit(self, unit: int, transfer: FileTransfer, writer: WriterThread | None) -> None:
        records = {id(store): store.ledger.read_record(unit) for store in self._stores}
        shards: list[ShardFile] = []
        for key, source in self.sources.items():
            name = shard_name(*key, unit)
            check_inside(source.path, source.path / name)
            record = records[id(source)].files[name]
            if self._is_unchanged(key):
                transfer.add_file(source.path / name, name, record)
            else:
                assert writer is not None
                check_file(source.path / name, record)
                shards += self._converted(key, unit, source, writer)
        files = transfer.commit_all()
        if writer is not None:
            with locating_values(self.target):
                files |= writer.commit_shards(shards)
        rows = next(iter(self._layouts.values())).rows(unit)
        every = list(records.values())
        self.target.ledger.commit(
            UnitRecord(
                unit,
                (rows.start, rows.stop),
                min(record.batch_tokens for record in every),
                self._fingerprint([record.fingerprint for record in every]),
                {name: files[name] for key in (*self.sources, *self._scales) if (name := shard_name(*key, unit))},
                {shard_name(*key, unit): digests_of(records[id(store)], key) for key, store in self._virtual.items()},
            )
        )

    def _converted(self, key: ArrayKey, unit: int, source: Store, writer: WriterThread) -> list[ShardFile]:
        """Return the shard of the converted rows, followed by the shard of their scales for int8."""
        name, layer = key
        arrays, layout, dtype = self.target.arrays, self._layouts[name], DTYPES[self.target.arrays[name].dtype]
        shards = [
            ShardFile(writer, arrays[made], layer, self._layouts[made], unit, self.target.compressed)
            for made in ([name, scale_name(name)] if dtype == np.int8 else [name])
        ]
        reader, rows = source.reader(name), layout.rows(unit)
        step = max(1, BLOCK // max(layout.row_bytes, reader.array.row_bytes) // layout.chunk_rows) * layout.chunk_rows
        for start in range(rows.start, rows.stop, step):
            values = reader.scan(layer, start, min(start + step, rows.stop), raw=reader.dtype != np.int8)
            with locating_values(self.target, name, layer, start):
                pieces = encode_rows(values, dtype, outlier_count(name, self.target.arrays))
            for shard, (content, spans) in zip(shards, pieces, strict=True):
                shard.append(content, spans)
        for shard in shards:
            shard.finish()
        return shards

    def _is_generated(self, key: ArrayKey) -> bool:
        """Return True if *key* is a scale array that the conversion to int8 regenerates."""
        name, layer = key
        owner = (name.removesuffix(SCALE), layer)
        return is_scale(name, self.target.arrays) and not self._is_unchanged(owner)

    def _is_unchanged(self, key: ArrayKey) -> bool:
        source, name = self.sources[key], key[0]
        return (
            source.compressed == self.target.compressed and source.arrays[name].dtype == self.target.arrays[name].dtype
        )

    def _fingerprint(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        alike = all(other == found[0] for other in found)
        first: dict[str, Any] = found[0] if alike else {"merged": found}
        changed = {
            name: source.arrays[name].dtype
            for (name, _), source in self.sources.items()
            if source.arrays[name].dtype != self.target.arrays[name].dtype
        }
        return {**first, "converted_from": {**first.get("converted_from", {}), **changed}} if changed else first

    def _slabs(self, converted: list[ArrayKey]) -> tuple[int, int]:
        layouts = [self._layouts[name] for name, _ in converted]
        several = 1 + bool(self._scales)  # files that are open at the same time
        chunk = max(layout.chunk_rows * layout.row_bytes for layout in layouts) if self.target.compressed else None
        largest = max(layout.file_bytes(0) for layout in layouts)
        return size_slabs(self.target.path, several, max(BUFFER, 4 * (chunk or 0)), largest, chunk)

    def _bytes(self, units: list[int]) -> int:
        rows = np.asarray(units, dtype=np.int64) * self.target.shard_rows
        return int(np.minimum(self.target.shard_rows, self.target.n_rows - rows).sum()) * self._unit_bytes
