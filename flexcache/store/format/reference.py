"""Refer to a store by location, with an identity that tells it from another store at the same path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from flexcache.errors import MismatchError, StoreError
from flexcache.store.format.metadata import parse_metadata
from flexcache.store.format.provenance import Provenance
from flexcache.store.format.schema import read_attributes
from flexcache.store.storage.location import StoreLocation


@dataclass(frozen=True)
class StoreReference:
    """Location and identity of a store, pickled in place of its files, maps and tables.

    Attributes
    ----------
    stamp : tuple of int
        Inode and time of ``zarr.json`` when the reference was made. They change when another store takes its place, so
        that caches of a process and keys of Dask do not mix the two.
    committed : int
        Checksum of the mask of committed units. With another checksum, a process lists the ledger again; this matters
        for a store that was opened after a damaged unit was taken back.
    created : str
        Time at which the store was made. An extension keeps it, adds rows, and keeps *shard_rows*.
    """

    path: StoreLocation
    stamp: tuple[int, int]
    committed: int
    created: str
    n_rows: int
    shard_rows: int

    @property
    def n_units(self) -> int:
        """Number of units of the store when it was opened."""
        return -(-self.n_rows // self.shard_rows)

    def check(self) -> None:
        """Raise StoreError if this process finds no store at the path, MismatchError if it finds another one."""
        metadata = self.path / "zarr.json"
        if not metadata.is_file():
            raise StoreError(
                "a process that reads the store cannot find it",
                where=str(self.path),
                expected="the store at the same path in every process",
                found="no store",
                remedy="put the store where all workers reach it: a file system they share, or object storage",
            )
        found = parse_metadata(read_attributes(self.path), str(metadata))
        same = found.provenance.created == self.created and int(found.plan["shard_rows"]) == self.shard_rows
        if not same or int(found.plan["rows"]) < self.n_rows:
            raise MismatchError(
                "another store has taken the place of the one that was opened",
                where=str(self.path),
                expected=f"{self.n_rows} rows or more, created {self.created or 'at an unknown time'}",
                found=f"{found.plan['rows']} rows, created {found.provenance.created or 'at an unknown time'}",
                remedy="open the store again",
            )


def make_reference(
    path: StoreLocation, provenance: Provenance, plan: dict[str, Any], committed: np.ndarray
) -> StoreReference:
    """Return a reference to an open store; *committed* is the mask of committed units, shape (units,)."""
    path, rows, shard_rows = path.absolute(), int(plan["rows"]), int(plan["shard_rows"])
    return StoreReference(
        path, stamp(path), crc32(np.packbits(committed).tobytes()), provenance.created, rows, shard_rows
    )


def stamp(path: StoreLocation) -> tuple[int, int]:
    """Return inode and modification time of a store's metadata; (0, 0) if the store was removed."""
    try:
        status = (path / "zarr.json").stat()
    except OSError:  # it was removed: what is open stays readable
        return 0, 0
    return status.st_ino, status.st_mtime_ns
