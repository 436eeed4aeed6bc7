"""Write virtual layers of a store to disk, recomputed by the model and proved by their digests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flexcache.errors import SiteError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.site import Layers
from flexcache.spec import parse_sites
from flexcache.store.format.ledger import FileRecord, UnitRecord
from flexcache.store.format.shard import ShardLayout, shard_name
from flexcache.store.manage.layer_change import LayerChange
from flexcache.store.read.selection import ArrayKey, select
from flexcache.store.read.store import Store
from flexcache.store.write.create import check_free_space, total_bytes
from flexcache.store.write.election import start_writer
from flexcache.store.write.range_error import locating_values
from flexcache.store.write.shard_file import ShardFile, WriterThread
from flexcache.store.write.slabs import SlabPool, size_slabs
from flexcache.store.write.worker import Worker
from flexcache.virtual.attachment import attach
from flexcache.virtual.cache import CachedShard
from flexcache.virtual.unit_work import LayerMove, UnitWork, cache_groups

BUFFER = 256 << 20
"""Bytes of the buffers between the recomputed rows and the disk."""


class Filling(LayerMove):
    """A planned move of virtual layers to disk; `run` recomputes them with a model.

    ::

        filling = flexcache.Filling("run.zarr", layers="8:12")
        print(filling.bytes())
        filling.run(model)

    The files are those of a capture that keeps these layers, byte for byte. Each unit's files are complete, and in its
    ledger record, before the next unit begins; when all units are there, the metadata changes, so that the layers are
    read from disk. If it is interrupted, the same call goes on with the units that are missing. Any number of processes
    may fill one store.

    Parameters
    ----------
    sites, layers
        Virtual layers to write, see `flexcache.store.select`; all by default. Layers on disk are left as they are.
        *sites* may also be a mapping from site to layers.

    Attributes
    ----------
    keys : list of (str, int)
        The arrays and layers to write.

    Raises
    ------
    SiteError
        The store has no such site or layer, or all of them are on disk.
    StoreError
        There is no store at *path*, it is incomplete, or another change of it was interrupted.
    """

    def __init__(
        self, path: str | Path, sites: str | Sequence[str] | Mapping[str, Layers] | None = None, layers: Layers = "all"
    ) -> None:
        super().__init__(path, "fill", lambda store: self._plan(store, sites, layers))

    def bytes(self) -> int:
        """Return the bytes of the files to write, those of units that are already written included."""
        arrays, store = self._store.arrays, self._store
        written = [replace(arrays[name], layers=(layer,), virtual=()) for name, layer in self.keys if layer is not None]
        return total_bytes(written, store.n_rows, store.shard_rows)

    # Private

    def _plan(self, store: Store, sites: Any, layers: Layers) -> LayerChange:
        asked = parse_sites(sites) if isinstance(sites, Mapping) else None
        chosen = (
            select(store, sites, layers, virtual=True)
            if asked is None
            else [array for site, some in asked.items() for array in select(store, site, some, virtual=True)]
        )
        keys = tuple((array.name, layer) for array in chosen for layer in array.virtual)
        if not keys:
            raise SiteError(
                "all of these layers are on disk",
                where=str(self.path),
                found=", ".join(array.name for array in chosen),
                remedy="nothing has to be written",
            )
        return LayerChange(self.path, "fill", keys)

    def _prepare(self, model: Any, progress: ProgressCallback, cache_bytes: int | str) -> None:
        store = self._store
        work = UnitWork(store, self._is_written, lambda unit: None)
        pending = len(work.pending())
        check_free_space(self.path, self.bytes() * pending // max(1, store.n_units))
        if not pending:
            return
        with attach(Store(self.path), model, cache_bytes=cache_bytes) as view:
            attached, writing = view.attached, list[WriterThread]()
            groups = cache_groups(attached, self.keys)

            def begin(worker: Worker) -> Callable[[], None]:
                largest = max(self._layout(name).file_bytes(0) for name, _ in self.keys)
                sizes = size_slabs(self.path, 1, BUFFER, largest, None)
                writing.append(start_writer(worker, SlabPool(*sizes)))
                return writing[0].stop

            def write(unit: int) -> None:
                files: dict[str, FileRecord] = {}
                for keys in groups:
                    shards = attached.recompute_unit(unit, keys)
                    with locating_values(store):
                        made = [self._shard_file(writing[0], key, unit, shards[key]) for key in keys]
                        files |= writing[0].commit_shards(made)
                record = store.ledger.read_record(unit)
                store.ledger.commit(replace(record, files={**record.files, **files}))

            UnitWork(store, self._is_written, write).run(progress, begin)

    def _shard_file(self, writer: WriterThread, key: ArrayKey, unit: int, cached: CachedShard) -> ShardFile:
        """Return the shard of recomputed rows, passed to the writer."""
        name, layer = key
        array = self._store.arrays[name]
        file = ShardFile(writer, array, layer, self._layout(name), unit, compressed=False)
        content = np.ascontiguousarray(cached.rows).view(np.uint8).reshape(-1)
        file.append(content, [(0, len(content))])
        file.finish()
        return file

    def _layout(self, name: str) -> ShardLayout:
        return ShardLayout(self._store.n_rows, self._store.shard_rows, self._store.arrays[name].row_bytes)

    def _is_written(self, record: UnitRecord) -> bool:
        return all(shard_name(*key, record.unit) in record.files for key in self.keys)


def fill(
    path: str | Path,
    model: Any,
    sites: str | Sequence[str] | Mapping[str, Layers] | None = None,
    layers: Layers = "all",
    *,
    progress: ProgressCallback = ignore_progress,
) -> Store:
    """Write virtual layers of a complete store to disk, and return the store.

    ::

        flexcache.fill("run.zarr", model, sites={"mlp_post": [8]})

    See `Filling`, which says what will be written.

    Parameters
    ----------
    model
        The model of the capture; its name or folder; or a `flexcache.ModelSource`.
    sites, layers
        Virtual layers to write; all by default. *sites* may be a mapping from site to layers.

    Raises
    ------
    MismatchError
        The model is not that of the capture, or recomputed rows differ from it.
    SiteError, StoreError, PlanError, CaptureError
        See `Filling`.
    """
    return Filling(path, sites, layers).run(model, progress)
