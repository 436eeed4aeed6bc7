"""Compute the bytes, files and folders that a store needs, from its arrays and plan; pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexcache.array_spec import ArraySpec
from flexcache.store.format.ledger import FileRecord, UnitRecord, record_json
from flexcache.store.format.schema import COORDINATES
from flexcache.store.format.shard import ShardLayout, shard_name
from flexcache.store.storage.atomic_files import json_bytes
from flexcache.store.write.create import total_bytes
from flexcache.store.write.skeleton import coordinate_chunk


@dataclass(frozen=True)
class Footprint:
    """Disk usage of a complete store, without the bytes of tables and coordinates, which depend on the texts.

    Attributes
    ----------
    shard_files, shard_bytes : int
        Number of shards, one for each unit and each captured layer of a site, and their bytes before compression.
    ledger_bytes : int
        Bytes of the ledger records, one for each unit.
    files, folders : int
        Number of files and folders of the store, including its own folder but not the logs of runs.
    """

    shard_files: int
    shard_bytes: int
    ledger_bytes: int
    files: int
    folders: int

    @property
    def inodes(self) -> int:
        """Number of files and folders."""
        return self.files + self.folders


def footprint(
    arrays: Sequence[ArraySpec],
    n_rows: int,
    shard_rows: int,
    fingerprint: dict[str, Any] | None = None,
    batches: int = 1,
) -> Footprint:
    """Return the disk usage of a complete store of *n_rows*, whose units have *shard_rows* and some *batches*.

    A shard is a file in a folder of its own, as Zarr names chunks (``resid_post/c/12/7/0``), so a unit takes two inodes
    per layer on disk, and one for its ledger record, which holds a *fingerprint*, and a digest of each batch for each
    virtual layer.
    """
    units = -(-n_rows // shard_rows)
    slices = sum(len(array.slices) for array in arrays)
    shards = units * slices
    chunks = len(COORDINATES) * -(-n_rows // coordinate_chunk(n_rows))
    metadata = 1 + len(arrays) + len(COORDINATES)  # a zarr.json each, and that of the store
    tables_card_plan = 4
    of_layers = sum(len(array.slices) for array in arrays if array.layers is not None)
    wholly_virtual = sum(not array.slices for array in arrays)
    ledger_and_runs = 3
    return Footprint(
        shard_files=shards,
        shard_bytes=total_bytes(list(arrays), n_rows, shard_rows),
        ledger_bytes=units * record_bytes(arrays, n_rows, shard_rows, fingerprint or {}, batches),
        files=shards + units + chunks + metadata + tables_card_plan,
        folders=shards + of_layers + 2 * (len(arrays) + len(COORDINATES)) - wholly_virtual + ledger_and_runs + 1,
    )


def record_bytes(
    arrays: Sequence[ArraySpec], n_rows: int, shard_rows: int, fingerprint: dict[str, Any], batches: int = 1
) -> int:
    """Return the bytes of the ledger record of a unit in the middle of a store."""
    unit = -(-n_rows // shard_rows) // 2
    files = {
        shard_name(array.name, layer, unit): FileRecord(
            ShardLayout(n_rows, shard_rows, array.row_bytes).file_bytes(0), "0" * 32
        )
        for array in arrays
        for layer in array.slices
    }
    start = unit * shard_rows
    digests = ("0" * 32,) * batches
    virtual = {shard_name(array.name, layer, unit): digests for array in arrays for layer in array.virtual}
    record = UnitRecord(unit, (start, start + shard_rows), 4096, fingerprint, files, virtual)
    return len(json_bytes(record_json(record)))
